"""The report of a fine-tuning: the same bytes for the same numbers, all of them in it, and names that do no harm."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bionemo_esm.alphabet import encode
from bionemo_esm.finetuning.bootstrap import Estimate, differences, estimates
from bionemo_esm.finetuning.labelled import LabelledSet
from bionemo_esm.finetuning.metrics import scores
from bionemo_esm.finetuning.report import (
    TEST,
    TOO_GOOD,
    VALIDATION,
    Detail,
    Difference,
    Report,
    Row,
    SetFacts,
    lines,
    write_report,
)
from bionemo_esm.finetuning.task import Prediction, Targets, Task
from bionemo_esm.inference.inputs import Protein

CLASSES = Task("subcellular_localization", "sequence", "classification", "accuracy", ("in", "out", "a|b<i>$x\n*`"))
NUMBERS = Task("meltome", "sequence", "regression", "mse")
WITHIN = 110  # columns of a screen


def predicted(task: Task, targets: Sequence[Targets], skill: float, seed: int) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    if not task.is_classification:
        return [(skill * target[:, None] + rng.normal(size=(len(target), 1))).astype(np.float32) for target in targets]
    return [np.exp(skill * np.eye(3)[t.astype(int)] + rng.normal(size=(1, 3))).astype(np.float32) for t in targets]


def report_of(task: Task, sets: Sequence[str] = (VALIDATION, TEST), seeds: Sequence[int] = (1, 2)) -> Report:
    """Two rows on 40 proteins a set."""
    rng = np.random.default_rng(9)
    highest = task.outputs if task.is_classification else 80
    proteins = [Protein(str(at), encode("MKV"), at + 1) for at in range(40)]
    labelled = {
        name: LabelledSet(proteins, list(rng.integers(0, highest, (40, 1)).astype(np.float32)))
        for name in ("train", *sets)
    }
    rows, found = [], {}
    for name, skill in (("pretrained", 2.0), ("one-hot", 0.2)):
        runs = {which: [predicted(task, labelled[which].targets, skill, seed) for seed in seeds] for which in sets}
        of = {which: estimates(task, labelled[which].targets, runs[which], 200) for which in sets}
        each = [scores(task, labelled[VALIDATION].targets, run) for run in runs[VALIDATION]]
        rows.append(Row(name, f"{name}, linear", each, of[VALIDATION], of.get(TEST), 61.0, [3] * len(seeds), 1234))
        found[name] = runs
    on, targets = sets[-1], labelled[sets[-1]].targets
    difference = differences(task, targets, found["pretrained"][on], found["one-hot"][on], 200)
    return Report(
        task,
        {name: SetFacts.of(task, some) for name, some in labelled.items()},
        rows,
        [Difference("pretrained", "one-hot", on, difference)],
        Detail.of(task, "pretrained", on, seeds[0], targets, found["pretrained"][on][0]),
        seeds,
        200,
        ("3 proteins were left out: <b>too long</b>",),
        {"train.csv": "ab" * 32},
        {"file": Path("some/model.nemo"), "parameters": 1800000},
        {"head": {"kind": "linear", "hidden": 32}, "lr": 1e-3, "frozen": True, "lora": None},
    )


@pytest.mark.parametrize("task", [CLASSES, NUMBERS], ids=["classes", "numbers"])
@pytest.mark.parametrize("sets", [(VALIDATION, TEST), (VALIDATION,)], ids=["test", "no test"])
def test_equal_reports_are_equal_bytes_and_hold_every_number(tmp_path: Path, task: Task, sets: tuple[str, ...]) -> None:
    report = report_of(task, sets)
    written = [write_report(tmp_path / name, report_of(task, sets)) for name in ("one", "other")]
    assert [path.name for path in written[0]] == ["report.md", "report.json", "report.png"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(path.name for path in written[0])
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert written[0][2].read_bytes().startswith(b"\x89PNG")

    told = json.loads(written[0][1].read_text())
    assert list(told) == [
        *("schema", "task", "model", "data", "settings", "seeds", "resamples", "rows", "differences", "verdicts"),
        "detail",
    ]
    assert Task.from_mapping(told["task"]) == task
    for row, found in zip(report.rows, told["rows"], strict=True):
        assert found["runs_validation"] == [pytest.approx(run, rel=1e-7) for run in row.runs_validation]
        assert (found["test"] is None) == (TEST not in sets)
        for which in sets:
            for metric, estimate in row.on(which).items():
                assert list(found[which][metric].values()) == pytest.approx(estimate, rel=1e-7), (which, metric)
        assert (found["epochs"], found["seconds"], found["trained_parameters"]) == ([3, 3], 61, 1234)
    assert told["data"]["sets"]["train"]["known_targets"] == 40
    assert told["model"]["file"] == "some/model.nemo"

    page = written[0][0].read_text()
    screen = "\n".join(lines(report))
    for row in report.rows:
        for which in sets:
            value, low, high, sd = row.on(which)[task.metric]
            digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
            told_so = f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
            assert told_so in screen
            assert f"{told_so}; sd {sd:.3g}"[:-2] in page
    for text in (page, screen):
        assert report.verdicts[0].replace("\n", " ") in text.replace("\n", " ")
        assert TOO_GOOD in text.replace("\n", " ")
        assert ("There is no test set." in text.replace("\n", " ")) == (TEST not in sets)
    assert "200 times" in page
    assert max(map(len, lines(report))) <= WITHIN


def test_what_was_taken_for_what_is_in_full_in_the_json(tmp_path: Path) -> None:
    counts = np.array([[5, 0, 1], [2, 3, 0], [0, 0, 0]])
    report = dataclasses.replace(report_of(CLASSES), detail=Detail("pretrained", TEST, 1, confusion=counts))
    write_report(tmp_path, report)
    detail = json.loads((tmp_path / "report.json").read_text())["detail"]
    assert detail["confusion"] == [[0, 0, 5], [0, 2, 1], [1, 0, 2], [1, 1, 3]]
    first, second, third = detail["classes"]
    assert first == {
        **{"name": "in", "precision": pytest.approx(5 / 7), "recall": pytest.approx(5 / 6)},
        **{"f1": pytest.approx(10 / 13), "support": 6, "predicted": 7},
    }
    assert (second["precision"], second["recall"]) == (1, pytest.approx(0.6))
    assert (third["precision"], third["recall"], third["support"]) == (0, None, 0)
    page = (tmp_path / "report.md").read_text()
    assert "| in | 0.714 | 0.833 | 0.769 | 6 | 7 |" in page
    assert "| in | 5 | 0 | 1 |" in page


def test_names_out_of_files_are_neither_markdown_nor_html(tmp_path: Path) -> None:
    write_report(tmp_path, report_of(CLASSES))
    page = (tmp_path / "report.md").read_text()
    assert "a\\|b\\<i>$x \\*\\`" in page
    assert "\\<b>too long\\</b>" in page
    assert not re.search(r"(?<!\\)<", page)
    for line in page.splitlines():
        if line.startswith("|"):  # as many cells as the head of its table has
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 6, 7)


def test_very_many_classes_are_cut_on_the_page_and_whole_in_the_json(tmp_path: Path) -> None:
    task = Task("remote_homology", "sequence", "classification", "accuracy", tuple(f"fold {n}" for n in range(1195)))
    counts = np.diag(np.arange(1195)).astype(np.int64)
    facts = SetFacts(40, 120, 40, tuple(range(1195)))
    before = report_of(CLASSES)
    sets, detail = dict.fromkeys(before.sets, facts), Detail("pretrained", TEST, 1, confusion=counts)
    report = dataclasses.replace(before, task=task, sets=sets, detail=detail)
    write_report(tmp_path, report)
    page = (tmp_path / "report.md").read_text()
    assert len(page) < 20_000
    assert page.count("The 30 most frequent of 1,195 classes") == 2
    assert page.count("| fold 1194 ") == 2
    assert "fold 3 " not in page
    told = json.loads((tmp_path / "report.json").read_text())
    assert len(told["detail"]["classes"]) == 1195
    assert len(told["detail"]["confusion"]) == 1194


def test_scores_that_are_not_defined_are_dashes_and_null(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("spearman", "pearson", "mse"), Estimate(math.nan, math.nan, math.nan))
    huge = {**nothing, "mse": Estimate(1.25e14, 1e14, 1.5e14)}
    rows = [
        Row("a" * 200, "diverged", [dict.fromkeys(nothing, math.nan)], nothing, nothing),
        Row("b", "", [dict.fromkeys(nothing, 1.0)], huge, huge),
    ]
    nowhere = Detail("b", TEST, 1, pairs=np.full((5, 2), math.nan))
    report = Report(NUMBERS, {}, rows, [Difference("a", "b", TEST, nothing)], nowhere)
    write_report(tmp_path, report)
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]
    assert row["test"]["mse"] == {"value": None, "low": None, "high": None, "spread": None}
    assert "cannot be compared by MSE" in (tmp_path / "report.md").read_text()
    shown = lines(report)
    assert max(map(len, shown)) <= WITHIN
    assert shown[1].split()[1:] == ["-", "-", "-"]
    assert "1.25e+14 (1.00e+14 to 1.50e+14)" in shown[2]


def test_a_report_that_cannot_be_made_leaves_no_file_half_written(tmp_path: Path) -> None:
    report = dataclasses.replace(report_of(CLASSES), settings={"a": object()})
    with pytest.raises(TypeError):
        write_report(tmp_path, report)
    assert [path.name for path in tmp_path.iterdir()] == []
