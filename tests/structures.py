"""Structures for tests: proteins on compact random walks, so that residues touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as arrow
from numpy.typing import NDArray
from pyarrow import parquet

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.inference.contacts.structures import Structure

STEP_ANGSTROM = 3.8  # between neighbouring C-alphas


def walk(name: str, tokens: NDArray[np.uint8], seed: int) -> Structure:
    """Return a protein on a random walk drawn back to its centre. One residue in twelve is unresolved."""
    random = np.random.default_rng(seed)
    points = np.zeros((len(tokens), 3))
    for place in range(1, len(tokens)):
        step = random.normal(size=3) - 0.08 * points[place - 1]
        points[place] = points[place - 1] + STEP_ANGSTROM * step / np.linalg.norm(step)
    points[3::12] = np.nan
    return Structure(name, tokens, points.astype(np.float32))


def as_table(structures: list[Structure], path: Path) -> Path:
    """Write the structures as a Parquet file and return its path."""
    rows = [
        {
            "id": structure.id,
            "sequence": "".join(TOKENS[token] for token in structure.tokens),
            "coords": np.nan_to_num(structure.coordinates).tolist(),
            "ca_mask": structure.resolved.astype(int).tolist(),
        }
        for structure in structures
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path
