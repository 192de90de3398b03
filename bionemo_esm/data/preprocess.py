"""From FASTA to a token store in one pass: clean each record, drop duplicates, split at random or as given.

Records are cleaned by a policy on letters, stops, gaps, lengths and identifiers, and every decision is counted. Blocks
of whole records are parsed on as many threads as there are cores and passed on in order, so the number of threads
changes nothing but the time.

A random split sorts by keyed digests of the sequences, which are as good as random numbers: the smallest ones are
validation, the next ones test. So it depends on the seed and the set of sequences, not on their order or the number of
threads. Which digests are the smallest is known at the end only. But a digest that is not among the smallest so far,
with a margin, will not be among them at the end. Those sequences, nearly all, are written to train at once. The others
wait in a scratch file. Memory: some 29 bytes a sequence: a slot in each of two hash sets, its length, and copies.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import IO, Annotated, Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.data import kernels
from bionemo_esm.data.fasta import (
    NUCLEOTIDE_RECORDS,
    FastaError,
    RecordBlock,
    Source,
    fasta_error,
    parse_record,
    record_blocks,
    refuse_nucleotides,
)
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.data.kernels import DigestSet
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreError, StoreWriter, disk_errors
from bionemo_esm.settings import Settings

PathLike = str | os.PathLike[str]

Progress = Callable[[int, int, int | None], None]
"""Called after each block with the records and the bytes read of a source so far, and its size (None for a pipe)."""

_DIGEST_STREAM = 7  # keeps the digests' key apart from the keys of order, crop and corruption
_BLOCKS_AHEAD = 2  # a thread

_DROPPED = -1  # in arrays of split codes, where 0, 1, 2 index SPLITS
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))
_PROPORTION = 20  # validation and test get one sequence in so many, each, unless counts are given
_SCRATCH_BUFFER_BYTES = 2**20
_SPLIT_SEQUENCES = 2**14  # split at once at the end: about 5 MB of tokens


class CleaningPolicy(Settings, section="policy"):
    """The treatment of each irregularity of a record. `error` stops at the first one and names its record.

    unknown_letters: letters outside the alphabet (J) and other symbols, digits among them: read as X, or the record is
    dropped. internal_stops: a `*` inside the residues. gaps: `-` and `.`. long_sequences: over `max_residues`;
    `truncate` keeps the first residues. Always: a trailing `*` is stripped, lower case is read as upper case, a record
    without residues is dropped. Raises `ConfigError` for a value that is not allowed.
    """

    max_residues: Annotated[int, Field(ge=1, lt=2**31)] = 1024  # as the ESM-1nv model card has it
    unknown_letters: Literal["x", "drop", "error"] = "x"
    internal_stops: Literal["drop", "x", "error"] = "drop"
    gaps: Literal["remove", "drop", "error"] = "remove"
    long_sequences: Literal["truncate", "drop", "keep", "error"] = "truncate"
    duplicate_ids: Literal["keep", "drop", "error"] = "keep"
    duplicate_sequences: Literal["drop", "keep"] = "drop"


class BuildPolicy(CleaningPolicy):
    """The policy of a store: cleaning of records, seed of the split, numbers of held-out sequences.

    `validation_sequences` and `test_sequences` are counts; None takes one in twenty, at least one. They belong to
    `build_store`: where the splits are given they must be None. Raises `ConfigError` for a value out of range.
    """

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    validation_sequences: Annotated[int, Field(ge=0, lt=2**48)] | None = None
    test_sequences: Annotated[int, Field(ge=0, lt=2**48)] | None = None

    @property
    def key(self) -> np.uint64:
        """The key under which sequences and identifiers are hashed."""
        return np.uint64(derive_key(self.seed, _DIGEST_STREAM)[0])

    def held_out(self, sequences: int, name: str) -> tuple[int, int]:
        """Return how many of the distinct sequences go to validation and test; at least one is left for train."""
        proportional = max(1, sequences // _PROPORTION)
        validation = proportional if self.validation_sequences is None else self.validation_sequences
        test = proportional if self.test_sequences is None else self.test_sequences
        if validation + test + 1 > sequences:
            raise StoreError(
                f"{name}: {sequences:,} distinct sequences are too few for {validation:,} in validation, {test:,} in "
                f"test and at least one in train; {self._remedy()}",
                code="preprocess.too-few-sequences",
            )
        return validation, test

    def _remedy(self) -> str:
        if self.validation_sequences is None and self.test_sequences is None:
            return "give at least three distinct sequences"
        return (
            "ask for fewer (split.validation, split.test; in a training run data.validation_sequences, "
            "data.test_sequences), or set both to null for one in twenty each"
        )

    def held_out_bound(self, seen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the share of all digests above which a sequence belongs to train, after so many distinct ones.

        After n sequences, H(n) of them are to be held out, and H(n) / n falls as n grows. The digests below
        (H + 8 sqrt(H) + 64) / n number H + 8 sqrt(H) + 64 on average, and fewer than H with a probability under 1e-13
        (Chernoff). So does the bound fall, and a sequence above it now is above it at the end.
        """
        given = sum(count for count in (self.validation_sequences, self.test_sequences) if count is not None)
        proportional = sum(count is None for count in (self.validation_sequences, self.test_sequences))
        held_out = given + proportional * (seen / _PROPORTION + 1)
        bound: NDArray[np.float64] = (held_out + 8 * np.sqrt(held_out) + 64) / np.maximum(seen, 1)
        return bound


@dataclass
class BuildCounts:
    """Counts of records; `records_read` is the sum of `records_kept` and all that were dropped.

    A dropped record is counted under the first reason in the order below. The other counts are of irregularities in all
    records.
    """

    records_read: int = 0
    records_kept: int = 0
    dropped_empty: int = 0
    dropped_unknown_letters: int = 0
    dropped_internal_stop: int = 0
    dropped_gaps: int = 0
    dropped_too_long: int = 0
    dropped_duplicate_id: int = 0
    dropped_duplicate: int = 0
    dropped_in_other_split: int = 0
    dropped_without_cluster: int = 0
    dropped_held_out_members: int = 0
    records_with_internal_stop: int = 0
    trailing_stops_stripped: int = 0
    """Records that ended in '*'."""
    gap_symbols: int = 0
    """'-' and '.' in all records."""
    unknown_letters: int = 0
    """Letters outside the alphabet and other symbols, in all records."""
    over_max_residues: int = 0
    """Records longer than the policy's `max_residues`."""
    truncated: int = 0
    """Of these, those that were cut to it."""
    duplicate_ids: int = 0
    """Records with the identifier (the first word of the header) of an earlier one."""
    duplicate_sequences: int = 0
    """Records with the sequence, as cleaned and cut, of an earlier one."""

    @property
    def dropped(self) -> int:
        """Records dropped for any reason."""
        return sum(count for key, count in vars(self).items() if key.startswith("dropped_"))


class CleanBlock(NamedTuple):
    """Clean sequences of one block, in order. The arrays are valid until the block has been consumed."""

    tokens: NDArray[np.uint8]
    """Token ids of all sequences, concatenated, uint8 [sum of lengths]."""
    lengths: NDArray[np.int32]
    """Residues of each, int32 [sequences]."""
    digests: NDArray[np.uint64]
    """Keyed 64-bit hash of each sequence's token ids, uint64 [sequences]."""
    id_digests: NDArray[np.uint64]
    """The same of each identifier; 0 for a record without one."""

    def select(self, chosen: NDArray[np.bool_]) -> CleanBlock:
        """Return the chosen sequences; chosen: bool [sequences]."""
        if chosen.all():
            return self
        tokens, lengths = select_sequences(self.tokens, self.lengths, chosen)
        return CleanBlock(tokens, lengths, self.digests[chosen], self.id_digests[chosen])


def select_sequences(
    tokens: NDArray[np.uint8], lengths: NDArray[np.int32], chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return token ids and lengths of the chosen ones, bool [sequences], of concatenated sequences."""
    chosen_lengths = lengths[chosen]
    selected = np.empty(int(chosen_lengths.sum(dtype=np.int64)), dtype=np.uint8)
    kernels.select(tokens, lengths, chosen, selected)
    return selected, chosen_lengths


class _Workspace:
    """Text and arrays that the kernel fills, allocated once: fresh memory costs more than the parsing."""

    def __init__(self) -> None:
        self._allocate(0)

    def _allocate(self, size: int) -> None:
        self._text = bytearray(size)
        self._tokens = np.empty(size, dtype=np.uint8)
        self._fields = np.empty((size // 2 + 1, kernels.FIELDS), dtype=np.int32)
        self._digests = np.empty((size // 2 + 1, 2), dtype=np.uint64)

    def buffer_of(self, size: int) -> bytearray:
        """Return a buffer of at least so many bytes for the next text of `parse`."""
        if len(self._text) < size:
            self._allocate(size)
        return self._text

    def parse(self, block: RecordBlock, bytes_read: int, policy: BuildPolicy) -> _ParsedBlock:
        """Run the kernel over a block. The next call overwrites the result."""
        text = np.frombuffer(block.text, dtype=np.uint8)
        limit = text.size if policy.long_sequences == "keep" else policy.max_residues
        filled = self._tokens, kernels.words_of(self._tokens), self._fields, self._digests
        records, end = kernels.parse(text, kernels.words_of(text), kernels.BYTE_CLASSES, limit, policy.key, *filled)
        return _ParsedBlock(
            block, self._tokens[:end], self._fields[:records], self._digests[:records], bytes_read, self
        )


class _ParsedBlock(NamedTuple):
    """The kernel's result for a block of records."""

    source: RecordBlock
    tokens: NDArray[np.uint8]
    fields: NDArray[np.int32]
    digests: NDArray[np.uint64]
    bytes_read: int  # of the source, up to the end of the block or somewhat beyond it
    workspace: _Workspace


class ExpectedTotals(NamedTuple):
    """Totals of a source of known size, estimated from its first block."""

    records: int
    residues: int


@dataclass
class RecordCleaner:
    """Read sources, one after another, and pass on clean blocks; keep counts and identifiers."""

    policy: BuildPolicy
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    progress: Progress | None = None
    counts: BuildCounts = field(default_factory=BuildCounts)
    sources: list[dict[str, object]] = field(default_factory=list)
    """The manifest's entries of the sources read."""
    _ids: DigestSet = field(default_factory=DigestSet)
    _number: int = 0  # records before the block at hand, in its source

    def read(
        self,
        path: str | os.PathLike[str],
        consume: Callable[[CleanBlock], None],
        expect: Callable[[ExpectedTotals], None] = lambda _: None,
    ) -> None:
        """Clean every record of a source and pass the blocks, in order, to `consume`, on its own thread.

        `expect` is called before the first block where the source's size is known. Raises `SourceError` or `FastaError`
        when it cannot be read, looks like DNA, or has no usable record; `FastaError` where the policy says `error`; and
        whatever `consume` and `expect` raise.
        """
        before, usable = vars(self.counts).copy(), 0
        self._number = 0
        with Source(path) as source:

            def to_native(parsed: _ParsedBlock) -> None:
                nonlocal usable
                if self._number == 0 and source.size and len(parsed.fields):
                    share = min(parsed.bytes_read / source.size, 1.0)
                    expected = ExpectedTotals(int(len(parsed.fields) / share), int(parsed.tokens.size / share))
                    self._ids.reserve(len(self._ids) + expected.records)
                    expect(expected)
                clean = self._clean(source.name, parsed)
                usable += clean.lengths.size
                consume(clean)
                if self.progress:
                    self.progress(self._number, parsed.bytes_read, source.size)

            _in_order(source, self.policy, to_native, self.threads)
            self.sources.append(source.manifest_entry)
        if not usable:
            raise FastaError(f"{source.name}: {_why_nothing_is_left(before, vars(self.counts))}")

    def _clean(self, name: str, parsed: _ParsedBlock) -> CleanBlock:
        """Apply the policy to a block. Raises what is wrong with it, with its position."""
        if self._number == 0:
            first = int(parsed.fields[:NUCLEOTIDE_RECORDS, kernels.LENGTH].sum(dtype=np.int64))
            refuse_nucleotides(name, np.bincount(parsed.tokens[:first], minlength=VOCABULARY_SIZE))
        for record in np.flatnonzero(parsed.fields[:, kernels.SUSPECT]):
            self._judge(name, parsed, int(record))
        if parsed.source.problem:
            where = self._number + len(parsed.fields) + 1, parsed.source.offset + len(parsed.source.text)
            raise fasta_error(name, *where, parsed.source.problem)
        kept = self._keep(name, parsed)
        lengths = parsed.fields[:, kernels.LENGTH].copy()
        block = CleanBlock(parsed.tokens, lengths, parsed.digests[:, 0], parsed.digests[:, 1])
        self._number += kept.size
        self.counts.records_read += kept.size
        return block.select(kept)

    def _keep(self, name: str, parsed: _ParsedBlock) -> NDArray[np.bool_]:
        """Return which records of the block are kept, bool [records]; count the others."""
        fields, policy, counts = parsed.fields, self.policy, self.counts
        unknown, gaps, stops = (fields[:, c] for c in (kernels.UNKNOWN_LETTERS, kernels.GAPS, kernels.INTERNAL_STOPS))
        too_long = fields[:, kernels.GIVEN_LENGTH] > policy.max_residues
        counts.unknown_letters += int(unknown.sum())
        counts.gap_symbols += int(gaps.sum())
        counts.records_with_internal_stop += int((stops > 0).sum())
        counts.trailing_stops_stripped += int(fields[:, kernels.ENDS_IN_STOP].sum())
        counts.over_max_residues += int(too_long.sum())
        kept = np.ones(len(fields), dtype=np.bool_)

        def apply(action: str, found: NDArray[np.bool_], counter: str, what: str) -> None:
            if action == "error" and (found & kept).any():
                self._refuse(name, parsed, int((found & kept).argmax()), what)
            if action in ("drop", "error"):
                setattr(counts, counter, getattr(counts, counter) + int((found & kept).sum()))
                kept[found] = False

        apply("drop", fields[:, kernels.LENGTH] == 0, "dropped_empty", "no residues")
        apply(policy.unknown_letters, unknown > 0, "dropped_unknown_letters", "a letter outside the alphabet")
        apply(policy.internal_stops, stops > 0, "dropped_internal_stop", "a '*' amid the residues")
        apply(policy.gaps, gaps > 0, "dropped_gaps", "a gap symbol")
        apply(policy.long_sequences, too_long, "dropped_too_long", f"over {policy.max_residues} residues")
        if policy.long_sequences == "truncate":
            counts.truncated += int((too_long & kept).sum())
        repeated = self._repeated_ids(parsed, kept)
        counts.duplicate_ids += int(repeated.sum())
        apply(policy.duplicate_ids, repeated, "dropped_duplicate_id", "an identifier that an earlier record has")
        return kept

    def _repeated_ids(self, parsed: _ParsedBlock, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which kept records repeat an identifier, bool [records]."""
        named = kept & (parsed.digests[:, 1] != 0)
        repeated = np.zeros(kept.size, dtype=np.bool_)
        repeated[named] = ~self._ids.add(parsed.digests[named, 1])
        return repeated

    def _judge(self, name: str, parsed: _ParsedBlock, record: int) -> None:
        """Parse a record by the reference reader, which raises what is wrong; bytes over 127 may be UTF-8."""
        offsets = parsed.fields[:, kernels.OFFSET]
        begin = int(offsets[record])
        end = int(offsets[record + 1]) if record + 1 < len(offsets) else len(parsed.source.text)
        piece = bytes(parsed.source.text[begin + 1 : end]).removesuffix(b"\n")
        parse_record(name, self._number + record + 1, parsed.source.offset + begin, piece)

    def _refuse(self, name: str, parsed: _ParsedBlock, record: int, what: str) -> NoReturn:
        offset = parsed.source.offset + int(parsed.fields[record, kernels.OFFSET])
        problem = f"has {what}, which the policy calls an error; mend the record or choose what to do with such ones"
        raise fasta_error(name, self._number + record + 1, offset, problem)


def _why_nothing_is_left(before: dict[str, int], after: dict[str, int]) -> str:
    """Explain a source of which every record was dropped."""
    new = {key: after[key] - before[key] for key in after}
    reasons = ", ".join(
        f"{count} {key.removeprefix('dropped_').replace('_', ' ')}"
        for key, count in new.items()
        if count and key.startswith("dropped_")
    )
    return f"0 of {new['records_read']} records usable ({reasons}); check that it holds protein sequences"


def _in_order(source: Source, policy: BuildPolicy, consume: Callable[[_ParsedBlock], None], threads: int) -> None:
    """Read blocks here, parse them on `threads` threads, consume them on one more, in order; a few are under way."""
    under_way: deque[Future[None]] = deque()
    idle: SimpleQueue[_Workspace] = SimpleQueue()
    for _ in range(_BLOCKS_AHEAD * threads):
        idle.put(_Workspace())

    workspace = idle.get()

    def buffer_of(size: int) -> bytearray:
        return workspace.buffer_of(size)

    def finish(parsed: Future[_ParsedBlock]) -> None:
        block = parsed.result()
        consume(block)
        idle.put(block.workspace)

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="parse") as parsers,
        ThreadPoolExecutor(1, thread_name_prefix="consume") as consumer,
    ):
        try:
            for block in record_blocks(source, buffer_of):
                parsed = parsers.submit(workspace.parse, block, source.bytes_read, policy)
                under_way.append(consumer.submit(finish, parsed))
                while idle.empty():
                    under_way.popleft().result()
                workspace = idle.get()
            while under_way:
                under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


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
    split follows from the order of the records. Equal records and names give equal bytes with any number of threads
    (None: as many as there are cores).

    Raises `SourceError` or `FastaError` for a file that cannot be read, holds no usable record, or looks like DNA;
    `StoreError` when `output` exists or is being built, the disk is too small, or the policy asks for more sequences
    than there are. Nothing is left behind in that case.
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
    """Write one file to one split, without repeats and sequences of other splits. Return the digests of the split."""
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
    """Split clean blocks at random: what certainly belongs to train at once, the rest at the end."""

    def __init__(
        self, name: str, policy: BuildPolicy, writer: StoreWriter, scratch: IO[bytes], counts: BuildCounts
    ) -> None:
        self._name, self._policy, self._writer, self._scratch, self._counts = name, policy, writer, scratch, counts
        self._seen = DigestSet()
        self._waiting_lengths = array("i")
        self._waiting_digests = array("Q")

    def expect(self, expected: ExpectedTotals) -> None:
        """Reserve memory and check the disk for the totals of a source."""
        self._seen.reserve(len(self._seen) + expected.records)
        ends = np.array([max(expected.records, 1)])
        waiting = min(1.0, float(self._policy.held_out_bound(ends)[0]))  # of the last sequences; of the first ones more
        waiting *= 1 - np.log(waiting)
        self._writer.require_space(int(expected.residues * (1 + waiting)), expected.records)

    def add(self, block: CleanBlock) -> None:
        """Split one block. Repeats are dropped, or under the policy `keep` go where the first one goes."""
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
        """Split the sequences that waited."""
        lengths, codes = np.frombuffer(self._waiting_lengths, dtype=np.int32), self._codes()
        self._counts.dropped_duplicate += int((codes == _DROPPED).sum())
        with disk_errors(self._writer.folder):
            self._scratch.seek(0)
        for begin in range(0, codes.size, _SPLIT_SEQUENCES):
            lengths_here = lengths[begin : begin + _SPLIT_SEQUENCES]
            codes_here = codes[begin : begin + _SPLIT_SEQUENCES]
            content = self._scratch.read(int(lengths_here.sum(dtype=np.int64)))
            tokens = np.frombuffer(content, dtype=np.uint8)
            for code, name in enumerate(SPLITS):
                self._writer.add_many(name, tokens, lengths_here, chosen=codes_here == code)
        self._counts.records_kept = self._counts.records_read - self._counts.dropped

    def _codes(self) -> NDArray[np.int8]:
        """Return the split of each waiting sequence, int8 [n]; of equal held-out sequences the first one is kept."""
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
    """Open a file without a name on the disk of a store that is being written."""
    with disk_errors(writer.folder):
        return tempfile.TemporaryFile(dir=writer.partial, buffering=_SCRATCH_BUFFER_BYTES)


def _finish(intake: RecordCleaner, writer: StoreWriter, provenance: dict[str, object]) -> None:
    """Write the manifest, without a date: equal content gives equal bytes."""
    writer.finish({**provenance, "counts": asdict(intake.counts), "policy": intake.policy.model_dump()})
