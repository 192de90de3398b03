"""The order of samples: a keyed bijection in place of a shuffled index array.

Position p of the endless stream of samples belongs to epoch p // size, and within its epoch is sent to a sample by a
permutation computed on the fly: O(1) time and memory at any data-set size, nothing to build at start-up, nothing to
store for a resume but the number of samples consumed. The stream depends on the seed alone; ranks, batch size and
workers only decide who reads which slice of it.

The permutation is a Feistel network over the next power of two, walked until it lands inside the range (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.compiled_hashing import derived, mixed
from bionemo_esm.data.hashing import UInt64Array, derive_key
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
