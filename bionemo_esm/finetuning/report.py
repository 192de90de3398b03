"""The report of a fine-tuning and its baselines: its data, and as lines for the screen, JSON and Markdown.

Equal reports give equal bytes; nothing holds a date. Names from files (classes, paths) are escaped in Markdown.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.console import duration
from bionemo_esm.finetuning.config import FROZEN
from bionemo_esm.finetuning.metrics import (
    METRIC_NAMES,
    RESAMPLES,
    ClassScore,
    Estimate,
    confusion,
    decimal_places,
    format_estimate,
    format_score,
    known_pairs,
    per_class,
    verdict,
)
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import LOWER_IS_BETTER, METRICS, Prediction, Targets, Task

TRAIN, VALIDATION, TEST = "train", "validation", "test"
OPTIMISTIC = "The epoch was chosen on validation, so validation scores are slightly optimistic."
_SCHEMA = 1
_SCREEN = 110  # columns
_FEW = 30  # proteins; intervals of fewer are rough
_SEEN = "in the training set too"  # in a note: the score is optimistic


@dataclass(frozen=True)
class Row:
    """One method, over one or more training runs."""

    name: str  # "pretrained", "one-hot"
    description: str
    runs_validation: Sequence[Mapping[str, float]]  # for each seed the scores, by metric
    validation: Mapping[str, Estimate]  # by metric
    test: Mapping[str, Estimate] | None = None
    seconds: float | None = None  # of training, all runs together
    epochs: Sequence[int] = ()  # for each seed, the epoch that was kept
    parameters: int | None = None  # trained
    epochs_made: Sequence[int] = ()  # for each seed, all epochs

    def on(self, which: str) -> Mapping[str, Estimate] | None:
        """Return the estimates on validation or test."""
        return self.validation if which == VALIDATION else self.test


@dataclass(frozen=True)
class Difference:
    """The scores of one row less those of another, on the same proteins."""

    one: str
    other: str
    on: str
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class SetFacts:
    """The size of a set."""

    proteins: int
    residues: int
    known: int  # targets
    classes: tuple[int, ...] = ()  # targets of each class, in the task's order

    @classmethod
    def of(cls, task: Task, labelled: LabelledDataset) -> SetFacts:
        counts: tuple[int, ...] = ()
        if task.is_classification:
            targets = np.concatenate(labelled.targets)
            found = np.bincount(targets[~np.isnan(targets)].astype(np.int64), minlength=task.outputs)
            counts = tuple(int(count) for count in found)
        return cls(len(labelled), int(labelled.lengths.sum()), labelled.known, counts)


@dataclass(frozen=True)
class Detail:
    """One run of one row: its confusion matrix, or pairs of measured and predicted values."""

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
        compared = known_pairs(task, targets, predictions)
        return cls(row, on, seed, pairs=np.stack([compared.targets, compared.predicted], axis=1))


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    task: Task
    sets: Mapping[str, SetFacts]  # by name: train, validation and, where there is one, test
    rows: Sequence[Row]
    differences: Sequence[Difference] = ()
    detail: Detail | None = None
    seeds: Sequence[int] = ()
    resamples: int = RESAMPLES  # of the intervals
    notes: Sequence[str] = ()  # on the data: records left out, missing values, random splits
    files: Mapping[str, str] = field(default_factory=dict)  # by name of a data file: SHA-256
    model: Mapping[str, Any] = field(default_factory=dict)  # plain values: file, sha256, parameters, family
    settings: Mapping[str, Any] = field(default_factory=dict)  # plain values

    @property
    def measured_on(self) -> tuple[str, ...]:
        """The sets with scores, the test set first."""
        return (TEST, VALIDATION) if any(row.test is not None for row in self.rows) else (VALIDATION,)

    @property
    def class_scores(self) -> list[ClassScore]:
        """Scores of each class, of the detail; none for a regression."""
        if self.detail is None or self.detail.confusion is None:
            return []
        return per_class(self.task, self.detail.confusion)

    @property
    def runs(self) -> int:
        """The largest number of training runs of a row."""
        return max(len(row.runs_validation) for row in self.rows)

    def seen(self, which: str) -> list[str]:
        """Return the notes that proteins of a set are in the training set."""
        return [note for note in self.notes if _SEEN in note and re.search(rf"\b{which}\b", note)]

    def too_few(self, which: str) -> str:
        """Return a sentence if a set is too small for its intervals, else ""."""
        proteins = self.sets[which].proteins if which in self.sets else _FEW
        return "" if proteins >= _FEW else f"The {which} set has {proteins} proteins: its intervals are rough."

    @property
    def unfinished(self) -> str:
        """A sentence on the rows whose best epoch was the last one, else "".

        Early stopping ends a run some epochs after its best one, so such a run reached tuning.max_epochs.
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


# --- for the screen ---------------------------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """Return the table and the verdicts, at most 110 columns wide, the task's own metric first."""
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
    """Return the metrics of the task's kind, its own first."""
    return sorted(METRICS[task.kind], key=lambda name: name != task.metric)


def cell(of: Mapping[str, Estimate] | None, metric: str) -> str:
    """Return `0.773 (0.765 to 0.781)`, or `-` without estimates."""
    return "-" if of is None else format_estimate(of[metric], metric)


def how_made(report: Report) -> str:
    """Return a sentence on how scores and intervals were computed."""
    mean = f"Means over {report.runs} training runs" if report.runs > 1 else "Of one training run"
    without = "" if TEST in report.measured_on else " There is no test set."
    return f"{mean}; in brackets the 95% bootstrap intervals over proteins.{without} {OPTIMISTIC}"


def cut(name: str, longest: int) -> str:
    """Return a name of at most so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


# --- for programs -----------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Return all but single predictions as plain values; NaN is None, paths are text, numbers have eight digits."""
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
            "confusion": cells.tolist(),  # true class, predicted class, targets; counts of 0 are left out
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


_MEANINGS = {
    "accuracy": "share of targets whose class has the highest probability.",
    "f1": "mean over the classes that occur among the targets, each with the same weight, of F1.",
    "mcc": "Matthews' correlation for several classes (Gorodkin 2004); 0: no better than a constant class.",
    "spearman": "correlation of ranks, those of equal values averaged.",
    "pearson": "correlation of values.",
    "mse": "mean squared error, in the square of the target's unit; lower is better.",
}
_MOST_CLASSES = 30  # that a table lists
_MOST_ACROSS = 12  # classes of a confusion matrix
_OF_ENCODERS = ("encoder_lr", "layer_decay", "keep_adapters")  # of tuning: unused if the encoder is frozen


def page(report: Report) -> str:
    """Return the report as Markdown."""
    task = report.task
    kind = f"{task.kind} of each {'residue' if task.is_per_residue else 'protein'}"
    what = f"{kind}, {task.outputs} classes" if task.is_classification else kind
    parts = [f"# {safe(task.name)}", f"A {what}. Main metric: {METRIC_NAMES[task.metric]}."]
    parts += _verdicts(report)
    for which in report.measured_on:
        parts += [f"## On {which}", _results(report, which), *_remarks(report, which)]
    parts += ["![Scores with their intervals, and predictions in detail](report.png)", *_rows(report)]
    parts += ["## How the numbers were computed", _bullets(_explanations(report))]
    parts += ["## Data", *_data(report)]
    parts += _classes(report)
    for title, values in (("Model", report.model), ("Settings", _used_settings(report.settings))):
        if values:
            parts += [f"## {title}", _table(("key", "value"), ((key, _value(one)) for key, one in _flat(values)))]
    return "\n\n".join(parts) + "\n"


def safe(text: str) -> str:
    """Return a text on one line, with Markdown and HTML escaped, and without control characters."""
    shown = "".join(
        letter if letter.isprintable() else " " if letter.isspace() else ascii(letter)[1:-1] for letter in text
    )
    for letter in "\\|<`*[":
        shown = shown.replace(letter, f"\\{letter}")
    return shown


def _verdicts(report: Report) -> list[str]:
    return [_bullets(map(safe, report.verdicts))] if report.differences else []


def _results(report: Report, which: str) -> str:
    names = metrics_of(report.task)
    head = ["", *(METRIC_NAMES[name] + (" (lower is better)" if name in LOWER_IS_BETTER else "") for name in names)]
    return _table(head, ([row.name, *(_cell(row, which, name) for name in names)] for row in report.rows))


def _cell(row: Row, which: str, metric: str) -> str:
    of = row.on(which)
    text = cell(of, metric)
    spread = math.nan if of is None else of[metric].spread
    if of is None or math.isnan(spread) or text == "-":
        return text
    return f"{text}; sd {format_score(spread, decimal_places(metric, *of[metric][:3]))}"


def _remarks(report: Report, which: str) -> Iterator[str]:
    """Yield remarks on the scores of a set."""
    yield from (f"**{safe(note)}**" for note in report.seen(which))
    without = "" if TEST in report.measured_on else "There is no test set."
    sentences = (report.too_few(which), *((without, OPTIMISTIC) if which == VALIDATION else ()))
    if remark := " ".join(filter(None, sentences)):
        yield remark


def _rows(report: Report) -> Iterator[str]:
    yield "## Methods"
    head = ("", "description", "trained parameters", "runs", "epochs", "training time")
    yield _table(
        head,
        (
            (
                row.name,
                row.description,
                "-" if row.parameters is None else f"{row.parameters:,}",
                str(len(row.runs_validation)),
                ", ".join(map(str, row.epochs)) or "-",
                "-" if row.seconds is None else _time(row.seconds),
            )
            for row in report.rows
        ),
    )
    if report.unfinished:
        yield safe(report.unfinished)


def _time(seconds: float) -> str:
    """`2.3 s`, `12 s`, `4:05`."""
    if round(seconds) >= 60:
        return duration(seconds)
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _explanations(report: Report) -> Iterator[str]:
    several = report.runs > 1
    named = f" (seed{'s' if len(report.seeds) > 1 else ''} {', '.join(map(str, report.seeds))})" if report.seeds else ""
    if several:
        yield f"A score is the mean over training runs{named}; sd is the standard deviation over them."
    else:
        yield f"A score is that of one training run{named}."
    together = " The residues of a protein are drawn together." if report.task.is_per_residue else ""
    of_seeds = "; the sd shows the variation over seeds" if several else ", and no variation over seeds"
    yield (
        f"Brackets hold the 95% interval: the proteins with a known target are resampled {report.resamples:,} times "
        f"with replacement, and the interval reaches from the 2.5th to the 97.5th percentile of the resampled scores."
        f"{together} The interval shows the variation over proteins{of_seeds}."
    )
    yield "Two rows are compared on the same resamples; one beats the other if the difference's interval excludes 0."
    if TEST in report.measured_on:
        yield "Test labels were used once, after every model had been chosen."
    yield "Unknown targets are left out of all scores."
    for name in metrics_of(report.task):
        yield f"{METRIC_NAMES[name]}: {_MEANINGS[name]}"


def _data(report: Report) -> Iterator[str]:
    sets = report.sets.items()
    yield _table(
        ("set", "proteins", "residues", "known targets"),
        ((name, f"{facts.proteins:,}", f"{facts.residues:,}", f"{facts.known:,}") for name, facts in sets),
    )
    if report.task.is_classification:
        yield from _class_counts(report)
    if report.notes:
        yield _bullets(map(safe, report.notes))
    if report.files:
        yield _table(("file", "SHA-256"), report.files.items())


def _class_counts(report: Report) -> Iterator[str]:
    task = report.task
    columns = [(name, facts.classes) for name, facts in report.sets.items() if facts.classes]
    if not columns:
        return
    shown = _most_frequent(columns[0][1])
    rows = ((task.classes[number], *(f"{counts[number]:,}" for _, counts in columns)) for number in shown)
    yield _table(("class", *(name for name, _ in columns)), rows)
    yield from _left_out(task)


def _classes(report: Report) -> Iterator[str]:
    """Yield the scores of each class, and the confusion matrix."""
    task, detail = report.task, report.detail
    if detail is None or detail.confusion is None:
        return
    yield "## By class"
    yield f"{safe(detail.row)} on {detail.on}, the training run with seed {detail.seed}."
    scores = report.class_scores
    shown = (
        (
            one.name,
            format_score(one.precision),
            format_score(one.recall),
            format_score(one.f1),
            f"{one.support:,}",
            f"{one.predicted:,}",
        )
        for one in (scores[number] for number in _most_frequent([score.support for score in scores]))
    )
    yield _table(("class", "precision", "recall", "F1", "targets", "predicted"), shown)
    yield from _left_out(task)
    if task.outputs <= _MOST_ACROSS:
        yield "A row for each true class, a column for each predicted one:"
        counts = zip(task.classes, detail.confusion.tolist(), strict=True)
        yield _table(("", *task.classes), ((name, *(f"{count:,}" for count in row)) for name, row in counts))


def _most_frequent(counts: Sequence[int]) -> list[int]:
    """Return the numbers of the classes that a table lists, in the task's order."""
    return sorted(sorted(range(len(counts)), key=lambda number: (-counts[number], number))[:_MOST_CLASSES])


def _left_out(task: Task) -> Iterator[str]:
    if task.outputs > _MOST_CLASSES:
        yield f"The {_MOST_CLASSES} most frequent of {task.outputs:,} classes; report.json has all."


def _used_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    tuning = settings.get("tuning")
    if not isinstance(tuning, Mapping) or tuning.get("mode") != FROZEN:
        return settings
    return {**settings, "tuning": {key: value for key, value in tuning.items() if key not in _OF_ENCODERS}}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Any) -> str:
    """Return a Markdown table; columns of numbers are aligned right."""
    body = [[safe(text) for text in row] for row in rows]
    rule = ["---" if at == 0 else "---:" if _are_numbers(body, at) else "---" for at in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in ([safe(text) for text in head], rule, *body))


def _are_numbers(body: Sequence[Sequence[str]], at: int) -> bool:
    return all(row[at][:1].isdigit() or row[at][:1] == "-" for row in body) and all(len(row[at]) < 40 for row in body)


def _bullets(texts: Any) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _value(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)
