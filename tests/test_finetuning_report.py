"""The report of a fine-tuning: deterministic bytes, complete numbers, and escaped names."""

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
from bionemo_esm.finetuning.comparison import write_report
from bionemo_esm.finetuning.metrics import Estimate, differences, estimates, scores
from bionemo_esm.finetuning.report import (
    OPTIMISTIC,
    TEST,
    VALIDATION,
    Detail,
    Difference,
    Report,
    Row,
    SetFacts,
    lines,
)
from bionemo_esm.finetuning.report import page as page_of
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import Prediction, Targets, Task
from bionemo_esm.inference.inputs import Protein

CLASSES = Task(
    name="subcellular_localization",
    level="sequence",
    kind="classification",
    metric="accuracy",
    classes=("in", "out", "a|b<i>$x\n*`"),
)
NUMBERS = Task(name="meltome", level="sequence", kind="regression", metric="mse")
WITHIN = 110  # terminal columns


def predicted(task: Task, targets: Sequence[Targets], skill: float, seed: int) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    if not task.is_classification:
        return [(skill * target[:, None] + rng.normal(size=(len(target), 1))).astype(np.float32) for target in targets]
    return [np.exp(skill * np.eye(3)[t.astype(int)] + rng.normal(size=(1, 3))).astype(np.float32) for t in targets]


def report_of(task: Task, sets: Sequence[str] = (VALIDATION, TEST), seeds: Sequence[int] = (1, 2)) -> Report:
    """Return a report with two rows and 40 proteins per set."""
    rng = np.random.default_rng(9)
    highest = task.outputs if task.is_classification else 80
    proteins = [Protein(str(at), encode("MKV"), at + 1) for at in range(40)]
    labelled = {
        name: LabelledDataset(proteins, list(rng.integers(0, highest, (40, 1)).astype(np.float32)))
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
def test_equal_reports_have_equal_bytes_and_every_number(tmp_path: Path, task: Task, sets: tuple[str, ...]) -> None:
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
    console = "\n".join(lines(report))
    for row in report.rows:
        for which in sets:
            value, low, high, sd = row.on(which)[task.metric]
            digits = 0 if task is NUMBERS else 3
            told_so = f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
            assert told_so in console
            assert f"{told_so}; sd {sd:,.{digits}f}" in page
    for text in (page, console):
        assert report.verdicts[0].replace("\n", " ") in text.replace("\n", " ")
        assert text.replace("\n", " ").count(OPTIMISTIC) == 1
        assert ("There is no test set." in text.replace("\n", " ")) == (TEST not in sets)
    assert "200 times" in page
    assert max(map(len, lines(report))) <= WITHIN


def test_the_json_has_the_full_confusion_matrix(tmp_path: Path) -> None:
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


def test_names_from_files_are_escaped_in_markdown(tmp_path: Path) -> None:
    write_report(tmp_path, report_of(CLASSES))
    page = (tmp_path / "report.md").read_text()
    assert "a\\|b\\<i>$x \\*\\`" in page
    assert "\\<b>too long\\</b>" in page
    assert not re.search(r"(?<!\\)<", page)
    for line in page.splitlines():
        if line.startswith("|"):  # as many cells as the table's header
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 6, 7)


def test_many_classes_are_truncated_on_the_page_and_complete_in_the_json(tmp_path: Path) -> None:
    task = Task(
        name="remote_homology",
        level="sequence",
        kind="classification",
        metric="accuracy",
        classes=tuple(f"fold {n}" for n in range(1195)),
    )
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


def test_undefined_scores_are_dashes_and_null(tmp_path: Path) -> None:
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


def test_a_report_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    report = dataclasses.replace(report_of(CLASSES), settings={"a": object()})
    with pytest.raises(TypeError):
        write_report(tmp_path, report)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_classes_are_in_the_order_of_the_task_in_every_table() -> None:
    counts = np.array([[1, 0, 0], [0, 9, 0], [0, 0, 5]])
    sets = dict.fromkeys(("train", VALIDATION, TEST), SetFacts(40, 120, 15, (1, 9, 5)))
    report = dataclasses.replace(report_of(CLASSES), sets=sets, detail=Detail("pretrained", TEST, 1, confusion=counts))
    tables = re.findall(r"^\| (in|out|a\\\|b)\S* .*\|$", page_of(report), re.MULTILINE)
    assert tables == ["in", "out", "a\\|b"] * 3


def test_the_explanation_of_numbers_fits_the_seeds_and_the_level() -> None:
    of_proteins = page_of(report_of(CLASSES))
    assert "(seeds 1, 2); sd is" in of_proteins
    assert "residues of a protein are drawn together" not in of_proteins
    residues = CLASSES.replace(level="residue")
    one = page_of(dataclasses.replace(report_of(CLASSES, seeds=(1,)), task=residues))
    assert "that of one training run (seed 1)." in one
    assert "residues of a protein are drawn together" in one
    assert "sd" not in one


@pytest.mark.parametrize(("mode", "told"), [("frozen", False), ("full", True), ("lora", True)])
def test_encoder_settings_are_listed_only_if_the_encoder_was_trained(mode: str, told: bool) -> None:
    tuning = {"mode": mode, "lr": 1e-3, "encoder_lr": 1e-4, "layer_decay": 0.9, "keep_adapters": False}
    text = page_of(dataclasses.replace(report_of(CLASSES), settings={"tuning": tuning}))
    assert "| tuning.lr |" in text
    for key in ("encoder_lr", "layer_decay", "keep_adapters"):
        assert (f"| tuning.{key} |" in text) == told


def test_rows_that_reached_max_epochs_while_improving_are_noted() -> None:
    report = report_of(CLASSES)
    first, second = report.rows
    for made, expected in (
        (([3, 3], [3, 3]), "tuning.max_epochs=3: pretrained, one-hot."),
        (([4, 3], [8, 8]), "tuning.max_epochs=8: pretrained (1 of 2 runs)."),
        (([8, 8], [8, 8]), None),
        (((), ()), None),
    ):
        rows = [dataclasses.replace(row, epochs_made=of) for row, of in zip((first, second), made, strict=True)]
        some = dataclasses.replace(report, rows=rows)
        for text in (page_of(some), " ".join(lines(some))):
            assert ("Still improving" in text) == (expected is not None)
            assert expected is None or expected in text


def test_a_warning_about_a_score_is_below_its_table() -> None:
    seen = "24 of 30 test proteins are in the training set too: the test scores are not those of new proteins"
    report = report_of(CLASSES)
    few = {**report.sets, VALIDATION: dataclasses.replace(report.sets[VALIDATION], proteins=29)}
    doubtful = dataclasses.replace(report, notes=(seen, "test: 3 left out"), sets=few)
    parts = re.split(r"^## ", page_of(doubtful), flags=re.MULTILINE)
    on_test, on_validation = parts[1], parts[2]
    assert on_test.endswith(f"|\n\n**{seen}**\n\n")
    assert "The validation set has 29 proteins: its intervals are rough." in on_validation
    assert seen not in on_validation
    assert "rough" not in on_test
    console = lines(doubtful)
    assert console[3].strip() == seen
    assert sum("rough" in line for line in console) == 1
    assert not any("rough" in line or "too:" in line for line in lines(report))


@pytest.mark.parametrize(("seconds", "told"), [(0.04, "0.0 s"), (12.3, "12 s"), (59.8, "1:00"), (61, "1:01")])
def test_times_below_a_minute_are_in_seconds(seconds: float, told: str) -> None:
    report = report_of(CLASSES)
    text = page_of(dataclasses.replace(report, rows=[dataclasses.replace(report.rows[0], seconds=seconds)]))
    assert f"| {told} |" in text
