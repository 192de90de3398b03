"""A task's files, as sets of labelled proteins, with all that can be wrong with them found before any training.

Proteins with what is known of them, and how they are shared out to training, validation and test.

Sets split off a training set at random, the same whatever the order of its records.

A sequence's place is drawn by a keyed hash of the sequence itself, so that equal ones go together. Similar ones may
part: a split by families is for the files to bring.

A task's own files over the network: one zip archive at a fixed commit of FLIP's repository, of which only named
members are taken out, once its bytes have been found to be the expected ones.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.download import Progress, ReleaseError, download, file_errors, require_room
from bionemo_esm.data.fasta import SourceError
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write
from bionemo_esm.finetuning.parsing import (
    SETS,
    TEST,
    TRAIN,
    VALIDATION,
    Entry,
    LabelError,
    Notes,
    Reader,
    class_numbers,
    classes_of,
    counts_in_words,
    known_of,
    read_sets,
    shorter,
    strange_label,
    with_targets,
)
from bionemo_esm.finetuning.tasks import (
    SKIP,
    DataConfig,
    DownloadConfig,
    SplitConfig,
    Targets,
    Task,
    TaskConfig,
    class_problem,
)
from bionemo_esm.inference.inputs import Protein


class LabelledProtein(NamedTuple):
    """One record, checked."""

    protein: Protein
    targets: Targets
    where: str  # "train.csv, record 3 (1abc-A)", for messages


@dataclass(frozen=True)
class LabelledDataset:
    """Labelled proteins in the order of their files."""

    proteins: Sequence[Protein]
    targets: Sequence[Targets]

    def __len__(self) -> int:
        return len(self.proteins)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein, int64 [S]."""
        return np.array([protein.residues for protein in self.proteins], dtype=np.int64)

    @property
    def known(self) -> int:
        """Targets that are known."""
        return sum(int(np.isfinite(target).sum()) for target in self.targets)


class SealedTestSet:
    """The test set: its proteins are at hand, its labels only after `open`, which is called once, at the end."""

    def __init__(self, labelled: LabelledDataset) -> None:
        self.proteins = labelled.proteins
        self._labelled: LabelledDataset | None = labelled

    def __len__(self) -> int:
        return len(self.proteins)

    def open(self) -> LabelledDataset:
        """The set with its labels. A second call is a fault of ours: test labels are looked at once."""
        assert self._labelled is not None, "the test labels have been looked at already"
        labelled, self._labelled = self._labelled, None
        return labelled


@dataclass(frozen=True)
class Splits:
    """A task's data, checked: every label known to be what the task says, before anything is computed."""

    task: Task  # classes, mean and scale are those of the training set
    train: LabelledDataset
    validation: LabelledDataset
    test: SealedTestSet | None
    notes: tuple[str, ...] = ()  # what was left out, was missing, or was split off; for screen and report
    files: Mapping[str, str] = field(default_factory=dict)  # by file name: SHA-256


def split_off(entries: Sequence[Entry], shares: SplitConfig, seed: int) -> dict[str, list[Entry]]:
    """The entries of train, validation and test, each in its order; shares of 0 give empty sets, others no empty one.

    Raises `ConfigError` where there are too few different sequences for that.
    """
    drawn = sorted({entry.sequence for entry in entries}, key=lambda sequence: _draw(sequence, seed))
    test = max(round(shares.test * len(drawn)), int(shares.test > 0))
    validation = max(round(shares.validation * len(drawn)), int(shares.validation > 0))
    if test + validation >= len(drawn):
        raise ConfigError(
            f"data.split.validation={shares.validation} and data.split.test={shares.test} leave none of "
            f"{len(drawn):,} different sequences to train on; give more proteins, or files of each set"
        )
    places = dict.fromkeys(drawn, TRAIN) | dict.fromkeys(drawn[test : test + validation], VALIDATION)
    places |= dict.fromkeys(drawn[:test], TEST)
    return {name: [one for one in entries if places[one.sequence] == name] for name in (TRAIN, VALIDATION, TEST)}


def _draw(sequence: bytes, seed: int) -> bytes:
    return hashlib.blake2b(sequence, digest_size=16, key=str(seed).encode()).digest()


_LARGEST_ARCHIVE_BYTES = 2**30
_LARGEST_MEMBER_BYTES = 2**30
_BLOCK_BYTES = 2**20


def download_task(name: str, config: DownloadConfig, folder: Path, progress: Progress | None = None) -> dict[str, Path]:
    """The files of a task in `folder/name`, by what they are: train, and where the task has them sequences and mask.

    What is there already is looked through, and not downloaded again. Raises `ReleaseError`: for an archive that cannot
    be had, has other bytes than expected, or lacks a member; for a folder that cannot be written to.
    """
    place = folder / name
    archive = place / (PurePosixPath(config.url).name or "archive.zip")
    if not (archive.is_file() and _has_checksum(archive, config.checksum)):
        try:
            download(config.url, archive, progress=progress)
        except ReleaseError as error:
            raise ReleaseError(f"{error}; or give local files by data.train=...") from error
        if not _has_checksum(archive, config.checksum):
            archive.unlink()
            raise ReleaseError(
                f"{config.url}: has other bytes than {config.checksum}; it was removed. Check the address and "
                "task.download.checksum, or give local files by data.train=..."
            )
    members = {"train": config.train, "sequences": config.sequences, "mask": config.mask}
    with file_errors(archive):
        return {key: _taken_out(archive, member, place) for key, member in members.items() if member is not None}


def _has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has the bytes of `sha256:...`, or of a blob `git:...`: SHA-1 of a header and the file."""
    kind, _, expected = checksum.partition(":")
    size = path.stat().st_size
    if size > _LARGEST_ARCHIVE_BYTES:
        return False
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == expected


def _taken_out(archive: Path, member: str, place: Path) -> Path:
    """One member of an archive, as a file of its last name in a folder."""
    target = place / PurePosixPath(member).name
    try:
        with zipfile.ZipFile(archive) as packed:
            if member not in packed.namelist():
                there = ", ".join(name for name in packed.namelist() if not name.endswith("/"))
                raise ReleaseError(f"{archive}: has no member {member!r}, but {there}; correct task.download")
            info = packed.getinfo(member)
            if target == archive or not target.name or info.is_dir() or info.file_size > _LARGEST_MEMBER_BYTES:
                raise ReleaseError(f"{archive}: member {member!r} is no file of up to 1 GiB; correct task.download")
            if _is_taken_out(target, info):
                return target
            require_room(target, info.file_size)
            with packed.open(info) as source, atomic_write(target) as stream:
                shutil.copyfileobj(source, stream, _BLOCK_BYTES)  # no more than file_size, and its CRC is checked
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ReleaseError(f"{archive}: cannot be unpacked ({error}); remove it and run this again") from error
    return target


def _is_taken_out(target: Path, info: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != info.file_size:
        return False
    check = 0
    with target.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            check = zlib.crc32(block, check)
    return check == info.CRC


if TYPE_CHECKING:
    from bionemo_esm.data.download import Progress

_IMBALANCED = 10  # times as many of the most frequent class as of the least
_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


def read_splits(task: TaskConfig, data: DataConfig, seed: int, progress: Progress | None = None) -> Splits:
    """The sets of a task, every label checked; of the test set, the labels sealed.

    seed: of what is split off at random. progress: of a download. Raises `LabelError`, `InputError`, `TableError`,
    `SourceError` for files, `ConfigError` for keys, `ReleaseError` for a download.
    """
    if data.mask and not task.is_per_residue:
        raise ConfigError(f"data.mask is of residues, and {task.name} asks for one target a protein; leave it out")
    data = with_files(task, data, progress)
    notes = Notes([])
    reader = Reader(task, data)
    sets = read_sets(reader, data, notes)
    notes.lines += reader.told
    notes.count("records left out by data.bad_records=skip", len(reader.problems), next(iter(reader.problems), ""))
    notes.count("proteins without a mask, all of whose residues count as resolved", reader.unmasked)
    sets = _shorter(sets, data, notes)
    sets = _shared_out(sets, data, seed, notes)
    classes = _classes(sets[TRAIN], task, data)
    strange: Counter[str] = Counter()  # labels that are no class, of each set
    if task.is_classification:
        sets = {name: _numbered(name, entries, classes, task, data, strange) for name, entries in sets.items()}
    sets = {name: _labelled(name, entries, task, data, strange[name], notes) for name, entries in sets.items()}
    _check_sets(sets, task, data)
    _note_repeats(sets, notes)
    _note_classes(sets[TRAIN], classes, notes)
    mean, scale = (0.0, 1.0) if task.is_classification else _moments(sets[TRAIN])
    train, validation, test = (_set_of(sets[name]) for name in SETS)
    return Splits(
        task=Task(
            name=task.name,
            level=task.level,
            kind=task.kind,
            metric=task.metric,
            classes=classes,
            target_mean=mean,
            target_scale=scale,
        ),
        train=train,
        validation=validation,
        test=SealedTestSet(test) if len(test) else None,
        notes=tuple(notes.lines),
        files=_digests(data),
    )


def with_files(task: TaskConfig, data: DataConfig, progress: Progress | None = None) -> DataConfig:
    """The configuration with local files: those that it names, or the task's own, downloaded where they are not there.

    Raises `ConfigError` where neither is asked for, or the task has none; `ReleaseError`.
    """
    if data.train:
        return data
    if data.download is None:
        own = "" if task.download is None else ", or the task's own files by data.download=FOLDER"
        raise ConfigError(f"data.train must be given: data.train=FILE{own}")
    if task.download is None:
        raise ConfigError(
            f"data.download: of task {task.name}, no file is known that could be downloaded and checked; give local "
            "ones by data.train=..."
        )
    found = download_task(task.name, task.download, data.download, progress)
    train, sequences, mask = ((str(found[key]),) if key in found else () for key in ("train", "sequences", "mask"))
    return data.replace(download=None, train=train, sequences=sequences, mask=mask)


# --- which set --------------------------------------------------------------------------------------------------------


def _shorter(sets: Mapping[str, list[Entry]], data: DataConfig, notes: Notes) -> dict[str, list[Entry]]:
    kept = {name: shorter(entries, data.max_residues) for name, entries in sets.items()}
    for name, entries in sets.items():
        if left := len(entries) - len(kept[name]):
            notes.lines.append(f"{_NAMES[name]}: {left:,} of {len(entries):,} proteins left out, as too long")
    return kept


def _shared_out(sets: Mapping[str, list[Entry]], data: DataConfig, seed: int, notes: Notes) -> dict[str, list[Entry]]:
    """With what is split off at random. Raises `LabelError` for a set that is missing, or that is empty."""
    files = ", ".join(data.train)
    for name, share in ((VALIDATION, data.split.validation), (TEST, data.split.test)):
        if share and sets[name]:
            raise ConfigError(f"data.split.{name}: {files} has proteins marked for {name} already; leave it out")
    if not sets[TRAIN]:
        raise LabelError(f"{files}: no protein is left to train on; check the marks of sets, and data.max_residues")
    if not data.split.validation and not sets[VALIDATION]:
        if data.validation:
            raise LabelError(f"{', '.join(data.validation)}: no protein is left to validate on; check the file")
        raise LabelError(
            f"{files}: no protein is marked for validation; give a file by data.validation=..., mark some "
            "(VALIDATION=True in a FASTA header, a column `validation`), or split some off at random by "
            "data.split.validation=0.1"
        )
    if data.test and not sets[TEST]:
        raise LabelError(f"{', '.join(data.test)}: no protein is left to test on; check the file")
    if not (data.split.validation or data.split.test):
        return dict(sets)
    parts = split_off(sets[TRAIN], data.split, seed)
    for name in (VALIDATION, TEST):
        if parts[name]:
            notes.lines.append(f"{_NAMES[name]}: {len(parts[name]):,} proteins, split off the training set at random")
    return {name: parts[name] or (list(sets[name]) if name != TRAIN else []) for name in SETS}


# --- what is known ----------------------------------------------------------------------------------------------------


def _classes(train: Sequence[Entry], task: TaskConfig, data: DataConfig) -> tuple[str, ...]:
    if not task.is_classification:
        return ()
    classes = classes_of((entry.known for entry in train), task, ", ".join(data.train))  # type: ignore[misc]
    for label in classes:
        if problem := class_problem(label):
            where = next(entry.where for entry in train if label in entry.known)
            raise LabelError(f"{where}: the label {label[:40]!r} {problem}. Rename it")
    return classes


def _numbered(
    name: str,
    entries: Sequence[Entry],
    classes: Sequence[str],
    task: TaskConfig,
    data: DataConfig,
    strange: Counter[str],
) -> list[Entry]:
    """With numbers of classes in the place of labels; what is none of the classes is counted in `strange`.

    Raises `LabelError` for such a label, where it is to be an error.
    """
    numbers: dict[str | None, float] = {None: np.nan} | {label: float(place) for place, label in enumerate(classes)}  # type: ignore[dict-item]
    numbered = []
    for entry in entries:
        assert not isinstance(entry.known, np.ndarray)
        if found := strange_label(entry.known, numbers):
            if name == TRAIN or data.unseen_classes != SKIP:
                raise LabelError(_strange(name, entry, found, classes, task))
            strange[name] += sum(label not in numbers for label in entry.known)
        numbered.append(with_targets(entry, class_numbers(entry.known, numbers)))
    return numbered


def _strange(name: str, entry: Entry, found: tuple[int, str], classes: Sequence[str], task: TaskConfig) -> str:
    place, label = found
    where = f"{entry.where}, residue {place + 1}" if task.is_per_residue else entry.where
    of = "task.classes" if task.classes is not None else "the classes of the training set"
    listed = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    advice = "correct it, or list it in task.unknown where it says that nothing is known"
    if name != TRAIN:
        advice += "; data.unseen_classes=skip treats all such as not known"
    return f"{where}: the label {label[:40]!r} is none of {of} ({listed}); {advice}"


def _labelled(
    name: str, entries: Sequence[Entry], task: TaskConfig, data: DataConfig, strange: int, notes: Notes
) -> list[Entry]:
    """Those of which anything is known; of the labels so many were strange. Raises `LabelError` where none is left."""
    kept = [entry for entry in entries if len(known_of(entry))]
    if entries and not kept:
        raise LabelError(f"{_files(name, data)}: no target of the {_NAMES[name]} set is known; check the labels")
    left = len(entries) - len(kept)
    if not task.is_per_residue and strange == left:  # the same proteins: told once
        notes.count(f"{_NAMES[name]}: proteins left out, as their classes are none of the task's", left)
    else:
        notes.count(f"{_NAMES[name]}: labels of classes that are none of the task's, treated as not known", strange)
        notes.count(f"{_NAMES[name]}: proteins left out, of which no target is known", left)
    targets, known = sum(len(entry.known) for entry in kept), sum(len(known_of(entry)) for entry in kept)
    if known < targets:
        notes.lines.append(f"{_NAMES[name]}: {known:,} of {targets:,} targets are known")
    return kept


def _check_sets(sets: Mapping[str, Sequence[Entry]], task: TaskConfig, data: DataConfig) -> None:
    """Something to learn, and something to measure it by."""
    for name in (TRAIN, VALIDATION):
        values = np.unique(np.concatenate([known_of(entry) for entry in sets[name]]))
        needed = name == TRAIN or task.metric in ("spearman", "pearson")
        if len(values) < 2 and needed:
            what = "are of one class" if task.is_classification else f"are equal ({values[0]:g})"
            why = "nothing can be learned from them" if name == TRAIN else f"task.metric={task.metric} cannot be had"
            raise LabelError(
                f"{_files(name, data)}: all targets of the {_NAMES[name]} set {what}; {why}. Check the labels"
            )


def _files(name: str, data: DataConfig) -> str:
    """Those of a set, for a message."""
    own = {TRAIN: data.train, VALIDATION: data.validation, TEST: data.test}[name]
    return ", ".join(own or data.train)


def _moments(entries: Sequence[Entry]) -> tuple[float, float]:
    """Mean and standard deviation of the known targets."""
    values = np.concatenate([known_of(entry) for entry in entries]).astype(np.float64)
    return float(values.mean()), float(values.std())


# --- what is worth a word ---------------------------------------------------------------------------------------------


def _note_repeats(sets: Mapping[str, Sequence[Entry]], notes: Notes) -> None:
    """Equal sequences: of sets that should have none in common, and with different targets to train on."""
    sequences = {name: [entry.sequence for entry in entries] for name, entries in sets.items()}
    for one, other in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        common = set(sequences[one])
        if repeated := sum(sequence in common for sequence in sequences[other]):
            told = (
                f"{repeated:,} of {len(sequences[other]):,} {_NAMES[other]} proteins are in the {_NAMES[one]} set too"
            )
            notes.lines.append(told + (": its scores are not those of new proteins" if one == TRAIN else ""))
    known: dict[bytes, Targets] = {}
    contradicting: set[bytes] = set()
    for entry in sets[TRAIN]:
        assert isinstance(entry.known, np.ndarray)
        earlier = known.get(entry.sequence, entry.known)
        if (np.isfinite(earlier) & np.isfinite(entry.known) & (earlier != entry.known)).any():
            contradicting.add(entry.sequence)
        known[entry.sequence] = np.where(np.isfinite(earlier), earlier, entry.known)
    notes.count("training: sequences that occur more than once, with different targets", len(contradicting))


def _note_classes(train: Sequence[Entry], classes: Sequence[str], notes: Notes) -> None:
    if not classes:
        return
    values = np.concatenate([known_of(entry) for entry in train]).astype(np.int64)
    counts = Counter(dict(zip(classes, np.bincount(values, minlength=len(classes)).tolist(), strict=True)))
    notes.count("classes of which the training set has none", sum(not count for count in counts.values()))
    if max(counts.values()) > _IMBALANCED * min(counts.values()):
        notes.lines.append(f"training: the classes are far from equally frequent: {counts_in_words(counts)}")


# --- what is handed on ------------------------------------------------------------------------------------------------


def _set_of(entries: Sequence[Entry]) -> LabelledDataset:
    return LabelledDataset([entry.protein for entry in entries], [entry.known for entry in entries])  # type: ignore[misc]


def _digests(data: DataConfig) -> dict[str, str]:
    """SHA-256 of every file, by its name; where two have the same name, with the folder it is in."""
    every = dict.fromkeys((*data.train, *data.validation, *data.test, *data.sequences, *data.mask))
    names = Counter(Path(path).name for path in every)
    found = {}
    for path in map(Path, every):
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
        found[path.name if names[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"] = digest
    return found
