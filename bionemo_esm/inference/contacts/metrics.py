"""Precision of the most probable contacts, as in Rao et al. 2020.

P@L is the share of true contacts among the L pairs predicted with the highest probability, L the residues of the
protein; P@L/2 and P@L/5 take fewer. Pairs are counted by how far apart their residues are in the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.inference.contacts.structures import CONTACT_ANGSTROM, Structure
from bionemo_esm.statistics import mean_interval

RANGES: dict[str, tuple[int, int | None]] = {"short": (6, 12), "medium": (12, 24), "long": (24, None)}
"""Least separation |i - j| of each range, and its end, which is excluded."""
TOPS: dict[str, int] = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
_RESAMPLINGS = 2000

Precisions = dict[tuple[str, str], float]
"""By the names of range and top; without those for which a protein has no pairs."""


class Row(NamedTuple):
    """A mean precision over proteins."""

    range: str
    top: str
    mean: float
    low: float  # of a 95% interval
    high: float
    proteins: int  # that have such pairs


def precision_of_top(scores: NDArray[np.floating], hits: NDArray[np.bool_], count: int) -> float:
    """Return the share of hits among the `count` highest scores [P], of all if there are fewer; P > 0.

    Among equal scores at the limit, the expected share of a random draw counts, so that no order of pairs is favoured.
    NaN is below every score.
    """
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    count = min(max(count, 1), len(ranked))
    line = np.partition(ranked, len(ranked) - count)[len(ranked) - count]
    above, level = ranked > line, ranked == line
    share = (count - above.sum()) / level.sum()
    return float((hits[above].sum() + share * hits[level].sum()) / count)


def precisions(scores_RR: NDArray[np.floating], structure: Structure, below: float = CONTACT_ANGSTROM) -> Precisions:
    """Return the precisions of one protein; pairs with an unresolved residue do not count."""
    first, second = np.triu_indices(structure.residues, min(begin for begin, _ in RANGES.values()))
    known = structure.resolved[first] & structure.resolved[second]
    first, second = first[known], second[known]
    scores, hits = scores_RR[first, second], structure.contacts(below)[first, second]
    found: Precisions = {}
    for name, (begin, end) in RANGES.items():
        within = (second - first >= begin) & (True if end is None else second - first < end)
        if within.any():
            for top, part in TOPS.items():
                count = structure.residues // part
                found[name, top] = precision_of_top(scores[within], hits[within], count)
    return found


def summary(of_proteins: Sequence[Precisions], seed: int) -> list[Row]:
    """Return the mean of each precision over proteins, with its 95% percentile bootstrap interval over proteins."""
    rows = []
    for name in RANGES:
        for top in TOPS:
            values = np.array([found[name, top] for found in of_proteins if (name, top) in found])
            if len(values):
                low, high = mean_interval(values, _RESAMPLINGS, seed)
                rows.append(Row(name, top, float(values.mean()), low, high, len(values)))
    return rows


def table(predictors: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return lines for the screen: P@L, P@L/2 and P@L/5 of each range, a line for each predictor."""
    head = "".join(f"{name:^22}" for name in RANGES)
    tops = "".join(f"{top:>7}" for top in TOPS) + " "
    width = max(map(len, predictors), default=0)
    lines = [f"{'':{width}}  {head}".rstrip(), f"{'':{width}}  {tops * len(RANGES)}".rstrip()]
    for name, rows in predictors.items():
        found = {(row.range, row.top): row.mean for row in rows}
        cells = [found.get((range_name, top)) for range_name in RANGES for top in TOPS]
        texts = ["      -" if cell is None else f"{cell:7.3f}" for cell in cells]
        groups = ["".join(texts[at : at + len(TOPS)]) + " " for at in range(0, len(texts), len(TOPS))]
        lines.append(f"{name:{width}}  {''.join(groups)}".rstrip())
    return lines


TIES = "Pairs with the same probability count by what a draw among them would give on average."


def intervals(predictors: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return lines for the screen: the long range P@L of each predictor with its interval."""
    found = {name: row for name, rows in predictors.items() if (row := _long(rows))}
    width = max(map(len, found), default=0)
    return [
        f"long range P@L of {name:{width}}  {row.mean:.3f}, 95% interval over {row.proteins:,} "
        f"protein{'s' * (row.proteins != 1)} {row.low:.3f} to {row.high:.3f}"
        for name, row in found.items()
    ]


def verdict(predictors: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return lines that compare the long range P@L of the first predictor with that of each other one.

    "Better" means that its interval lies above the other's.
    """
    (_, first), *others = predictors.items()
    model = _long(first)
    lines = []
    for name, rows in others:
        other = _long(rows)
        if model is None or other is None:
            continue
        figures = f"{model.mean:.3f} against {other.mean:.3f}"
        if model.mean <= other.mean:
            lines.append(f"At long range the head is no better than {name}: {figures}")
        elif model.low <= other.high:
            lines.append(f"At long range the head is above {name}, but the intervals overlap: {figures}")
        else:
            lines.append(f"At long range the head is better than {name}: {figures}")
    return lines


def _long(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if (row.range, row.top) == ("long", "P@L")), None)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, str | float | int]]:
    """Return rows for JSON."""
    return [dict(row._asdict()) for row in rows]
