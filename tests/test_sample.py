"""The sample proteins: contents, no leakage between splits, and the script that builds them."""

from __future__ import annotations

import gzip
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from conftest import needs_mmseqs

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "bionemo_esm" / "data" / "sample"
COUNTS = {"train": 2600, "validation": 200, "test": 200}
K = 8  # unrelated proteins share a word of 8 residues only by chance, in low-complexity regions
MOST_SHARED = 0.2


def read_part(part: str) -> list[tuple[str, str]]:
    """Return header and residues of every protein; each has two lines."""
    lines = gzip.decompress((SAMPLE / f"{part}.fasta.gz").read_bytes()).decode("ascii").splitlines()
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, str]]:
    """Residues by accession for each part."""
    return {part: {h[1:].split(" ", 1)[0]: residues for h, residues in read_part(part)} for part in COUNTS}


@pytest.fixture(scope="module")
def make_sample() -> ModuleType:
    path = ROOT / "scripts" / "make_sample.py"
    if not path.is_file():
        pytest.skip(f"{path} is in the repository only")
    spec = importlib.util.spec_from_file_location("make_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(residues: str) -> set[str]:
    return {residues[i : i + K] for i in range(len(residues) - K + 1)}


def highest_shared_fraction(held_out: Iterable[str], train: Iterable[str]) -> float:
    """Return the highest fraction of a held-out protein's distinct 8-residue words found in one train protein."""
    holders: dict[str, list[int]] = defaultdict(list)
    for index, residues in enumerate(train):
        for word in words(residues):
            holders[word].append(index)
    highest = 0.0
    for residues in held_out:
        own = words(residues)
        shared = Counter(index for word in own for index in holders.get(word, ()))
        highest = max(highest, max(shared.values(), default=0) / len(own))
    return highest


# the shipped files


@pytest.mark.parametrize("part", COUNTS)
def test_part_has_standard_residues_and_distinct_accessions(part: str) -> None:
    proteins = read_part(part)
    assert len(proteins) == COUNTS[part]
    assert all(header.startswith(">") and " OS=" in header for header, _ in proteins)
    accessions = [header[1:].split(" ", 1)[0] for header, _ in proteins]
    assert accessions == sorted(set(accessions))
    assert all(30 <= len(residues) <= 1024 for _, residues in proteins)
    assert set("".join(residues for _, residues in proteins)) == set("ACDEFGHIKLMNPQRSTVWY")


def test_no_accession_or_sequence_occurs_twice(parts: Mapping[str, Mapping[str, str]]) -> None:
    assert len({accession for part in parts.values() for accession in part}) == 3000
    assert len({residues for part in parts.values() for residues in part.values()}) == 3000


def test_sample_is_smaller_than_2_mb() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir() if path.is_file()) < 2_000_000


@pytest.mark.parametrize("part", COUNTS)
def test_gzip_header_has_no_time_and_no_file_name(part: str) -> None:
    header = (SAMPLE / f"{part}.fasta.gz").read_bytes()[:10]
    assert header[:4] == b"\x1f\x8b\x08\x00"  # magic, deflate, no flags: no name, no comment, no extra field
    assert header[4:8] == bytes(4)


def test_readme_states_counts_source_and_licence(parts: Mapping[str, Mapping[str, str]]) -> None:
    text = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for part, proteins in parts.items():
        lengths = sorted(map(len, proteins.values()))
        assert f"| {part} | {len(lengths):,} | {sum(lengths):,} | {lengths[len(lengths) // 2]} |" in text
    assert all(word in text for word in ("UniProt", "mmseqs2-examples", "10.1038/nbt.3988", "CC BY 4.0"))


# leakage


def test_no_held_out_protein_shares_many_words_with_a_train_protein(parts: Mapping[str, Mapping[str, str]]) -> None:
    held_out = [*parts["validation"].values(), *parts["test"].values()]
    assert highest_shared_fraction(held_out, parts["train"].values()) <= MOST_SHARED
    assert highest_shared_fraction(parts["test"].values(), parts["validation"].values()) <= MOST_SHARED


def test_word_check_finds_a_planted_near_duplicate(parts: Mapping[str, Mapping[str, str]]) -> None:
    train = list(parts["train"].values())
    original = next(residues for residues in train if len(residues) >= 300)
    mutated = "".join("A" if i % 20 == 0 else residue for i, residue in enumerate(original))  # 95% identity or more
    assert highest_shared_fraction([mutated], train) > MOST_SHARED
    assert highest_shared_fraction([original[100:200]], train) == 1.0


def as_proteins(make_sample: ModuleType, part: Mapping[str, str]) -> list:  # type: ignore[type-arg]
    return [make_sample.Protein(accession, "", "", residues) for accession, residues in part.items()]


@pytest.mark.slow
@needs_mmseqs
def test_sensitive_search_finds_no_leak(make_sample: ModuleType, parts: Mapping[str, Mapping[str, str]]) -> None:
    hits = make_sample.search_between({part: as_proteins(make_sample, proteins) for part, proteins in parts.items()})
    assert len(hits) > 1000, "the search is meant to see distant and chance similarities too"
    leaks = [hit for hit in hits if hit.identity >= 0.3 and hit.coverage >= 0.5]
    assert leaks == []


@pytest.mark.slow
@needs_mmseqs
def test_sensitive_search_finds_a_planted_leak(make_sample: ModuleType, parts: Mapping[str, Mapping[str, str]]) -> None:
    proteins = {part: as_proteins(make_sample, dict(list(parts[part].items())[:20])) for part in COUNTS}
    original = next(p for p in proteins["train"] if len(p.residues) >= 300)
    # About half of the residues stay, and no word of 8 is shared; a sensitive search must still find it.
    mutated = "".join("L" if i % 2 else residue for i, residue in enumerate(original.residues))
    assert not words(mutated) & words(original.residues)
    proteins["test"].append(make_sample.Protein("PLANTED", "", "", mutated))
    leaks = {(hit.query, hit.target) for hit in make_sample.search_between(proteins) if hit.is_leak}
    assert ("PLANTED", original.accession) in leaks


# the script


def test_header_is_parsed_into_accession_name_and_organism(make_sample: ModuleType) -> None:
    header = "sp|P02654|APOC1_HUMAN Apolipoprotein C-I OS=Homo sapiens GN=APOC1 PE=1 SV=1 Split=0"
    assert make_sample.parse_protein(header, "MK") == ("P02654", "Apolipoprotein C-I", "Homo sapiens", "MK")
    with pytest.raises(ValueError, match="not a UniProt header"):
        make_sample.parse_protein("UniRef50_P02654 Apolipoprotein C-I", "MK")


def test_only_whole_proteins_of_standard_residues_are_read(make_sample: ModuleType, tmp_path: Path) -> None:
    entries = [
        ("C", 0, "M" * 30),
        ("A", 0, "M" * 1024),
        ("B", 1, "M" * 30),  # a later fragment of a long protein
        ("D", 0, "M" * 29),
        ("E", 0, "M" * 1025),
        ("F", 0, "M" * 29 + "X"),
    ]
    text = "".join(f">tr|{name}|{name}_X y OS=z PE=4 Split={piece} \n{seq}\n" for name, piece, seq in entries)
    (tmp_path / "in.fasta.gz").write_bytes(gzip.compress(text.encode()))
    assert [p.accession for p in make_sample.read_proteins(tmp_path / "in.fasta.gz")] == ["A", "C"]


def test_parts_are_filled_with_whole_clusters(make_sample: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_sample, "PART_SIZES", {"test": 5, "validation": 5, "train": 20})
    members = [make_sample.Protein(f"P{i:02}", "", "", "") for i in range(42)]
    clusters = {members[i].accession: members[i : i + 3] for i in range(0, 36, 3)}
    clusters |= {p.accession: [p] for p in members[36:]}
    filled = make_sample.fill_parts(clusters, {"P36"})
    assert {part: len(set(proteins)) for part, proteins in filled.items()} == {"test": 5, "validation": 5, "train": 20}
    part_of = {p.accession: part for part, proteins in filled.items() for p in proteins}
    assert len(part_of) == 30
    assert "P36" not in part_of
    for cluster in clusters.values():
        assert len({part_of[p.accession] for p in cluster if p.accession in part_of}) <= 1
    with pytest.raises(ValueError, match="the input is too small"):
        make_sample.fill_parts(dict(list(clusters.items())[:3]), set())


@pytest.mark.parametrize("part", COUNTS)
def test_written_parts_equal_the_shipped_files(make_sample: ModuleType, tmp_path: Path, part: str) -> None:
    proteins = []
    for header, residues in read_part(part):
        accession, rest = header[1:].split(" ", 1)
        name, organism = rest.rsplit(" OS=", 1)
        proteins.append(make_sample.Protein(accession, name, organism, residues))
    make_sample.write_part(tmp_path / "any_name.fasta.gz", reversed(proteins))
    written, shipped = (tmp_path / "any_name.fasta.gz").read_bytes(), (SAMPLE / f"{part}.fasta.gz").read_bytes()
    assert written[:10] == shipped[:10]
    assert gzip.decompress(written) == gzip.decompress(shipped)  # compressed bytes depend on the zlib version


def test_missing_program_or_input_error_says_what_to_install(
    make_sample: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_sample, "find_mmseqs", lambda: None)
    with pytest.raises(FileNotFoundError, match="apt-get install mmseqs2"):
        make_sample.mmseqs("version")
    with pytest.raises(FileNotFoundError, match="apt-get install mmseqs2-examples"):
        make_sample.read_proteins(tmp_path / "absent.fasta.gz")
