"""What a fine-tuned model predicts: of each residue or of each protein, one of some classes or a number. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError

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
