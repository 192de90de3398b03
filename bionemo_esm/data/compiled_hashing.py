"""The hashes of `hashing.py` for one word at a time, to be called in compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from bionemo_esm.data.hashing import mix
from bionemo_esm.data.kernels import compiled

_U = np.uint64

mixed: Any = compiled(mix)  # the same lines: what works on arrays works on a word


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
