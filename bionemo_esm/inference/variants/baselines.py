"""What a score of variants has to beat: what can be said of a variant without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.inference.variants.mutations import Variant

FEWER_MUTATIONS, SUBSTITUTION_MATRIX = "(fewer mutations)", "(BLOSUM62)"
_ORDER = "ARNDCQEGHILKMFPSTWYV"
_BLOSUM62 = """
     4 -1 -2 -2  0 -1 -1  0 -2 -1 -1 -1 -1 -2 -1  1  0 -3 -2  0
    -1  5  0 -2 -3  1  0 -2  0 -3 -2  2 -1 -3 -2 -1 -1 -3 -2 -3
    -2  0  6  1 -3  0  0  0  1 -3 -3  0 -2 -3 -2  1  0 -4 -2 -3
    -2 -2  1  6 -3  0  2 -1 -1 -3 -4 -1 -3 -3 -1  0 -1 -4 -3 -3
     0 -3 -3 -3  9 -3 -4 -3 -3 -1 -1 -3 -1 -2 -3 -1 -1 -2 -2 -1
    -1  1  0  0 -3  5  2 -2  0 -3 -2  1  0 -3 -1  0 -1 -2 -1 -2
    -1  0  0  2 -4  2  5 -2  0 -3 -3  1 -2 -3 -1  0 -1 -3 -2 -2
     0 -2  0 -1 -3 -2 -2  6 -2 -4 -4 -2 -3 -3 -2  0 -2 -2 -3 -3
    -2  0  1 -1 -3  0  0 -2  8 -3 -3 -1 -2 -1 -2 -1 -2 -2  2 -3
    -1 -3 -3 -3 -1 -3 -3 -4 -3  4  2 -3  1  0 -3 -2 -1 -3 -1  3
    -1 -2 -3 -4 -1 -2 -3 -4 -3  2  4 -2  2  0 -3 -2 -1 -2 -1  1
    -1  2  0 -1 -3  1  1 -2 -1 -3 -2  5 -1 -3 -1  0 -1 -3 -2 -2
    -1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5  0 -2 -1 -1 -1 -1  1
    -2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6 -4 -2 -2  1  3 -1
    -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7 -1 -1 -4 -3 -2
     1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4  1 -3 -2 -2
     0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5 -2 -2  0
    -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11  2 -3
    -2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7 -1
     0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""
MATRIX: NDArray[np.int64] = np.array(_BLOSUM62.split(), dtype=np.int64).reshape(20, 20)
"""BLOSUM62 in half bits, rows and columns by `_ORDER`: Henikoff and Henikoff 1992, doi:10.1073/pnas.89.22.10915."""


def baselines(variants: Sequence[Variant | None]) -> dict[str, NDArray[np.float64]]:
    """Scores without a model, float64 [V]: NaN for None, or a residue that is none of the 20.

    By the matrix: the sum over substitutions of M(wild type, mutant) - M(wild type, wild type). By the number of
    substitutions, negative: where all have as many, that is left out.
    """
    fewer = np.array([np.nan if variant is None else -len(variant) for variant in variants], dtype=np.float64)
    matrix = np.array([np.nan if variant is None else _by_matrix(variant) for variant in variants])
    scores = {SUBSTITUTION_MATRIX: matrix}
    return {FEWER_MUTATIONS: fewer} | scores if len(np.unique(fewer[~np.isnan(fewer)])) > 1 else scores


def _by_matrix(variant: Variant) -> float:
    total = 0.0
    for one in variant:
        row, column = _ORDER.find(TOKENS[one.wildtype]), _ORDER.find(TOKENS[one.mutant])
        if row < 0 or column < 0:
            return np.nan
        total += float(MATRIX[row, column] - MATRIX[row, row])
    return total
