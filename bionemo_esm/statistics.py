"""Correlations, and intervals from the percentile bootstrap (Efron & Tibshirani 1993).

All values are float64. A seed gives the same resamples everywhere: NumPy's PCG64. Shape suffixes: B resamples, N pairs,
P units that are resampled, such as proteins or variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
INTERVAL_PERCENTILES = (2.5, 97.5)  # of a 95% interval
FEWEST_FOR_CORRELATION = 3
_BLOCK_NUMBERS = 2**22  # float64 at once: 32 MB


def pearson(x: Floats, y: Floats) -> float:
    """Return Pearson's correlation of x and y [N]; NaN for fewer than three pairs, or if one of the two is constant."""
    if len(x) < FEWEST_FOR_CORRELATION or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):  # a spread that rounds to zero
        return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Floats, y: Floats) -> float:
    """Return Spearman's rank correlation of x and y [N], equal values with their mean rank; NaN as `pearson`."""
    return weighted_spearman(x, [y])(np.ones(len(x)))[0]


def weighted_spearman(x: Floats, ys: Sequence[Floats]) -> Callable[[Floats], list[float]]:
    """Return a function from weights to Spearman's correlation of x with each y, all [N].

    A weight says how often its pair occurs, as in a resample. Values are sorted once, not for each call: a rank follows
    from the weights of all smaller values. The function gives NaN for fewer than three pairs, or constant values.
    """
    by_x = np.argsort(x, kind="stable")
    first = np.flatnonzero(np.diff(x[by_x], prepend=np.nan) != 0)  # of each group of equal values
    group_sizes = np.diff(first, append=len(x))
    groups_of_ys = [np.unique(y[by_x], return_inverse=True)[1] for y in ys]

    def correlations(weights_N: Floats) -> list[float]:
        weights = weights_N[by_x]
        total = weights.sum()
        occurrences, ranks = _centred_ranks(np.add.reduceat(weights, first), total)
        x_spread, weighted_x = (occurrences * ranks * ranks).sum(), weights * np.repeat(ranks, group_sizes)
        found = []
        for groups in groups_of_ys:
            occurrences, ranks = _centred_ranks(np.bincount(groups, weights=weights), total)
            product = x_spread * (occurrences * ranks * ranks).sum()
            defined = product > 0 and total >= FEWEST_FOR_CORRELATION
            found.append(float(weighted_x @ ranks[groups] / np.sqrt(product)) if defined else float("nan"))
        return found

    return correlations


def _centred_ranks(occurrences: NDArray[Any], total: float) -> tuple[Floats, Floats]:
    """Return how often each distinct value occurs, as given, and its mean rank less the mean of all ranks."""
    return occurrences, np.cumsum(occurrences) - (occurrences - 1) / 2 - (total + 1) / 2


def resampled_indices(size: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield, for each resample, `size` indices into `size` units, drawn with replacement: int64 [P]."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(size, size=size)


def resampled_counts(size: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each of `size` units was drawn in each resample, [B, P]: all resamples, some at a time."""
    counts: list[NDArray[np.int64]] = []
    for drawn in resampled_indices(size, resamples, seed):
        counts.append(np.bincount(drawn, minlength=size))
        if len(counts) * size >= _BLOCK_NUMBERS:
            yield np.array(counts, dtype=np.float64)
            counts = []
    if counts:
        yield np.array(counts, dtype=np.float64)


def percentile_interval(values: Floats) -> tuple[float, float]:
    """Return the 95% interval of resampled values [B] without those that are NaN; NaN and NaN if none is left."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, INTERVAL_PERCENTILES)
    return float(low), float(high)


def mean_interval(values: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of values [P]."""
    return percentile_interval(
        np.array([values[drawn].mean() for drawn in resampled_indices(len(values), resamples, seed)])
    )
