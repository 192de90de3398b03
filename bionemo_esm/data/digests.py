"""A set of 64-bit digests: which of millions of sequences or identifiers was met before, in 8 bytes and a half each.

Two different sequences with equal digests would be taken for one. Among the 54 million of UniRef50 that happens with a
probability of 8 in 100,000 (n**2 / 2**65): once in some 12,000 builds, to one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data import kernels

_SMALLEST_CAPACITY = 2**12
_LARGEST_CAPACITY = 2**32 - 1  # of slots that 32 bits can choose among
_FULLEST = 0.8  # beyond this share of used slots, look-ups slow down
_SPARE = 1.05  # an expected number of digests is an estimate
_GROWTH = 1.5  # where none is expected
_BLOCK = 2**20


class DigestSet:
    """Grows as needed; `reserve` spares it growing in steps where a number is expected."""

    def __init__(self) -> None:
        self._slots = np.zeros(_SMALLEST_CAPACITY, dtype=np.uint64)
        self._expected = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def reserve(self, digests: int) -> None:
        """Expect so many digests in all. Takes effect when the set has to grow."""
        self._expected = digests

    def add(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add digests uint64 [n]; which of them were not yet in the set, or earlier among these: bool [n]."""
        if self._size + digests.size > _FULLEST * self._slots.size:
            self._grow(self._size + digests.size)
        is_new = np.empty(digests.size, dtype=np.bool_)
        self._size += int(kernels.insert(self._slots, np.maximum(digests, 1), is_new))  # 0 marks a free slot
        return is_new

    def contains(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of digests uint64 [n] are in the set: bool [n]."""
        is_there = np.empty(digests.size, dtype=np.bool_)
        kernels.find(self._slots, np.maximum(digests, 1), is_there)
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
            kernels.insert(slots, used, np.empty(used.size, dtype=np.bool_))
        self._slots = slots
