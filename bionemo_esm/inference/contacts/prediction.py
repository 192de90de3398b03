"""Contacts of proteins by a model with a contact head, long ones through windows.

Shape suffixes: R residues of a protein, W residues of a window.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import encode
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.batching import Residues, batches_by_length, blending_weights, windows
from bionemo_esm.inference.contacts.structures import GAPS
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.feature_extraction import contacts

Map = NDArray[np.float32]
"""Probabilities of contact [R, R], symmetric; NaN for pairs that no window holds both of."""


@dataclass(frozen=True)
class WindowSpec:
    """How a protein is read that is over `window` residues: through windows that share `overlap` or more."""

    window: int
    overlap: int

    @classmethod
    def of(cls, engine: Engine, window: int | None = None, overlap: int | None = None) -> WindowSpec:
        """None: as many residues as the model was trained on, and half a window. Raises `ConfigError`."""
        window = engine.window if window is None else window
        if window < 1:
            raise ConfigError(f"window must be at least 1 residue, not {window}")
        if engine.longest is not None and window > engine.longest:
            raise ConfigError(f"window={window}: the model reads up to {engine.longest} residues at once")
        overlap = window // 2 if overlap is None else overlap
        if not 0 <= overlap < window:
            raise ConfigError(f"overlap must be from 0 to below the window of {window}, not {overlap}")
        return cls(window, overlap)

    def cover(self, residues: int) -> list[tuple[int, int]]:
        """Begin and end of each window."""
        return windows(residues, self.window, self.overlap)


def residues_at_hand(sequence: object) -> Residues:
    """The token ids of one protein's sequence, given as text. Raises `UserError` for anything else."""
    if not isinstance(sequence, str):
        raise UserError(
            f"contacts are asked for of one protein: give its sequence as text, not a {type(sequence).__name__}"
        )
    letters = "".join(sequence.split()).removesuffix("*")
    if not letters:
        raise UserError("sequence: no residue in it")
    tokens = encode(letters.encode("ascii", "replace"))
    if unknown := [place for place, token in enumerate(tokens.tolist()) if token in GAPS]:
        hint = "; give residues, not a file's name" if set(letters) & set("./") else "; put X there"
        place = unknown[0]
        raise UserError(f"sequence: residue {place + 1} is {letters[place]!r}, no letter of a protein{hint}")
    return tokens


def check_head(engine: Engine) -> None:
    """Raises `UserError` for a model without a contact head."""
    if engine.encoder.contact_head is None:
        name = engine.source or "x.nemo"
        raise UserError(
            f"model: {name} has no contact head; fit one on a few structures: bionemo-esm fit-contacts "
            f"model={shlex.quote(str(name))} "
            "structures=structures.parquet output=x_contacts.nemo"
        )


def predict_contacts(
    engine: Engine, proteins: Sequence[Residues], reach: WindowSpec, wanted: Callable[[int], bool] = lambda place: True
) -> Iterator[tuple[int, Map]]:
    """Contacts of each protein with its place in `proteins`: those that fit a window longest first, then the others.

    Those at places that are not `wanted` are left out; which proteins share a batch, and so the last digits of an
    answer, does not depend on that. Memory: the attention maps of one layer of a batch, and a long protein's [R, R]
    twice. Raises `UserError` for a model without a contact head.
    """
    check_head(engine)
    lengths = np.array([len(protein) for protein in proteins], dtype=np.int64)
    short = np.flatnonzero(lengths <= reach.window)
    for batch in batches_by_length(lengths[short], engine.batch_tokens):
        places = short[batch].tolist()
        if any(map(wanted, places)):
            found = _together(engine, [proteins[place] for place in places])
            yield from ((place, found_RR) for place, found_RR in zip(places, found, strict=True) if wanted(place))
    for place in filter(wanted, np.flatnonzero(lengths > reach.window).tolist()):
        yield place, _through_windows(engine, proteins[place], reach)


def contacts_of(engine: Engine, tokens: Residues, reach: WindowSpec) -> Map:
    """Contacts of one protein."""
    ((_, found),) = predict_contacts(engine, [tokens], reach)
    return found


@torch.inference_mode()
def _together(engine: Engine, proteins: Sequence[Residues]) -> list[Map]:
    found = contacts(engine.encoder, engine.packed(proteins))
    return [((half_RR + half_RR.T) / 2).cpu().numpy() for half_RR in found]  # rounding leaves them nearly symmetric


def _through_windows(engine: Engine, tokens: Residues, reach: WindowSpec) -> Map:
    """The mean over the windows that hold both residues of a pair, each counting by the product of its blending weights
    at the two."""
    cover = reach.cover(len(tokens))
    total_RR = np.zeros((len(tokens), len(tokens)), dtype=np.float32)
    weight_RR = np.zeros_like(total_RR)
    together = max(engine.batch_tokens // (reach.window + 2), 1)
    pieces = list(zip(cover, blending_weights(cover), strict=True))
    for at in range(0, len(pieces), together):
        some = pieces[at : at + together]
        maps = _together(engine, [tokens[begin:end] for (begin, end), _ in some])
        for ((begin, end), weight_W), found_WW in zip(some, maps, strict=True):
            weight_WW = np.outer(weight_W, weight_W)
            total_RR[begin:end, begin:end] += weight_WW * found_WW
            weight_RR[begin:end, begin:end] += weight_WW
    total_RR /= np.where(weight_RR > 0, weight_RR, np.float32(np.nan))
    return total_RR
