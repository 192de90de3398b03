"""What a contact head is fitted on: which structures, which pairs of their residues, and whether memory does for them.

Neither torch nor scikit-learn is imported. Shape suffix: P pairs of residues.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.contacts.structures import CONTACT_ANGSTROM, Structure

_BYTES_OF_A_FEATURE = 40
"""4 as a float32; liblinear turns each into 16 bytes, an index and a float64, and for L1 transposes a copy of those."""


@dataclass(frozen=True)
class FitChoice:
    """What is fitted on what. Raises `ConfigError`, naming the key."""

    train: int | tuple[str, ...] = 20  # how many structures, drawn by the seed, or their ids
    seed: int = 0
    strength: float = 0.15  # C, the inverse of the L1 penalty's
    contact_angstrom: float = CONTACT_ANGSTROM
    separation: int = 6  # |i - j| of a pair, at least
    most_pairs: int | None = None  # to fit on, drawn from those of all structures; None: all

    def __post_init__(self) -> None:
        if not self.train or (isinstance(self.train, int) and self.train < 1):
            raise ConfigError("train must be a number of structures, 1 or more, or a list of their ids")
        for key, value in (("C", self.strength), ("contact_angstrom", self.contact_angstrom)):
            if not 0 < value < np.inf:
                raise ConfigError(f"{key} must be over 0, not {value}")
        for key, count in (("separation", self.separation), ("most_pairs", self.most_pairs)):
            if count is not None and count < 1:
                raise ConfigError(f"{key} must be at least 1, not {count}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 2**32 - 1, not {self.seed}")


class Division(NamedTuple):
    """Which structures are fitted on, and which are asked about."""

    train: list[Structure]
    held_out: list[Structure]
    repeated: int  # left out: of each sequence the first structure stays
    without_pairs: int  # left out: no two resolved residues far enough apart in the sequence


class Pairs(NamedTuple):
    """Some pairs of residues of one protein, the first before the second, and which of them touch."""

    first: NDArray[np.int64]  # [P]
    second: NDArray[np.int64]  # [P]
    touch: NDArray[np.bool_]  # [P]


def pairs_of(structure: Structure, separation: int, below: float) -> Pairs:
    """All pairs at least `separation` apart in the sequence of which both residues are resolved."""
    first, second = np.triu_indices(structure.residues, separation)
    known = structure.resolved[first] & structure.resolved[second]
    first, second = first[known], second[known]
    return Pairs(first, second, structure.contacts(below)[first, second])


def some_of(pairs: list[Pairs], most: int | None, seed: int) -> list[Pairs]:
    """Of the pairs of several proteins at most so many, drawn from all alike, so that contacts keep their share."""
    total = sum(len(part.first) for part in pairs)
    if most is None or total <= most:
        return pairs
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(total)[:most]] = True
    bounds = np.cumsum([len(part.first) for part in pairs])[:-1]
    kept = zip(pairs, np.split(chosen, bounds), strict=True)
    return [Pairs(part.first[keep], part.second[keep], part.touch[keep]) for part, keep in kept]


def divide(structures: Sequence[Structure], choice: FitChoice, window: int) -> Division:
    """Structures to fit on, of up to `window` residues, and all others; no sequence is in both, or twice.

    Raises `ConfigError` where there are not as many, or not these.
    """
    distinct = list({structure.tokens.tobytes(): structure for structure in reversed(structures)}.values())[::-1]
    usable = [structure for structure in distinct if len(pairs_of(structure, choice.separation, 1.0).first)]
    fitting = [structure for structure in usable if structure.residues <= window]
    if isinstance(choice.train, int):
        if choice.train > len(fitting):
            raise ConfigError(
                f"train={choice.train}: there are {len(fitting)} structures to fit on; it takes different sequences "
                f"of up to {window} residues, with two resolved residues {choice.separation} or more apart"
            )
        drawn = np.random.default_rng(choice.seed).permutation(len(fitting))[: choice.train]
        train = [fitting[place] for place in sorted(drawn.tolist())]
    else:
        train = _named(structures, choice.train, {structure.id for structure in fitting}, window)
    seen = {structure.tokens.tobytes() for structure in train}
    held_out = [structure for structure in usable if structure.tokens.tobytes() not in seen]
    return Division(train, held_out, len(structures) - len(distinct), len(distinct) - len(usable))


def _named(structures: Sequence[Structure], ids: Sequence[str], fitting: set[str], window: int) -> list[Structure]:
    by_id = {structure.id: structure for structure in structures}
    for place, identifier in enumerate(ids):
        if identifier not in by_id:
            some = ", ".join(list(by_id)[:10])
            raise ConfigError(
                f"train: no structure is named {identifier}; there are {some}{', ...' * (len(by_id) > 10)}"
            )
        if identifier in ids[:place]:
            raise ConfigError(f"train: {identifier} is named twice")
        if identifier not in fitting:
            raise ConfigError(
                f"train: {identifier} cannot be fitted on: it has the sequence of an earlier structure, over {window} "
                "residues, or no two resolved residues far enough apart"
            )
    return [by_id[identifier] for identifier in ids]


def training_pairs(train: Sequence[Structure], choice: FitChoice) -> list[Pairs]:
    """The pairs of each structure that are fitted on. Raises `UserError` where none touches, or all do."""
    pairs = [pairs_of(structure, choice.separation, choice.contact_angstrom) for structure in train]
    pairs = some_of(pairs, choice.most_pairs, choice.seed)
    touching, total = sum(int(part.touch.sum()) for part in pairs), sum(len(part.touch) for part in pairs)
    if touching in (0, total):
        raise UserError(f"{touching} of {total:,} pairs touch, so there is nothing to tell apart; give more structures")
    return pairs


def bytes_to_fit(pairs: int, features: int) -> int:
    """Memory that fitting takes at its peak."""
    return pairs * features * _BYTES_OF_A_FEATURE


def check_memory(pairs: int, features: int) -> None:
    """Raises `UserError` where fitting takes more memory than this machine has."""
    needed, there = bytes_to_fit(pairs, features), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        enough = int(0.5 * there / features / _BYTES_OF_A_FEATURE)
        raise UserError(
            f"fitting on {pairs:,} pairs x {features:,} attention heads takes {needed / 1e9:.1f} GB, more than the "
            f"{there / 1e9:.1f} GB of this machine; most_pairs={enough} draws so many of them"
        )
