"""What a fine-tuning came to, beside its baselines: for the screen, a paper's supplement, programs, and as a picture.

Equal reports give equal bytes; nothing holds a date. Names out of files (classes, paths) may hold anything: they are
made harmless to Markdown.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.finetuning.bootstrap import RESAMPLES, Estimate, in_brackets, verdict
from bionemo_esm.finetuning.labelled import LabelledSet
from bionemo_esm.finetuning.metrics import METRIC_NAMES, ClassScore, confusion, known, per_class
from bionemo_esm.finetuning.task import METRICS, Prediction, Targets, Task
from bionemo_esm.outputs import written_whole

TRAIN, VALIDATION, TEST = "train", "validation", "test"
TOO_GOOD = "Validation chose the epoch, so its numbers are a little too good."
_SCHEMA = 1
_SCREEN = 110  # columns
_FEW = 30  # proteins, of which fewer are too few to be resampled well
_SEEN = "in the training set too"  # in a note of the data: what makes a score too good


@dataclass(frozen=True)
class Row:
    """One way to predict, over one or more training runs."""

    name: str  # "pretrained", "one-hot"
    description: str
    runs_validation: Sequence[Mapping[str, float]]  # for each seed the scores, by metric
    validation: Mapping[str, Estimate]  # by metric
    test: Mapping[str, Estimate] | None = None
    seconds: float | None = None  # of training, all runs together
    epochs: Sequence[int] = ()  # for each seed, up to the one that was kept
    parameters: int | None = None  # trained
    epochs_made: Sequence[int] = ()  # for each seed, with those after the one that was kept

    def on(self, which: str) -> Mapping[str, Estimate] | None:
        """Its estimates on validation or test."""
        return self.validation if which == VALIDATION else self.test


@dataclass(frozen=True)
class Difference:
    """By how much one row is above another, on the same proteins."""

    one: str
    other: str
    on: str
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class SetFacts:
    """How much a set holds."""

    proteins: int
    residues: int
    known: int  # targets
    classes: tuple[int, ...] = ()  # targets of each class, in the task's order

    @classmethod
    def of(cls, task: Task, labelled: LabelledSet) -> SetFacts:
        counts: tuple[int, ...] = ()
        if task.is_classification:
            targets = np.concatenate(labelled.targets)
            found = np.bincount(targets[~np.isnan(targets)].astype(np.int64), minlength=task.outputs)
            counts = tuple(int(count) for count in found)
        return cls(len(labelled), int(labelled.lengths.sum()), labelled.known, counts)


@dataclass(frozen=True)
class Detail:
    """One run of one row in full: which class was taken for which, or what was predicted for what was measured."""

    row: str
    on: str
    seed: int
    confusion: NDArray[np.int64] | None = None  # [C, C], of a classification; a row for each true class
    pairs: NDArray[np.float64] | None = None  # [N, 2], of a regression: measured, predicted

    @classmethod
    def of(
        cls, task: Task, row: str, on: str, seed: int, targets: Sequence[Targets], predictions: Sequence[Prediction]
    ) -> Detail:
        if task.is_classification:
            return cls(row, on, seed, confusion=confusion(task, targets, predictions))
        compared = known(task, targets, predictions)
        return cls(row, on, seed, pairs=np.stack([compared.targets, compared.predicted], axis=1))


@dataclass(frozen=True)
class Report:
    """Everything that is told."""

    task: Task
    sets: Mapping[str, SetFacts]  # by name: train, validation and, where there is one, test
    rows: Sequence[Row]
    differences: Sequence[Difference] = ()
    detail: Detail | None = None
    seeds: Sequence[int] = ()
    resamples: int = RESAMPLES  # that the intervals are of
    notes: Sequence[str] = ()  # of the data: what was left out, was missing, or was split off
    files: Mapping[str, str] = field(default_factory=dict)  # by name of a data file: SHA-256
    model: Mapping[str, Any] = field(default_factory=dict)  # plain values: file, sha256, parameters, family
    settings: Mapping[str, Any] = field(default_factory=dict)  # plain values

    @property
    def measured_on(self) -> tuple[str, ...]:
        """The sets with scores, that which counts first."""
        return (TEST, VALIDATION) if any(row.test is not None for row in self.rows) else (VALIDATION,)

    @property
    def class_scores(self) -> list[ClassScore]:
        """Of the detail, none where there is nothing of the kind."""
        if self.detail is None or self.detail.confusion is None:
            return []
        return per_class(self.task, self.detail.confusion)

    @property
    def runs(self) -> int:
        """Training runs of the row that has most."""
        return max(len(row.runs_validation) for row in self.rows)

    def seen(self, which: str) -> list[str]:
        """Notes that proteins of a set are in the training set."""
        return [note for note in self.notes if _SEEN in note and re.search(rf"\b{which}\b", note)]

    def too_few(self, which: str) -> str:
        """A sentence where a set is too small for its intervals; or nothing."""
        proteins = self.sets[which].proteins if which in self.sets else _FEW
        return "" if proteins >= _FEW else f"The {which} set has {proteins} proteins: its intervals are rough."

    @property
    def unfinished(self) -> str:
        """A sentence on the rows whose best epoch was the last that they were allowed; or nothing.

        Patience ends a run only when epochs have passed since its best, so one that ends with it was out of epochs.
        """
        found = []
        for row in self.rows:
            made = row.epochs_made
            count = sum(best == last for best, last in zip(row.epochs, made, strict=True)) if made else 0
            found += [row.name if count == len(made) else f"{row.name} ({count} of {len(made)} runs)"] if count else []
        most = max((made for row in self.rows for made in row.epochs_made), default=0)
        return f"Still improving when it ended at tuning.max_epochs={most}: {', '.join(found)}." if found else ""

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each difference, by the task's metric."""
        metric = self.task.metric
        return [
            f"On {difference.on}, {verdict(metric, difference.one, difference.other, difference.estimates[metric])}."
            for difference in self.differences
        ]


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write report.json, report.png and report.md, each whole, over what is there; their paths, report.md first."""
    from bionemo_esm.finetuning.picture import draw
    from bionemo_esm.finetuning.report_page import page

    texts = {"report.json": json.dumps(as_json(report), indent=1, allow_nan=False) + "\n", "report.md": page(report)}
    draw(report, folder / "report.png")
    for name, text in texts.items():
        with written_whole(folder / name) as stream:
            stream.write(text.encode())
    return [folder / name for name in ("report.md", "report.json", "report.png")]


# --- for the screen ---------------------------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """The table and the verdicts, at most 110 columns wide; the task's own metric stands first."""
    found = []
    metrics = metrics_of(report.task)
    for which in report.measured_on:
        cells = [[cell(row.on(which), metric) for metric in metrics] for row in report.rows]
        table = [[METRIC_NAMES[metric] for metric in metrics], *cells]
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        width = min(max(len(row.name) for row in report.rows), _SCREEN - sum(wide) - 2 * len(wide) - 2)
        for name, texts in zip((which, *(f"  {cut(row.name, width)}" for row in report.rows)), table, strict=True):
            columns = "".join(f"  {text:{w}}" for text, w in zip(texts, wide, strict=True))
            found.append(f"{name:{width + 2}}{columns}".rstrip())
        for remark in filter(None, (*report.seen(which), report.too_few(which))):
            found += textwrap.wrap(remark, _SCREEN, initial_indent="  ", subsequent_indent="  ")
    for sentence in filter(None, (*report.verdicts, report.unfinished, how_made(report))):
        found += textwrap.wrap(sentence, _SCREEN)
    return found


def metrics_of(task: Task) -> list[str]:
    """Those of the task's kind, its own first."""
    return sorted(METRICS[task.kind], key=lambda name: name != task.metric)


def cell(of: Mapping[str, Estimate] | None, metric: str) -> str:
    """`0.773 (0.765 to 0.781)`, or what of it there is."""
    return "-" if of is None else in_brackets(of[metric], metric)


def how_made(report: Report) -> str:
    """How the numbers and their intervals come about, and what validation's are worth."""
    mean = f"Means over {report.runs} training runs" if report.runs > 1 else "Of one training run"
    without = "" if TEST in report.measured_on else " There is no test set."
    return f"{mean}; in brackets what 95% of resamples of the proteins come to.{without} {TOO_GOOD}"


def cut(name: str, longest: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


# --- for programs -----------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Plain values of everything but single predictions; NaN is None, paths are texts, numbers have eight digits."""
    detail = report.detail
    cells = np.empty((0, 3)) if detail is None or detail.confusion is None else _cells(detail.confusion)
    found = {
        "schema": _SCHEMA,
        "task": report.task.to_dict(),
        "model": report.model,
        "data": {
            "sets": {
                name: {
                    "proteins": facts.proteins,
                    "residues": facts.residues,
                    "known_targets": facts.known,
                    "classes": dict(zip(report.task.classes, facts.classes, strict=True)) if facts.classes else {},
                }
                for name, facts in report.sets.items()
            },
            "notes": report.notes,
            "files": report.files,
        },
        "settings": report.settings,
        "seeds": report.seeds,
        "resamples": report.resamples,
        "rows": [_row(row) for row in report.rows],
        "differences": [
            {"one": one.one, "other": one.other, "on": one.on, "metrics": _estimates(one.estimates)}
            for one in report.differences
        ],
        "verdicts": report.verdicts,
        "detail": None
        if detail is None
        else {
            **{"row": detail.row, "on": detail.on, "seed": detail.seed},
            "classes": [score._asdict() for score in report.class_scores],
            "confusion": cells.tolist(),  # number of the true class, of the predicted one, targets; none is 0
        },
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "description": row.description,
        "runs_validation": row.runs_validation,
        "validation": _estimates(row.validation),
        "test": None if row.test is None else _estimates(row.test),
        "seconds": row.seconds,
        "epochs": row.epochs,
        "epochs_made": row.epochs_made,
        "trained_parameters": row.parameters,
    }


def _estimates(of: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: estimate._asdict() for name, estimate in of.items()}


def _cells(counts_CC: NDArray[np.int64]) -> NDArray[np.int64]:
    true, predicted = np.nonzero(counts_CC)
    return np.stack([true, predicted, counts_CC[true, predicted]], axis=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value
