"""The task of a fine-tuned model and its files: the configuration groups `task` and `data`. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationInfo, field_validator, model_validator

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.inputs import InputPolicy
from bionemo_esm.model.safe_serialization import check_plain
from bionemo_esm.settings import PositiveInt, Settings, expand_home

RESIDUE, SEQUENCE = "residue", "sequence"
CLASSIFICATION, REGRESSION = "classification", "regression"
ERROR, SKIP = "error", "skip"
Level = Literal["residue", "sequence"]
Kind = Literal["classification", "regression"]
METRICS = {CLASSIFICATION: ("accuracy", "f1", "mcc"), REGRESSION: ("spearman", "pearson", "mse")}
"""By kind: the metrics of every report, and the values of `Task.metric`."""
LOWER_IS_BETTER = frozenset({"mse"})
_DEFAULT_METRIC = {CLASSIFICATION: "accuracy", REGRESSION: "mse"}

Targets = NDArray[np.float32]
"""Targets of one protein: [R], one for each residue, or [1], one for the protein. A classification's are class numbers
in `Task.classes`, a regression's are in their own unit; NaN where the target is not known."""
Prediction = NDArray[np.float32]
"""Of one protein, [R, C] or [1, C]: probabilities of the C classes, or the number in the target's unit (C = 1)."""

SettingsT = TypeVar("SettingsT", bound=Settings)


def from_archive(settings: type[SettingsT], section: str, values: Mapping[str, Any]) -> SettingsT:
    """Return settings from an archive, where every key is written. Raises `ConfigError`, also for a missing key."""
    if missing := sorted(set(settings.model_fields) - set(values)):
        raise ConfigError(f"{section}.{missing[0]} is missing", code="config.missing-key")
    return settings.from_config(values)


class Task(Settings, section="task"):
    """A task whose training data have been read.

    metric: one of `METRICS`; it decides early stopping and the choice of the best epoch.
    classes: names of the labels in the order of their numbers; () for a regression.
    target_mean, target_scale: of a regression's training targets; a head's output is (target - mean) / scale.
    """

    name: str
    level: Level
    kind: Kind
    metric: str
    classes: tuple[str, ...] = ()
    target_mean: float = 0.0
    target_scale: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Task:
        if self.metric not in METRICS[self.kind]:
            raise ConfigError(f"metric of a {self.kind} is {', '.join(METRICS[self.kind])}, not {self.metric!r}")
        if (self.kind == CLASSIFICATION) != (len(self.classes) > 1) or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"a classification has two or more different classes, a regression none: {self.classes}")
        if not (np.isfinite(self.target_mean) and 0 < self.target_scale < np.inf):
            raise ConfigError(f"target_scale must be positive and finite, not {self.target_scale}")
        return self

    @property
    def outputs(self) -> int:
        """C: numbers that a head gives for each residue or protein."""
        return len(self.classes) or 1

    @property
    def is_classification(self) -> bool:
        return self.kind == CLASSIFICATION

    @property
    def is_per_residue(self) -> bool:
        return self.level == RESIDUE

    @property
    def unit(self) -> str:
        """The unit that has a target, for messages: a residue or a protein."""
        return "residue" if self.is_per_residue else "protein"

    def is_better(self, one: float, other: float) -> bool:
        """Whether one value of `metric` is better than another; NaN is worse than any."""
        if np.isnan(one) or np.isnan(other):
            return bool(np.isnan(other) and not np.isnan(one))
        return one < other if self.metric in LOWER_IS_BETTER else one > other

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for an archive."""
        return self.model_dump(mode="json")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Task:
        """Return the task that `to_dict` wrote. Raises `ConfigError`, naming the key."""
        names = values.get("classes", ())
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise ConfigError("classes of a task must be texts")
        return from_archive(cls, "task", values)


def standardised(task: Task, targets: Sequence[Targets]) -> list[Targets]:
    """Return the targets that a head is fitted to: class numbers as they are, numbers less their mean, over scale."""
    if task.is_classification:
        return list(targets)
    mean, scale = np.float32(task.target_mean), np.float32(task.target_scale)
    return [(target - mean) / scale for target in targets]


class DownloadConfig(Settings, section="task.download"):
    """A zip archive with a task's files, and its members.

    checksum: `sha256:` and 64 hexadecimal digits, or `git:` and the 40 of the archive's blob in its repository.
    train: the member with the labels of all sets. sequences, mask: the members with sequences and resolved residues,
    for labels in a file of their own.
    """

    url: str
    checksum: str
    train: str
    sequences: str | None = None
    mask: str | None = None

    @model_validator(mode="after")
    def _check(self) -> DownloadConfig:
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
        return self


class TaskConfig(Settings, section="task"):
    """A task before its data have been read.

    level, kind, metric: as in `Task`. classes: None for those of the training set, sorted, by number if all are whole
    numbers. unknown: labels that mean "not known".
    sequence_column: of a table; None for `sequence` or `seq`. id_column: None for `id`, or else the number of the row.
    set_column, validation_column: None for `set` and `validation`, if they exist.
    header_pattern: for FASTA headers without TARGET=, a regular expression with one group, the label.
    """

    name: str
    level: Level
    kind: Kind
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

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return {"metric": _DEFAULT_METRIC.get(str(given.get("kind")), "accuracy"), **given}

    @field_validator(
        *("name", "metric", "target_column", "sequence_column", "id_column", "set_column", "validation_column"),
        "header_pattern",
        mode="before",
    )
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"task.{info.field_name} must be text, not {value!r}", code="config.type")
        return value

    @field_validator("classes", "unknown", mode="before")
    @classmethod
    def _check_labels(cls, values: Any, info: ValidationInfo) -> Any:
        """Accept text and whole numbers, but no fraction: its digits may differ from those in the file."""
        key = f"task.{info.field_name}"
        if not isinstance(values, list | tuple) or not all(isinstance(one, str | int) for one in values):
            raise ConfigError(f"{key} must be a list of labels, not {values!r}; put those that are not whole in quotes")
        if truths := [one for one in values if isinstance(one, bool)]:
            raise ConfigError(f"{key}: {truths[0]} must be in quotes, as the text that the file has")
        return values

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ConfigError(f"task.name must be made of letters, digits, _ . and -, not {self.name!r}")
        if self.metric not in METRICS[self.kind]:
            raise ConfigError(f"task.metric must be one of {', '.join(METRICS[self.kind])}, not {self.metric!r}")
        self._check_classes()
        if self.header_pattern is not None:
            try:
                groups = re.compile(self.header_pattern).groups
            except re.error as error:
                raise ConfigError(f"task.header_pattern is no regular expression: {error}") from error
            if groups != 1:
                raise ConfigError(f"task.header_pattern must have one group in parentheses, the label, not {groups}")
        return self

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
        return self.level == RESIDUE


class SplitConfig(Settings, section="data.split"):
    """Shares of the training set's distinct sequences that are split off at random; 0: none."""

    validation: float = 0.0
    test: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: 0.0 if value is None else value for key, value in values.items()}

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise ConfigError(
                "data.split.validation and data.split.test must be shares that leave some to train on, such as 0.1, "
                f"not {self.validation} and {self.test}"
            )
        return self


class DataConfig(Settings, section="data"):
    """The files with a task's labels, and the handling of records that cannot be used.

    train: FASTA, CSV, TSV or Parquet, by name; may hold all sets. validation, test: () for the records marked so in
    train. sequences: for labels in a file of their own, FASTA or tables with the sequences by id. mask: FASTA of 1 and
    0 by id; the targets of residues at 0, which the experiment did not resolve, are not known.
    max_residues: longer proteins are left out, and counted. bad_records: a sequence that cannot be read, or that has
    labels or a mask of another length, or is missing. unknown_letters: as in `InputPolicy`. missing_targets: empty, or
    NaN. unseen_classes: in validation or test, in none of the task's. download: a folder for the task's own files.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    split: SplitConfig = SplitConfig()
    max_residues: PositiveInt | None = None
    bad_records: Literal["error", "skip"] = "error"
    unknown_letters: Literal["error", "X"] = "error"
    missing_targets: Literal["error", "skip"] = "error"
    unseen_classes: Literal["error", "skip"] = "error"
    download: Path | None = None

    @field_validator("train", "validation", "test", "sequences", "mask", mode="before")
    @classmethod
    def _check_paths(cls, value: Any, info: ValidationInfo) -> tuple[str, ...]:
        key = f"data.{info.field_name}"
        given = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(one, str) and one for one in given) or value == []:
            raise ConfigError(f"{key} must be a path, or a list of paths, not {value!r}", code="config.type")
        found = [str(expand_home(one)) for one in given]
        if "-" in found:
            raise ConfigError(f"{key} must be a file: standard input can be read only once; save it first")
        if len(set(found)) < len(found):
            raise ConfigError(f"{key} names a file twice")
        return tuple(found)

    @field_validator("split", mode="before")
    @classmethod
    def _no_split(cls, value: Any) -> Any:
        return SplitConfig() if value is None else value

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.train and self.download is not None:
            raise ConfigError("data.train names local files, data.download a folder to get them into; give one of both")
        if self.download is not None and (self.validation or self.test or self.sequences or self.mask):
            raise ConfigError(
                "data.download brings all files of a task; leave out validation, test, sequences and mask"
            )
        for key in ("validation", "test"):
            if getattr(self, key) and getattr(self.split, key):
                raise ConfigError(f"data.{key} names files, data.split.{key} splits off another such set; give one")
        return self


class DataPolicy(InputPolicy):
    """The policy for reading proteins, with advice in terms of the keys `data` and `task`."""

    @classmethod
    def for_reading(cls, task: TaskConfig, data: DataConfig) -> DataPolicy:
        """Return the policy for a task's columns and data."""
        return cls(
            id_column=task.id_column,
            sequence_column=task.sequence_column,
            bad_records=data.bad_records,
            unknown_letters=data.unknown_letters,
        )

    def advice(self, text: str, key: str, value: str) -> str:
        section = "data" if key in ("bad_records", "unknown_letters") else "task"
        return text.format(f"{section}.{key}={value}")


def class_problem(label: str) -> str:
    """Return why a label cannot name a class, for a message; "" if it can. An archive's configuration holds it."""
    if len(label.splitlines()) > 1:
        return "runs over several lines: is a quote not closed?"
    try:
        check_plain(label)
    except ValueError:
        return "cannot be kept in a model's archive, where ${ and nemo: at the beginning refer to something else"
    return ""
