"""Metrics of fine-tuned models against scikit-learn and SciPy, gathering over ranks, and the composition baseline."""

from __future__ import annotations

import math
import os
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import distributed

from bionemo_esm.alphabet import encode
from bionemo_esm.finetuning.batches import gather_predictions
from bionemo_esm.finetuning.comparison import composition, fitted_composition
from bionemo_esm.finetuning.metrics import confusion, per_class, scores
from bionemo_esm.finetuning.splits import LabelledDataset, Splits
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.parallel import ensure_groups
from faults import FORK_SERVER

LETTERS = Task(name="letters", level="residue", kind="classification", metric="accuracy", classes=tuple("HECXY"))
NUMBERS = Task(name="numbers", level="residue", kind="regression", metric="spearman")
EACH = Task(name="each", level="sequence", kind="classification", metric="f1", classes=("a", "b", "c"))


def classified(seed: int, classes: int, lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return targets of the first `classes` - 1 classes, some of them NaN, and probabilities of all classes."""
    rng = np.random.default_rng(seed)
    targets = [rng.integers(0, classes - 1, length).astype(np.float32) for length in lengths]
    for target in targets:
        target[rng.random(len(target)) < 0.2] = np.nan
    return targets, [rng.dirichlet(np.ones(classes), length).astype(np.float32) for length in lengths]


def measured(seed: int, lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return targets far from zero with ties and NaN, and correlated predictions, also with ties."""
    rng = np.random.default_rng(seed)
    targets = [np.round(1000 + rng.normal(size=length), 1).astype(np.float32) for length in lengths]
    predictions = [np.round(t[:, None] + rng.normal(size=(len(t), 1)), 1).astype(np.float32) for t in targets]
    for target in targets:
        target[rng.random(len(target)) < 0.2] = np.nan
    return targets, predictions


@pytest.mark.parametrize("lengths", [[3, 1, 40, 7], [1] * 300, [2000]], ids=["few", "many short", "one long"])
def test_classification_metrics_equal_scikit_learn(lengths: list[int]) -> None:
    targets, predictions = classified(1, 5, lengths)
    true, told = np.concatenate(targets), np.concatenate(predictions).argmax(axis=1)
    true, told = true[~np.isnan(true)], told[~np.isnan(true)]
    found = scores(LETTERS, targets, predictions)
    assert list(found) == ["accuracy", "f1", "mcc"]
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(true, told), abs=1e-12)
    there = np.unique(true)
    assert 4 in told
    assert 4 not in there  # macro F1 leaves out a class without targets
    expected = sklearn_metrics.f1_score(true, told, labels=there, average="macro")
    assert found["f1"] == pytest.approx(expected, abs=1e-12)
    assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(true, told), abs=1e-12)

    counts = confusion(LETTERS, targets, predictions)
    assert counts.dtype == np.int64
    assert np.array_equal(counts, sklearn_metrics.confusion_matrix(true, told, labels=range(5)))
    by_class = sklearn_metrics.precision_recall_fscore_support(true, told, labels=range(5), zero_division=np.nan)
    for at, score in enumerate(per_class(LETTERS, counts)):
        expected = [by_class[0][at], by_class[1][at], by_class[2][at], by_class[3][at]]
        assert score.name == "HECXY"[at]
        assert list(score[1:5]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("lengths", [[3, 1, 40, 7], [1] * 300, [2000]], ids=["few", "many short", "one long"])
def test_regression_metrics_equal_scipy(lengths: list[int]) -> None:
    targets, predictions = measured(2, lengths)
    true, told = np.concatenate(targets).astype(float), np.concatenate(predictions)[:, 0].astype(float)
    true, told = true[~np.isnan(true)], told[~np.isnan(true)]
    found = scores(NUMBERS, targets, predictions)
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, told).statistic, abs=1e-9)
    assert found["pearson"] == pytest.approx(stats.pearsonr(true, told).statistic, abs=1e-9)
    assert found["mse"] == pytest.approx(np.mean((true - told) ** 2), rel=1e-9)


def test_spearman_with_very_many_ties_equals_scipy() -> None:
    rng = np.random.default_rng(3)
    targets = [rng.integers(0, 2, 200_000).astype(np.float32)]
    predictions = [(targets[0] + rng.normal(size=200_000))[:, None].astype(np.float32)]
    expected = stats.spearmanr(targets[0], predictions[0][:, 0]).statistic
    assert scores(NUMBERS, targets, predictions)["spearman"] == pytest.approx(expected, abs=1e-9)


def test_undefined_metrics_are_nan_without_error_or_warning() -> None:
    def of(task: Task, target: list[float], told: list[list[float]]) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return scores(task, [np.array(target, dtype=np.float32)], [np.array(told, dtype=np.float32)])

    a, b = [1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]
    assert of(LETTERS, [0, 0], [a, a]) == pytest.approx({"accuracy": 1, "f1": 1, "mcc": math.nan}, nan_ok=True)
    assert of(LETTERS, [0, 1], [a, a]) == pytest.approx({"accuracy": 0.5, "f1": 1 / 3, "mcc": 0})
    assert of(LETTERS, [0, 1], [b, a]) == pytest.approx({"accuracy": 0, "f1": 0, "mcc": -1})
    nothing = dict.fromkeys(("accuracy", "f1", "mcc"), math.nan)
    assert of(LETTERS, [math.nan], [a]) == pytest.approx(nothing, nan_ok=True)
    assert of(LETTERS, [0, 1], [a, [math.nan] * 5]) == pytest.approx(nothing, nan_ok=True)
    assert scores(LETTERS, [], []) == pytest.approx(nothing, nan_ok=True)

    nan = math.nan
    for target, told, expected in (
        ([1, 2], [[1], [2]], {"spearman": nan, "pearson": nan, "mse": 0}),
        ([1, 2, 3], [[5], [5], [5]], {"spearman": nan, "pearson": nan, "mse": 29 / 3}),
        ([2, 2, 2], [[1], [2], [3]], {"spearman": nan, "pearson": nan, "mse": 2 / 3}),
        ([1, 2, 3], [[1], [nan], [3]], {"spearman": nan, "pearson": nan, "mse": nan}),
        ([1, nan, 2, 3], [[1], [nan], [2], [3]], {"spearman": 1, "pearson": 1, "mse": 0}),
        ([nan], [[1]], {"spearman": nan, "pearson": nan, "mse": nan}),
    ):
        assert of(NUMBERS, target, told) == pytest.approx(expected, nan_ok=True)


def test_predictions_of_another_shape_fail_an_assertion() -> None:
    one = [np.zeros(3, dtype=np.float32)]
    with pytest.raises(AssertionError, match="for 3 targets"):
        scores(LETTERS, one, [np.zeros((2, 5), dtype=np.float32)])
    with pytest.raises(AssertionError, match="1 proteins, 0 predictions"):
        scores(LETTERS, one, [])


# --- several ranks ----------------------------------------------------------------------------------------------------


def whole_set(columns: int) -> list[Prediction]:
    rng = np.random.default_rng(4)
    predictions = [rng.normal(size=(length, columns)).astype(np.float32) for length in (3, 1, 700, 2, 5, 40, 1)]
    predictions[3][0, 0] = np.nan
    return predictions


SHARES = {2: [[6, 0, 3], [1, 2, 4, 5, 0]], 3: [[5, 1, 0, 6], [], [4, 3, 2]]}
"""Dataset positions that each rank predicts, out of order; one rank has none, one position is predicted twice."""


def on_a_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
        ensure_groups()
        for columns in (1, 3):
            everything = whole_set(columns)
            found = gather_predictions([(place, everything[place]) for place in SHARES[ranks][rank]], len(everything))
            for prediction, expected in zip(found, everything, strict=True):
                assert prediction.dtype == np.float32
                np.testing.assert_array_equal(prediction, expected)
        assert gather_predictions([], 0) == []
        with pytest.raises(AssertionError, match="no rank has predicted 1 of 2 proteins, as number 1"):
            gather_predictions([(0, everything[0])], 2)
        (folder / f"done-{rank}").touch()
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gathers_all_predictions_in_dataset_order(tmp_path: Path, ranks: int) -> None:
    processes = [FORK_SERVER.Process(target=on_a_rank, args=(rank, ranks, tmp_path)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert not [path.read_text() for path in tmp_path.glob("error-*")]
    assert len(list(tmp_path.glob("done-*"))) == ranks


def test_one_process_puts_its_predictions_in_dataset_order() -> None:
    everything = whole_set(2)
    found = gather_predictions([(place, everything[place]) for place in (3, 1, 0, 2, 6, 5, 4)], 7)
    assert all(one is other for one, other in zip(found, everything, strict=True))


# --- composition ------------------------------------------------------------------------------------------------------


def proteins(*sequences: str) -> list[Protein]:
    return [Protein(str(at), encode(sequence), at + 1) for at, sequence in enumerate(sequences)]


def test_residue_baseline_predicts_the_mean_target_of_each_amino_acid() -> None:
    nan = np.nan
    task = Task(name="letters", level="residue", kind="classification", metric="accuracy", classes=("H", "E"))
    train = LabelledDataset(proteins("AAK", "AC"), [np.float32([0, 1, 1]), np.float32([0, nan])])
    found = fitted_composition(Splits(task, train, train, None))(proteins("AKCX"))
    assert found[0].dtype == np.float32
    assert found[0] == pytest.approx(np.array([[2 / 3, 1 / 3], [0, 1], [1 / 2, 1 / 2], [1 / 2, 1 / 2]]))

    task = Task(name="numbers", level="residue", kind="regression", metric="mse")
    train = LabelledDataset(proteins("AAK", "AC"), [np.float32([1, 2, 8]), np.float32([3, nan])])
    found = fitted_composition(Splits(task, train, train, None))(proteins("AK", "C"))
    assert found[0] == pytest.approx(np.array([[2], [8]]))
    assert found[1] == pytest.approx(np.array([[3.5]]))


def test_protein_baseline_is_linear_in_composition_and_log_length() -> None:
    features = composition(proteins("AAKX"))
    assert features.shape == (1, 21)
    assert features[0, -1] == pytest.approx(math.log(4))
    assert sorted(features[0, :-1])[-3:] == [0, 0.25, 0.5]

    rng = np.random.default_rng(5)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 60)) for _ in range(120)]
    share = np.float32([sequence.count("K") / 60 for sequence in sequences])
    task = Task(name="numbers", level="sequence", kind="regression", metric="mse")
    train = LabelledDataset(proteins(*sequences[:80]), [np.float32([100 * value]) for value in share[:80]])
    train.targets[0][:] = np.nan
    validation = LabelledDataset(proteins(*sequences[80:]), [np.float32([100 * value]) for value in share[80:]])
    found = fitted_composition(Splits(task, train, validation, None))(validation.proteins)
    assert all(one.shape == (1, 1) and one.dtype == np.float32 for one in found)
    assert scores(task, validation.targets, found)["pearson"] > 0.999
    again = fitted_composition(Splits(task, train, validation, None))(validation.proteins)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))

    lysines = [np.float32([2 * (value > 0.1)]) for value in share]  # the second class never occurs
    train = LabelledDataset(proteins(*sequences[:80]), lysines[:80])
    validation = LabelledDataset(proteins(*sequences[80:]), lysines[80:])
    found = fitted_composition(Splits(EACH, train, validation, None))(validation.proteins)
    assert all(one.shape == (1, 3) and one[0, 1] == 0 for one in found)
    assert np.concatenate(found).sum(axis=1) == pytest.approx(np.ones(40), abs=1e-6)
    assert scores(EACH, validation.targets, found)["accuracy"] > 0.85
    assert fitted_composition(Splits(EACH, train, validation, None))([]) == []


def test_validation_set_chooses_the_regularisation_of_the_baseline() -> None:
    rng = np.random.default_rng(6)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 50)) for _ in range(60)]
    noise = [np.float32([value]) for value in rng.normal(size=60)]
    task = Task(name="noise", level="sequence", kind="regression", metric="mse")
    train = LabelledDataset(proteins(*sequences[:30]), noise[:30])
    spread = []
    # Unseen noise, then the training set itself.
    for validation in (LabelledDataset(proteins(*sequences[30:]), noise[30:]), train):
        found = fitted_composition(Splits(task, train, validation, None))(proteins(*sequences))
        spread.append(np.concatenate(found).std())
    assert spread[0] < 0.7 * spread[1]
