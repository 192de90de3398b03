"""Proteins for the rows: each turn draws others, from the shipped sample, with UniRef50's lengths, or from a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.inputs import Protein, read_proteins

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
TUNING = -1  # a turn before all others, to find the best settings of each side

UNIREF50_LENGTHS = (
    *(24, 40, 46, 59, 77, 98, 118, 138, 158, 180, 205),
    *(231, 266, 302, 342, 394, 459, 545, 662, 883, 9111),
)
"""Residues of UniRef50's clusters (release 2021_04, 5,001 representatives): minimum, each 5th percentile, maximum."""


@dataclass(frozen=True)
class Source:
    """Proteins in an order that never changes. `lengths`: cut the file's residues to lengths of these percentiles."""

    key: str  # suffix of a row's key: "" or "-uniref50"
    name: str  # "the sample"
    path: Path
    lengths: tuple[int, ...] = ()

    def draw(self, turn: int, count: int, longest: int | None = None) -> list[Protein]:
        """Return the `count` proteins of a turn (`TUNING` or more), which no other turn has.

        `longest`: leave out proteins of more residues. Raises `ConfigError` if the file has too few proteins.
        """
        fitting = [protein for protein in self._proteins if longest is None or protein.residues <= longest]
        first = (turn - TUNING) * count
        if len(fitting) < first + count:
            limit = "" if longest is None else f" of up to {longest} residues"
            raise ConfigError(
                f"{self.path}: holds {len(fitting)} proteins{limit}, and {first + count} are needed; give a larger file"
            )
        return fitting[first : first + count]

    def at_least(self, turn: int, residues: int) -> Protein:
        """Return the protein of a turn, of at least `residues` residues. Raises `ConfigError` if there is none left."""
        long = [protein for protein in self._proteins if protein.residues >= residues]
        if len(long) <= turn - TUNING:
            raise ConfigError(
                f"{self.path}: holds {len(long)} proteins of at least {residues} residues, and {turn - TUNING + 1} are "
                "needed; give a larger file"
            )
        return long[turn - TUNING]

    @cached_property
    def _proteins(self) -> list[Protein]:
        found = read_proteins(self.path)
        return list(self._recut(found) if self.lengths else found)

    def _recut(self, proteins: Iterator[Protein]) -> Iterator[Protein]:
        """Yield the residues of all proteins in their order, cut to new lengths."""
        residues = np.concatenate([protein.tokens for protein in proteins])
        at, random = 0, np.random.default_rng(0)
        for number in itertools.count(1):
            length = round(np.interp(random.random(), np.linspace(0, 1, len(self.lengths)), self.lengths))
            if at + length > len(residues):
                return
            yield Protein(f"cut_{number}", residues[at : at + length], number)
            at += length


def sources(fasta: Path | None) -> list[Source]:
    """Return where a row's proteins come from: a file, or (None) the sample and the sample with UniRef50's lengths."""
    if fasta is not None:
        return [Source("", fasta.name, fasta)]
    return [
        Source("", "the sample", SAMPLE),
        Source("-uniref50", "UniRef50's lengths", SAMPLE, UNIREF50_LENGTHS),
    ]
