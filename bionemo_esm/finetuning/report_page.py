"""The report of a fine-tuning as Markdown: what a paper's supplement would say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bionemo_esm.finetuning.bootstrap import decimals, told
from bionemo_esm.finetuning.config import FROZEN
from bionemo_esm.finetuning.metrics import METRIC_NAMES
from bionemo_esm.finetuning.report import TEST, TOO_GOOD, VALIDATION, Report, Row, cell, metrics_of
from bionemo_esm.finetuning.task import LOWER_IS_BETTER, Task
from bionemo_esm.screen import duration

_MEANINGS = {
    "accuracy": "share of targets whose class is the likeliest.",
    "f1": "mean over the classes that occur among the targets, each with the same weight, of F1.",
    "mcc": "Matthews' correlation of many classes (Gorodkin 2004); 0: no better than always the same class.",
    "spearman": "correlation of ranks, those of equal values averaged.",
    "pearson": "correlation of values.",
    "mse": "mean squared error, in the square of the target's unit; lower is better.",
}
_MOST_CLASSES = 30  # that a table lists
_MOST_ACROSS = 12  # classes of a confusion matrix
_OF_ENCODERS = ("encoder_lr", "layer_decay", "keep_adapters")  # of tuning: no matter where the encoder is frozen


def page(report: Report) -> str:
    """The whole page."""
    task = report.task
    kind = f"{task.kind} of each {'residue' if task.is_per_residue else 'protein'}"
    what = f"{kind}, {task.outputs} classes" if task.is_classification else kind
    parts = [f"# {safe(task.name)}", f"A {what}. The metric that counts: {METRIC_NAMES[task.metric]}."]
    parts += _verdicts(report)
    for which in report.measured_on:
        parts += [f"## On {which}", _results(report, which), *_remarks(report, which)]
    parts += ["![Scores with their intervals, and predictions in detail](report.png)", *_rows(report)]
    parts += ["## How to read the numbers", _bullets(_reading(report))]
    parts += ["## Data", *_data(report)]
    parts += _classes(report)
    for title, values in (("Model", report.model), ("Settings", _that_matter(report.settings))):
        if values:
            parts += [f"## {title}", _table(("key", "value"), ((key, _value(one)) for key, one in _flat(values)))]
    return "\n\n".join(parts) + "\n"


def safe(text: str) -> str:
    """A text that is no Markdown, no HTML and no control characters, on one line."""
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
    return f"{text}; sd {told(spread, decimals(metric, *of[metric][:3]))}"


def _remarks(report: Report, which: str) -> Iterator[str]:
    """What is to be known of the numbers of a set."""
    yield from (f"**{safe(note)}**" for note in report.seen(which))
    without = "" if TEST in report.measured_on else "There is no test set."
    sentences = (report.too_few(which), *((without, TOO_GOOD) if which == VALIDATION else ()))
    if remark := " ".join(filter(None, sentences)):
        yield remark


def _rows(report: Report) -> Iterator[str]:
    yield "## What was compared"
    head = ("", "what it is", "trained parameters", "runs", "epochs", "training time")
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


def _reading(report: Report) -> Iterator[str]:
    several = report.runs > 1
    named = f" (seed{'s' if len(report.seeds) > 1 else ''} {', '.join(map(str, report.seeds))})" if report.seeds else ""
    if several:
        yield f"A score is the mean over training runs{named}; sd is the standard deviation over them."
    else:
        yield f"A score is that of one training run{named}."
    together = " The residues of a protein go together." if report.task.is_per_residue else ""
    of_seeds = "; what hangs on the seed the sd says" if several else ", not how much hangs on the seed"
    yield (
        f"In brackets stands its 95% interval: {report.resamples:,} times the proteins with a known target are drawn "
        f"anew, with replacement, and the scores of these sets are taken from the 2.5th to the 97.5th percentile."
        f"{together} The interval says how much hangs on which proteins are in the set{of_seeds}."
    )
    yield "Two rows are compared on the same draws; one beats the other where the interval of the difference has no 0."
    if TEST in report.measured_on:
        yield "Test labels were looked at once, when every model had been chosen."
    yield "Targets that are not known are in no score."
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
    """The classes of the detail one by one, and which was taken for which."""
    task, detail = report.task, report.detail
    if detail is None or detail.confusion is None:
        return
    yield "## By class"
    yield f"{safe(detail.row)} on {detail.on}, the training run with seed {detail.seed}."
    scores = report.class_scores
    shown = (
        (one.name, told(one.precision), told(one.recall), told(one.f1), f"{one.support:,}", f"{one.predicted:,}")
        for one in (scores[number] for number in _most_frequent([score.support for score in scores]))
    )
    yield _table(("class", "precision", "recall", "F1", "targets", "predicted"), shown)
    yield from _left_out(task)
    if task.outputs <= _MOST_ACROSS:
        yield "A row for each true class, a column for each predicted one:"
        counts = zip(task.classes, detail.confusion.tolist(), strict=True)
        yield _table(("", *task.classes), ((name, *(f"{count:,}" for count in row)) for name, row in counts))


def _most_frequent(counts: Sequence[int]) -> list[int]:
    """Numbers of the classes that a table lists, in the task's order."""
    return sorted(sorted(range(len(counts)), key=lambda number: (-counts[number], number))[:_MOST_CLASSES])


def _left_out(task: Task) -> Iterator[str]:
    if task.outputs > _MOST_CLASSES:
        yield f"The {_MOST_CLASSES} most frequent of {task.outputs:,} classes; report.json has all."


def _that_matter(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    tuning = settings.get("tuning")
    if not isinstance(tuning, Mapping) or tuning.get("mode") != FROZEN:
        return settings
    return {**settings, "tuning": {key: value for key, value in tuning.items() if key not in _OF_ENCODERS}}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Any) -> str:
    """Numbers, and what looks like them, to the right."""
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
