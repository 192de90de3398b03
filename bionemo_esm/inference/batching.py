"""Windows, batches and masked queries: how proteins become input of the model. NumPy only.

Lengths and positions count residues from 0; `<cls>` and `<eos>` surround each window. Shape suffixes: R residues of a
protein, W residues of a window, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import MASK_ID, SPECIAL_TOKENS_PER_SEQUENCE

Thing = TypeVar("Thing")
Residues = NDArray[np.uint8]
"""Token ids of a protein's residues, uint8 [R], without <cls> and <eos>."""


@dataclass(frozen=True)
class MaskedQuery:
    """Which residues belong at some places of a protein?"""

    tokens: Residues  # the protein as the model is to see it: <mask> where it must not see
    places: NDArray[np.int64]  # [K], ascending, one or more; 0 is the first residue


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


def masked(tokens: Residues, places: NDArray[np.int64]) -> MaskedQuery:
    """What belongs at these places, all of them hidden?"""
    hidden = tokens.copy()
    hidden[places] = MASK_ID
    return MaskedQuery(hidden, places)


def each_masked(tokens: Residues, places: Iterable[int]) -> Iterator[MaskedQuery]:
    """For each place on its own: what belongs there, if it alone is hidden? (masked marginals, pseudo-likelihood)"""
    return (masked(tokens, np.array([place], dtype=np.int64)) for place in places)


def batches_by_length(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Which proteins [S] go together, longest first: each batch of up to `batch_tokens` tokens, or of one protein.

    Neighbours of like length share one call of attention; and if memory does not do, that shows at once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[list[int]] = []
    filled = batch_tokens
    for index in order.tolist():
        tokens = int(lengths[index]) + SPECIAL_TOKENS_PER_SEQUENCE
        if filled + tokens > batch_tokens or not batches:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += tokens
    return [np.array(batch, dtype=np.int64) for batch in batches]


def group_by_size(most: int, things: Iterable[Thing], size: Callable[[Thing], int]) -> Iterator[list[Thing]]:
    """Neighbours together, as many as come to `most` by their sizes, one at least; taken as they are needed."""
    some: list[Thing] = []
    filled = 0
    for thing in things:
        if some and filled + size(thing) > most:
            yield some
            some, filled = [], 0
        some.append(thing)
        filled += size(thing)
    if some:
        yield some


def tokens_of_query(query: MaskedQuery) -> int:
    return len(query.tokens) + SPECIAL_TOKENS_PER_SEQUENCE
