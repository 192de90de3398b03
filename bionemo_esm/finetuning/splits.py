"""The training, validation and test sets of a task, read from its files and checked before any training.

Sets that are split off at random do not depend on the order of the records: a keyed hash of the sequence decides, so
equal sequences stay together. Similar ones may not: files can hold a split by families.

A task's own files are downloaded as one zip archive at a fixed commit of FLIP's repository; named members are extracted
once the archive's checksum matches.
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
    at_most,
    class_numbers,
    classes_of,
    counts_in_words,
    known_of,
    read_sets,
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

_IMBALANCED = 10  # ratio of the most to the least frequent class, from which on the report notes it
_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


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
        """Number of known targets."""
        return sum(int(np.isfinite(target).sum()) for target in self.targets)


class SealedTestSet:
    """The test set: its proteins are accessible, its labels only through `open`, which is called once, at the end."""

    def __init__(self, labelled: LabelledDataset) -> None:
        self.proteins = labelled.proteins
        self._labelled: LabelledDataset | None = labelled

    def __len__(self) -> int:
        return len(self.proteins)

    def open(self) -> LabelledDataset:
        """Return the set with its labels. A second call is a bug: test labels are used once."""
        assert self._labelled is not None, "the test labels were used already"
        labelled, self._labelled = self._labelled, None
        return labelled


@dataclass(frozen=True)
class Splits:
    """A task's data; every label was checked."""

    task: Task  # classes, mean and scale are those of the training set
    train: LabelledDataset
    validation: LabelledDataset
    test: SealedTestSet | None
    notes: tuple[str, ...] = ()  # records left out, missing values, random splits; for screen and report
    files: Mapping[str, str] = field(default_factory=dict)  # by file name: SHA-256


# --- reading --------------------------------------------------------------------------------------------------------


def read_splits(task: TaskConfig, data: DataConfig, seed: int, progress: Progress | None = None) -> Splits:
    """Return the sets of a task, every label checked, the labels of the test set sealed.

    seed: of random splits. progress: of a download. Raises `LabelError`, `InputError`, `TableError` or `SourceError`
    for files, `ConfigError` for keys, `ReleaseError` for a download.
    """
    if data.mask and not task.is_per_residue:
        raise ConfigError(f"data.mask is of residues, and {task.name} asks for one target a protein; leave it out")
    data = with_files(task, data, progress)
    notes = Notes([])
    reader = Reader(task, data)
    sets = read_sets(reader, data, notes)
    notes.lines += reader.notes
    notes.count("records left out by data.bad_records=skip", len(reader.problems), next(iter(reader.problems), ""))
    notes.count("proteins without a mask, all of whose residues count as resolved", reader.unmasked)
    sets = _without_long(sets, data, notes)
    sets = _with_random_splits(sets, data, seed, notes)
    classes = _classes(sets[TRAIN], task, data)
    unknown: Counter[str] = Counter()  # labels that are no class, of each set
    if task.is_classification:
        sets = {name: _numbered(name, entries, classes, task, data, unknown) for name, entries in sets.items()}
    sets = {name: _labelled(name, entries, task, data, unknown[name], notes) for name, entries in sets.items()}
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
    """Return the configuration with local files: those that it names, or the task's own, downloaded if missing.

    Raises `ConfigError` if neither is configured, or the task has no files; `ReleaseError`.
    """
    if data.train:
        return data
    if data.download is None:
        own = "" if task.download is None else ", or the task's own files by data.download=FOLDER"
        raise ConfigError(f"data.train must be given: data.train=FILE{own}")
    if task.download is None:
        raise ConfigError(
            f"data.download: task {task.name} has no file that could be downloaded and checked; give local "
            "ones by data.train=..."
        )
    found = download_task(task.name, task.download, data.download, progress)
    train, sequences, mask = ((str(found[key]),) if key in found else () for key in ("train", "sequences", "mask"))
    return data.replace(download=None, train=train, sequences=sequences, mask=mask)


# --- sets -------------------------------------------------------------------------------------------------------------


def _without_long(sets: Mapping[str, list[Entry]], data: DataConfig, notes: Notes) -> dict[str, list[Entry]]:
    kept = {name: at_most(entries, data.max_residues) for name, entries in sets.items()}
    for name, entries in sets.items():
        if left := len(entries) - len(kept[name]):
            notes.lines.append(f"{_NAMES[name]}: {left:,} of {len(entries):,} proteins left out, as too long")
    return kept


def _with_random_splits(
    sets: Mapping[str, list[Entry]], data: DataConfig, seed: int, notes: Notes
) -> dict[str, list[Entry]]:
    """Return the sets after random splits. Raises `LabelError` for a missing or an empty set."""
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


# --- known targets --------------------------------------------------------------------------------------------------


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
    unknown: Counter[str],
) -> list[Entry]:
    """Return the entries with class numbers for labels; unknown classes are counted in `unknown`.

    Raises `LabelError` for an unknown class, unless `data.unseen_classes` is skip.
    """
    numbers: dict[str | None, float] = {None: np.nan} | {label: float(place) for place, label in enumerate(classes)}  # type: ignore[dict-item]
    numbered = []
    for entry in entries:
        assert not isinstance(entry.known, np.ndarray)
        if found := strange_label(entry.known, numbers):
            if name == TRAIN or data.unseen_classes != SKIP:
                raise LabelError(_strange(name, entry, found, classes, task))
            unknown[name] += sum(label not in numbers for label in entry.known)
        numbered.append(with_targets(entry, class_numbers(entry.known, numbers)))
    return numbered


def _strange(name: str, entry: Entry, found: tuple[int, str], classes: Sequence[str], task: TaskConfig) -> str:
    place, label = found
    where = f"{entry.where}, residue {place + 1}" if task.is_per_residue else entry.where
    of = "task.classes" if task.classes is not None else "the classes of the training set"
    listed = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    advice = "correct it, or list it in task.unknown if it means that the label is not known"
    if name != TRAIN:
        advice += "; data.unseen_classes=skip treats all such as not known"
    return f"{where}: the label {label[:40]!r} is none of {of} ({listed}); {advice}"


def _labelled(
    name: str, entries: Sequence[Entry], task: TaskConfig, data: DataConfig, unknown: int, notes: Notes
) -> list[Entry]:
    """Return the entries with a known target. `unknown`: their labels of unknown classes. Raises `LabelError`."""
    kept = [entry for entry in entries if len(known_of(entry))]
    if entries and not kept:
        raise LabelError(f"{_files(name, data)}: no target of the {_NAMES[name]} set is known; check the labels")
    left = len(entries) - len(kept)
    if not task.is_per_residue and unknown == left:  # the same proteins: one note
        notes.count(f"{_NAMES[name]}: proteins left out, as their classes are none of the task's", left)
    else:
        notes.count(f"{_NAMES[name]}: labels of classes that are none of the task's, treated as not known", unknown)
        notes.count(f"{_NAMES[name]}: proteins left out, of which no target is known", left)
    targets, known = sum(len(entry.known) for entry in kept), sum(len(known_of(entry)) for entry in kept)
    if known < targets:
        notes.lines.append(f"{_NAMES[name]}: {known:,} of {targets:,} targets are known")
    return kept


def _check_sets(sets: Mapping[str, Sequence[Entry]], task: TaskConfig, data: DataConfig) -> None:
    """Raise `LabelError` unless targets differ: in training, and in validation for a correlation."""
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
    """Return the file names of a set, for a message."""
    own = {TRAIN: data.train, VALIDATION: data.validation, TEST: data.test}[name]
    return ", ".join(own or data.train)


def _moments(entries: Sequence[Entry]) -> tuple[float, float]:
    """Return mean and standard deviation of the known targets."""
    values = np.concatenate([known_of(entry) for entry in entries]).astype(np.float64)
    return float(values.mean()), float(values.std())


# --- notes ----------------------------------------------------------------------------------------------------------


def _note_repeats(sets: Mapping[str, Sequence[Entry]], notes: Notes) -> None:
    """Note sequences that several sets have in common, and equal training sequences with different targets."""
    sequences = {name: [entry.sequence for entry in entries] for name, entries in sets.items()}
    for one, other in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
        common = set(sequences[one])
        if repeated := sum(sequence in common for sequence in sequences[other]):
            note = (
                f"{repeated:,} of {len(sequences[other]):,} {_NAMES[other]} proteins are in the {_NAMES[one]} set too"
            )
            notes.lines.append(note + (": its scores are not those of new proteins" if one == TRAIN else ""))
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


# --- results ---------------------------------------------------------------------------------------------------------


def _set_of(entries: Sequence[Entry]) -> LabelledDataset:
    return LabelledDataset([entry.protein for entry in entries], [entry.known for entry in entries])  # type: ignore[misc]


def _digests(data: DataConfig) -> dict[str, str]:
    """Return the SHA-256 of every file by its name; with its folder if two names are equal."""
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


# --- random splits --------------------------------------------------------------------------------------------------


def split_off(entries: Sequence[Entry], shares: SplitConfig, seed: int) -> dict[str, list[Entry]]:
    """Return the entries of train, validation and test, each in its order; only shares of 0 give empty sets.

    Raises `ConfigError` for too few distinct sequences.
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


# --- downloads ------------------------------------------------------------------------------------------------------

_LARGEST_ARCHIVE_BYTES = 2**30
_LARGEST_MEMBER_BYTES = 2**30
_BLOCK_BYTES = 2**20


def download_task(name: str, config: DownloadConfig, folder: Path, progress: Progress | None = None) -> dict[str, Path]:
    """Return the files of a task in `folder/name` by key: train, and sequences and mask if the task has them.

    An existing file is checked, and not downloaded again. Raises `ReleaseError` for an archive that cannot be
    downloaded, has another checksum or lacks a member, and for a folder that is not writable.
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
        return {key: _extract(archive, member, place) for key, member in members.items() if member is not None}


def _has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has this checksum: `sha256:...`, or `git:...`, the SHA-1 of a blob's header and the file."""
    kind, _, expected = checksum.partition(":")
    size = path.stat().st_size
    if size > _LARGEST_ARCHIVE_BYTES:
        return False
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == expected


def _extract(archive: Path, member: str, place: Path) -> Path:
    """Extract one member of an archive into a folder, under the last part of its name."""
    target = place / PurePosixPath(member).name
    try:
        with zipfile.ZipFile(archive) as packed:
            if member not in packed.namelist():
                there = ", ".join(name for name in packed.namelist() if not name.endswith("/"))
                raise ReleaseError(f"{archive}: has no member {member!r}, but {there}; correct task.download")
            info = packed.getinfo(member)
            if target == archive or not target.name or info.is_dir() or info.file_size > _LARGEST_MEMBER_BYTES:
                raise ReleaseError(f"{archive}: member {member!r} is no file of up to 1 GiB; correct task.download")
            if _is_extracted(target, info):
                return target
            require_room(target, info.file_size)
            with packed.open(info) as source, atomic_write(target) as stream:
                shutil.copyfileobj(source, stream, _BLOCK_BYTES)  # file_size bytes at most; the CRC is checked
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ReleaseError(f"{archive}: cannot be unpacked ({error}); remove it and run this again") from error
    return target


def _is_extracted(target: Path, info: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != info.file_size:
        return False
    check = 0
    with target.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            check = zlib.crc32(block, check)
    return check == info.CRC
