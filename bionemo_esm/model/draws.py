"""The draws of dropout: a splitmix64 stream (Steele, Lea and Flood, OOPSLA 2014), each word deciding four times."""

from __future__ import annotations

from typing import Any

import numpy as np

from bionemo_esm.data.kernels import compiled

_U = np.uint64
_INCREMENT, _MULTIPLIER_1, _MULTIPLIER_2 = _U(0x9E3779B97F4A7C15), _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_LOW = _U(2**16 - 1)


@compiled
def fill(bits: Any, key: Any, bound: Any, kept: Any) -> None:
    """bits: integers [4 n], filled: `kept` where a draw is at least `bound` of 65,536, else 0; key, bound: uint64.

    The four draws of a word go to places a quarter of all apart, so that a compiler makes vector instructions of it.
    """
    quarter = _U(bits.size // 4)
    first, second = bits[:quarter], bits[quarter : 2 * quarter]
    third, fourth = bits[2 * quarter : 3 * quarter], bits[3 * quarter :]
    dropped = kept ^ kept
    for place in range(quarter):
        word = key + _U(place) * _INCREMENT
        word ^= word >> _U(30)
        word *= _MULTIPLIER_1
        word ^= word >> _U(27)
        word *= _MULTIPLIER_2
        word ^= word >> _U(31)
        first[place] = kept if word & _LOW >= bound else dropped
        second[place] = kept if (word >> _U(16)) & _LOW >= bound else dropped
        third[place] = kept if (word >> _U(32)) & _LOW >= bound else dropped
        fourth[place] = kept if word >> _U(48) >= bound else dropped
