"""One pass from the memory-mapped store to a masked, packed row: every token is read once and written where it stays.

What is computed is defined in NumPy, by the formulas in `order.py`, `masking.py` and `packing.py`; here they are one
compiled loop, and tests hold the two together bit for bit. Inner loops have no branch and no dependency between turns,
so that the compiler does several residues at once.

Shape suffixes: T tokens of the row, S sequences, M chosen (masked) positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bionemo_esm.alphabet import CLS_ID, EOS_ID, FIRST_RESIDUE_ID, MASK_ID, NUM_STANDARD_RESIDUES, VOCABULARY_SIZE
from bionemo_esm.data.batch_sampler import MEMBER_STREAM
from bionemo_esm.data.hashing import derived, drawn, mixed, scaled
from bionemo_esm.data.kernels import compiled
from bionemo_esm.data.masking import ACTION_STREAM, CHOICE_STREAM, CROP_STREAM, LETTER_STREAM
from bionemo_esm.data.packing import SPECIAL_TOKENS_PER_SEQUENCE

NO_ROOM, NO_LETTER = -1, -2

_U = np.uint64
_LINE = 64  # bytes of a line of the processor's cache
_OVER = 64  # no ids of the alphabet, all below 33, have this bit or a higher one
_DE_BRUIJN = _U(0x03F79D71B4CB0A89)  # its 64 windows of six bits all differ, so the top six bits of a power of two...
_PLACES = np.zeros(64, dtype=np.uint64)  # ...times it say which power it is
_PLACES[(_DE_BRUIJN << np.arange(64, dtype=np.uint64)) >> _U(58)] = np.arange(64)


def room_for_chosen(tokens: int, longest: int, chosen: float) -> int:
    """Places for the chosen residues of a row: eight standard deviations over the mean, as `fill` wants to know
    before a sequence that all of it would fit. A row that has more all the same is filled again.
    """
    return min(tokens, math.ceil(chosen * tokens + 4 * math.sqrt(tokens)) + longest)


@compiled
def _member(first: Any, after: Any, key: Any) -> Any:
    """The sequence that stands for a cluster of sequences `first` to `after` under a key: int64."""
    return first if after - first == 1 else first + scaled(drawn(key, MEMBER_STREAM), after - first)


@compiled
def measure(lengths: Any, clusters: Any, root: Any, epochs: Any, samples: Any, most: Any, tokens: Any) -> Any:
    """Fill tokens int64 [S] with the length of each sample in its epoch, specials counted, at most `most`.

    lengths int32 [sequences]; clusters int64 [clusters + 1]; root uint64 [1], the key of the seed; epochs, samples
    int64 [S]. Returns the first sample that the split has not; -1 where it has all.
    """
    plain = clusters.size - 1 == lengths.size  # every sequence is its own cluster
    for at in range(samples.size):
        sequence = samples[at]
        if sequence < 0 or sequence >= clusters.size - 1:
            return at
        if not plain:
            key = derived(derived(root[0], epochs[at]), sequence)
            sequence = _member(clusters[_U(sequence)], clusters[_U(sequence) + _U(1)], key)
            if sequence < 0 or sequence >= lengths.size:
                return at
        tokens[at] = min(np.int64(lengths[_U(sequence)]) + SPECIAL_TOKENS_PER_SEQUENCE, most)
    return -1


@compiled
def draw(
    lengths: Any, offsets: Any, clusters: Any, residues: Any, root: Any, epochs: Any, samples: Any, most: Any,
    begins: Any, keys: Any, cu_seqlens: Any,
) -> Any:  # fmt: skip
    """Which window of which sequence each sample is in its epoch.

    lengths int32, offsets int64 [sequences]; clusters int64 [clusters + 1]; residues: of the split; root uint64 [1],
    the key of the seed; epochs, samples int64 [S]; most: residues of a window.
    Filled: begins int64 [S], where the window is in the split's tokens; keys uint64 [S], by `masking.sample_keys`;
    cu_seqlens int32 [S + 1]. Returns tokens of the longest window, or -1 - i where i is the first sample that the split
    has not, or whose sequence is not in its file.
    """
    plain = clusters.size - 1 == lengths.size  # every sequence is its own cluster
    longest, cu_seqlens[0] = 0, 0
    for at in range(samples.size):
        sequence = samples[at]
        if sequence < 0 or sequence >= clusters.size - 1:
            return -1 - at
        key = derived(derived(root[0], epochs[at]), sequence)
        if not plain:
            sequence = _member(clusters[_U(sequence)], clusters[_U(sequence) + _U(1)], key)
            if sequence < 0 or sequence >= lengths.size:
                return -1 - at
        length, begin = np.int64(lengths[_U(sequence)]), offsets[_U(sequence)]
        window = min(length, most)
        if length > window:  # else it is the whole
            begin += scaled(drawn(key, CROP_STREAM), length - window + 1)
        if window < 0 or begin < 0 or begin > residues - window:
            return -1 - at
        begins[at], keys[at], cu_seqlens[at + 1] = begin, key, cu_seqlens[at] + window + SPECIAL_TOKENS_PER_SEQUENCE
        longest = max(longest, window + SPECIAL_TOKENS_PER_SEQUENCE)
    return longest


@compiled
def _copy(content: Any, begins: Any, cu_seqlens: Any, tokens: Any, positions: Any) -> Any:
    """The sequences between their specials, and positions; whether all of their token ids are in the alphabet."""
    seen = np.uint8(0)
    for at in range(begins.size):  # ask for all lines of memory first, so that they are waited for together
        begin, residues = _U(begins[at]), _U(cu_seqlens[at + 1] - cu_seqlens[at] - SPECIAL_TOKENS_PER_SEQUENCE)
        for place in range(begin, begin + residues, _U(_LINE)):
            seen |= content[place]
    over = seen >= _OVER
    for at in range(begins.size):
        begin, first, last = _U(begins[at]), _U(cu_seqlens[at]), _U(cu_seqlens[at + 1])
        for place in range(last - first):
            positions[first + place] = place
        tokens[first] = CLS_ID
        tokens[last - _U(1)] = EOS_ID
        for place in range(last - first - _U(SPECIAL_TOKENS_PER_SEQUENCE)):
            token = content[begin + place]
            tokens[first + _U(1) + place] = token
            over |= token >= VOCABULARY_SIZE
    return not over


@compiled
def _choose(keys: Any, below: Any, cu_seqlens: Any, index: Any, draws: Any) -> Any:
    """Write the chosen places of the row to `index`, and what was drawn there to `draws`; returns their number, or
    `NO_ROOM`. index int64, draws uint64 [room].
    """
    found = _U(0)
    for at in range(keys.size):
        key, base = drawn(keys[at], CHOICE_STREAM), _U(cu_seqlens[at]) + _U(1)
        residues = _U(cu_seqlens[at + 1]) - base - _U(1)
        if found + residues > _U(index.size):
            return NO_ROOM
        begun = found
        for begin in range(_U(0), residues, _U(64)):
            word = _U(0)  # a bit for each of 64 residues
            for lane in range(_U(64)):
                word |= _U(mixed(key ^ (begin + lane)) < below) << lane
            if begin + _U(64) > residues:
                word &= (_U(1) << (residues - begin)) - _U(1)
            while word != _U(0):
                lowest = word & (~word + _U(1))
                index[found] = begin + _PLACES[(lowest * _DE_BRUIJN) >> _U(58)]
                found += _U(1)
                word ^= lowest
        for one in range(begun, found):
            draws[one] = mixed(key ^ _U(index[one]))
            index[one] += np.int64(base)
    return np.int64(found)


@compiled
def _corrupt(index: Any, draws: Any, masked: Any, replaced: Any, tokens: Any, targets: Any) -> None:
    """Keep what is at the chosen places, and show there what the policy says.

    index int64, draws uint64 [M], from `_choose`; tokens int64 [T], changed; targets int64 [M], filled.
    """
    actions, rest, kept = np.empty(index.size, dtype=np.uint64), np.empty(index.size, dtype=np.int64), 0
    for at in range(index.size):
        actions[at] = drawn(draws[at], ACTION_STREAM)
    for at in range(index.size):
        true = tokens[index[at]]
        targets[at] = true
        tokens[index[at]] = MASK_ID if actions[at] < masked else true
    for at in range(index.size):
        rest[kept] = at
        kept += (actions[at] >= masked) & (actions[at] < replaced)
    for at in rest[:kept]:
        word, letter = drawn(draws[at], LETTER_STREAM), targets[at] - FIRST_RESIDUE_ID
        if 0 <= letter < NUM_STANDARD_RESIDUES:  # 1 to 19 places on: never back on the original
            letter += 1 + scaled(word, NUM_STANDARD_RESIDUES - 1)
        else:
            letter = scaled(word, NUM_STANDARD_RESIDUES)
        tokens[index[at]] = letter % NUM_STANDARD_RESIDUES + FIRST_RESIDUE_ID


@compiled
def fill(
    content: Any, begins: Any, keys: Any, cu_seqlens: Any, bounds: Any, tokens: Any,
    positions: Any, index: Any, targets: Any,
) -> Any:  # fmt: skip
    """Write the row of the windows that `draw` found.

    content: uint8 [residues of the split]; begins int64 [S], keys uint64 [S], cu_seqlens int32 [S + 1]; bounds
    uint64 [3], below which a draw chooses, masks, and masks or replaces.
    Filled: tokens, positions int64 [T]; index, targets int64 [room], the places of the row that were chosen and what
    was there. Returns how many were, or `NO_ROOM`, or `NO_LETTER` where the content has other ids than the alphabet.
    """
    if not _copy(content, begins, cu_seqlens, tokens, positions):
        return NO_LETTER
    draws = np.empty(index.size, dtype=np.uint64)
    found = _choose(keys, bounds[0], cu_seqlens, index, draws)
    if found > 0:
        _corrupt(index[:found], draws, bounds[1], bounds[2], tokens, targets)
    return found
