"""From FASTA to a token store in one pass: clean each record, drop duplicates, split at random or as given.

A random split goes by the sequences' keyed digests, which are as good as random numbers: the smallest ones are
validation, the next ones test. So it depends on the seed and the set of sequences, not on their order or on how many
threads read them. Which digests are the smallest is known at the end only; but a digest that is not among the smallest
of the sequences so far, with a margin, will not be at the end. Those, nearly all, go to train at once. The others wait
in a scratch file. Memory: some 29 bytes a sequence: a slot in each of two hash sets, its length, and passing copies.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.cleaning import BuildCounts, CleanBlock, CleaningPolicy, ExpectedTotals, Progress, RecordCleaner
from bionemo_esm.data.kernels import DigestSet
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreError
from bionemo_esm.data.store_writer import StoreWriter, disk_errors

PathLike = str | os.PathLike[str]

_DROPPED = -1  # in arrays of split codes, where 0, 1, 2 index SPLITS
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))
_PROPORTION = 20  # validation and test get one sequence in so many, each, unless counts are given
_SCRATCH_BUFFER_BYTES = 2**20
_DEAL_SEQUENCES = 2**14  # dealt at once at the end: about 5 MB of tokens


@dataclass(frozen=True)
class BuildPolicy(CleaningPolicy):
    """How a store is built: how records are cleaned, and how many sequences are held out.

    `validation_sequences` and `test_sequences` are counts; None takes one in twenty, at least one. They belong to
    `build_store`: where the splits are given they must be None. Raises `StoreError` for a value out of range.
    """

    validation_sequences: int | None = None
    test_sequences: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("validation_sequences", "test_sequences"):
            count = getattr(self, key)
            if count is not None and not 0 <= count < 2**48:
                raise StoreError(f"{key} is {count}; give a count from 0 to 2**48, or null for one in {_PROPORTION}")

    def held_out(self, sequences: int, name: str) -> tuple[int, int]:
        """How many of the distinct sequences of a source go to validation and test; one at least is left for train."""
        proportional = max(1, sequences // _PROPORTION)
        validation = proportional if self.validation_sequences is None else self.validation_sequences
        test = proportional if self.test_sequences is None else self.test_sequences
        if validation + test + 1 > sequences:
            raise StoreError(
                f"{name}: {sequences:,} distinct sequences are too few for {validation:,} in validation, {test:,} in "
                "test and at least one in train; ask for fewer (split.validation, split.test; in a training run "
                "data.validation_sequences, data.test_sequences), or set both to null for one in twenty each"
            )
        return validation, test

    def held_out_bound(self, seen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Beyond which share of all digests a sequence surely belongs to train, once so many distinct ones were seen.

        After n sequences, H(n) of them are to be held out, and H(n) / n falls as n grows. The digests below
        (H + 8 sqrt(H) + 64) / n number H + 8 sqrt(H) + 64 on average, and fewer than H with a probability under 1e-13
        (Chernoff). So does the bound fall, and a sequence above it now is above it at the end.
        """
        given = sum(count for count in (self.validation_sequences, self.test_sequences) if count is not None)
        proportional = sum(count is None for count in (self.validation_sequences, self.test_sequences))
        held_out = given + proportional * (seen / _PROPORTION + 1)
        bound: NDArray[np.float64] = (held_out + 8 * np.sqrt(held_out) + 64) / np.maximum(seen, 1)
        return bound


def build_store(
    fasta: PathLike | Sequence[PathLike],
    output: PathLike,
    policy: BuildPolicy,
    *,
    release: str | None = None,
    licence: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ProteinStore:
    """Build a store at `output` from FASTA files, or standard input (`-`), its sequences split at random by the seed.

    Exact duplicates, compared after cleaning and cutting, are dropped, so none straddles two splits. The order within a
    split follows from the order of the records. Equal records and names give equal bytes at any number of threads
    (None: as many as there are cores).

    Raises `SourceError` or `FastaError` for a file that cannot be read, holds no usable record, or looks like DNA;
    `StoreError` when `output` exists or is being built, the disk is too small, or the policy asks for more sequences
    than there are. Nothing is left behind then.
    """
    paths = [fasta] if isinstance(fasta, str | os.PathLike) else list(fasta)
    if not paths:
        raise StoreError("no FASTA file is named")
    with StoreWriter(output) as writer, scratch_file(writer) as scratch:
        intake = RecordCleaner(policy, threads or os.cpu_count() or 1, progress)
        split = _RandomSplit(", ".join(map(str, paths)), policy, writer, scratch, intake.counts)
        for path in paths:
            intake.read(path, split.add, split.expect)
        split.finish()
        _finish(intake, writer, {"source": intake.sources, "release": release, "licence": licence})
    return ProteinStore.open(output)


def build_store_from_splits(
    train: PathLike,
    validation: PathLike,
    test: PathLike,
    output: PathLike,
    policy: BuildPolicy,
    *,
    release: str | None = None,
    licence: str | None = None,
    threads: int | None = None,
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
            raise StoreError(f"{key} is {getattr(policy, key)}, but the splits are given as files; set it to null")
    # Read in the order of precedence: of equal sequences the first one read is kept.
    paths = {_TEST: test, _VALIDATION: validation, _TRAIN: train}
    with StoreWriter(output) as writer:
        intake = RecordCleaner(policy, threads or os.cpu_count() or 1, progress)
        elsewhere = DigestSet()
        for code, path in paths.items():
            elsewhere.update(_take_split(intake, writer, SPLITS[code], path, elsewhere))
        named = zip(paths, intake.sources, strict=True)
        source = [{"split": SPLITS[code], **entry} for code, entry in sorted(named, key=lambda pair: pair[0])]
        _finish(intake, writer, {"source": source, "release": release, "licence": licence})
    return ProteinStore.open(output)


def _take_split(
    intake: RecordCleaner, writer: StoreWriter, name: str, path: PathLike, elsewhere: DigestSet
) -> DigestSet:
    """All of one file to one split, but for repeats and for what is elsewhere; the digests of the split."""
    here, counts, kept_before = DigestSet(), intake.counts, intake.counts.records_kept

    def add(block: CleanBlock) -> None:
        in_other, repeated = elsewhere.contains(block.digests), ~here.add(block.digests)
        dropped = in_other | repeated if intake.policy.duplicate_sequences == "drop" else in_other
        counts.duplicate_sequences += int((repeated | in_other).sum())
        counts.dropped_in_other_split += int(in_other.sum())
        counts.dropped_duplicate += int((dropped & ~in_other).sum())
        counts.records_kept += int((~dropped).sum())
        writer.add_many(name, block.tokens, block.lengths, chosen=~dropped)

    intake.read(path, add, lambda expected: writer.require_space(expected.residues, expected.records))
    if counts.records_kept == kept_before:
        raise StoreError(f"{path}: every sequence is in another split too; give {name} its own")
    return here


class _RandomSplit:
    """Deals clean blocks: to train at once what surely belongs there, the rest when all have been seen."""

    def __init__(
        self, name: str, policy: BuildPolicy, writer: StoreWriter, scratch: IO[bytes], counts: BuildCounts
    ) -> None:
        self._name, self._policy, self._writer, self._scratch, self._counts = name, policy, writer, scratch, counts
        self._seen = DigestSet()
        self._waiting_lengths = array("i")
        self._waiting_digests = array("Q")

    def expect(self, expected: ExpectedTotals) -> None:
        """Make room for what a source will bring, in memory and on disk."""
        self._seen.reserve(len(self._seen) + expected.records)
        ends = np.array([max(expected.records, 1)])
        waiting = min(1.0, float(self._policy.held_out_bound(ends)[0]))  # of the last sequences; of the first ones more
        waiting *= 1 - np.log(waiting)
        self._writer.require_space(int(expected.residues * (1 + waiting)), expected.records)

    def add(self, block: CleanBlock) -> None:
        """Deal one block; repeats are dropped, or under the policy `keep` follow their first."""
        number_before = len(self._seen)
        is_new = self._seen.add(block.digests)
        kept = is_new if self._policy.duplicate_sequences == "drop" else np.ones_like(is_new)
        self._counts.duplicate_sequences += int((~is_new).sum())
        self._counts.dropped_duplicate += int((~kept).sum())
        bound = self._policy.held_out_bound(number_before + np.cumsum(is_new))
        may_be_held_out = kept & (block.digests < bound * 2.0**64)
        self._writer.add_many("train", block.tokens, block.lengths, chosen=kept & ~may_be_held_out)
        waiting = block.select(may_be_held_out)
        with disk_errors(self._writer.folder):
            self._scratch.write(waiting.tokens.data)
        self._waiting_lengths.frombytes(waiting.lengths.tobytes())
        self._waiting_digests.frombytes(waiting.digests.tobytes())

    def finish(self) -> None:
        """Deal the sequences that waited."""
        lengths, codes = np.frombuffer(self._waiting_lengths, dtype=np.int32), self._codes()
        self._counts.dropped_duplicate += int((codes == _DROPPED).sum())
        with disk_errors(self._writer.folder):
            self._scratch.seek(0)
        for begin in range(0, codes.size, _DEAL_SEQUENCES):
            lengths_here = lengths[begin : begin + _DEAL_SEQUENCES]
            codes_here = codes[begin : begin + _DEAL_SEQUENCES]
            content = self._scratch.read(int(lengths_here.sum(dtype=np.int64)))
            tokens = np.frombuffer(content, dtype=np.uint8)
            for code, name in enumerate(SPLITS):
                self._writer.add_many(name, tokens, lengths_here, chosen=codes_here == code)
        self._counts.records_kept = self._counts.records_read - self._counts.dropped

    def _codes(self) -> NDArray[np.int8]:
        """The split of each sequence that waited, int8 [n]; of equal ones that are held out the first one stays."""
        digests = np.frombuffer(self._waiting_digests, dtype=np.uint64)
        validation, test = self._policy.held_out(len(self._seen), self._name)
        distinct, first = np.unique(digests, return_index=True)
        assert distinct.size >= validation + test
        codes = np.full(digests.size, _TRAIN, dtype=np.int8)
        if validation + test:
            codes[digests <= distinct[validation + test - 1]] = _DROPPED
        codes[first[:validation]] = _VALIDATION
        codes[first[validation : validation + test]] = _TEST
        return codes


def scratch_file(writer: StoreWriter) -> IO[bytes]:
    """A file without a name on the disk of a store that is being written."""
    with disk_errors(writer.folder):
        return tempfile.TemporaryFile(dir=writer.partial, buffering=_SCRATCH_BUFFER_BYTES)


def _finish(intake: RecordCleaner, writer: StoreWriter, provenance: dict[str, object]) -> None:
    """Write the manifest; no date in it, so that equal content gives equal bytes."""
    writer.finish({**provenance, "counts": asdict(intake.counts), "policy": asdict(intake.policy)})
