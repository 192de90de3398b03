"""Proteins with what is known of them, and how they are shared out to training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.finetuning.task import Targets, Task
from bionemo_esm.inference.inputs import Protein


class LabelledProtein(NamedTuple):
    """One record, checked."""

    protein: Protein
    targets: Targets
    where: str  # "train.csv, record 3 (1abc-A)", for messages


@dataclass(frozen=True)
class LabelledSet:
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


class SealedSet:
    """The test set: its proteins are at hand, its labels only after `open`, which is called once, at the end."""

    def __init__(self, labelled: LabelledSet) -> None:
        self.proteins = labelled.proteins
        self._labelled: LabelledSet | None = labelled

    def __len__(self) -> int:
        return len(self.proteins)

    def open(self) -> LabelledSet:
        """The set with its labels. A second call is a fault of ours: test labels are looked at once."""
        assert self._labelled is not None, "the test labels have been looked at already"
        labelled, self._labelled = self._labelled, None
        return labelled


@dataclass(frozen=True)
class Splits:
    """A task's data, checked: every label known to be what the task says, before anything is computed."""

    task: Task  # classes, mean and scale are those of the training set
    train: LabelledSet
    validation: LabelledSet
    test: SealedSet | None
    notes: tuple[str, ...] = ()  # what was left out, was missing, or was split off; for screen and report
    files: Mapping[str, str] = field(default_factory=dict)  # by file name: SHA-256
