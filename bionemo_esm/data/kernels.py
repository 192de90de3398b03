"""Loops over bytes, compiled by Numba: parse a block of FASTA, look up digests, copy and count tokens.

They run over every byte of UniRef50, where another pass costs seconds. All release the GIL. Indices are unsigned:
Numba wraps negative ones, which doubles the time of a look-up.

`DigestSet` is a set of 64-bit digests of millions of sequences or identifiers, in 8.5 bytes each. Two different
sequences with equal digests count as one. Among the 54 million of UniRef50 that happens with a probability of 8 in
100,000 (n**2 / 2**65): once in some 12,000 builds, to one sequence.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import ENCODING_TABLE, TOKEN_IDS, UNK_ID

Function = TypeVar("Function", bound=Callable[..., Any])

# The class of a byte of a sequence: a token id below 128, or one of these.
BLANK, GAP, STOP, UNKNOWN, FORBIDDEN = range(128, 133)

# Columns of the fields that `parse` fills for each record.
OFFSET, LENGTH, GIVEN_LENGTH, UNKNOWN_LETTERS, GAPS, INTERNAL_STOPS, ENDS_IN_STOP, SUSPECT = range(8)
FIELDS = 8

_U = np.uint64
_NEWLINE, _RETURN, _HEADER, _SPACE, _TAB, _COMMA = (ord(character) for character in "\n\r> \t,")
_X = TOKEN_IDS["X"]
_ONES, _HIGH_BITS = _U(0x0101010101010101), _U(0x8080808080808080)
_MULTIPLIER = _U(0x9FB21C651E98DF25)
_MIXER_1, _MIXER_2 = _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_PAIR_BASE = 64  # over the largest token id


def _byte_classes() -> NDArray[np.uint8]:
    classes = ENCODING_TABLE.copy()
    classes[classes == UNK_ID] = UNKNOWN
    for characters, code in ((b" \t\n\r\v\f", BLANK), (b".-", GAP), (b"*", STOP), (b">\0", FORBIDDEN)):
        classes[list(characters)] = code
    return classes


BYTE_CLASSES = _byte_classes()
"""uint8 [256]: the token id of each byte of a sequence, or its class."""


def _sources() -> str:
    """Hash the sources of compiled code: the files of this folder, and the alphabet."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (folder.parent / "alphabet.py", *sorted(folder.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _sources()


def compiled(function: Function) -> Function:
    """Compile to machine code, cached on disk where possible: the first use takes a second or two.

    Numba reuses cached code while the function's own file is unchanged. Ours depends on constants and functions of
    other files, too, so the cache also compares `_sources`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dispatcher: Any = numba.njit(nogil=True, cache=True)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written to
            return cast(Function, numba.njit(nogil=True)(function))
    on_disk = dispatcher._cache._cache_file
    on_disk._source_stamp = (on_disk._source_stamp, _SOURCES)
    return cast(Function, dispatcher)


def words_of(content: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """View every eight neighbouring bytes of uint8 [n] as a number: uint64 [n - 7], overlapping."""
    return np.ndarray((max(content.size - 7, 0),), np.dtype("<u8"), buffer=content.data, strides=(1,))


@compiled
def _word(content: Any, words: Any, at: Any, count: Any) -> Any:
    """The next `count` bytes, under eight, as a number, with a one above them so that trailing zeros count."""
    if at + _U(8) <= content.size:
        return (words[at] & ((_U(1) << (_U(8) * count)) - _U(1))) | (_U(1) << (_U(8) * count))
    word = _U(1)
    for place in range(count):
        word = (word << _U(8)) | _U(content[at + count - _U(place) - _U(1)])
    return word


@compiled
def _digest(content: Any, words: Any, begin: Any, end: Any, key: Any) -> Any:
    """64-bit hash of content[begin:end] under a key: a multiply-and-shift chain over 8-byte words, then splitmix64."""
    state = key ^ (_U(end - begin) * _MULTIPLIER)
    at = begin
    while at + _U(8) <= end:
        state = (state ^ words[at]) * _MULTIPLIER
        state ^= state >> _U(32)
        at += _U(8)
    state = (state ^ _word(content, words, at, end - at)) * _MULTIPLIER
    state ^= state >> _U(30)
    state *= _MIXER_1
    state ^= state >> _U(27)
    state *= _MIXER_2
    return state ^ (state >> _U(31))


@compiled
def _is_plain(word: Any) -> Any:
    """Whether none of eight bytes is a line end, a carriage return, NUL, or over 127 (Mycroft's zero-byte test)."""
    found = word & _HIGH_BITS
    for pattern in (_U(0), _ONES * _U(_NEWLINE), _ONES * _U(_RETURN)):
        compared = word ^ pattern
        found |= (compared - _ONES) & ~compared & _HIGH_BITS
    return found == _U(0)


@compiled
def _encode_run(text: Any, at: Any, count: Any, classes: Any, tokens: Any, end: Any) -> Any:
    """Encode `count` bytes at once; return whether all were residues (otherwise the output is invalid)."""
    seen = np.uint8(0)
    for place in range(count):
        code = classes[text[at + _U(place)]]
        tokens[end + _U(place)] = code
        seen |= code
    return seen < BLANK


@compiled
def _encode_line(text: Any, at: Any, classes: Any, tokens: Any, end: Any, stops: Any, row: Any) -> Any:
    """Encode a line that has other bytes than residues; count them in `row`.

    at: index of the line in `text`; end: count of tokens; stops: stops before the line that may be internal. Returns
    the three after the line.
    """
    while at < _U(text.size):
        byte = text[at]
        code = classes[byte]
        at += _U(1)
        if byte == _NEWLINE:
            break
        if code == BLANK:
            continue
        if code == STOP:
            stops += 1
            continue
        if code == GAP:
            row[GAPS] += 1
            continue
        if code == FORBIDDEN:
            row[SUSPECT] = 1
            continue
        if code == UNKNOWN:
            row[UNKNOWN_LETTERS] += 1
            code = np.uint8(_X)
        row[INTERNAL_STOPS] += stops
        while stops > 0:
            tokens[end] = _X
            end += _U(1)
            stops -= 1
        tokens[end] = code
        end += _U(1)
    return at, end, stops


@compiled
def parse(  # noqa: C901
    text: Any, words: Any, classes: Any, max_residues: Any, key: Any,
    tokens: Any, token_words: Any, fields: Any, digests: Any,
) -> Any:  # fmt: skip
    """Clean and encode whole FASTA records.

    text uint8 [bytes], beginning with '>' and ending where a record ends; words, token_words: `words_of` text
    and tokens; classes: `BYTE_CLASSES`; key uint64.
    Filled: tokens uint8 [at least bytes], the records' token ids one after another, each cut to `max_residues`;
    fields int32 [at least records, FIELDS], a column for each name above, lengths in residues; digests uint64
    [at least records, 2], of the tokens and of the identifier (0: it has none). Letters outside the alphabet and stops
    amid a sequence become X. SUSPECT marks a record that the reference reader must judge. Returns (records, token ids).
    """
    size, at, end, record, width = _U(text.size), _U(0), _U(0), _U(0), _U(60)
    while at < size:
        row = fields[record]
        row[:] = 0
        row[OFFSET] = at
        # The header; its first word is the identifier.
        at += _U(1)
        word = at
        while at < size:
            while at + _U(8) <= size and _is_plain(words[at]):
                at += _U(8)
            if at >= size or text[at] == _NEWLINE:
                break
            byte = text[at]
            if byte >= 128 or byte == 0 or (byte == _RETURN and at + _U(1) < size and text[at + _U(1)] != _NEWLINE):
                row[SUSPECT] = 1
            at += _U(1)
        while word < at and text[word] <= _SPACE:
            word += _U(1)
        word_end = word
        while word_end < at and text[word_end] > _SPACE:
            word_end += _U(1)
        digests[record, 1] = _digest(text, words, word, word_end, key) if word_end > word else _U(0)
        at += _U(1)
        # The sequence, line by line; most lines are as wide as the one before, and of residues alone.
        first, stops = end, 0
        while at < size and text[at] != _HEADER:
            line_end = at + width
            if line_end >= size or text[line_end] != _NEWLINE:
                line_end = at
                while line_end < size and text[line_end] != _NEWLINE:
                    line_end += _U(1)
            width = line_end - at
            count = width - _U(1) if width > _U(0) and text[line_end - _U(1)] == _RETURN else width
            if stops == 0 and _encode_run(text, at, count, classes, tokens, end):
                end += count
                at = line_end + _U(1)
                continue
            at, end, stops = _encode_line(text, at, classes, tokens, end, stops, row)
        row[ENDS_IN_STOP] = stops > 0
        row[GIVEN_LENGTH] = end - first
        end = min(end, first + _U(max_residues))
        row[LENGTH] = end - first
        digests[record, 0] = _digest(tokens, token_words, first, end, key)
        record += _U(1)
    return record, end


@compiled
def _trimmed(text: Any, begin: Any, end: Any) -> Any:
    """Return the end of text[begin:end] without trailing blanks."""
    while end > begin and text[end - _U(1)] <= _SPACE:
        end -= _U(1)
    return end


@compiled
def parse_map(text: Any, words: Any, key: Any, cluster_first: Any, members: Any, clusters: Any) -> Any:  # noqa: C901
    """Hash the fields of a table of clusters, line by line.

    text uint8 [bytes], whole lines of two columns divided by a tab: a cluster and its members, divided by commas, if
    `cluster_first`, else the members and their cluster. members, clusters uint64 [at least half the bytes] are filled,
    a pair for each member. Returns (pairs, offset of the first line that has not two columns, or the text's size).
    """
    size, at, pairs = _U(text.size), _U(0), _U(0)
    while at < size:
        begin, tab, tabs = at, size, 0
        while at < size and text[at] != _NEWLINE:
            if text[at] == _TAB:
                tab = at if tabs == 0 else tab
                tabs += 1
            at += _U(1)
        end = at
        at += _U(1)
        if _trimmed(text, begin, end) == begin:
            continue
        if tabs != 1 or tab == begin or _trimmed(text, tab + _U(1), end) == tab + _U(1):
            return pairs, begin
        first, last_member, cluster_begin, cluster_end = begin, tab, tab + _U(1), end
        if cluster_first:
            first, last_member, cluster_begin, cluster_end = tab + _U(1), end, begin, tab
        cluster = _digest(text, words, cluster_begin, _trimmed(text, cluster_begin, cluster_end), key)
        while first < last_member:
            last = first
            while last < last_member and text[last] != _COMMA:
                last += _U(1)
            while first < last and text[first] <= _SPACE:
                first += _U(1)
            if first < last:
                members[pairs] = _digest(text, words, first, _trimmed(text, first, last), key)
                clusters[pairs] = cluster
                pairs += _U(1)
            first = last + _U(1)
    return pairs, size


@compiled
def _slot_of(slots: Any, digest: Any) -> Any:
    """Return the slot of a digest in a hash set, or the free slot for it."""
    capacity = _U(slots.size)
    slot = ((digest >> _U(32)) * capacity) >> _U(32)
    while slots[slot] != _U(0) and slots[slot] != digest:
        slot += _U(1)
        if slot == capacity:
            slot = _U(0)
    return slot


@compiled
def insert(slots: Any, digests: Any, is_new: Any) -> Any:
    """Add digests to a hash set by linear probing.

    slots uint64 [capacity], 0 where free; digests uint64 [n], none 0; is_new bool [n] is filled: whether each was
    absent. There must be free slots left. Returns the number of new ones.
    """
    added = 0
    for index in range(digests.size):
        digest = digests[index]
        slot = _slot_of(slots, digest)
        is_new[index] = slots[slot] == _U(0)
        slots[slot] = digest
        added += is_new[index]
    return added


@compiled
def find(slots: Any, digests: Any, is_there: Any) -> Any:
    """Fill is_there, bool [n], with whether each of digests, uint64 [n], is in the hash set `slots`."""
    for index in range(digests.size):
        digest = digests[index]
        slot = _slot_of(slots, digest)
        is_there[index] = slots[slot] == digest


@compiled
def select(tokens: Any, lengths: Any, chosen: Any, selected: Any) -> Any:
    """Copy the chosen sequences: tokens uint8, lengths [n], chosen bool [n]; selected uint8 is filled."""
    begin, end, index = _U(0), _U(0), 0
    while index < lengths.size:
        run = _U(0)
        if chosen[index]:  # neighbours are copied at once
            while index < lengths.size and chosen[index]:
                run += _U(lengths[index])
                index += 1
            selected[end : end + run] = tokens[begin : begin + run]
            end += run
        else:
            run = _U(lengths[index])
            index += 1
        begin += run


@compiled
def count_tokens(tokens: Any, counts: Any) -> Any:
    """Add how often each id occurs in tokens uint8 [n], n < 2**32, to counts int64 [33]; by pairs, which halves it."""
    pairs = np.zeros(_PAIR_BASE * _PAIR_BASE, dtype=np.uint32)
    for place in range(tokens.size // 2):
        first, second = tokens[_U(2 * place)], tokens[_U(2 * place + 1)]
        pairs[_U(first) * _U(_PAIR_BASE) + _U(second)] += np.uint32(1)
    for first in range(counts.size):
        for second in range(counts.size):
            number = pairs[first * _PAIR_BASE + second]
            counts[first] += number
            counts[second] += number
    if tokens.size % 2:
        counts[tokens[tokens.size - 1]] += 1


_SMALLEST_CAPACITY = 2**12
_LARGEST_CAPACITY = 2**32 - 1  # of slots that 32 bits can choose among
_FULLEST = 0.8  # beyond this share of used slots, look-ups slow down
_SPARE = 1.05  # an expected number of digests is an estimate
_GROWTH = 1.5  # where none is expected
_BLOCK = 2**20


class DigestSet:
    """A set of digests that grows as needed; `reserve` avoids growing in steps where a number is expected."""

    def __init__(self) -> None:
        self._slots = np.zeros(_SMALLEST_CAPACITY, dtype=np.uint64)
        self._expected = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def reserve(self, digests: int) -> None:
        """Expect so many digests in all. Takes effect when the set grows."""
        self._expected = digests

    def add(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add digests uint64 [n]; return which of them are new, bool [n]."""
        if self._size + digests.size > _FULLEST * self._slots.size:
            self._grow(self._size + digests.size)
        is_new = np.empty(digests.size, dtype=np.bool_)
        self._size += int(insert(self._slots, np.maximum(digests, 1), is_new))  # 0 marks a free slot
        return is_new

    def contains(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which of digests uint64 [n] are in the set, bool [n]."""
        is_there = np.empty(digests.size, dtype=np.bool_)
        find(self._slots, np.maximum(digests, 1), is_there)
        return is_there

    def update(self, other: DigestSet) -> None:
        """Add all digests of another set."""
        for some in other._blocks():
            self.add(some)

    def _blocks(self) -> Iterator[NDArray[np.uint64]]:
        for begin in range(0, self._slots.size, _BLOCK):
            some = self._slots[begin : begin + _BLOCK]
            yield some[some != 0]

    def _grow(self, needed: int) -> None:
        wanted = self._expected * _SPARE if self._expected * _SPARE > needed else _GROWTH * needed
        capacity = int(wanted / _FULLEST) + 1
        if capacity > _LARGEST_CAPACITY:
            raise ValueError(f"a set of {needed} digests is over the {_LARGEST_CAPACITY} slots it may have")
        slots = np.zeros(capacity, dtype=np.uint64)
        for used in self._blocks():
            insert(slots, used, np.empty(used.size, dtype=np.bool_))
        self._slots = slots
