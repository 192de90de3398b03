"""Labels as they stand in a file: FLIP's FASTA, any other with the label in its header, or a table with a column of it.

FLIP (Dallago et al. 2021) has two kinds of FASTA: sequences with `TARGET=x SET=train VALIDATION=False` in the header,
and labels of residues in the place of the sequence, with SET and VALIDATION alone, the sequences in another file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bionemo_esm.data.fasta import MAX_RECORD_BYTES, FastaRecord, read_fasta
from bionemo_esm.errors import UserError
from bionemo_esm.finetuning.tasks import TaskConfig
from bionemo_esm.inference.policy import InputPolicy
from bionemo_esm.inference.variants.table import VariantTable, no_column, read_table

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SETS = (TRAIN, VALIDATION, TEST)
_SET_WORDS = {"train": TRAIN, "training": TRAIN, "test": TEST} | dict.fromkeys(
    ("validation", "valid", "val"), VALIDATION
)
_TRUTHS = {"true": True, "1": True, "1.0": True} | dict.fromkeys(("false", "0", "0.0", "", "nan", "none"), False)
_AS_BY_PATTERN = r"""'task.header_pattern="class=(\S+)"'"""  # as a shell, and then Hydra, has to be given it
_ATTRIBUTE = re.compile(r"(?:^|\s)([A-Z]+)=")


class LabelError(UserError):
    """Labels that cannot be used; the message names the file, the record and its id, and what to do."""


class Record(NamedTuple):
    """What a file says of one protein, not yet understood."""

    number: int  # 1 for the first
    id: str  # "" where the file has none
    target: Any  # text; of a Parquet file, whatever its column holds
    set: str | None  # one of `SETS`; None where the file does not say
    where: str  # "train.csv, record 3 (1abc-A)", for messages


def read_records(
    path: str, task: TaskConfig, labels_stand_alone: bool, told: Callable[[str], None] = lambda note: None
) -> list[Record]:
    """The records of a file in order; FASTA, CSV, TSV or Parquet, by its name.

    labels_stand_alone: sequences are in another file, so that a FASTA record of a task per residue holds labels.
    told: gets what is worth a note, of a table whose ids may stand in a column of another name.
    Raises `LabelError` for a record without a label, a set or VALIDATION that is none, a column that is not there;
    and what reading the file raises.
    """
    if InputPolicy().format_of(path) != "fasta":
        return list(_of_table(path, task, labels_stand_alone, told))
    return [_of_fasta(path, record, task, labels_stand_alone) for record in read_fasta(path)]


def place_of(path: str, number: int, identifier: str) -> str:
    """Where a record stands, for a message."""
    shown = identifier if len(identifier) <= 40 else identifier[:37] + "..."
    return f"{path}, record {number}" + (f" ({shown})" if shown and shown != str(number) else "")


# --- FASTA ------------------------------------------------------------------------------------------------------------


def _of_fasta(path: str, record: FastaRecord, task: TaskConfig, labels_stand_alone: bool) -> Record:
    where = place_of(path, record.number, record.id)
    said = attributes(record.header)
    if labels_stand_alone and task.is_per_residue and "TARGET" not in said:
        target = record.sequence.decode("ascii", "replace")
    else:
        target = _target_in_header(record.header, said, task, where)
    return Record(record.number, record.id, target, _set_of(said.get("SET"), said.get("VALIDATION"), where), where)


def attributes(header: str) -> dict[str, str]:
    """The KEY=value pairs of a FASTA header; a value runs until the next key, and may have blanks within."""
    found = list(_ATTRIBUTE.finditer(header))
    ends = [*(match.start() for match in found), len(header)][1:]
    return {match[1]: header[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def _target_in_header(header: str, said: dict[str, str], task: TaskConfig, where: str) -> str:
    if "TARGET" in said:
        return said["TARGET"]
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


def _of_table(path: str, task: TaskConfig, labels_stand_alone: bool, told: Callable[[str], None]) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    table = read_table(path)
    targets = _column(table, "target_column", task.target_column, _target_advice(table, task, labels_stand_alone))
    ids = _optional(table, "id_column", task.id_column, "id")
    if ids is None and (name := next((each for each in table.table.column_names if each.lower() == "name"), None)):
        told(f"{path}: ids are the numbers of the rows; task.id_column={name} takes those of the column {name}")
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
    """What to do where the column of targets is not there; the sequences' may be of another name, too."""
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
    """The column that is wanted; where none is, the usual one, in capitals or not, if it is there."""
    if wanted is not None:
        return _column(table, key, wanted)
    found = next((name for name in table.table.column_names if name.lower() == usual), None)
    return None if found is None else _column(table, key, found)


def _field(value: Any) -> str:
    return "" if value is None else str(value).strip()


# --- sets -------------------------------------------------------------------------------------------------------------


def _set_of(name: str | None, validation: str | None, where: str) -> str | None:
    """FLIP's two marks as one: what is for validation is of the set `train` there."""
    if name is None and validation is None:
        return None
    found = TRAIN if name is None else _word("SET", name, _SET_WORDS, "train, validation or test", where)
    if validation is None or not _word("VALIDATION", validation, _TRUTHS, "True or False", where):
        return found
    if found == TEST:
        raise LabelError(f"{where}: is marked as of the test set and as for validation; it can be in one only")
    return VALIDATION


def _word(what: str, text: str, meanings: dict[str, Any], allowed: str, where: str) -> Any:
    if text.lower() not in meanings:
        column = f"task.{what.lower()}_column"
        raise LabelError(
            f"{where}: {what} is {text[:40]!r}, not {allowed}; correct it, or name the right column by {column}=..."
        )
    return meanings[text.lower()]


def check_ids(records: Sequence[Record]) -> None:
    """By which sequences are found. Raises `LabelError` for a second record of the same id, and for one without."""
    found: dict[str, str] = {}
    for record in records:
        if not record.id:
            raise LabelError(f"{record.where}: has no id, by which its sequence could be found; give each record one")
        if found.setdefault(record.id, record.where) != record.where:
            raise LabelError(f"{record.where}: {found[record.id]} has the same id; ids must differ")
