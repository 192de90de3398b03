"""How sure a score is: means over training seeds, and intervals over the proteins that happened to be in the set.

An interval holds 95% of the scores of resampled sets (percentile bootstrap; Efron & Tibshirani 1993). Proteins are
drawn, with replacement, as many as have a known target; the residues of a protein go together, for they are not
independent. Of several training runs the mean of their scores is taken within each resample. Two ways to predict are
compared on the same resamples, so that what is hard for both cancels out.

No residue is looked at twice where sums over proteins will do: accuracy, F1, MCC, MSE and Pearson follow from sums of
each protein, weighted by how often it was drawn. Spearman's ranks follow from how often each smaller value was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.finetuning.metrics import FEWEST_TO_CORRELATE, METRIC_NAMES, Known, from_counts, known, scores
from bionemo_esm.finetuning.tasks import LOWER_IS_BETTER, METRICS, Prediction, Targets, Task

Floats = NDArray[np.float64]
Runs = Sequence[Sequence[Prediction]]
"""For each training seed the predictions of a set, in its order."""
Scoring = Callable[[Floats], dict[str, Floats]]
"""From how often each protein was drawn, [B, P], to each metric's mean over runs, [B]."""
RESAMPLES = 1000
COVERED = (2.5, 97.5)  # percentiles
_FEWEST_PROTEINS = 2
_DECIMALS = 3  # of a score from -1 to 1
_LEAST, _MOST = 1e-4, 1e6  # squared errors that are written without powers of ten
_ROUNDING = 1e-12  # of a sum of squares: what is left of a spread that is none
_BLOCK_NUMBERS = 2**22  # float64 at once: 32 MB


class Estimate(NamedTuple):
    """A score, or a difference of scores; NaN where it is not defined."""

    value: float  # the mean over training runs
    low: float  # of the 95% interval over proteins; this and the next are NaN of fewer than two proteins
    high: float
    spread: float = float("nan")  # standard deviation over training runs (n - 1); NaN of one run, or of a difference


def estimates(
    task: Task, targets: Sequence[Targets], runs: Runs, resamples: int = RESAMPLES, seed: int = 1
) -> dict[str, Estimate]:
    """Each metric of the task, of one or more training runs on the same proteins.

    A resample in which a metric is not defined (MCC, when all proteins drawn are of one class) is left out of its
    interval.
    """
    of_runs = [scores(task, targets, run) for run in runs]
    drawn = _resampled(task, targets, runs, resamples, seed)
    found = {}
    for name in METRICS[task.kind]:
        values = np.array([of_run[name] for of_run in of_runs])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[name] = _estimate(float(values.mean()), drawn[name])._replace(spread=spread)
    return found


def differences(
    task: Task, targets: Sequence[Targets], runs_a: Runs, runs_b: Runs, resamples: int = RESAMPLES, seed: int = 1
) -> dict[str, Estimate]:
    """By how much each metric of one way to predict is above that of another, on the same proteins, drawn together."""
    first, second = ([scores(task, targets, run) for run in runs] for runs in (runs_a, runs_b))
    drawn_a, drawn_b = (_resampled(task, targets, runs, resamples, seed) for runs in (runs_a, runs_b))
    found = {}
    for name in METRICS[task.kind]:
        means = [float(np.mean([of_run[name] for of_run in of_runs])) for of_runs in (first, second)]
        found[name] = _estimate(means[0] - means[1], drawn_a[name] - drawn_b[name])
    return found


def verdict(metric: str, name_a: str, name_b: str, difference: Estimate) -> str:
    """What a difference a - b says, in a sentence; that one beats the other only where the interval leaves out 0."""
    value, low, high, _ = difference
    named = METRIC_NAMES[metric]
    if np.isnan([value, low, high]).any():
        return f"{name_a} and {name_b} cannot be compared by {named}: it is not defined for both"
    if low <= 0 <= high:
        told_so = in_brackets(difference, metric, signed=True)
        return f"no difference is shown between {name_a} and {name_b}: {named} {told_so}"
    better, worse = (name_a, name_b) if (value < 0) == (metric in LOWER_IS_BETTER) else (name_b, name_a)
    least, most = sorted((abs(low), abs(high)))
    return f"{better} beats {worse} by {in_brackets(Estimate(abs(value), least, most), metric, unit=f' {named}')}"


def in_brackets(estimate: Estimate, metric: str, unit: str = "", signed: bool = False) -> str:
    """`0.773 (0.765 to 0.781)`, all with the same decimals; what of it is not defined is left out."""
    value, low, high, _ = estimate
    places = decimals(metric, value, low, high)
    interval = "" if np.isnan([value, low]).any() else f" ({told(low, places, signed)} to {told(high, places, signed)})"
    return f"{told(value, places, signed)}{unit}{interval}"


def decimals(metric: str, value: float, *beside: float) -> int | None:
    """Decimals of a score, and of what stands beside it: three of what lies from -1 to 1; of a squared error, which
    may be anything, as many as give three digits (of a value far smaller than what is beside it, fewer), and None,
    powers of ten, below 0.0001 and from a million on.
    """
    if metric not in LOWER_IS_BETTER:
        return _DECIMALS
    sizes = [abs(number) for number in (value, *beside) if np.isfinite(number)]
    size = max(abs(value) if np.isfinite(value) else 0, max(sizes, default=0) / 10)
    if size == 0:
        return _DECIMALS
    return max(0, 2 - math.floor(math.log10(size))) if _LEAST <= size < _MOST else None


def told(value: float, places: int | None = _DECIMALS, signed: bool = False) -> str:
    """A score for a person, with so many decimals (None: as a power of ten); - where it is not defined."""
    if np.isnan(value):
        return "-"
    text = f"{value:{'+' if signed else ''}{'.2e' if places is None else f',.{places}f'}}"
    return text if text.strip("-0.") else text.removeprefix("-")


# --- resamples --------------------------------------------------------------------------------------------------------


def draws(proteins: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """For each resample the proteins drawn, [P] of P; by NumPy's PCG64, so that a seed gives the same everywhere."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(proteins, size=proteins)


def _weights(proteins: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each protein was drawn: blocks [B, P] of all resamples."""
    block = max(1, _BLOCK_NUMBERS // max(proteins, 1))
    times: list[NDArray[np.int64]] = []
    for drawn in draws(proteins, resamples, seed):
        times.append(np.bincount(drawn, minlength=proteins))
        if len(times) == block:
            yield np.array(times, dtype=np.float64)
            times = []
    if times:
        yield np.array(times, dtype=np.float64)


def _resampled(task: Task, targets: Sequence[Targets], runs: Runs, resamples: int, seed: int) -> dict[str, Floats]:
    """Mean over runs of each metric, of each resample [resamples]; all NaN where there are not two proteins."""
    assert runs, "no run to take a mean of"
    pairs = [known(task, targets, run) for run in runs]
    taking_part, numbers = np.unique(pairs[0].proteins, return_inverse=True)
    proteins = len(taking_part)
    if proteins < _FEWEST_PROTEINS or not all(one.are_finite for one in pairs):
        return dict.fromkeys(METRICS[task.kind], np.full(resamples, np.nan))
    pairs = [one._replace(proteins=numbers) for one in pairs]
    score = _scores_of_classes(task, pairs, proteins) if task.is_classification else _scores_of_numbers(pairs, proteins)
    blocks = [score(weights_BP) for weights_BP in _weights(proteins, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS[task.kind]}


def _scores_of_classes(task: Task, pairs: Sequence[Known], proteins: int) -> Scoring:
    """Three sums for each class: how many of it were recognised, there, and predicted."""
    from scipy.sparse import csr_matrix

    classes = len(task.classes)

    def counted(which: NDArray[np.number], of: NDArray[np.int64]) -> csr_matrix:
        return csr_matrix((np.ones(len(of)), (of, which.astype(np.int64))), shape=(proteins, classes))  # sums alike

    true_PC = counted(pairs[0].targets, pairs[0].proteins)
    sums = []
    for one in pairs:
        right = one.targets == one.predicted
        sums.append((counted(one.targets[right], one.proteins[right]), counted(one.predicted, one.proteins)))

    def score(weights_BP: Floats) -> dict[str, Floats]:
        true_BC = weights_BP @ true_PC
        return _mean([from_counts(weights_BP @ right, true_BC, weights_BP @ predicted) for right, predicted in sums])

    return score


def _scores_of_numbers(pairs: Sequence[Known], proteins: int) -> Scoring:
    moments = [_moments(one, proteins) for one in pairs]
    spearman = _spearman(pairs)

    def score(weights_BP: Floats) -> dict[str, Floats]:
        ranked = spearman(weights_BP)
        return _mean(
            [{**_from_moments(weights_BP @ of), "spearman": by} for of, by in zip(moments, ranked, strict=True)]
        )

    return score


def _moments(pairs: Known, proteins: int) -> Floats:
    """Sums over each protein [P, 7]: 1, x, y, xx, yy, xy (predictions, targets, about their means), squared errors."""
    x, y = pairs.predicted - pairs.predicted.mean(), pairs.targets - pairs.targets.mean()
    error = pairs.predicted - pairs.targets
    columns = (np.ones(len(x)), x, y, x * x, y * y, x * y, error * error)
    return np.stack([np.bincount(pairs.proteins, weights=of, minlength=proteins) for of in columns], axis=1)


def _from_moments(sums_B7: Floats) -> dict[str, Floats]:
    n, x, y, xx, yy, xy, squared = sums_B7.T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        varies = (spread_x > _ROUNDING * xx) & (spread_y > _ROUNDING * yy) & (n >= FEWEST_TO_CORRELATE)
        pearson = np.where(varies, (xy - x * y / n) / np.sqrt(spread_x * spread_y), np.nan)
        return {"pearson": pearson, "mse": squared / n}


def _spearman(pairs: Sequence[Known]) -> Callable[[Floats], list[Floats]]:
    """For each run [B]. No resample is sorted: a rank follows from how often each smaller value was drawn."""
    by_target = np.argsort(pairs[0].targets, kind="stable")
    of, values = pairs[0].proteins[by_target], pairs[0].targets[by_target]
    begins = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    lengths = np.diff(begins, append=len(values))
    orders = [np.unique(one.predicted[by_target], return_inverse=True)[1] for one in pairs]

    def one_resample(weights_P: Floats) -> list[float]:
        times = weights_P[of]
        middle = (times.sum() + 1) / 2  # the mean of all ranks
        drawn = np.add.reduceat(times, begins)
        ranks = np.cumsum(drawn) - (drawn - 1) / 2 - middle
        spread, weighted = (drawn * ranks * ranks).sum(), times * np.repeat(ranks, lengths)
        found = []
        for order in orders:
            drawn = np.bincount(order, weights=times)
            ranks = np.cumsum(drawn) - (drawn - 1) / 2 - middle
            product = spread * (drawn * ranks * ranks).sum()
            enough = product > 0 and times.sum() >= FEWEST_TO_CORRELATE
            found.append(float(weighted @ ranks[order] / np.sqrt(product)) if enough else float("nan"))
        return found

    return lambda weights_BP: list(np.array([one_resample(weights_P) for weights_P in weights_BP]).T)


def _mean(of_runs: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    return {name: np.mean([of_run[name] for of_run in of_runs], axis=0) for name in of_runs[0]}


def _estimate(value: float, drawn: Floats) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.percentile(drawn, COVERED)
    return Estimate(value, float(low), float(high))
