"""The order of samples: a keyed bijection in place of a shuffled index array.

Position p of the endless stream of samples belongs to epoch p // size, and within its epoch is sent to a sample by a
permutation computed on the fly: O(1) time and memory at any data-set size, nothing to build at start-up, nothing to
store for a resume but the number of samples consumed. The stream depends on the seed alone; ranks, batch size and
workers only decide who reads which slice of it.

The permutation is a Feistel network over the next power of two, walked until it lands inside the range (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.hashing import UInt64Array, derive_key, mix

_ROUNDS = 8  # even, so that unequal halves end where they began
_ORDER_STREAM, _MEMBER_STREAM = 1, 6  # keep the order's keys apart from the keys of crop and corruption


@dataclass(frozen=True)
class EpochOrder:
    """The stream of samples over a data set of `size` samples.

    Raises `ValueError` for an empty data set or one over 2**48 samples.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.size <= 2**48:
            raise ValueError(f"an order needs between 1 and 2**48 samples, not {self.size}")

    def samples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and sample at each position of the stream: positions int64 [n] -> (int64 [n], int64 [n])."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        return epochs, self._permute(places, derive_key(self.seed, _ORDER_STREAM, epochs))

    def _permute(self, places: NDArray[np.int64], keys: UInt64Array) -> NDArray[np.int64]:
        """The sample at each place under each key; cycle-walking takes under two rounds on average."""
        bits = max(2, (self.size - 1).bit_length())
        values = places.astype(np.uint64)
        outside = np.arange(len(values))
        while outside.size:
            values[outside] = _feistel(values[outside], keys[outside], bits)
            outside = outside[values[outside] >= np.uint64(self.size)]
        return values.astype(np.int64)


def member_words(keys: UInt64Array) -> UInt64Array:
    """Uniform words to draw the member of a cluster by, from the keys of samples in their epochs: uint64 [n]."""
    return derive_key(keys, _MEMBER_STREAM)


def _feistel(values: UInt64Array, keys: UInt64Array, bits: int) -> UInt64Array:
    """A keyed permutation of [0, 2**bits), element by element."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_number in range(_ROUNDS):
        scrambled = mix(keys ^ mix(right + np.uint64(round_number << 56)))
        left, right = right, left ^ (scrambled & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
