"""How good predictions are: the scores of `task.METRICS`, and the predictions of all ranks in one list.

Counting and correlating is torchmetrics'; targets that are not known (NaN) are left out, and per residue all residues
of all proteins count alike. A score is NaN where it is not defined, never an error: early stopping goes on.

accuracy: share of targets whose class is the likeliest (of equal ones the first in `Task.classes`).
f1: mean over the classes that occur among the targets, each with the same weight, of 2 tp / (targets + predictions)
    of that class (macro F1; a class that is only predicted does not enter the mean, but costs the others).
mcc: Matthews' correlation of many classes (Gorodkin 2004, "R_K"): 0 where all predictions are one class, NaN where
    all targets are.
spearman, pearson: correlation of ranks, those of equal values averaged, and of values; NaN of fewer than three, or
    where one side is the same everywhere.
mse: mean squared error, in the square of the target's unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.finetuning.tasks import METRICS, Prediction, Targets, Task

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
METRIC_NAMES = {
    **{"accuracy": "accuracy", "f1": "macro F1", "mcc": "MCC"},
    **{"spearman": "Spearman", "pearson": "Pearson", "mse": "MSE"},
}
"""As a person reads them."""
FEWEST_TO_CORRELATE = 3
_UNDEFINED = float("nan")
_NO_CLASS = -1


class Known(NamedTuple):
    """Targets that are known, of all proteins end to end, and what was predicted."""

    targets: NDArray[Any]  # [N]: numbers of classes, int64, or numbers in their own unit, float64
    predicted: NDArray[Any]  # [N], alike
    proteins: Integers  # [N]: which protein of the set each belongs to

    @property
    def are_finite(self) -> bool:
        """Whether every pair has a prediction that can be compared."""
        numbers = self.predicted
        return bool((numbers != _NO_CLASS).all() if numbers.dtype == np.int64 else np.isfinite(numbers).all())


class ClassScore(NamedTuple):
    """How well one class is recognised; a share of nothing is NaN."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int  # targets of this class
    predicted: int


def known(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> Known:
    """The pairs to compare, of a classification the likeliest class, -1 where the probabilities are not finite."""
    assert len(targets) == len(predictions), f"{len(targets)} proteins, {len(predictions)} predictions"
    if not len(targets):
        targets, predictions = [np.empty(0, dtype=np.float32)], [np.empty((0, task.outputs), dtype=np.float32)]
    true, predicted, counts = [], [], []
    for target, prediction in zip(targets, predictions, strict=True):
        assert prediction.shape == (len(target), task.outputs), f"{prediction.shape} for {len(target)} targets"
        here = ~np.isnan(target)
        true.append(target[here])
        predicted.append(_told(task, prediction[here]))
        counts.append(len(true[-1]))
    kind = np.int64 if task.is_classification else np.float64
    proteins = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return Known(np.concatenate(true).astype(kind), np.concatenate(predicted).astype(kind), proteins)


def _told(task: Task, prediction: Prediction) -> NDArray[Any]:
    if not task.is_classification:
        return prediction[:, 0].astype(np.float64)
    return np.where(np.isfinite(prediction).all(axis=1), prediction.argmax(axis=1), _NO_CLASS)


def scores(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Every metric of the task's kind; NaN, all of them, where a prediction to be compared is not finite."""
    pairs = known(task, targets, predictions)
    names = METRICS[task.kind]
    if not len(pairs.targets) or not pairs.are_finite:
        return dict.fromkeys(names, _UNDEFINED)
    if task.is_classification:
        return {name: float(value) for name, value in from_counts(*_counts(task, pairs)).items()}
    return _of_numbers(pairs)


def from_counts(
    right: NDArray[np.number], true: NDArray[np.number], predicted: NDArray[np.number]
) -> dict[str, Floats]:
    """accuracy, f1 and mcc, each [...], from how many of each class [..., C] were recognised, there, and predicted."""
    right, true, predicted = (values.astype(np.float64) for values in (right, true, predicted))
    total, total_right = true.sum(axis=-1), right.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_classes = np.where(true > 0, 2 * right / (true + predicted), 0.0)
        f1 = of_classes.sum(axis=-1) / (true > 0).sum(axis=-1)
        spread_true = total**2 - (true**2).sum(axis=-1)
        spread_predicted = total**2 - (predicted**2).sum(axis=-1)
        mcc = (total_right * total - (true * predicted).sum(axis=-1)) / np.sqrt(spread_true * spread_predicted)
        mcc = np.where(spread_true > 0, np.where(spread_predicted > 0, mcc, 0.0), np.nan)
        return {"accuracy": total_right / total, "f1": f1, "mcc": mcc}


def _counts(task: Task, pairs: Known) -> tuple[Integers, Integers, Integers]:
    """Of each class [C]: recognised, among the targets, predicted."""
    import torch
    from torchmetrics.functional.classification import multiclass_stat_scores

    predicted, targets = torch.from_numpy(pairs.predicted), torch.from_numpy(pairs.targets)
    found: Integers = multiclass_stat_scores(predicted, targets, len(task.classes), average="none").numpy()
    right, false_positive, _, _, support = found.T
    return right, support, right + false_positive


def _of_numbers(pairs: Known) -> dict[str, float]:
    import torch
    from torchmetrics.functional.regression import mean_squared_error, pearson_corrcoef

    def correlation(one: Floats, other: Floats) -> float:
        if len(one) < FEWEST_TO_CORRELATE or np.ptp(one) == 0 or np.ptp(other) == 0:
            return _UNDEFINED
        return float(pearson_corrcoef(torch.from_numpy(one), torch.from_numpy(other)))

    targets, predicted = pairs.targets.astype(np.float64), pairs.predicted.astype(np.float64)
    # torchmetrics' own spearman_corrcoef sums the ranks of equal values in int32, which overflows from 65,536 on
    spearman = correlation(average_ranks(predicted), average_ranks(targets))
    error = float(mean_squared_error(torch.from_numpy(predicted), torch.from_numpy(targets)))
    return {"spearman": spearman, "pearson": correlation(predicted, targets), "mse": error}


def average_ranks(values: Floats) -> Floats:
    """Ranks of values [N], from 1 on; equal ones have the mean of theirs."""
    _, order, times = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(times) - (times - 1) / 2)[order]
    return ranks


# --- by class ---------------------------------------------------------------------------------------------------------


def confusion(task: Task, targets: Sequence[Targets], predictions: Sequence[Prediction]) -> Integers:
    """How many targets of each class (row) were taken for each class (column), int64 [C, C].

    Those without a finite prediction are not in it.
    """
    assert task.is_classification
    pairs, classes = known(task, targets, predictions), len(task.classes)
    told = pairs.predicted != _NO_CLASS
    cells = pairs.targets[told].astype(np.int64) * classes + pairs.predicted[told].astype(np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def per_class(task: Task, counts_CC: Integers) -> list[ClassScore]:
    """Of each class, in the task's order, from `confusion`."""
    right, true, predicted = np.diag(counts_CC), counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    return [
        ClassScore(name, _share(r, p), _share(r, t), _share(2 * r, t + p), int(t), int(p))
        for name, r, t, p in zip(task.classes, right, true, predicted, strict=True)
    ]


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else _UNDEFINED


# --- of several ranks -------------------------------------------------------------------------------------------------


def gathered(
    local: Sequence[tuple[int, Prediction]], count: int, device: torch.device | str = "cpu"
) -> list[Prediction]:
    """The predictions of a whole set of `count` proteins, in its order, on every data-parallel rank; collective.

    local: what this rank predicted, each with the protein's place in the set; ranks may have as many as they like, or
    none. A place that several ranks predicted (samplers fill up the last batch so) counts once. device: where the
    process group's tensors lie: the model's.
    Nothing is pickled: places, rows and numbers travel as tensors, as long as the longest rank's.
    """
    from bionemo_esm.model.parallel import data_parallel_size  # Megatron takes seconds to import

    everything = list(local) if data_parallel_size() == 1 else _of_all_ranks(local, device)
    found: list[Prediction | None] = [None] * count
    for place, prediction in everything:
        found[place] = prediction
    missing = [place for place, prediction in enumerate(found) if prediction is None]
    assert not missing, f"no rank has predicted {len(missing)} of {count} proteins, as number {missing[0]}"
    return [prediction for prediction in found if prediction is not None]


def _of_all_ranks(local: Sequence[tuple[int, Prediction]], device: torch.device | str) -> list[tuple[int, Prediction]]:
    import torch

    shapes = np.array([(place, *prediction.shape) for place, prediction in local], dtype=np.int64).reshape(-1, 3)
    numbers = [prediction.astype(np.float32, copy=False).ravel() for _, prediction in local]
    flat = np.concatenate([np.empty(0, dtype=np.float32), *numbers])
    everything: list[tuple[int, Prediction]] = []
    for their_shapes, theirs in zip(
        _all_gathered(torch.from_numpy(shapes.ravel()), device),
        _all_gathered(torch.from_numpy(flat), device),
        strict=True,
    ):
        begin, values = 0, theirs.numpy()
        for place, rows, columns in their_shapes.reshape(-1, 3).tolist():
            everything.append((place, values[begin : begin + rows * columns].reshape(rows, columns)))
            begin += rows * columns
    return everything


def _all_gathered(mine: torch.Tensor, device: torch.device | str) -> list[torch.Tensor]:
    """The vectors of all data-parallel ranks, of any lengths, on the CPU."""
    import torch
    from torch import distributed

    from bionemo_esm.model.parallel import data_parallel_group, data_parallel_size

    ranks, group = data_parallel_size(), data_parallel_group()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    distributed.all_gather(lengths, torch.tensor([len(mine)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=mine.dtype, device=device)
    padded[: len(mine)] = mine.to(device)
    theirs = [torch.empty_like(padded) for _ in range(ranks)]
    if longest:
        distributed.all_gather(theirs, padded, group=group)
    return [part[: int(length)].cpu() for part, length in zip(theirs, lengths, strict=True)]
