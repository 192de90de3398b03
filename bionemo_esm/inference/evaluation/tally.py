"""Sums over masked residues, from which every figure of an evaluation follows: by protein, residue, length, position.

All sums are float64. Shape suffixes: P proteins, K masked residues of one, G groups of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES, STANDARD_RESIDUES
from bionemo_esm.inference.evaluation.masked import MaskedProtein
from bionemo_esm.statistics import percentile_interval, resampled_counts

Floats = NDArray[np.float64]

LENGTHS = (1, 50, 100, 200, 300, 400, 500, 750, 1000, 1500)
"""The shortest length of each group of proteins, in residues."""
DISTANCES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)
"""The smallest distance of each group of residues from an end of the protein; 0 is the last residue there."""
CONFIDENCE_BINS = 15
"""Bins of equal width, as in Guo et al. 2017 (arXiv:1706.04599)."""
RESIDUES = (*STANDARD_RESIDUES, "other")
SIZES = {
    "by_residue": len(RESIDUES),
    "by_length": len(LENGTHS),
    "from_start": len(DISTANCES),
    "from_end": len(DISTANCES),
    "by_confidence": CONFIDENCE_BINS,
}


@dataclass
class Tally:
    """Sums of one predictor over some proteins.

    `proteins`: float64 [P, 2], loss in nats and number of right answers of each protein. `tables`: by name float64
    [G, 4]: loss, right answers, masked residues, summed confidence (the highest probability).
    """

    proteins: Floats
    tables: dict[str, Floats]

    @classmethod
    def of(cls, proteins: Iterable[MaskedProtein], answers: Iterable[Floats]) -> Tally:
        """Sum the answers, log-probabilities float64 [K, 33] of each protein."""
        sums, tables = [], {name: np.zeros((size, 4)) for name, size in SIZES.items()}
        for protein, answer in zip(proteins, answers, strict=True):
            targets = protein.targets.astype(np.int64)
            loss = -answer[np.arange(len(targets)), targets]
            right = (answer.argmax(axis=1) == targets).astype(np.float64)
            confidence = np.exp(answer.max(axis=1)) if len(targets) else loss
            values = np.stack([loss, right, np.ones(len(targets)), confidence], axis=1)
            for name, groups in _groups(protein, targets, confidence).items():
                np.add.at(tables[name], groups, values)
            sums.append((loss.sum(), right.sum()))
        return cls(np.array(sums, dtype=np.float64).reshape(-1, 2), tables)

    def __add__(self, other: Tally) -> Tally:
        tables = {name: table + other.tables[name] for name, table in self.tables.items()}
        return Tally(np.concatenate([self.proteins, other.proteins]), tables)

    def to_arrays(self) -> dict[str, Floats]:
        return {"proteins": self.proteins, **self.tables}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Floats]) -> Tally:
        return cls(arrays["proteins"], {name: arrays[name] for name in SIZES})

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: mean distance of confidence and accuracy, weighted by residues."""
        table = self.tables["by_confidence"]
        return float(np.abs(table[:, 3] - table[:, 1]).sum() / table[:, 2].sum())


def _groups(protein: MaskedProtein, targets: NDArray[np.int64], confidence: Floats) -> dict[str, NDArray[np.int64]]:
    """Return by table the group of each masked residue, int64 [K]."""
    letters = targets - FIRST_RESIDUE_ID
    standard = (letters >= 0) & (letters < NUM_STANDARD_RESIDUES)
    from_end = len(protein.tokens) - 1 - protein.positions
    of_length = np.searchsorted(LENGTHS, len(protein.tokens), side="right") - 1
    return {
        "by_residue": np.where(standard, letters, NUM_STANDARD_RESIDUES),
        "by_length": np.full(len(targets), of_length),
        "from_start": np.searchsorted(DISTANCES, protein.positions, side="right") - 1,
        "from_end": np.searchsorted(DISTANCES, from_end, side="right") - 1,
        "by_confidence": np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1),
    }


@dataclass(frozen=True)
class Estimates:
    """Figures of several predictors over the same masked residues, with 95% bootstrap intervals over proteins."""

    counts: Floats  # [P], masked residues of each protein
    tallies: Mapping[str, Tally]
    resamples: int = 1000
    seed: int = 1
    _resampled: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = self.counts > 0
        names, counts = list(self.tallies), self.counts[kept]
        sums = np.concatenate([self.tallies[name].proteins[kept] for name in names], axis=1)  # [P, 2 x names]
        drawn = [block @ np.column_stack([sums, counts]) for block in self._blocks(len(counts))]
        totals = np.concatenate(drawn) if drawn else np.zeros((0, 2 * len(names) + 1))
        for at, name in enumerate(names):
            self._resampled[name] = totals[:, 2 * at : 2 * at + 2] / totals[:, -1:]  # [B, 2]: loss, accuracy

    def _blocks(self, proteins: int) -> Iterable[Floats]:
        return resampled_counts(proteins, self.resamples, self.seed)

    def mean(self, name: str, column: int = 0) -> float:
        """Return a predictor's loss in nats a masked residue (column 0), or its accuracy (1)."""
        return float(self.tallies[name].proteins[:, column].sum() / self.counts.sum())

    def interval(self, name: str, column: int = 0) -> tuple[float, float]:
        """Return the interval of `mean`."""
        return percentile_interval(self._resampled[name][:, column])

    def difference(self, name: str, other: str) -> tuple[float, tuple[float, float]]:
        """Return the loss of one predictor less that of another, and its paired interval."""
        resampled = self._resampled[name][:, 0] - self._resampled[other][:, 0]
        return self.mean(name) - self.mean(other), percentile_interval(resampled)


def table_rows(name: str, table: Floats) -> list[dict[str, Any]]:
    """Return a table as plain rows, without groups of no residue."""
    rows = []
    for group, (loss, right, count, confidence) in enumerate(table.tolist()):
        if count:
            figures = {"loss": loss / count, "accuracy": right / count, "masked_residues": int(count)}
            if name == "by_confidence":
                figures["confidence"] = confidence / count
            rows.append({**label_of(name, group), **figures})
    return rows


def label_of(name: str, group: int) -> dict[str, Any]:
    """Return what a group of a table is: a residue, or the range of its values, both ends included."""
    if name == "by_residue":
        return {"residue": RESIDUES[group]}
    if name == "by_confidence":
        return {"from": group / CONFIDENCE_BINS, "to": (group + 1) / CONFIDENCE_BINS}
    edges = LENGTHS if name == "by_length" else DISTANCES
    return {"from": edges[group], "to": edges[group + 1] - 1 if group + 1 < len(edges) else None}
