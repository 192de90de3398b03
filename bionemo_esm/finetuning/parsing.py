"""Parse files of labelled proteins: records, their sets, and their labels or numbers.

Formats: FASTA of FLIP, FASTA with the label in the header, and tables (CSV, TSV, Parquet) with a column of labels.
Sequences are in the same file, or in others, and are then found by id.

FLIP (Dallago et al. 2021) has two kinds of FASTA: sequences with `TARGET=x SET=train VALIDATION=False` in the header;
and labels of residues in place of the sequence, with SET and VALIDATION, and the sequences in another file.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.fasta import MAX_RECORD_BYTES, FastaRecord, read_fasta
from bionemo_esm.errors import UserError
from bionemo_esm.finetuning.tasks import SKIP, DataConfig, DataPolicy, Targets, TaskConfig
from bionemo_esm.inference.inputs import InputPolicy, Protein, read_proteins
from bionemo_esm.inference.variants.table import VariantTable, no_column, read_table

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SETS = (TRAIN, VALIDATION, TEST)
_SET_WORDS = {"train": TRAIN, "training": TRAIN, "test": TEST} | dict.fromkeys(
    ("validation", "valid", "val"), VALIDATION
)
_TRUTHS = {"true": True, "1": True, "1.0": True} | dict.fromkeys(("false", "0", "0.0", "", "nan", "none"), False)
_AS_BY_PATTERN = r"""'task.header_pattern="class=(\S+)"'"""  # quoted for a shell and for Hydra
_ATTRIBUTE = re.compile(r"(?:^|\s)([A-Z]+)=")


class LabelError(UserError):
    """Labels that cannot be used; the message names file, record and id, and what to do."""

    code = "labels"


class Record(NamedTuple):
    """One record of a file, not yet interpreted."""

    number: int  # 1 for the first
    id: str  # "" if the file has none
    target: Any  # text; for Parquet, any value of the column
    set: str | None  # one of `SETS`; None if the file has no mark
    where: str  # "train.csv, record 3 (1abc-A)", for messages


def read_records(
    path: str, task: TaskConfig, labels_stand_alone: bool, note: Callable[[str], None] = lambda line: None
) -> list[Record]:
    """Return the records of a file in order; FASTA, CSV, TSV or Parquet, by its name.

    labels_stand_alone: sequences are in another file, so that a FASTA record of a task per residue holds labels.
    note: receives a line for the report, if a table may have ids in another column.
    Raises `LabelError` for a record without a label, an unknown SET or VALIDATION, or a missing column; and the errors
    of reading the file.
    """
    if InputPolicy().format_of(path) != "fasta":
        return list(_of_table(path, task, labels_stand_alone, note))
    return [_of_fasta(path, record, task, labels_stand_alone) for record in read_fasta(path)]


def place_of(path: str, number: int, identifier: str) -> str:
    """Return the location of a record, for a message."""
    shown = identifier if len(identifier) <= 40 else identifier[:37] + "..."
    return f"{path}, record {number}" + (f" ({shown})" if shown and shown != str(number) else "")


# --- FASTA ------------------------------------------------------------------------------------------------------------


def _of_fasta(path: str, record: FastaRecord, task: TaskConfig, labels_stand_alone: bool) -> Record:
    where = place_of(path, record.number, record.id)
    given = attributes(record.header)
    if labels_stand_alone and task.is_per_residue and "TARGET" not in given:
        target = record.sequence.decode("ascii", "replace")
    else:
        target = _target_in_header(record.header, given, task, where)
    return Record(record.number, record.id, target, _set_of(given.get("SET"), given.get("VALIDATION"), where), where)


def attributes(header: str) -> dict[str, str]:
    """Return the KEY=value pairs of a FASTA header; a value runs until the next key, and may contain blanks."""
    found = list(_ATTRIBUTE.finditer(header))
    ends = [*(match.start() for match in found), len(header)][1:]
    return {match[1]: header[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def _target_in_header(header: str, given: dict[str, str], task: TaskConfig, where: str) -> str:
    if "TARGET" in given:
        return given["TARGET"]
    if task.header_pattern is None:
        advice = f"say where it is, as by {_AS_BY_PATTERN}"
        if task.is_per_residue:
            advice = "if the record holds labels, give the sequences by data.sequences=...; else " + advice
        raise LabelError(f"{where}: no TARGET= in its header, which would be the label; {advice}")
    match = re.search(task.header_pattern, header)
    if match is None or match[1] is None:
        raise LabelError(
            f"{where}: neither has its header {header[:60]!r} a TARGET=, nor does {task.header_pattern} fit, "
            "which is task.header_pattern; correct one of both"
        )
    return match[1]


# --- tables -----------------------------------------------------------------------------------------------------------


def _of_table(path: str, task: TaskConfig, labels_stand_alone: bool, note: Callable[[str], None]) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    table = read_table(path)
    targets = _column(table, "target_column", task.target_column, _target_advice(table, task, labels_stand_alone))
    ids = _optional(table, "id_column", task.id_column, "id")
    if ids is None and (name := next((each for each in table.table.column_names if each.lower() == "name"), None)):
        note(f"{path}: ids are the numbers of the rows; task.id_column={name} takes those of the column {name}")
    sets = _optional(table, "set_column", task.set_column, "set")
    marks = _optional(table, "validation_column", task.validation_column, "validation")
    for index, target in enumerate(targets):
        identifier = "" if ids is None else _field(ids[index])
        where = place_of(path, index + 1, identifier)
        own = _set_of(
            None if sets is None else _field(sets[index]), None if marks is None else _field(marks[index]), where
        )
        yield Record(index + 1, identifier, target, own, where)


def _target_advice(table: VariantTable, task: TaskConfig, labels_stand_alone: bool) -> str:
    """Return what to do about a missing column of targets; the sequences' may have another name, too."""
    advice = "; say which it is by task.target_column=..."
    usual = any(name.lower() in ("sequence", "seq") for name in table.table.column_names)
    if not (usual or task.sequence_column is not None or labels_stand_alone):
        advice += ", and which has the sequences by task.sequence_column=..."
    return advice


def _column(table: VariantTable, key: str, column: str, advice: str = "") -> Sequence[Any]:
    names = table.table.column_names
    if column not in names:
        raise LabelError(no_column(table.name, f"task.{key}", column, names, advice))
    values: list[Any] = table.table.column(names.index(column)).to_pylist()
    return values


def _optional(table: VariantTable, key: str, wanted: str | None, usual: str) -> Sequence[Any] | None:
    """Return the configured column, or else the default one, in any case, if it exists."""
    if wanted is not None:
        return _column(table, key, wanted)
    found = next((name for name in table.table.column_names if name.lower() == usual), None)
    return None if found is None else _column(table, key, found)


def _field(value: Any) -> str:
    return "" if value is None else str(value).strip()


# --- sets -------------------------------------------------------------------------------------------------------------


def _set_of(name: str | None, validation: str | None, where: str) -> str | None:
    """Return one set for FLIP's two marks: its validation records are in the set `train`."""
    if name is None and validation is None:
        return None
    found = TRAIN if name is None else _word("SET", name, _SET_WORDS, "train, validation or test", where)
    if validation is None or not _word("VALIDATION", validation, _TRUTHS, "True or False", where):
        return found
    if found == TEST:
        raise LabelError(f"{where}: is marked for test and for validation; it can be in one only")
    return VALIDATION


def _word(what: str, text: str, meanings: dict[str, Any], allowed: str, where: str) -> Any:
    if text.lower() not in meanings:
        column = f"task.{what.lower()}_column"
        raise LabelError(
            f"{where}: {what} is {text[:40]!r}, not {allowed}; correct it, or name the right column by {column}=..."
        )
    return meanings[text.lower()]


def check_ids(records: Sequence[Record]) -> None:
    """Raise `LabelError` for a record without an id, or with that of another record."""
    found: dict[str, str] = {}
    for record in records:
        if not record.id:
            raise LabelError(f"{record.where}: has no id to find its sequence by; give each record one")
        if found.setdefault(record.id, record.where) != record.where:
            raise LabelError(f"{record.where}: {found[record.id]} has the same id; ids must differ")


Labels: TypeAlias = Sequence[str | None]
"""Of one protein: a label for each residue, or one label; None where it is not known."""
_NO_LABEL = ("", "nan")
_NO_NUMBER = ("", "nan", "na", "null", "none")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_SEPARATORS = re.compile(r"\s*[,;]\s*|\s+")


class LengthError(LabelError):
    """Labels, or a mask, that differ in length from the sequence."""


def labels_of(record: Record, residues: int, task: TaskConfig, data: DataConfig) -> Labels:
    """Return the labels of a classification. Per residue: single letters, or separated by `,`, `;` or blanks.

    Raises `LengthError`; `LabelError` for a missing label, unless `data.missing_targets` is skip.
    """
    items = _items(record, residues, task)
    if isinstance(items, str):  # single letters: the text is the sequence of labels
        return [None if letter in task.unknown else letter for letter in items] if task.unknown else items
    return [_label(record, place, item, task, data) for place, item in enumerate(items)]


def numbers_of(record: Record, residues: int, task: TaskConfig, data: DataConfig) -> Targets:
    """Return the numbers of a regression, float32 [R] or [1], NaN if not known; separated by `,`, `;` or blanks.

    Raises `LengthError`; `LabelError` for text that is no finite number, and for a missing number, unless
    `data.missing_targets` is skip.
    """
    items = _items(record, residues, task)
    return np.array([_number(record, place, item, task, data) for place, item in enumerate(items)], dtype=np.float32)


def resolved_only(record: Record, known: Labels | Targets, mask: bytes | None) -> Labels | Targets:
    """Return the targets of residues with a `1` in the mask. Raises `LengthError`; `LabelError` for other letters."""
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
    """Return the task's classes, or else those of a training set, sorted; by number if all are whole numbers.

    Raises `LabelError` for fewer than two classes, or numbers that are not whole.
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
    """Return class numbers, float32 [R] or [1], NaN if not known, or not in `numbers`."""
    return np.array([numbers.get(label, np.nan) for label in labels], dtype=np.float32)


def strange_label(labels: Labels, numbers: dict[str | None, float]) -> tuple[int, str] | None:
    """Return the first label that is no class, with its position from 0; None if there is none."""
    if set(labels) <= numbers.keys():
        return None
    return next((place, label) for place, label in enumerate(labels) if label is not None and label not in numbers)


def counts_in_words(counts: Counter[str], most: int = 12, shown: int = 3) -> str:
    """Return the counts of classes as text; of more than `most`, the `shown` most and least frequent."""
    ordered = counts.most_common()
    texts = [f"{label} {count:,}" for label, count in ordered]
    if len(texts) > most:
        texts = [*texts[:shown], f"... {len(texts) - 2 * shown:,} others ...", *texts[-shown:]]
    return ", ".join(texts)


def _items(record: Record, residues: int, task: TaskConfig) -> Sequence[Any]:
    """Return an item for each residue, or one; single letters stay text. Raises `LengthError`, `LabelError`."""
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


class Entry(NamedTuple):
    """One protein with its labels; they become class numbers once the training set is read."""

    protein: Protein
    known: Labels | Targets  # of a classification, or of a regression
    set: str | None  # the mark in its file: one of `SETS`
    where: str

    @property
    def sequence(self) -> bytes:
        """The bytes of the tokens; equal for equal sequences."""
        return self.protein.tokens.tobytes()


@dataclass
class Notes:
    """Lines about the data for screen and report, in order."""

    lines: list[str]

    def count(self, what: str, number: int, first: str = "") -> None:
        """Add a line unless the number is zero."""
        if number:
            self.lines.append(f"{what}: {number:,}" + (f"; the first: {first}" if first else ""))


class Reader:
    """Reader of a task's files, each read once. Raises as `read_records`, `read_proteins` and `labels_of`."""

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data
        self.policy = DataPolicy.for_reading(task, data)
        self.problems: list[str] = []  # of records that are left out
        self.notes: list[str] = []
        self.unmasked = 0
        self._files: dict[str, list[Entry]] = {}
        self._sequences: dict[str, Protein] | None = None
        self._unread: list[str] = []  # why sequences could not be read
        self._masks: dict[str, bytes] | None = None

    def read(self, path: str) -> list[Entry]:
        """Return the entries of a file, in order."""
        if path not in self._files:
            records = read_records(path, self.task, bool(self.data.sequences), self.notes.append)
            proteins = self._by_id(records) if self.data.sequences else self._by_number(path)
            entries = (self._entry(record, proteins) for record in records)
            self._files[path] = [entry for entry in entries if entry is not None]
        return self._files[path]

    def _by_number(self, path: str) -> Mapping[int, Protein]:
        """Return the proteins of a file that has both sequences and labels, by record number."""
        return {protein.number: protein for protein in read_proteins(path, self.policy, self.problems.append)}

    def _by_id(self, records: Sequence[Record]) -> Mapping[int, Protein]:
        """Return the proteins of the sequence files, by the number of the records with their labels."""
        if self._sequences is None:
            self._sequences = self._read_sequences()
        check_ids(records)
        missing = [record for record in records if record.id not in self._sequences]
        if missing and self.data.bad_records != SKIP:
            raise LabelError(
                f"{missing[0].where}: no sequence of this id is in {', '.join(self.data.sequences)}; {len(missing):,} "
                f"of {len(records):,} records have none. Correct it, or leave such out by data.bad_records=skip"
            )
        unread = f", that can be read; the first that cannot: {self._unread[0]}" if self._unread else ""
        self.problems += [f"{record.where}: has no sequence{unread}" for record in missing]
        found = {record.number: self._sequences.get(record.id) for record in records}
        return {number: protein for number, protein in found.items() if protein is not None}

    def _read_sequences(self) -> dict[str, Protein]:
        found: dict[str, Protein] = {}
        for path in self.data.sequences:
            for protein in read_proteins(path, self.policy, self._unread.append):
                if protein.id in found:
                    raise LabelError(f"{path}: {protein.id} is in an earlier file too; ids must differ")
                found[protein.id] = protein
        return found

    def _entry(self, record: Record, proteins: Mapping[int, Protein]) -> Entry | None:
        protein = proteins.get(record.number)
        if protein is None:  # left out when it was read
            return None
        read: Callable[..., Labels | Targets] = labels_of if self.task.is_classification else numbers_of
        try:
            known = read(record, protein.residues, self.task, self.data)
            known = resolved_only(record, known, self._mask(protein.id))
        except LengthError as error:
            if self.data.bad_records != SKIP:
                raise LengthError(f"{error}, or leave such out by data.bad_records=skip") from None
            self.problems.append(str(error))
            return None
        return Entry(protein, known, record.set, record.where)

    def _mask(self, identifier: str) -> bytes | None:
        if not self.data.mask:
            return None
        if self._masks is None:
            self._masks = _read_masks(self.data.mask)
        self.unmasked += identifier not in self._masks
        return self._masks.get(identifier)


def _read_masks(paths: Sequence[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in paths:
        for record in read_fasta(path):
            if record.id in found:
                raise LabelError(f"{place_of(path, record.number, record.id)}: an earlier record has the same id")
            found[record.id] = record.sequence
    return found


def read_sets(reader: Reader, data: DataConfig, notes: Notes) -> dict[str, list[Entry]]:
    """Return the entries of each of `SETS`, by the configuration's keys and the marks in the files."""
    marked = [entry for path in data.train for entry in reader.read(path)]
    sets = {name: [entry for entry in marked if (entry.set or TRAIN) == name] for name in SETS}
    for name, files in ((VALIDATION, data.validation), (TEST, data.test)):
        if not files:
            continue
        if not set(data.train) & set(files):
            notes.count(f"marked for {name} in data.train, but not used, as data.{name} is given", len(sets[name]))
        others = {*data.train, *(data.validation if name == TEST else ())}
        sets[name] = [entry for path in files for entry in _of_file(reader.read(path), path, name, path in others)]
    for name, entries in sets.items():
        _check_ids(name, entries)
    return sets


def _of_file(entries: list[Entry], path: str, name: str, is_shared: bool) -> list[Entry]:
    """Return a set's entries from its file: the marked ones, or all if none is marked and no set texts it."""
    if all(entry.set is None for entry in entries):
        if is_shared:
            raise LabelError(
                f"data.{name}={path}: is named for another set too, and marks none of its records; name another file, "
                f"or split some off at random by data.split.{name}=0.1"
            )
        return entries
    found = [entry for entry in entries if entry.set == name]
    if not found:
        marks = ", ".join(sorted({entry.set or "none" for entry in entries}))
        raise LabelError(
            f"data.{name}={path}: no record is marked for {name}, but for {marks}; name another file, or take the "
            "marks (SET, VALIDATION, or columns of these names) out of it"
        )
    return found


def _check_ids(name: str, entries: Iterable[Entry]) -> None:
    """Raise `LabelError` for an id that two files of a set share; within a file ids were checked."""
    found: dict[str, str] = {}
    for protein, _, _, where in entries:
        if protein.id != str(protein.number) and found.setdefault(protein.id, where) != where:
            raise LabelError(f"{where}: {found[protein.id]} of the {name} set has the same id; ids must differ")


def at_most(entries: list[Entry], most_residues: int | None) -> list[Entry]:
    """Return the entries of at most so many residues."""
    return [entry for entry in entries if most_residues is None or entry.protein.residues <= most_residues]


def with_targets(entry: Entry, targets: Targets) -> Entry:
    """Return the entry with class numbers for its labels."""
    return entry._replace(known=targets)


def known_of(entry: Entry) -> NDArray[np.float32]:
    """Return the known targets of an entry; float32 [K]."""
    assert isinstance(entry.known, np.ndarray)
    return entry.known[np.isfinite(entry.known)]
