"""What is to be learned, and of which files, as a configuration says it: the groups `task` and `data`. No torch.

Every key is known and of its type once it is here; what the files hold is for `finetuning/dataset.py` to see.

What a fine-tuned model predicts: of each residue or of each protein, one of some classes or a number. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.inputs import InputPolicy
from bionemo_esm.model.safe_serialization import check_plain
from bionemo_esm.settings import integer, known, number, path

RESIDUE, SEQUENCE = "residue", "sequence"
LEVELS = (RESIDUE, SEQUENCE)
CLASSIFICATION, REGRESSION = "classification", "regression"
METRICS = {CLASSIFICATION: ("accuracy", "f1", "mcc"), REGRESSION: ("spearman", "pearson", "mse")}
"""By kind: what is reported of every fine-tuning, and what `Task.metric` may be."""
LOWER_IS_BETTER = frozenset({"mse"})

Targets = NDArray[np.float32]
"""What is known of one protein: [R], a target for each residue, or [1], one for the protein. Of a classification the
number of the class in `Task.classes`, of a regression the number itself, in its own unit; NaN where it is not known."""
Prediction = NDArray[np.float32]
"""Of one protein, [R, C] or [1, C]: probabilities of the C classes, or the number itself, in its own unit (C = 1)."""


@dataclass(frozen=True)
class Task:
    """A task, when its training data have been read.

    metric: the one of `METRICS` that early stopping, and the choice of the best checkpoint, go by.
    classes: names of the labels in the order of their numbers; () for a regression.
    target_mean, target_scale: of a regression's training targets; a head's output is (target - mean) / scale.
    Raises `ConfigError` for values that do not go together.
    """

    name: str
    level: str
    kind: str
    metric: str
    classes: tuple[str, ...] = ()
    target_mean: float = 0.0
    target_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.level not in LEVELS or self.kind not in METRICS:
            raise ConfigError(
                f"a task is of level {' or '.join(LEVELS)}, and of kind {' or '.join(METRICS)}, "
                f"not {self.level!r} and {self.kind!r}"
            )
        if self.metric not in METRICS[self.kind]:
            raise ConfigError(f"metric of a {self.kind} is {', '.join(METRICS[self.kind])}, not {self.metric!r}")
        if (self.kind == CLASSIFICATION) != (len(self.classes) > 1) or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"a classification has two or more different classes, a regression none: {self.classes}")
        if not (np.isfinite(self.target_mean) and 0 < self.target_scale < np.inf):
            raise ConfigError(f"target_scale must be positive and finite, not {self.target_scale}")

    @property
    def outputs(self) -> int:
        """C: numbers that a head gives for each residue, or protein."""
        return len(self.classes) or 1

    @property
    def is_classification(self) -> bool:
        return self.kind == CLASSIFICATION

    @property
    def is_per_residue(self) -> bool:
        return self.level == RESIDUE

    def is_better(self, one: float, other: float) -> bool:
        """Whether one value of `metric` is better than another; NaN is worse than any."""
        if np.isnan(one) or np.isnan(other):
            return bool(np.isnan(other) and not np.isnan(one))
        return one < other if self.metric in LOWER_IS_BETTER else one > other

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for an archive."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Task:
        """From what `to_dict` gave. Raises `ConfigError` for other keys, or values of another type."""
        kinds: dict[str, type | tuple[type, ...]] = {field.name: str for field in fields(cls)}
        kinds |= {"classes": list, "target_mean": (int, float), "target_scale": (int, float)}
        if values.keys() != kinds.keys():
            raise ConfigError(f"a task has exactly the keys {', '.join(kinds)}, not {', '.join(map(str, values))}")
        for key, value in values.items():
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise ConfigError(f"{key} of a task cannot be {value!r}")
        if not all(isinstance(name, str) for name in values["classes"]):
            raise ConfigError("classes of a task must be texts")
        return cls(**{**values, "classes": tuple(values["classes"])})


def standardised(task: Task, targets: Sequence[Targets]) -> list[Targets]:
    """What a head is fitted on: numbers of classes as they are, numbers by the task's mean and scale."""
    if task.is_classification:
        return list(targets)
    mean, scale = np.float32(task.target_mean), np.float32(task.target_scale)
    return [(target - mean) / scale for target in targets]


ERROR, SKIP = "error", "skip"
_USUAL_METRIC = {"classification": "accuracy", "regression": "mse"}


@dataclass(frozen=True)
class DownloadConfig:
    """Where a task's own files can be had: one zip archive, and what its members are.

    checksum: `sha256:` and 64 hexadecimal digits, or `git:` and the 40 of the archive's blob in its repository.
    train: the member that holds the labels of all sets. sequences, mask: those that hold sequences and resolved
    residues, where labels stand alone.
    """

    url: str
    checksum: str
    train: str
    sequences: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", self.checksum):
            raise ConfigError(
                "task.download.checksum must be sha256: and 64 hexadecimal digits, or git: and 40, "
                f"not {self.checksum!r}"
            )
        names = [member.rpartition("/")[2] for member in (self.train, self.sequences, self.mask) if member is not None]
        if len(set(names)) < len(names):
            raise ConfigError(
                "task.download: train, sequences and mask must have different names, as files in one folder"
            )


@dataclass(frozen=True)
class TaskConfig:
    """A task before its data have been read. Raises `ConfigError` for values that do not go together.

    level, kind, metric: as in `Task`. classes: None for those of the training set, sorted, by number where all are
    whole numbers. unknown: labels that say that nothing is known.
    sequence_column: of a table; None for `sequence` or `seq`. id_column: None for `id`, or else the number of the row.
    set_column, validation_column: None for `set` and `validation`, where they are there.
    header_pattern: where the header of a FASTA record has no TARGET=, a regular expression with one group, the label.
    """

    name: str
    level: str
    kind: str
    metric: str
    classes: tuple[str, ...] | None = None
    unknown: tuple[str, ...] = ()
    target_column: str = "target"
    sequence_column: str | None = None
    id_column: str | None = None
    set_column: str | None = None
    validation_column: str | None = None
    header_pattern: str | None = None
    download: DownloadConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ConfigError(f"task.name must be made of letters, digits, _ . and -, not {self.name!r}")
        _one_of("task.level", self.level, LEVELS)
        _one_of("task.kind", self.kind, tuple(METRICS))
        _one_of("task.metric", self.metric, METRICS[self.kind])
        self._check_classes()
        if self.header_pattern is not None:
            try:
                groups = re.compile(self.header_pattern).groups
            except re.error as error:
                raise ConfigError(f"task.header_pattern is no regular expression: {error}") from error
            if groups != 1:
                raise ConfigError(f"task.header_pattern must have one group in parentheses, the label, not {groups}")

    def _check_classes(self) -> None:
        if self.classes is not None:
            if self.kind != CLASSIFICATION:
                raise ConfigError("task.classes is for a classification; set it to null, or task.kind=classification")
            if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
                raise ConfigError(f"task.classes must be two or more different labels, not {list(self.classes)}")
            for label in self.classes:
                if problem := class_problem(label):
                    raise ConfigError(f"task.classes: {label[:40]!r} {problem}; rename it, here and in the files")
            if both := set(self.classes) & set(self.unknown):
                raise ConfigError(f"{min(both)!r} is in task.classes and in task.unknown; it is one of the two")

    @property
    def is_classification(self) -> bool:
        return self.kind == CLASSIFICATION

    @property
    def is_per_residue(self) -> bool:
        return self.level == "residue"


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the training set's distinct sequences that are split off at random; 0: none."""

    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise ConfigError(
                f"data.split.validation and data.split.test must be shares of which the rest is trained on, as 0.1, "
                f"not {self.validation} and {self.test}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which files hold a task's labels, and what becomes of records that are not as they should be.

    train: FASTA, CSV, TSV or Parquet, by name; may hold all sets. validation, test: () for what is marked so in train.
    sequences: for labels that stand alone, FASTA or tables with the sequences by id. mask: FASTA of 1 and 0 by id;
    of residues at 0, which the experiment did not show, nothing is known; () for none such.
    max_residues: longer proteins are left out, and counted. bad_records: a sequence that cannot be read, or has labels
    or a mask of another length, or is not there. unknown_letters: as in `InputPolicy`. missing_targets: empty, or NaN.
    unseen_classes: in validation or test, where they are none of the task's. download: a folder for a task's own files.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    split: SplitConfig = SplitConfig()
    max_residues: int | None = None
    bad_records: str = ERROR
    unknown_letters: str = ERROR
    missing_targets: str = ERROR
    unseen_classes: str = ERROR
    download: Path | None = None

    def __post_init__(self) -> None:
        for key in ("bad_records", "missing_targets", "unseen_classes"):
            _one_of(f"data.{key}", getattr(self, key), (ERROR, SKIP))
        _one_of("data.unknown_letters", self.unknown_letters, (ERROR, "X"))
        if self.max_residues is not None and self.max_residues < 1:
            raise ConfigError(f"data.max_residues must be at least 1, or null, not {self.max_residues}")
        if self.train and self.download is not None:
            raise ConfigError("data.train names local files, data.download a folder to get them into; give one of both")
        if self.download is not None and (self.validation or self.test or self.sequences or self.mask):
            raise ConfigError(
                "data.download brings all files of a task; leave out validation, test, sequences and mask"
            )
        for key in ("validation", "test"):
            if getattr(self, key) and getattr(self.split, key):
                raise ConfigError(f"data.{key} names files, data.split.{key} splits off another such set; give one")


class DataPolicy(InputPolicy):
    """How proteins are read, in the words of these keys."""

    @classmethod
    def for_reading(cls, task: TaskConfig, data: DataConfig) -> DataPolicy:
        """Of a task's columns, and of what is done about bad records."""
        return cls(None, task.id_column, task.sequence_column, data.bad_records, data.unknown_letters)

    def advice(self, text: str, key: str, value: str) -> str:
        section = "data" if key in ("bad_records", "unknown_letters") else "task"
        return text.format(f"{section}.{key}={value}")


def class_problem(label: str) -> str:
    """Why a label cannot name a class, for a message; "" where it can. An archive's configuration has to hold it."""
    if len(label.splitlines()) > 1:
        return "runs over several lines: is a quote not closed?"
    try:
        check_plain(label)
    except ValueError:
        return "cannot be kept in a model's archive, where ${ and nemo: at the beginning refer to something else"
    return ""


def load_task_config(values: Mapping[str, Any]) -> TaskConfig:
    """The section `task`. Raises `ConfigError`, naming the key that is unknown, missing or of the wrong kind."""
    checked = dict(known("task", dict(values), {item.name for item in fields(TaskConfig)}))
    for key in ("name", "level", "kind"):
        if checked.get(key) is None:
            raise ConfigError(f"task.{key} must be given: task.{key}=...")
    if checked.get("metric") is None:
        checked["metric"] = _USUAL_METRIC.get(str(checked["kind"]), "accuracy")
    if checked.get("target_column") is None:
        checked["target_column"] = "target"
    classes = checked.pop("classes", None)
    unknown = checked.pop("unknown", None)
    download = checked.pop("download", None)
    return TaskConfig(
        classes=None if classes is None else _labels("task.classes", classes),
        unknown=() if unknown is None else _labels("task.unknown", unknown),
        download=None if download is None else _download_config(download),
        **{key: None if value is None else _text(f"task.{key}", value) for key, value in checked.items()},  # type: ignore[arg-type]
    )


def load_data_config(values: Mapping[str, Any]) -> DataConfig:
    """The section `data`. Raises `ConfigError`, naming the key, for one that is unknown or of the wrong kind."""
    checked = dict(known("data", dict(values), {item.name for item in fields(DataConfig)}))
    for key in ("train", "validation", "test", "sequences", "mask"):
        checked[key] = _paths(f"data.{key}", checked.get(key))
    split = checked.pop("split", None)
    if split is not None:
        shares = known("data.split", split, {item.name for item in fields(SplitConfig)})
        split = {key: 0.0 if value is None else number(f"data.split.{key}", value) for key, value in shares.items()}
    if checked.get("max_residues") is not None:
        checked["max_residues"] = integer("data.max_residues", checked["max_residues"])
    for key in ("bad_records", "unknown_letters", "missing_targets", "unseen_classes"):
        if key in checked:
            checked[key] = _text(f"data.{key}", checked[key])
    checked["download"] = path("data.download", checked.get("download"))
    return DataConfig(split=SplitConfig(**split or {}), **checked)


def _download_config(values: Any) -> DownloadConfig:
    checked = known("task.download", values, {item.name for item in fields(DownloadConfig)})
    for key in ("url", "checksum", "train"):
        if checked.get(key) is None:
            raise ConfigError(f"task.download.{key} is missing")
    return DownloadConfig(
        **{key: None if value is None else _text(f"task.download.{key}", value) for key, value in checked.items()}  # type: ignore[arg-type]
    )


def _labels(key: str, values: Any) -> tuple[str, ...]:
    """Labels as text: whole numbers may be given as such, but no fraction, whose digits could be others in the file."""
    if not isinstance(values, list | tuple) or not all(isinstance(one, str | int) for one in values):
        raise ConfigError(f"{key} must be a list of labels, not {values!r}; put those that are not whole in quotes")
    if truths := [one for one in values if isinstance(one, bool)]:
        raise ConfigError(f"{key}: {truths[0]} must be in quotes, as the text that the file has")
    return tuple(str(one) for one in values)


def _paths(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    several = value if isinstance(value, list | tuple) else [value]
    found = [path(key, one) for one in several]
    if not found or None in found:
        raise ConfigError(f"{key} must be a path, or a list of paths, not {value!r}")
    if "-" in map(str, found):
        raise ConfigError(f"{key} must be a file: standard input can be read only once; save it first")
    if len(set(found)) < len(found):
        raise ConfigError(f"{key} names a file twice")
    return tuple(map(str, found))


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be text, not {value!r}")
    return value


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {value!r}")
