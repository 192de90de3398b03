"""From what a file says of a protein to what is known of it: labels, numbers, and the classes of a training set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from bionemo_esm.finetuning.records import LabelError, Record
from bionemo_esm.finetuning.task import Targets
from bionemo_esm.finetuning.tasks import SKIP, DataConfig, TaskConfig

Labels: TypeAlias = Sequence[str | None]
"""Of one protein: a label for each residue, or one; None where it is not known."""
_NO_LABEL = ("", "nan")
_NO_NUMBER = ("", "nan", "na", "null", "none")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_SEPARATORS = re.compile(r"\s*[,;]\s*|\s+")


class LengthError(LabelError):
    """Labels, or a mask, of another number of residues than the sequence's."""


def labels_of(record: Record, residues: int, task: TaskConfig, data: DataConfig) -> Labels:
    """Of a classification. Per residue they are single letters, or separated by `,`, `;` or blanks.

    Raises `LengthError`; `LabelError` where there is none, unless `data.missing_targets` says to skip it.
    """
    items = _items(record, residues, task)
    if isinstance(items, str):  # of single letters: the text itself is the sequence of its labels
        return [None if letter in task.unknown else letter for letter in items] if task.unknown else items
    return [_label(record, place, item, task, data) for place, item in enumerate(items)]


def numbers_of(record: Record, residues: int, task: TaskConfig, data: DataConfig) -> Targets:
    """Of a regression, float32 [R] or [1], NaN where not known. Per residue they are separated by `,`, `;` or blanks.

    Raises `LengthError`; `LabelError` for what is no number, or not finite; where there is none, unless
    `data.missing_targets` says to skip it.
    """
    items = _items(record, residues, task)
    return np.array([_number(record, place, item, task, data) for place, item in enumerate(items)], dtype=np.float32)


def resolved_only(record: Record, known: Labels | Targets, mask: bytes | None) -> Labels | Targets:
    """What is known of residues where the mask has a `1`. Raises `LengthError`; `LabelError` for other letters."""
    if mask is None:
        return known
    if len(mask) != len(known):
        raise LengthError(
            f"{record.where}: its mask has {len(mask):,} residues, its sequence {len(known):,}; correct it"
        )
    if other := mask.translate(None, b"01"):
        letter = other[:1].decode("ascii", "replace")
        raise LabelError(f"{record.where}: its mask has a {letter!r}; 1 is a resolved residue, 0 one that is not")
    shown = np.frombuffer(mask, dtype=np.uint8) == ord("1")
    if isinstance(known, np.ndarray):
        return np.where(shown, known, np.float32(np.nan))
    return [label if there else None for label, there in zip(known, shown.tolist(), strict=True)]


def classes_of(every: Iterable[Labels], task: TaskConfig, where: str) -> tuple[str, ...]:
    """The task's classes, or else those of a training set, sorted; by number where all are whole numbers.

    Raises `LabelError` where these are fewer than two, or numbers that are not whole.
    """
    if task.classes is not None:
        return task.classes
    found = {label for labels in every for label in set(labels) if label is not None}
    if len(found) < 2:
        what = f"only {min(found)!r}" if found else "none"
        raise LabelError(f"{where}: two or more classes are needed to train on, but there is {what}; check the labels")
    if not all(map(_is_number, found)):
        return tuple(sorted(found))
    fractions = [label for label in found if not float(label).is_integer()]
    if fractions:
        advice = "is it task.kind=regression? If they are names of classes, list them by task.classes=[...]"
        raise LabelError(f"{where}: the labels are numbers that are not whole, as {min(fractions)!r}; {advice}")
    return tuple(sorted(found, key=lambda label: (float(label), label)))


def class_numbers(labels: Labels, numbers: dict[str | None, float]) -> Targets:
    """Numbers of classes, float32 [R] or [1], NaN where not known, or not in `numbers`."""
    return np.array([numbers.get(label, np.nan) for label in labels], dtype=np.float32)


def strange_label(labels: Labels, numbers: dict[str | None, float]) -> tuple[int, str] | None:
    """The first label that is no class, and its place from 0; None where there is none."""
    if set(labels) <= numbers.keys():
        return None
    return next((place, label) for place, label in enumerate(labels) if label is not None and label not in numbers)


def counts_in_words(counts: Counter[str], most: int = 12, shown: int = 3) -> str:
    """How often each class occurs; of more than `most`, the most and the least frequent, so many of each."""
    ordered = counts.most_common()
    told = [f"{label} {count:,}" for label, count in ordered]
    if len(told) > most:
        told = [*told[:shown], f"... {len(told) - 2 * shown:,} others ...", *told[-shown:]]
    return ", ".join(told)


def _items(record: Record, residues: int, task: TaskConfig) -> Sequence[Any]:
    """One for each residue, or one; a text of single letters stays one. Raises `LengthError`, `LabelError`."""
    target = record.target
    if isinstance(target, dict) or (isinstance(target, list) and not task.is_per_residue):
        raise LabelError(f"{record.where}: the target of a protein cannot be a {type(target).__name__}; correct it")
    if not task.is_per_residue:
        return [target]
    items: Sequence[Any]
    if isinstance(target, list):
        items = target
    elif target is None or not str(target).strip():
        items = [""] * residues
    else:
        text = str(target).strip()
        single = task.is_classification and not re.search(r"[,;\s]", text)
        items = text if single else [item.strip() for item in _SEPARATORS.split(text)]
    if len(items) != residues:
        what = "label" if task.is_classification else "number"
        raise LengthError(
            f"{record.where}: has {len(items):,} {what}{'s' * (len(items) != 1)}, its sequence {residues:,} residues; "
            "each residue needs one"
        )
    return items


def _label(record: Record, place: int, item: Any, task: TaskConfig, data: DataConfig) -> str | None:
    label = "" if item is None else str(item).strip()
    if label in task.unknown:
        return None
    if label.lower() in _NO_LABEL:
        _check_missing(record, place, label, task, data)
        return None
    return label


def _number(record: Record, place: int, item: Any, task: TaskConfig, data: DataConfig) -> float:
    text = "" if item is None else str(item).strip()
    if text in task.unknown:
        return float("nan")
    if text.lower() in _NO_NUMBER:
        _check_missing(record, place, text, task, data)
        return float("nan")
    if not _is_number(text):
        advice = "correct it, or is it task.kind=classification?"
        if _DECIMAL_COMMA.fullmatch(text):
            advice = "write it with a decimal point"
        raise LabelError(f"{_place(record, place, task)}: {text[:40]!r} is not a number; {advice}")
    with np.errstate(over="ignore"):
        number = float(np.float32(float(text)))
    if not np.isfinite(number):
        what = "not finite" if "inf" in text.lower() else "too large for a 32-bit number"
        raise LabelError(f"{_place(record, place, task)}: {text[:40]!r} is {what}; correct it")
    return number


def _check_missing(record: Record, place: int, text: str, task: TaskConfig, data: DataConfig) -> None:
    if data.missing_targets != SKIP:
        what = "has no target" if not text else f"the target is {text!r}"
        raise LabelError(
            f"{_place(record, place, task)}: {what}; correct it, or treat such as not known by "
            "data.missing_targets=skip"
        )


def _place(record: Record, place: int, task: TaskConfig) -> str:
    return f"{record.where}, residue {place + 1}" if task.is_per_residue else record.where


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
