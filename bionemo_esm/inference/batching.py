"""Windows, batches and masked queries: how proteins become input of the model. NumPy only.

Lengths and positions count residues from 0; `<cls>` and `<eos>` surround each window. Shape suffixes: R residues of a
protein, W residues of a window, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import MASK_ID, SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.errors import ConfigError

if TYPE_CHECKING:
    from bionemo_esm.inference.engine_options import ModelSizes

Item = TypeVar("Item")
Residues = NDArray[np.uint8]
"""Token ids of a protein's residues, uint8 [R], without <cls> and <eos>."""


@dataclass(frozen=True)
class MaskedQuery:
    """A sequence, and the positions whose token probabilities are wanted."""

    tokens: Residues  # as the model reads them: <mask> at every hidden position
    positions: NDArray[np.int64]  # [K], ascending, at least one; 0 is the first residue


@dataclass(frozen=True)
class WindowSpec:
    """Windows for proteins of over `window` residues; neighbouring windows share at least `overlap` residues."""

    window: int
    overlap: int

    @classmethod
    def of(cls, model: ModelSizes, window: int | None = None, overlap: int | None = None) -> WindowSpec:
        """Return the windows for a model; defaults: the trained length, and half a window.

        Raises `ConfigError` for a window that the model cannot read, and an overlap that does not fit the window.
        """
        window = model.window if window is None else window
        if window < 1:
            raise ConfigError(f"window must be at least 1 residue, not {window}")
        if model.longest is not None and window > model.longest:
            raise ConfigError(f"window={window}: the model reads up to {model.longest} residues at once")
        overlap = window // 2 if overlap is None else overlap
        if not 0 <= overlap < window:
            raise ConfigError(f"overlap must be from 0 to below the window of {window}, not {overlap}")
        return cls(window, overlap)

    def cover(self, residues: int) -> list[tuple[int, int]]:
        """Return begin and end of each window over a protein of this length."""
        return windows(residues, self.window, self.overlap)


def windows(residues: int, limit: int, overlap: int) -> list[tuple[int, int]]:
    """Return begin and end of the windows that cover a protein, in order.

    Their number is the least possible; each has `limit` residues, two neighbours share at least `overlap`, and they are
    spaced as evenly as integers allow. A protein that fits has one window. Raises `ValueError` unless
    0 <= overlap < limit.
    """
    if not 0 <= overlap < limit:
        raise ValueError(f"an overlap of {overlap} does not go with windows of {limit} residues")
    if residues <= limit:
        return [(0, residues)]
    count = -(-(residues - overlap) // (limit - overlap))
    begins = [round(index * (residues - limit) / (count - 1)) for index in range(count)]
    return [(begin, begin + limit) for begin in begins]


def blending_weights(cover: list[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """Return the weight of each window at each of its residues: float32 [W] each, 1 in sum at every residue.

    A weight grows linearly with the distance from the window's cut ends. A window's end that is the protein's end is no
    cut.
    """
    residues = cover[-1][1]
    ramps = []
    total = np.zeros(residues)
    for begin, end in cover:
        positions = np.arange(begin, end)
        from_begin = positions - begin + 1.0 if begin > 0 else np.full(end - begin, np.inf)
        from_end = end - positions + 0.0 if end < residues else np.full(end - begin, np.inf)
        ramp = np.minimum(np.minimum(from_begin, from_end), end - begin)
        total[begin:end] += ramp
        ramps.append(ramp)
    return [(ramp / total[begin:end]).astype(np.float32) for ramp, (begin, end) in zip(ramps, cover, strict=True)]


def window_around(first: int, last: int, residues: int, limit: int) -> tuple[int, int]:
    """Return begin and end of the window of up to `limit` residues with positions `first` to `last` in its middle.

    Near an end of the protein the window is shifted inward, to its full length. Raises `ValueError` if the positions do
    not fit into it.
    """
    if last - first >= limit:
        raise ValueError(f"places {first} to {last} do not fit into a window of {limit} residues")
    if residues <= limit:
        return 0, residues
    begin = (first + last + 1) // 2 - limit // 2
    begin = min(max(begin, 0), residues - limit)
    return begin, begin + limit


def masked(tokens: Residues, positions: NDArray[np.int64]) -> MaskedQuery:
    """Return a query for these positions, all of them masked."""
    hidden = tokens.copy()
    hidden[positions] = MASK_ID
    return MaskedQuery(hidden, positions)


def each_masked(tokens: Residues, positions: Iterable[int]) -> Iterator[MaskedQuery]:
    """Yield a query for each position, it alone masked (masked marginals, pseudo-likelihood)."""
    return (masked(tokens, np.array([position], dtype=np.int64)) for position in positions)


def batches_by_length(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Return the indices of proteins [S] batch by batch, longest first: up to `batch_tokens` tokens, or one protein.

    Proteins of similar length share one attention call. The largest batch comes first, so that a lack of memory shows
    at once.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    tokens = (lengths + SPECIAL_TOKENS_PER_SEQUENCE).tolist()
    return [np.array(batch, dtype=np.int64) for batch in group_by_size(batch_tokens, order, tokens.__getitem__)]


def group_by_size(limit: int, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield consecutive items in groups of up to `limit` in total size, or of one item; items are read as needed."""
    group: list[Item] = []
    filled = 0
    for item in items:
        if group and filled + size(item) > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size(item)
    if group:
        yield group


def tokens_of_query(query: MaskedQuery) -> int:
    """Return the number of tokens of a query, `<cls>` and `<eos>` included."""
    return len(query.tokens) + SPECIAL_TOKENS_PER_SEQUENCE
