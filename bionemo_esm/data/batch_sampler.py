"""How a global batch is dealt: every rank finds its own part of it, of equal work, and asks no other rank.

Sequences differ in length, so equal numbers of them are unequal work, and a step takes as long as its slowest rank.
Each rank therefore sees the lengths of the whole global batch (not its residues) and deals it like cards.

The order of samples: a keyed bijection in place of a shuffled index array.

Position p of the endless stream of samples belongs to epoch p // size, and within its epoch is sent to a sample by a
permutation computed on the fly: O(1) time and memory at any data-set size, nothing to build at start-up, nothing to
store for a resume but the number of samples consumed. The stream depends on the seed alone; ranks, batch size and
workers only decide who reads which slice of it.

The permutation is a Feistel network over the next power of two, walked until it lands inside the range (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.hashing import UInt64Array, derive_key, derived, mixed
from bionemo_esm.data.kernels import compiled

_ROUNDS = 8  # even, so that unequal halves end where they began
_ORDER_STREAM, MEMBER_STREAM = 1, 6  # keep the order's keys apart from the keys of crop and corruption
_U = np.uint64


@dataclass(frozen=True)
class EpochOrder:
    """The stream of samples over a data set of `size` samples.

    Raises `ValueError` for an empty data set or one over 2**48 samples.
    """

    size: int
    seed: int
    _root: UInt64Array = field(init=False, repr=False, compare=False)  # [1], the key of all epochs

    def __post_init__(self) -> None:
        if not 0 < self.size <= 2**48:
            raise ValueError(f"an order needs between 1 and 2**48 samples, not {self.size}")
        object.__setattr__(self, "_root", derive_key(self.seed, _ORDER_STREAM))

    def samples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and sample at each position of the stream: positions int64 [n] -> (int64 [n], int64 [n])."""
        epochs, samples = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        _permute(samples, epochs, self._root, self.size, max(2, (self.size - 1).bit_length()))
        return epochs, samples


def member_words(keys: UInt64Array) -> UInt64Array:
    """Uniform words to draw the member of a cluster by, from the keys of samples in their epochs: uint64 [n]."""
    return derive_key(keys, MEMBER_STREAM)


@compiled
def _half_round(changed: Any, other: Any, keys: Any, bits: Any, number: Any) -> None:
    """One round: a half, of `bits` bits, is changed by the hash of the other; both and the keys uint64 [n]."""
    mask, salt = (_U(1) << bits) - _U(1), _U(number) << _U(56)
    for at in range(changed.size):
        changed[at] ^= mixed(keys[at] ^ mixed(other[at] + salt)) & mask


@compiled
def _feistel(values: Any, keys: Any, bits: Any) -> None:
    """A keyed permutation of [0, 2**bits), element by element: values uint64 [n], changed; keys uint64 [n]."""
    left_bits = bits // _U(2)
    right_bits = bits - left_bits
    left, right = values >> right_bits, values & ((_U(1) << right_bits) - _U(1))
    for number in range(0, _ROUNDS, 2):  # all elements at a time, which the compiler does side by side
        _half_round(left, right, keys, left_bits, number)
        _half_round(right, left, keys, right_bits, number + 1)
    values[:] = (left << right_bits) | right


@compiled
def _permute(places: Any, epochs: Any, root: Any, size: Any, bits: Any) -> None:
    """The sample at each place of its epoch; cycle-walking takes under two rounds on average.

    places int64 [n], changed into samples; epochs int64 [n]; root uint64 [1], the key of all epochs; 2**bits >= size.
    """
    end = _U(size)
    keys, values, where, left = np.empty(places.size, _U), places.astype(_U), np.arange(places.size), places.size
    for at in range(left):
        keys[at] = derived(root[0], epochs[at])
    while left > 0:
        _feistel(values[:left], keys[:left], _U(bits))
        outside = 0
        for at in range(left):
            if values[at] < end:
                places[where[at]] = np.int64(values[at])
            else:
                values[outside], keys[outside], where[outside] = values[at], keys[at], where[at]
                outside += 1
        left = outside


IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """How large a global batch is, and how it is dealt to ranks and then into micro batches.

    The global batch is `global_batch_size` sequences, or as many as come to at most `global_batch_tokens` tokens. A
    micro batch is `micro_batch_size` sequences, or any number of at most `micro_batch_tokens` tokens. Raises
    `ValueError` when a number of sequences does not come out even; tokens always do.
    """

    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1
    global_batch_tokens: int | None = None
    micro_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self) if item.name != "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        for whole in ("global_batch", "micro_batch"):
            if (getattr(self, f"{whole}_size") is None) == (getattr(self, f"{whole}_tokens") is None):
                raise ValueError(f"{whole}_size (sequences) or {whole}_tokens must be given, and not both")
        self._check_that_it_comes_out_even()

    def _check_that_it_comes_out_even(self) -> None:
        size, micro = self.global_batch_size, self.micro_batch_size
        if size is None:
            return
        if micro is None:
            if size < self.world_size:
                raise ValueError(f"a global batch of {size} sequences leaves some of {self.world_size} ranks idle")
            return
        if size % (micro * self.world_size) == 0:
            return
        raise ValueError(
            f"a global batch of {size} sequences cannot be dealt evenly to {self.world_size} ranks in micro batches of "
            f"{micro}; {_even_ways(size, micro, self.world_size)}. Or set micro_batch_tokens in place of "
            "micro_batch_size: then any number of ranks will do"
        )

    @property
    def accumulation(self) -> int | None:
        """Micro batches of a rank's share of a step; None where their number follows from the sequences' lengths."""
        if self.global_batch_size is None or self.micro_batch_size is None:
            return None
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def share(self, tokens: IntArray, rank: int | None = None) -> list[IntArray]:
        """A rank's micro batches (this plan's rank, if none is given) of a global batch of sequences of these lengths.

        tokens: int64 [n]. Each micro batch is int64 [k], indices into `tokens`, ascending.
        """
        rank = self.rank if rank is None else rank
        if self.accumulation is not None:
            rank_batches = assign_micro_batches(tokens, self.world_size * self.accumulation)
            return rank_batches[rank * self.accumulation : (rank + 1) * self.accumulation]
        own = assign_micro_batches(tokens, self.world_size)[rank]
        return [own[hand] for hand in self._micro_batches(tokens[own])]

    def _micro_batches(self, tokens: IntArray) -> list[IntArray]:
        """As few as keep within the limit, and alike."""
        if self.micro_batch_size is not None:
            return assign_micro_batches(tokens, -(-len(tokens) // self.micro_batch_size))
        assert self.micro_batch_tokens is not None
        number = max(-(-int(tokens.sum()) // self.micro_batch_tokens), 1)
        while True:
            rank_batches = assign_micro_batches(tokens, number)
            if (
                number >= len(tokens)
                or max(int(tokens[hand].sum()) for hand in rank_batches) <= self.micro_batch_tokens
            ):
                return rank_batches
            number += 1


def assign_micro_batches(tokens: IntArray, rank_batches: int) -> list[IntArray]:
    """Deal sequences of these lengths (int64 [n]) so that the hands hold like numbers of sequences and of tokens.

    Longest first, there and back, as captains choose teams. Each hand is int64 [k], ascending indices; numbers of
    sequences differ by one at most.
    """
    if rank_batches == 1:
        return [np.arange(len(tokens), dtype=np.int64)]
    longest_first = np.argsort(_descending_key(tokens), kind="stable")
    turn, place = np.divmod(np.arange(len(tokens), dtype=np.int64), rank_batches)
    holder = np.empty(len(tokens), dtype=np.int32)
    holder[longest_first] = np.where(turn % 2, rank_batches - 1 - place, place)
    by_hand = np.argsort(holder, kind="stable").astype(np.int64)
    return np.split(by_hand, np.cumsum(np.bincount(holder, minlength=rank_batches))[:-1])


def _descending_key(tokens: IntArray) -> NDArray[np.uint16] | IntArray:
    """A key that sorts long sequences first; of 16 bits where it fits, which sorts ten times as fast."""
    longest = int(tokens.max(initial=0))
    return (longest - tokens).astype(np.uint16) if longest < 2**16 else longest - tokens


def _even_ways(size: int, micro: int, world_size: int) -> str:
    """What comes out even, with each of the three changed alone."""
    ways = [f"make it a multiple of {micro * world_size}"]
    if size % micro == 0:
        ranks = [str(divisor) for divisor in divisors(size // micro)]
        ways.append(f"or the ranks one of {_some(ranks)}")
    if size % world_size == 0:
        ways.append(f"or the micro batch one of {_some([str(divisor) for divisor in divisors(size // world_size)])}")
    return ", ".join(ways)


def _some(names: list[str], most: int = 24) -> str:
    return ", ".join(names) if len(names) <= most else ", ".join([*names[: most // 2], "...", *names[-most // 2 :]])


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})
