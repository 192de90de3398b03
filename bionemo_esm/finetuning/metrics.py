"""Scores of predictions by the metrics of `tasks.METRICS`, and their 95% intervals over proteins.

Unknown targets (NaN) are left out. Per residue, all residues of all proteins count alike. A score that is not defined
is NaN, not an error.

accuracy: share of targets whose class has the highest probability (of equal ones the first in `Task.classes`).
f1: macro F1, the mean over the classes that occur among the targets of 2 tp / (targets + predictions).
mcc: Matthews' correlation for several classes (Gorodkin 2004, "R_K"); 0 if all predictions are one class, NaN if all
    targets are.
spearman, pearson: correlation of ranks and of values; NaN for fewer than three pairs or constant values.
mse: mean squared error, in the square of the target's unit.

Intervals come from the percentile bootstrap over proteins; the residues of a protein are drawn together, because they
are not independent. Several training runs are averaged within each resample, and two methods are compared on the same
resamples. Accuracy, F1, MCC, MSE and Pearson follow from sums over each protein, weighted by how often it was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.finetuning.tasks import LOWER_IS_BETTER, METRICS, Prediction, Targets, Task
from bionemo_esm.statistics import (
    FEWEST_FOR_CORRELATION,
    pearson,
    percentile_interval,
    resampled_counts,
    spearman,
    weighted_spearman,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Runs = Sequence[Sequence[Prediction]]
"""Predictions of a set, in its order, for each training seed."""
Scoring = Callable[[Floats], dict[str, Floats]]
"""From how often each protein was drawn, [B, P], to each metric's mean over runs, [B]."""
METRIC_NAMES = {
    **{"accuracy": "accuracy", "f1": "macro F1", "mcc": "MCC"},
    **{"spearman": "Spearman", "pearson": "Pearson", "mse": "MSE"},
}
"""Display names."""
RESAMPLES = 1000
_FEWEST_PROTEINS = 2  # for an interval
_NO_CLASS = -1
_DECIMALS = 3  # of a score from -1 to 1
_LEAST_PLAIN, _MOST_PLAIN = 1e-4, 1e6  # squared errors between them are written without powers of ten
_ROUNDING = 1e-12  # of a sum of squares: a smaller spread is rounding error


class Pairs(NamedTuple):
    """Known targets of all proteins, concatenated, with their predictions."""

    targets: NDArray[Any]  # [N]: int64 class numbers, or float64 values in the target's unit
    predicted: NDArray[Any]  # [N], alike; -1 for a class with probabilities that are not finite
    proteins: Integers  # [N]: the number of each one's protein

    @property
    def are_finite(self) -> bool:
        """Whether every prediction can be compared."""
        numbers = self.predicted
        return bool((numbers != _NO_CLASS).all() if numbers.dtype == np.int64 else np.isfinite(numbers).all())


class ClassScore(NamedTuple):
    """Scores of one class; a share of nothing is NaN."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int  # targets of this class
    predicted: int


class Estimate(NamedTuple):
    """A score, or a difference of scores; NaN where it is not defined."""

    value: float  # mean over training runs
    low: float  # of the 95% interval over proteins; NaN, as `high`, for fewer than two proteins
    high: float
    spread: float = float("nan")  # standard deviation over training runs (n - 1); NaN for one run, or a difference


def known_pairs(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> Pairs:
    """Return the known targets with their predictions; for a classification, the class of highest probability."""
    assert len(targets) == len(predictions), f"{len(targets)} proteins, {len(predictions)} predictions"
    if not len(targets):
        targets, predictions = [np.empty(0, dtype=np.float32)], [np.empty((0, task.outputs), dtype=np.float32)]
    for target, prediction in zip(targets, predictions, strict=True):
        assert prediction.shape == (len(target), task.outputs), f"{prediction.shape} for {len(target)} targets"
    target, prediction = np.concatenate(targets), np.concatenate(predictions)
    proteins = np.repeat(np.arange(len(targets), dtype=np.int64), [len(one) for one in targets])
    known = ~np.isnan(target)
    target, prediction, proteins = target[known], prediction[known], proteins[known]
    if not task.is_classification:
        return Pairs(target.astype(np.float64), prediction[:, 0].astype(np.float64), proteins)
    classes = np.where(np.isfinite(prediction).all(axis=1), prediction.argmax(axis=1), _NO_CLASS)
    return Pairs(target.astype(np.int64), classes.astype(np.int64), proteins)


def scores(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return every metric of the task's kind; all are NaN if a prediction of a known target is not finite."""
    pairs = known_pairs(task, targets, predictions)
    if not len(pairs.targets) or not pairs.are_finite:
        return dict.fromkeys(METRICS[task.kind], float("nan"))
    if task.is_classification:
        hits = pairs.targets[pairs.targets == pairs.predicted]
        counts = [np.bincount(of, minlength=len(task.classes)) for of in (hits, pairs.targets, pairs.predicted)]
        return {name: float(value) for name, value in _from_counts(*counts).items()}
    error = float(np.mean((pairs.predicted - pairs.targets) ** 2))
    correlations = {"spearman": spearman, "pearson": pearson}
    return {name: of(pairs.predicted, pairs.targets) for name, of in correlations.items()} | {"mse": error}


def confusion(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> Integers:
    """Return the counts of targets by true class (row) and predicted class (column), int64 [C, C].

    Targets without a finite prediction are left out.
    """
    assert task.is_classification
    pairs, classes = known_pairs(task, targets, predictions), len(task.classes)
    predicted = pairs.predicted != _NO_CLASS
    cells = pairs.targets[predicted] * classes + pairs.predicted[predicted]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def per_class(task: Task, counts_CC: Integers) -> list[ClassScore]:
    """Return the scores of each class, in the task's order, from `confusion`."""
    hits, true, predicted = np.diag(counts_CC), counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    return [
        ClassScore(name, _share(h, p), _share(h, t), _share(2 * h, t + p), int(t), int(p))
        for name, h, t, p in zip(task.classes, hits, true, predicted, strict=True)
    ]


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


# --- intervals --------------------------------------------------------------------------------------------------------


def estimates(
    task: Task, targets: Sequence[Targets], runs: Runs, resamples: int = RESAMPLES, seed: int = 1
) -> dict[str, Estimate]:
    """Return each metric of the task, for one or more training runs on the same proteins.

    A resample in which a metric is not defined (MCC, if all proteins drawn are of one class) is left out of its
    interval.
    """
    of_runs = [scores(task, targets, run) for run in runs]
    resampled = _resampled_scores(task, targets, runs, resamples, seed)
    found = {}
    for name in METRICS[task.kind]:
        values = np.array([of_run[name] for of_run in of_runs])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[name] = _estimate(float(values.mean()), resampled[name])._replace(spread=spread)
    return found


def differences(
    task: Task, targets: Sequence[Targets], runs_a: Runs, runs_b: Runs, resamples: int = RESAMPLES, seed: int = 1
) -> dict[str, Estimate]:
    """Return each metric of method a less that of method b, on the same resamples of the same proteins."""
    first, second = ([scores(task, targets, run) for run in runs] for runs in (runs_a, runs_b))
    resampled_a, resampled_b = (_resampled_scores(task, targets, runs, resamples, seed) for runs in (runs_a, runs_b))
    found = {}
    for name in METRICS[task.kind]:
        means = [float(np.mean([of_run[name] for of_run in of_runs])) for of_runs in (first, second)]
        found[name] = _estimate(means[0] - means[1], resampled_a[name] - resampled_b[name])
    return found


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = (float("nan"), float("nan")) if np.isnan(value) else percentile_interval(resampled)
    return Estimate(value, low, high)


def _resampled_scores(
    task: Task, targets: Sequence[Targets], runs: Runs, resamples: int, seed: int
) -> dict[str, Floats]:
    """Return each metric's mean over runs for each resample, [B]; all NaN for fewer than two proteins."""
    assert runs, "no run to take a mean of"
    pairs = [known_pairs(task, targets, run) for run in runs]
    drawable, numbers = np.unique(pairs[0].proteins, return_inverse=True)
    proteins = len(drawable)
    if proteins < _FEWEST_PROTEINS or not all(one.are_finite for one in pairs):
        return dict.fromkeys(METRICS[task.kind], np.full(resamples, np.nan))
    pairs = [one._replace(proteins=numbers) for one in pairs]
    score = (
        _scoring_of_classes(task, pairs, proteins) if task.is_classification else _scoring_of_numbers(pairs, proteins)
    )
    blocks = [score(weights_BP) for weights_BP in resampled_counts(proteins, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS[task.kind]}


def _scoring_of_classes(task: Task, pairs: Sequence[Pairs], proteins: int) -> Scoring:
    """Score resamples from three sums for each protein and class: hits, targets, predictions."""
    from scipy.sparse import csr_matrix

    def counted(classes: Integers, of: Integers) -> csr_matrix:  # [P, C]; equal places are added up
        return csr_matrix((np.ones(len(of)), (of, classes)), shape=(proteins, len(task.classes)))

    true_PC = counted(pairs[0].targets, pairs[0].proteins)
    sums = []
    for one in pairs:
        hit = one.targets == one.predicted
        sums.append((counted(one.targets[hit], one.proteins[hit]), counted(one.predicted, one.proteins)))

    def score(weights_BP: Floats) -> dict[str, Floats]:
        true_BC = weights_BP @ true_PC
        return _mean([_from_counts(weights_BP @ hits, true_BC, weights_BP @ predicted) for hits, predicted in sums])

    return score


def _from_counts(
    hits: NDArray[np.number], true: NDArray[np.number], predicted: NDArray[np.number]
) -> dict[str, Floats]:
    """Return accuracy, f1 and mcc, each [...], from hits, targets and predictions of each class, [..., C]."""
    hits, true, predicted = (values.astype(np.float64) for values in (hits, true, predicted))
    total, total_hits = true.sum(axis=-1), hits.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_classes = np.where(true > 0, 2 * hits / (true + predicted), 0.0)
        f1 = of_classes.sum(axis=-1) / (true > 0).sum(axis=-1)
        spread_true = total**2 - (true**2).sum(axis=-1)
        spread_predicted = total**2 - (predicted**2).sum(axis=-1)
        mcc = (total_hits * total - (true * predicted).sum(axis=-1)) / np.sqrt(spread_true * spread_predicted)
        mcc = np.where(spread_true > 0, np.where(spread_predicted > 0, mcc, 0.0), np.nan)
        return {"accuracy": total_hits / total, "f1": f1, "mcc": mcc}


def _scoring_of_numbers(pairs: Sequence[Pairs], proteins: int) -> Scoring:
    """Score resamples from seven sums for each protein, and Spearman from the weights of all pairs."""
    moments = [_moments(one, proteins) for one in pairs]
    correlations = weighted_spearman(pairs[0].targets, [one.predicted for one in pairs])

    def score(weights_BP: Floats) -> dict[str, Floats]:
        ranked = np.array([correlations(weights_P[pairs[0].proteins]) for weights_P in weights_BP]).T
        return _mean(
            [{**_from_moments(weights_BP @ of), "spearman": by} for of, by in zip(moments, ranked, strict=True)]
        )

    return score


def _moments(pairs: Pairs, proteins: int) -> Floats:
    """Sums over each protein [P, 7]: 1, x, y, xx, yy, xy (predictions, targets, about their means), squared errors."""
    x, y = pairs.predicted - pairs.predicted.mean(), pairs.targets - pairs.targets.mean()
    error = pairs.predicted - pairs.targets
    columns = (np.ones(len(x)), x, y, x * x, y * y, x * y, error * error)
    return np.stack([np.bincount(pairs.proteins, weights=of, minlength=proteins) for of in columns], axis=1)


def _from_moments(sums_B7: Floats) -> dict[str, Floats]:
    n, x, y, xx, yy, xy, squared = sums_B7.T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_x, spread_y = xx - x * x / n, yy - y * y / n
        varies = (spread_x > _ROUNDING * xx) & (spread_y > _ROUNDING * yy) & (n >= FEWEST_FOR_CORRELATION)
        correlation = np.where(varies, (xy - x * y / n) / np.sqrt(spread_x * spread_y), np.nan)
        return {"pearson": correlation, "mse": squared / n}


def _mean(of_runs: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    return {name: np.mean([of_run[name] for of_run in of_runs], axis=0) for name in of_runs[0]}


# --- as text ----------------------------------------------------------------------------------------------------------


def verdict(metric: str, name_a: str, name_b: str, difference: Estimate) -> str:
    """Return a sentence on a difference a - b: one beats the other only if the interval excludes 0."""
    value, low, high, _ = difference
    named = METRIC_NAMES[metric]
    if np.isnan([value, low, high]).any():
        return f"{name_a} and {name_b} cannot be compared by {named}: it is not defined for both"
    if low <= 0 <= high:
        shown = format_estimate(difference, metric, signed=True)
        return f"no difference is shown between {name_a} and {name_b}: {named} {shown}"
    better, worse = (name_a, name_b) if (value < 0) == (metric in LOWER_IS_BETTER) else (name_b, name_a)
    least, most = sorted((abs(low), abs(high)))
    return f"{better} beats {worse} by {format_estimate(Estimate(abs(value), least, most), metric, unit=f' {named}')}"


def format_estimate(estimate: Estimate, metric: str, unit: str = "", signed: bool = False) -> str:
    """Return `0.773 (0.765 to 0.781)`, all with the same decimals, without what is not defined."""
    value, low, high, _ = estimate
    places = decimal_places(metric, value, low, high)
    shown, least, most = (format_score(number, places, signed) for number in (value, low, high))
    return f"{shown}{unit}" + ("" if np.isnan([value, low]).any() else f" ({least} to {most})")


def decimal_places(metric: str, value: float, *beside: float) -> int | None:
    """Return the decimals of a score and of the numbers beside it: three for metrics from -1 to 1.

    A squared error has as many as give three digits, fewer if it is far smaller than the numbers beside it. None means
    a power of ten: below 0.0001 and from a million on.
    """
    if metric not in LOWER_IS_BETTER:
        return _DECIMALS
    sizes = [abs(number) for number in (value, *beside) if np.isfinite(number)]
    size = max(abs(value) if np.isfinite(value) else 0, max(sizes, default=0) / 10)
    if size == 0:
        return _DECIMALS
    return max(0, 2 - math.floor(math.log10(size))) if _LEAST_PLAIN <= size < _MOST_PLAIN else None


def format_score(value: float, places: int | None = _DECIMALS, signed: bool = False) -> str:
    """Return a score with so many decimals (None: as a power of ten), or `-` where it is not defined."""
    if np.isnan(value):
        return "-"
    text = f"{value:{'+' if signed else ''}{'.2e' if places is None else f',.{places}f'}}"
    return text if text.strip("-0.") else text.removeprefix("-")
