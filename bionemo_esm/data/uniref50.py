"""From FASTA to a token store: clean each record, drop duplicates, split at random or as given.

Two passes. The first cleans and encodes the records one by one into a scratch file and keeps 20 bytes of each in
memory: its length and a 16-byte digest of its tokens under the seed. Sorting the digests shows the duplicates and, as a
digest is as good as a random number, deals the split: it depends on the seed and the set of sequences, not on their
order in the file. The second pass copies the scratch file into the splits; the disk holds every token twice meanwhile.
Memory is some 60 MB per million records while sorting, 3 GB for the 52 million of UniRef50.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import ENCODING_TABLE, TOKEN_IDS, UNK_ID
from bionemo_esm.data.fasta import FastaError, FastaRecord, read_fasta
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreError, StoreWriter, sha256_of_file

Progress = Callable[[int, int], None]
"""Called now and then, and at the end of each file, with the records and decompressed bytes read of it so far."""

_DROPPED = -1  # in arrays of split codes, where 0, 1, 2 index SPLITS
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))
_PROPORTION = 20  # validation and test get one sequence in so many, each, unless counts are given
_NUCLEOTIDE_SHARE = 0.95
_NUCLEOTIDE_RECORDS = 1_000
_PROGRESS_RECORDS = 10_000
_BUFFER_BYTES = 2**20  # of the scratch file
_DEAL_SEQUENCES = 2**14  # dealt at once in the second pass: about 5 MB of tokens

_X_ID = TOKEN_IDS["X"]
_STOP = 0xFF  # what '*' is encoded as, until it is stripped or its record is dropped
_GAPS = b".-"


def _cleaning_table() -> bytes:
    """The token id of every byte, but X for what the alphabet does not know and `_STOP` for '*'."""
    table = ENCODING_TABLE.copy()
    table[table == UNK_ID] = _X_ID
    table[ord("*")] = _STOP
    return table.tobytes()


_CLEANING_TABLE = _cleaning_table()
_NUCLEOTIDES = bytes({_CLEANING_TABLE[letter] for letter in b"ACGTUN"})


@dataclass(frozen=True)
class BuildPolicy:
    """How a store is built. Longer sequences keep their first `max_residues`.

    `validation_sequences` and `test_sequences` are counts; None takes one in twenty, at least one. They belong to
    `build_store`: where the splits are given they must be None. Raises `StoreError` for a value out of range.
    """

    max_residues: int = 1024
    validation_sequences: int | None = None
    test_sequences: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_residues < 1:
            raise StoreError(f"data.max_residues is {self.max_residues}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise StoreError(f"seed is {self.seed}; it must lie in 0..2**64-1")
        for key in ("validation_sequences", "test_sequences"):
            count = getattr(self, key)
            if count is not None and count < 0:
                raise StoreError(f"data.{key} is {count}; give a count of 0 or more, or null for one in {_PROPORTION}")


@dataclass
class BuildCounts:
    """What cleaning did; `records_read` is `records_kept` and the dropped ones together."""

    records_read: int = 0
    records_kept: int = 0
    dropped_empty: int = 0
    dropped_internal_stop: int = 0
    dropped_duplicate: int = 0
    dropped_in_other_split: int = 0
    trailing_stops_stripped: int = 0
    """Records that ended in '*'."""
    gap_symbols_removed: int = 0
    """'-' and '.' in all records."""
    residues_replaced_by_x: int = 0
    """Letters outside the alphabet and other symbols, in all records."""
    truncated: int = 0
    """Records cut to the policy's `max_residues`, before duplicates are dropped."""


@dataclass
class _Cleaner:
    """The first pass: cleaned token ids go to `scratch`; lengths, digests and counts stay here."""

    policy: BuildPolicy
    scratch: IO[bytes]
    counts: BuildCounts = field(default_factory=BuildCounts)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    digests: bytearray = field(default_factory=bytearray)

    def read(self, path: Path, progress: Progress | None) -> int:
        """Clean every record of a file; the number of usable ones. Raises `FastaError` when there is none."""
        usable_before, read_before = len(self.lengths), self.counts.records_read
        if path.exists() and not (path.is_file() or path.is_dir()):  # a folder gets its own message from read_fasta
            raise FastaError(f"{path}: is a pipe or device, but is read twice (once to hash it); save it as a file")
        key = self.policy.seed.to_bytes(8, "little")
        record = FastaRecord("", b"", 0, 0)
        for record in _proteins(path):
            tokens = self._clean(record.sequence)
            if tokens:
                self.scratch.write(tokens)
                self.lengths.append(len(tokens))
                self.digests += hashlib.blake2b(tokens, digest_size=16, key=key).digest()
            if progress and record.number % _PROGRESS_RECORDS == 0:
                progress(record.number, record.offset)
        self.counts.records_read += record.number
        usable = len(self.lengths) - usable_before
        if usable == 0:
            read = self.counts.records_read - read_before
            why = f"{self.counts.dropped_empty} empty, {self.counts.dropped_internal_stop} with a '*' inside"
            raise FastaError(f"{path}: 0 of {read} records usable ({why}); check that it holds protein sequences")
        if progress:
            progress(record.number, record.offset)
        return usable

    def _clean(self, sequence: bytes) -> bytes:
        """Token ids of one record, cut to the policy's length; b'' when it is dropped."""
        tokens = sequence.translate(_CLEANING_TABLE, _GAPS)
        self.counts.gap_symbols_removed += len(sequence) - len(tokens)
        if _X_ID in tokens:
            as_given = sequence.count(b"X") + sequence.count(b"x")
            self.counts.residues_replaced_by_x += tokens.count(_X_ID) - as_given
        if _STOP in tokens:
            stripped = tokens.rstrip(bytes([_STOP]))
            self.counts.trailing_stops_stripped += len(stripped) < len(tokens)
            tokens = stripped
            if _STOP in tokens:
                self.counts.dropped_internal_stop += 1
                return b""
        if not tokens:
            self.counts.dropped_empty += 1
        self.counts.truncated += len(tokens) > self.policy.max_residues
        return tokens[: self.policy.max_residues]

    def sorted_by_digest(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The records in the order of their digests, int64 [records], and which is the first read of its equals."""
        high, low = np.frombuffer(self.digests, dtype="<u8").reshape(-1, 2).T
        order = np.lexsort((low, high))  # stable: equal digests stay in the order they were read
        first = np.ones(order.size, dtype=np.bool_)
        first[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        return order, first


def _proteins(path: Path) -> Iterator[FastaRecord]:
    """The records of a file; raises `FastaError` after the first thousand, or all, if they look like nucleotides."""
    nucleotides = residues = 0
    for record in read_fasta(path):
        yield record
        if record.number <= _NUCLEOTIDE_RECORDS:
            tokens = record.sequence.translate(_CLEANING_TABLE, _GAPS)
            residues += len(tokens)
            nucleotides += len(tokens) - len(tokens.translate(None, _NUCLEOTIDES))
        if record.number == _NUCLEOTIDE_RECORDS:
            _refuse_nucleotides(path, nucleotides, residues)
    _refuse_nucleotides(path, nucleotides, residues)


def _refuse_nucleotides(path: Path, nucleotides: int, residues: int) -> None:
    if nucleotides > _NUCLEOTIDE_SHARE * residues:
        share = f"{nucleotides / residues:.1%} of its letters are A, C, G, T, U or N"
        raise FastaError(f"{path}: looks like DNA or RNA ({share}); translate it first, or name a protein file")


def build_store(
    fasta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    policy: BuildPolicy,
    *,
    release: str | None = None,
    licence: str | None = None,
    progress: Progress | None = None,
) -> ProteinStore:
    """Build a store at `output` from one FASTA file, its sequences split at random by the policy's seed.

    Exact duplicates, compared after cleaning and cutting, are dropped, so none straddles two splits. Within a split the
    order is that of the file. Equal files, of equal names, give equal bytes.

    Raises `FastaError` for a file that cannot be read, holds no usable record, or looks like DNA; `StoreError` when
    `output` exists or the policy asks for more sequences than there are. Nothing is left behind then.
    """
    path = Path(fasta)
    with StoreWriter(output) as writer, tempfile.TemporaryFile(dir=writer.partial, buffering=_BUFFER_BYTES) as scratch:
        cleaner = _Cleaner(policy, scratch)
        cleaner.read(path, progress)
        codes = _split_at_random(cleaner)
        _deal(cleaner, codes, writer)
        _finish(cleaner, writer, {"source": [_describe(path)], "release": release, "licence": licence})
    return ProteinStore.open(output)


def build_store_from_splits(
    train: str | os.PathLike[str],
    validation: str | os.PathLike[str],
    test: str | os.PathLike[str],
    output: str | os.PathLike[str],
    policy: BuildPolicy,
    *,
    release: str | None = None,
    licence: str | None = None,
    progress: Progress | None = None,
) -> ProteinStore:
    """Build a store at `output` from three FASTA files, a split each.

    A sequence of train that is in validation or test too is dropped from train, one of validation that is in test from
    validation; both are counted as `dropped_in_other_split`. Repeats within a file are dropped as duplicates.

    Raises `StoreError` when the policy asks for counts, and otherwise as `build_store` does; also when nothing is left
    of a split.
    """
    for key in ("validation_sequences", "test_sequences"):
        if getattr(policy, key) is not None:
            raise StoreError(f"data.{key} is {getattr(policy, key)}, but the splits are given as files; set it to null")
    # Read in the order of precedence: of equal sequences the first one read is kept.
    paths = {_TEST: Path(test), _VALIDATION: Path(validation), _TRAIN: Path(train)}
    with StoreWriter(output) as writer, tempfile.TemporaryFile(dir=writer.partial, buffering=_BUFFER_BYTES) as scratch:
        cleaner = _Cleaner(policy, scratch)
        usable = [cleaner.read(path, progress) for path in paths.values()]
        codes = _keep_given_splits(cleaner, np.repeat(np.array(list(paths), dtype=np.int8), usable))
        for code, path in paths.items():
            if not (codes == code).any():
                raise StoreError(f"{path}: every sequence is in another split too; give {SPLITS[code]} its own")
        _deal(cleaner, codes, writer)
        source = [{"split": SPLITS[code], **_describe(paths[code])} for code in range(len(SPLITS))]
        _finish(cleaner, writer, {"source": source, "release": release, "licence": licence})
    return ProteinStore.open(output)


def _split_at_random(cleaner: _Cleaner) -> NDArray[np.int8]:
    """The split code of each record, int8 [records]: the smallest digests to validation, the next to test."""
    order, first = cleaner.sorted_by_digest()
    distinct = order[first]
    cleaner.counts.dropped_duplicate = order.size - distinct.size
    validation, test = _held_out(cleaner.policy, distinct.size)
    codes = np.full(order.size, _DROPPED, dtype=np.int8)
    codes[distinct] = _TRAIN
    codes[distinct[:validation]] = _VALIDATION
    codes[distinct[validation : validation + test]] = _TEST
    return codes


def _held_out(policy: BuildPolicy, sequences: int) -> tuple[int, int]:
    """How many sequences go to validation and to test, of so many distinct ones; one at least must be left."""
    proportional = max(1, sequences // _PROPORTION)
    validation = proportional if policy.validation_sequences is None else policy.validation_sequences
    test = proportional if policy.test_sequences is None else policy.test_sequences
    if validation + test + 1 > sequences:
        raise StoreError(
            f"{sequences} distinct sequences are too few for {validation} in validation, {test} in test and at least "
            "one in train; lower data.validation_sequences or data.test_sequences, or give more sequences"
        )
    return validation, test


def _keep_given_splits(cleaner: _Cleaner, given: NDArray[np.int8]) -> NDArray[np.int8]:
    """The given split codes, int8 [records], with `_DROPPED` for all but the first read of equal sequences."""
    order, first = cleaner.sorted_by_digest()
    kept_in = given[order[first]][np.cumsum(first) - 1]  # for each record in `order`, the split that keeps its sequence
    elsewhere = int((kept_in != given[order]).sum())
    cleaner.counts.dropped_in_other_split = elsewhere
    cleaner.counts.dropped_duplicate = int((~first).sum()) - elsewhere
    codes = given.copy()
    codes[order[~first]] = _DROPPED
    return codes


def _deal(cleaner: _Cleaner, codes: NDArray[np.int8], writer: StoreWriter) -> None:
    """The second pass: copy each record of the scratch file to the split of its code."""
    all_lengths = np.frombuffer(cleaner.lengths, dtype=np.int32)
    cleaner.scratch.seek(0)
    for begin in range(0, codes.size, _DEAL_SEQUENCES):
        lengths = all_lengths[begin : begin + _DEAL_SEQUENCES]
        tokens = np.frombuffer(cleaner.scratch.read(int(lengths.sum(dtype=np.int64))), dtype=np.uint8)
        codes_here = codes[begin : begin + _DEAL_SEQUENCES]
        code_of_token = np.repeat(codes_here, lengths)
        for code, name in enumerate(SPLITS):
            writer.add_many(name, tokens[code_of_token == code], lengths[codes_here == code])
    cleaner.counts.records_kept = int((codes != _DROPPED).sum())


def _describe(path: Path) -> dict[str, object]:
    """The manifest's entry for a source file."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _finish(cleaner: _Cleaner, writer: StoreWriter, provenance: dict[str, object]) -> None:
    """Write the manifest; no date in it, so that equal content gives equal bytes."""
    writer.finish({**provenance, "counts": asdict(cleaner.counts), "policy": asdict(cleaner.policy)})
