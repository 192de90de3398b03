"""Stateless random numbers: 64-bit hashes of counters under a key.

The order of samples, crop and masking draw from here. So each is a pure function of (seed, epoch, sample), without
state, and the same on every rank and worker. The mixer is splitmix64's finaliser (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014); arithmetic is modulo 2**64. `mix`, `derive_key` and
`uniform_integers` take arrays; `mixed`, `derived`, `drawn` and `scaled` do the same for one word in compiled loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bionemo_esm.data.kernels import compiled

UInt64Array = NDArray[np.uint64]

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def mix(values: UInt64Array) -> UInt64Array:
    """Scatter 64-bit words by a bijection: uint64 [n] -> uint64 [n]."""
    mixed = values + _INCREMENT
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MULTIPLIER_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MULTIPLIER_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


def derive_key(*parts: ArrayLike) -> UInt64Array:
    """Derive 64-bit keys from integers or integer arrays that broadcast: uint64, of their common shape (at least 1-D).

    Parts and their order matter: `derive_key(1, 2)` and `derive_key(2, 1)` are unrelated.
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key ^ mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return key


def threshold(probability: float) -> np.uint64:
    """Return the bound below which a uniform 64-bit word falls with this probability (1.0 is short by 2**-64)."""
    return np.uint64(min(int(probability * 2.0**64), 2**64 - 1))


def uniform_integers(words: UInt64Array, bounds: ArrayLike) -> NDArray[np.int64]:
    """Return integers in [0, bound) from uniform words, int64 [n]: the high 32 bits times the bound, over 2**32."""
    high = words >> np.uint64(32)
    return ((high * np.asarray(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


_U = np.uint64

mixed: Any = compiled(mix)  # the same code compiled for one word


@compiled
def derived(key: Any, part: Any) -> Any:
    """`derive_key(..., part)`, from the key of the parts before: uint64."""
    return mixed(key ^ mixed(_U(part)))


@compiled
def drawn(word: Any, stream: Any) -> Any:
    """`derive_key(word, stream)`: uint64."""
    return derived(derived(_U(0), word), stream)


@compiled
def scaled(word: Any, bound: Any) -> Any:
    """`uniform_integers` of one word: int64 in [0, bound)."""
    return np.int64(((word >> _U(32)) * _U(bound)) >> _U(32))
