"""Records into clean token ids: what is done about letters, stops, gaps, lengths and identifiers, with counts.

Blocks of whole records are parsed on as many threads as there are cores and handed on in their order, so the number of
threads changes nothing but the time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS
from bionemo_esm.data import kernels
from bionemo_esm.data.fasta import FastaError, RecordBlock, Source, fasta_error, parse_record, record_blocks
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.data.kernels import DigestSet
from bionemo_esm.data.store import StoreError

Progress = Callable[[int, int, int | None], None]
"""Called after each block with the records and the bytes read of a source so far, and its size (None for a pipe)."""

CHOICES = {
    "unknown_letters": ("x", "drop", "error"),
    "internal_stops": ("drop", "x", "error"),
    "gaps": ("remove", "drop", "error"),
    "long_sequences": ("truncate", "drop", "keep", "error"),
    "duplicate_ids": ("keep", "drop", "error"),
    "duplicate_sequences": ("drop", "keep"),
}
"""What can be done about each; the first is the default."""

_NUCLEOTIDE_SHARE = 0.95
_NUCLEOTIDE_RECORDS = 1_000
_NUCLEOTIDES = np.zeros(256, dtype=np.bool_)
_NUCLEOTIDES[[TOKEN_IDS[letter] for letter in "ACGTUN"]] = True
_DIGEST_STREAM = 7  # keeps the digests' key apart from the keys of order, crop and corruption
_BLOCKS_AHEAD = 2  # a thread


@dataclass(frozen=True)
class CleaningPolicy:
    """What to do about each irregularity, in the words of `CHOICES`; `error` stops at the first, naming its record.

    unknown_letters: letters outside the alphabet (J) and other symbols, digits among them: read as X, or the record is
    dropped. internal_stops: a `*` amid the residues. gaps: `-` and `.`. long_sequences: over `max_residues`; `truncate`
    keeps the first ones. Always: a trailing `*` is stripped, lower case is read as upper, a record without residues is
    dropped. Raises `StoreError` for another word or a number out of range.
    """

    max_residues: int = 1024  # as the ESM-1nv model card has it
    unknown_letters: str = "x"
    internal_stops: str = "drop"
    gaps: str = "remove"
    long_sequences: str = "truncate"
    duplicate_ids: str = "keep"
    duplicate_sequences: str = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_residues < 2**31:
            raise StoreError(f"max_residues is {self.max_residues}; it must lie in 1..2**31-1")
        if not 0 <= self.seed < 2**64:
            raise StoreError(f"seed is {self.seed}; it must lie in 0..2**64-1")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise StoreError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}")

    @property
    def key(self) -> np.uint64:
        """The key under which sequences and identifiers are hashed."""
        return np.uint64(derive_key(self.seed, _DIGEST_STREAM)[0])


@dataclass
class BuildCounts:
    """What became of the records; `records_read` is `records_kept` and all the dropped ones together.

    A record that is dropped is counted under the first reason in the order below; the counts that are not of dropped
    records count each irregularity wherever it was met.
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
    """Records whose identifier, the header's first word, an earlier one had."""
    duplicate_sequences: int = 0
    """Records whose sequence, as cleaned and cut, an earlier one had."""

    @property
    def dropped(self) -> int:
        """Records dropped for any reason."""
        return sum(count for key, count in vars(self).items() if key.startswith("dropped_"))


class CleanBlock(NamedTuple):
    """Clean sequences of one block, in their order. The arrays serve until the block has been consumed, no longer."""

    tokens: NDArray[np.uint8]
    """Token ids of all, one sequence after another, uint8 [sum of lengths]."""
    lengths: NDArray[np.int32]
    """Residues of each, int32 [sequences]."""
    digests: NDArray[np.uint64]
    """Keyed 64-bit hash of each sequence's token ids, uint64 [sequences]."""
    id_digests: NDArray[np.uint64]
    """The same of each identifier; 0 where it has none."""

    def select(self, chosen: NDArray[np.bool_]) -> CleanBlock:
        """The chosen sequences, bool [sequences]."""
        if chosen.all():
            return self
        tokens, lengths = select_sequences(self.tokens, self.lengths, chosen)
        return CleanBlock(tokens, lengths, self.digests[chosen], self.id_digests[chosen])


def select_sequences(
    tokens: NDArray[np.uint8], lengths: NDArray[np.int32], chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Token ids and lengths of the chosen ones, bool [sequences], of sequences that stand one after another."""
    chosen_lengths = lengths[chosen]
    selected = np.empty(int(chosen_lengths.sum(dtype=np.int64)), dtype=np.uint8)
    kernels.select(tokens, lengths, chosen, selected)
    return selected, chosen_lengths


class _Workspace:
    """Text and the arrays that the kernel fills, used again and again: fresh memory costs more than the parsing."""

    def __init__(self) -> None:
        self._allocate(0)

    def _allocate(self, size: int) -> None:
        self._text = bytearray(size)
        self._tokens = np.empty(size, dtype=np.uint8)
        self._fields = np.empty((size // 2 + 1, kernels.FIELDS), dtype=np.int32)
        self._digests = np.empty((size // 2 + 1, 2), dtype=np.uint64)

    def buffer_of(self, size: int) -> bytearray:
        """At least so many bytes, for the text that `parse` is given next."""
        if len(self._text) < size:
            self._allocate(size)
        return self._text

    def parse(self, block: RecordBlock, bytes_read: int, policy: CleaningPolicy) -> _ParsedBlock:
        """Run the kernel over a block; the result is overwritten by the next one."""
        text = np.frombuffer(block.text, dtype=np.uint8)
        limit = text.size if policy.long_sequences == "keep" else policy.max_residues
        filled = self._tokens, kernels.words_of(self._tokens), self._fields, self._digests
        records, end = kernels.parse(text, kernels.words_of(text), kernels.BYTE_CLASSES, limit, policy.key, *filled)
        return _ParsedBlock(
            block, self._tokens[:end], self._fields[:records], self._digests[:records], bytes_read, self
        )


class _ParsedBlock(NamedTuple):
    """What the kernel made of a block of records."""

    source: RecordBlock
    tokens: NDArray[np.uint8]
    fields: NDArray[np.int32]
    digests: NDArray[np.uint64]
    bytes_read: int  # of the source, up to the end of the block or somewhat beyond it
    workspace: _Workspace


class ExpectedTotals(NamedTuple):
    """How much a source of known size will give, judged by its first block."""

    records: int
    residues: int


@dataclass
class RecordCleaner:
    """Reads sources, one after another, and hands on clean blocks; keeps the counts and the identifiers seen."""

    policy: CleaningPolicy
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
        """Clean every record of a source and give the blocks, in order, to `consume`, on a thread of its own.

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
        """Apply the policy to a block; whatever is wrong with it is raised here, where its place is known."""
        if self._number == 0:
            _refuse_nucleotides(name, parsed)
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
        """Which records of the block go on, bool [records]; counts the others."""
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
        """Which kept records have an identifier that was met before, bool [records]."""
        named = kept & (parsed.digests[:, 1] != 0)
        repeated = np.zeros(kept.size, dtype=np.bool_)
        repeated[named] = ~self._ids.add(parsed.digests[named, 1])
        return repeated

    def _judge(self, name: str, parsed: _ParsedBlock, record: int) -> None:
        """Let the reference reader say what is wrong with a record, if anything is: bytes over 127 may be UTF-8."""
        offsets = parsed.fields[:, kernels.OFFSET]
        begin = int(offsets[record])
        end = int(offsets[record + 1]) if record + 1 < len(offsets) else len(parsed.source.text)
        piece = bytes(parsed.source.text[begin + 1 : end]).removesuffix(b"\n")
        parse_record(name, self._number + record + 1, parsed.source.offset + begin, piece)

    def _refuse(self, name: str, parsed: _ParsedBlock, record: int, what: str) -> NoReturn:
        offset = parsed.source.offset + int(parsed.fields[record, kernels.OFFSET])
        problem = f"has {what}, which the policy calls an error; mend the record or choose what to do with such ones"
        raise fasta_error(name, self._number + record + 1, offset, problem)


def _refuse_nucleotides(name: str, parsed: _ParsedBlock) -> None:
    """Raise `FastaError` if the first thousand records, or as many as the first block has, look like DNA or RNA."""
    residues = int(parsed.fields[:_NUCLEOTIDE_RECORDS, kernels.LENGTH].sum(dtype=np.int64))
    share = _NUCLEOTIDES[parsed.tokens[:residues]].mean() if residues else 0.0
    if share > _NUCLEOTIDE_SHARE:
        found = f"{share:.1%} of its letters are A, C, G, T, U or N"
        raise FastaError(f"{name}: looks like DNA or RNA ({found}); translate it first, or name a protein file")


def _why_nothing_is_left(before: dict[str, int], after: dict[str, int]) -> str:
    """For a source of which every record was dropped."""
    new = {key: after[key] - before[key] for key in after}
    reasons = ", ".join(
        f"{count} {key.removeprefix('dropped_').replace('_', ' ')}"
        for key, count in new.items()
        if count and key.startswith("dropped_")
    )
    return f"0 of {new['records_read']} records usable ({reasons}); check that it holds protein sequences"


def _in_order(source: Source, policy: CleaningPolicy, consume: Callable[[_ParsedBlock], None], threads: int) -> None:
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
