"""Proteins that are longer than the model reads at once: which windows to look through, and how to join what they show.

Lengths and places count residues; `<cls>` and `<eos>` stand around each window. Shape suffixes: R residues of the
protein, W residues of one window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def windows(residues: int, limit: int, overlap: int) -> list[tuple[int, int]]:
    """Begin and end of windows that cover a protein, in order: as few as can be, each of `limit` residues, two
    neighbours with at least `overlap` in common, spaced as evenly as whole numbers allow. One, where the protein fits.

    Raises `ValueError` unless 0 <= overlap < limit.
    """
    if not 0 <= overlap < limit:
        raise ValueError(f"an overlap of {overlap} does not go with windows of {limit} residues")
    if residues <= limit:
        return [(0, residues)]
    count = -(-(residues - overlap) // (limit - overlap))
    begins = [round(index * (residues - limit) / (count - 1)) for index in range(count)]
    return [(begin, begin + limit) for begin in begins]


def blending_weights(cover: list[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """What each window's answer counts at each of its residues: float32 [W] for each; they add up to 1 everywhere.

    A window counts the more, the further a residue is from where the window cuts the protein, so that one takes over
    from another gradually; where the protein itself ends nothing is cut.
    """
    residues = cover[-1][1]
    ramps = []
    total = np.zeros(residues)
    for begin, end in cover:
        places = np.arange(begin, end)
        from_begin = places - begin + 1.0 if begin > 0 else np.full(end - begin, np.inf)
        from_end = end - places + 0.0 if end < residues else np.full(end - begin, np.inf)
        ramp = np.minimum(np.minimum(from_begin, from_end), end - begin)
        total[begin:end] += ramp
        ramps.append(ramp)
    return [(ramp / total[begin:end]).astype(np.float32) for ramp, (begin, end) in zip(ramps, cover, strict=True)]


def window_around(first: int, last: int, residues: int, limit: int) -> tuple[int, int]:
    """Begin and end of the window of up to `limit` residues that has the places `first` to `last` in its middle.

    Near an end of the protein it is moved inward, so that it is full. Raises `ValueError` where they do not fit in.
    """
    if last - first >= limit:
        raise ValueError(f"places {first} to {last} do not fit into a window of {limit} residues")
    if residues <= limit:
        return 0, residues
    begin = (first + last + 1) // 2 - limit // 2
    begin = min(max(begin, 0), residues - limit)
    return begin, begin + limit
