"""Proteins and their labels, brought together: from one file, or by ids from several; and which set each is of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.finetuning.labels import Labels, LengthError, labels_of, numbers_of, resolved_only
from bionemo_esm.finetuning.records import (
    SETS,
    TEST,
    TRAIN,
    VALIDATION,
    LabelError,
    Record,
    check_ids,
    place_of,
    read_records,
)
from bionemo_esm.finetuning.task import Targets
from bionemo_esm.finetuning.tasks import SKIP, DataConfig, DataPolicy, TaskConfig
from bionemo_esm.inference.inputs import Protein, read_proteins


class Entry(NamedTuple):
    """One protein with its labels; numbers of their classes come later, when the training set has been seen."""

    protein: Protein
    known: Labels | Targets  # of a classification, or of a regression
    set: str | None  # what its file says: one of `SETS`
    where: str

    @property
    def sequence(self) -> bytes:
        """What tells equal sequences: the bytes of the tokens."""
        return self.protein.tokens.tobytes()


@dataclass
class Notes:
    """What was left out, or is worth a word, in order."""

    lines: list[str]

    def count(self, what: str, number: int, first: str = "") -> None:
        """A line, where there is anything to count."""
        if number:
            self.lines.append(f"{what}: {number:,}" + (f"; the first: {first}" if first else ""))


class Reader:
    """Reads each file of a task once. Raises as `read_records`, `read_proteins` and `labels_of` do."""

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data
        self.policy = DataPolicy.for_reading(task, data)
        self.problems: list[str] = []  # of records that are left out
        self.told: list[str] = []  # what is worth a note
        self.unmasked = 0
        self._files: dict[str, list[Entry]] = {}
        self._sequences: dict[str, Protein] | None = None
        self._unread: list[str] = []  # of the files of sequences: why not
        self._masks: dict[str, bytes] | None = None

    def read(self, path: str) -> list[Entry]:
        """The entries of a file, in order."""
        if path not in self._files:
            records = read_records(path, self.task, bool(self.data.sequences), self.told.append)
            proteins = self._by_id(records) if self.data.sequences else self._by_number(path)
            entries = (self._entry(record, proteins) for record in records)
            self._files[path] = [entry for entry in entries if entry is not None]
        return self._files[path]

    def _by_number(self, path: str) -> Mapping[int, Protein]:
        """The proteins that stand in the file of labels itself, by the number of their records."""
        return {protein.number: protein for protein in read_proteins(path, self.policy, self.problems.append)}

    def _by_id(self, records: Sequence[Record]) -> Mapping[int, Protein]:
        """The proteins that stand in other files, by the number of the records that have their labels."""
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
        if protein is None:  # left out, and told of, when it was read
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
    """The entries of each of `SETS`, as the configuration's keys, and marks in the files, tell them apart."""
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
    """Of a file that is named for a set: what is marked so; or all where nothing is marked, and no other set has it."""
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
    """Within a file ids differ already, but a set may be of several."""
    found: dict[str, str] = {}
    for protein, _, _, where in entries:
        if protein.id != str(protein.number) and found.setdefault(protein.id, where) != where:
            raise LabelError(f"{where}: {found[protein.id]} of the {name} set has the same id; ids must differ")


def shorter(entries: list[Entry], most_residues: int | None) -> list[Entry]:
    """Those of at most so many residues."""
    return [entry for entry in entries if most_residues is None or entry.protein.residues <= most_residues]


def with_targets(entry: Entry, targets: Targets) -> Entry:
    """The entry with its labels as numbers."""
    return entry._replace(known=targets)


def known_of(entry: Entry) -> NDArray[np.float32]:
    """The targets of an entry, those that are known; float32 [K]."""
    assert isinstance(entry.known, np.ndarray)
    return entry.known[np.isfinite(entry.known)]
