"""Bootstrap intervals over proteins, against a loop that builds and scores every resample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from bionemo_esm import statistics
from bionemo_esm.finetuning import metrics
from bionemo_esm.finetuning.metrics import (
    Estimate,
    decimal_places,
    differences,
    estimates,
    format_estimate,
    format_score,
    scores,
    verdict,
)
from bionemo_esm.finetuning.tasks import METRICS, Prediction, Targets, Task

RESAMPLES = 60
TASKS = {
    "classes of residues": Task(
        name="a", level="residue", kind="classification", metric="accuracy", classes=("H", "E", "C")
    ),
    "classes of proteins": Task(
        name="b", level="sequence", kind="classification", metric="f1", classes=tuple(map(str, range(40)))
    ),
    "numbers of residues": Task(name="c", level="residue", kind="regression", metric="spearman"),
    "numbers of proteins": Task(name="d", level="sequence", kind="regression", metric="mse"),
}


def labelled(task: Task, proteins: int, runs: int, skill: float = 1.0) -> tuple[list[Targets], list[list[Prediction]]]:
    """Targets far from zero with ties and NaN (two proteins entirely NaN), and runs with increasing noise."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 30, proteins) if task.is_per_residue else np.ones(proteins, dtype=int)
    if task.is_classification:
        targets = [rng.integers(0, task.outputs, length).astype(np.float32) for length in lengths]
    else:
        targets = [np.round(rng.normal(1e5, 1, length), 1).astype(np.float32) for length in lengths]

    def prediction(target: Targets, run: int) -> Prediction:
        noise = rng.normal(scale=1 + run, size=(len(target), task.outputs))
        if not task.is_classification:
            return np.round(skill * target[:, None] + noise, 1).astype(np.float32)
        right = np.eye(task.outputs)[target.astype(int)]
        return np.exp(2 * skill * right + noise).astype(np.float32)

    of_runs = [[prediction(target, run) for target in targets] for run in range(runs)]
    for target in targets:
        target[rng.random(len(target)) < 0.1] = np.nan
    for none in (3, 8):
        targets[none][:] = np.nan
    return targets, of_runs


def put_together(
    task: Task, targets: Sequence[Targets], runs: Sequence[Sequence[Prediction]], seed: int
) -> list[dict[str, float]]:
    """Return the mean over runs of each score for each resample, scored on copies of the drawn proteins."""
    known = [place for place, target in enumerate(targets) if not np.isnan(target).all()]
    found = []
    for drawn in statistics.resampled_indices(len(known), RESAMPLES, seed):
        places = [known[place] for place in drawn]
        of_runs = [scores(task, [targets[p] for p in places], [run[p] for p in places]) for run in runs]
        found.append({name: float(np.mean([one[name] for one in of_runs])) for name in METRICS[task.kind]})
    return found


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_intervals_equal_those_of_explicit_resamples(task: Task) -> None:
    targets, runs = labelled(task, 30, 2)
    each = put_together(task, targets, runs, seed=5)
    of_runs = [scores(task, targets, run) for run in runs]
    found = estimates(task, targets, runs, RESAMPLES, seed=5)
    assert list(found) == list(METRICS[task.kind])
    for name, estimate in found.items():
        low, high = np.nanpercentile([one[name] for one in each], [2.5, 97.5])
        values = [one[name] for one in of_runs]
        expected = (np.mean(values), low, high, abs(values[0] - values[1]) / math.sqrt(2))
        assert estimate == pytest.approx(expected, rel=1e-9, abs=1e-9), name
        assert low < estimate.value < high or name == "f1"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_differences_are_computed_within_each_resample(task: Task) -> None:
    targets, runs = labelled(task, 30, 3)
    first, second = runs[:1], runs[1:]
    pairs = zip(put_together(task, targets, first, 5), put_together(task, targets, second, 5), strict=True)
    each = [{name: one[name] - other[name] for name in one} for one, other in pairs]
    means = [estimates(task, targets, some, RESAMPLES, seed=5) for some in (first, second)]
    for name, difference in differences(task, targets, first, second, RESAMPLES, seed=5).items():
        low, high = np.nanpercentile([one[name] for one in each], [2.5, 97.5])
        expected = (means[0][name].value - means[1][name].value, low, high)
        assert difference[:3] == pytest.approx(expected, rel=1e-9, abs=1e-9), name
        assert math.isnan(difference.spread)
    same = differences(task, targets, first, first, RESAMPLES)
    assert all(difference[:3] == (0, 0, 0) for difference in same.values())


def test_residues_of_a_protein_are_resampled_together() -> None:
    """Each protein is entirely right or wrong: the interval is that of 20 draws, whatever the lengths."""
    task = TASKS["classes of residues"]
    targets = [np.zeros(500, dtype=np.float32) for _ in range(20)]
    run = [np.eye(3, dtype=np.float32)[np.full(500, place % 2)] for place in range(20)]
    _, low, high, _ = estimates(task, targets, [run])["accuracy"]
    assert (low, high) == pytest.approx((0.3, 0.7), abs=0.05)


def test_block_size_does_not_change_intervals_and_the_seed_fixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["numbers of residues"]
    targets, runs = labelled(task, 30, 2)
    whole = estimates(task, targets, runs, RESAMPLES)
    assert whole == estimates(task, targets, runs, RESAMPLES)
    assert whole != estimates(task, targets, runs, RESAMPLES, seed=2)
    monkeypatch.setattr(statistics, "_BLOCK_NUMBERS", 100)  # blocks of three resamples of 28 proteins
    found = estimates(task, targets, runs, RESAMPLES)
    for name, estimate in whole.items():
        assert found[name] == pytest.approx(estimate, rel=1e-12), name


def test_undefined_score_has_no_interval() -> None:
    nan = math.nan
    for task in TASKS.values():
        targets, runs = labelled(task, 30, 2)
        alone = estimates(task, targets[:1], [runs[0][:1]])
        assert all(np.isnan(estimate[1:]).all() for estimate in alone.values())
        known = next(place for place, target in enumerate(targets) if np.isfinite(target).all())
        spoilt = [np.full_like(one, nan) if place == known else one for place, one in enumerate(runs[0])]
        assert all(np.isnan(estimate).all() for estimate in estimates(task, targets, [runs[0], spoilt]).values())
        unknown = [np.full_like(target, nan) for target in targets]
        assert all(np.isnan(estimate).all() for estimate in estimates(task, unknown, runs).values())
    task = TASKS["numbers of proteins"]
    targets, runs = labelled(task, 30, 1)
    constant = [[np.full_like(one, 1e5) for one in runs[0]]]
    found = estimates(task, targets, constant)
    assert np.isnan(found["spearman"]).all()
    assert np.isnan(found["pearson"]).all()
    assert found["mse"].low < found["mse"].value < found["mse"].high
    sentence = verdict("spearman", "a", "b", differences(task, targets, runs, constant)["spearman"])
    assert sentence == "a and b cannot be compared by Spearman: it is not defined for both"


def test_residues_are_read_once_for_the_score_and_once_for_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["numbers of residues"]
    targets, runs = labelled(task, 30, 3)
    reads: list[int] = []
    read = metrics.known_pairs
    monkeypatch.setattr(metrics, "known_pairs", lambda *arguments: reads.append(1) or read(*arguments))
    estimates(task, targets, runs, RESAMPLES)
    assert len(reads) == 2 * len(runs)


@pytest.mark.parametrize(
    ("metric", "difference", "expected"),
    [
        ("accuracy", (0.021, 0.017, 0.025), "A beats B by 0.021 accuracy (0.017 to 0.025)"),
        ("f1", (-0.021, -0.025, -0.017), "B beats A by 0.021 macro F1 (0.017 to 0.025)"),
        ("mse", (-3.5, -12.25, -1), "A beats B by 3.50 MSE (1.00 to 12.25)"),
        ("mse", (12.34, 11, 13), "B beats A by 12.3 MSE (11.0 to 13.0)"),
        ("mcc", (0.01, -0.002, 0.03), "no difference is shown between A and B: MCC +0.010 (-0.002 to +0.030)"),
        ("mcc", (0.01, 0.0, 0.03), "no difference is shown between A and B: MCC +0.010 (+0.000 to +0.030)"),
    ],
)
def test_verdict_names_a_winner_only_if_the_interval_excludes_zero(
    metric: str, difference: tuple[float, float, float], expected: str
) -> None:
    assert verdict(metric, "A", "B", Estimate(*difference)) == expected


def test_numbers_are_written_with_as_many_digits_as_needed() -> None:
    scores = (0.77349, -0.0001, 4.59e-4, 0.0, 1.0, math.nan)
    assert [format_score(value, decimal_places("mcc", value)) for value in scores] == [
        *("0.773", "0.000", "0.000", "0.000", "1.000", "-"),
    ]
    errors = (4.59e-4, 1.5e-3, 0.004, 0.0, 82.847, 1234.56, 2.5e7, 1e-5, math.nan)
    assert [format_score(value, decimal_places("mse", value)) for value in errors] == [
        *("0.000459", "0.00150", "0.00400", "0.000", "82.8", "1,235", "2.50e+07", "1.00e-05", "-"),
    ]
    assert format_estimate(Estimate(2.5e7, 1e7, 3e7), "mse") == "2.50e+07 (1.00e+07 to 3.00e+07)"
    assert format_estimate(Estimate(1e-7, -0.5, 0.6), "mse", signed=True) == "+0.0000 (-0.5000 to +0.6000)"
    assert format_estimate(Estimate(0.001, 9e-5, 0.0121), "mse") == "0.00100 (0.00009 to 0.01210)"
    assert format_estimate(Estimate(0.5, math.nan, math.nan), "mcc") == "0.500"
