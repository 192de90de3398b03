"""Which residues of a protein a model must predict, and the model's answers. Shape suffixes: R residues, K masked ones.

The masked residues depend on the seed, and on the number and length of the protein: they are the same for every model.
For a protein of a store that fits into a model, they are those of the model's validation with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import MASK_ID, VOCABULARY_SIZE
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.data.masking import MaskingPolicy, mask_sequences
from bionemo_esm.inference.batching import MaskedQuery, Residues, WindowSpec

if TYPE_CHECKING:  # torch takes seconds to import
    from bionemo_esm.inference.engine import Engine

_EPOCH = 0  # of the keys of validation masks


@dataclass(frozen=True)
class MaskedProtein:
    """A protein, and the residues of it that are masked at once."""

    number: int  # of the protein in its input, from 0
    tokens: Residues  # [R], the true ones
    positions: NDArray[np.int64]  # [K], ascending; may be empty

    @property
    def targets(self) -> NDArray[np.uint8]:
        """The true residues at the masked positions, uint8 [K]."""
        return self.tokens[self.positions]

    @property
    def shown(self) -> Residues:
        """What a model is shown, uint8 [R]: `<mask>` at every masked position."""
        hidden = self.tokens.copy()
        hidden[self.positions] = MASK_ID
        return hidden


def masked_protein(number: int, tokens: Residues, fraction: float, seed: int) -> MaskedProtein:
    """Return a protein with each residue masked with probability `fraction`."""
    policy = MaskingPolicy(mlm_probability=fraction).for_evaluation()
    lengths = np.array([len(tokens)], dtype=np.int64)
    chosen = mask_sequences(tokens, lengths, derive_key(seed, _EPOCH, number), policy).chosen
    return MaskedProtein(number, tokens, np.flatnonzero(chosen))


def log_probabilities(
    engine: Engine,
    proteins: Sequence[MaskedProtein],
    windows: WindowSpec,
    answered: Callable[[int], None] = lambda residues: None,
) -> Iterator[NDArray[np.float64]]:
    """Yield a model's log-probabilities of the 33 tokens at the masked positions of each protein: float64 [K, 33].

    A protein that is longer than a window is read in windows. Each masked residue is predicted in the window that shows
    most residues on its shorter side.
    """
    pieces = [_pieces(protein, windows) for protein in proteins]
    answers = engine.log_probabilities((query for piece in pieces for query, _ in piece), answered)
    for protein, own in zip(proteins, pieces, strict=True):
        found = np.empty((len(protein.positions), VOCABULARY_SIZE))
        for _, place in own:
            found[place] = next(answers)
        yield found


def _pieces(protein: MaskedProtein, windows: WindowSpec) -> list[tuple[MaskedQuery, NDArray[np.int64]]]:
    """Return a query for each window with a masked residue to predict, and the indices of those residues, [K]."""
    cover, residues = windows.cover(len(protein.tokens)), len(protein.tokens)
    begins, ends = np.array(cover).T
    positions = protein.positions[:, None]
    before = np.where(begins == 0, residues, positions - begins)  # an end of the protein cuts nothing off
    after = np.where(ends == residues, residues, ends - 1 - positions)
    inside = (positions >= begins) & (positions < ends)
    best = np.where(inside, np.minimum(before, after), -1).argmax(axis=1)
    shown, pieces = protein.shown, []
    for window, (begin, end) in enumerate(cover):
        place = np.flatnonzero(best == window)
        if len(place):
            pieces.append((MaskedQuery(shown[begin:end], protein.positions[place] - begin), place))
    return pieces
