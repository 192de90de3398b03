"""Contacts of proteins by a model with a contact head; long proteins are read in windows.

Shape suffixes: R residues of a protein, W residues of a window.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import VOCABULARY_SIZE, encode
from bionemo_esm.data.fasta import refuse_nucleotides
from bionemo_esm.errors import UserError
from bionemo_esm.inference.batching import Residues, WindowSpec, batches_by_length, blending_weights
from bionemo_esm.inference.contacts.structures import GAPS
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.feature_extraction import contacts

Map = NDArray[np.float32]
"""Probabilities of contact [R, R], symmetric; NaN for pairs that no window covers."""


def residues_at_hand(sequence: object) -> Residues:
    """Return the token ids of one protein's sequence, given as text. Raises `UserError` for anything else."""
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
    refuse_nucleotides("sequence", np.bincount(tokens, minlength=VOCABULARY_SIZE))
    return tokens


def check_head(engine: Engine) -> None:
    """Raise `UserError` for a model without a contact head."""
    if engine.encoder.contact_head is None:
        name = engine.source or "x.nemo"
        raise UserError(
            f"model: {name} has no contact head; fit one on a few structures: bionemo-esm fit-contacts "
            f"model={shlex.quote(str(name))} "
            "structures=structures.parquet output=x_contacts.nemo"
        )


def predict_contacts(
    engine: Engine, proteins: Sequence[Residues], spec: WindowSpec, wanted: Callable[[int], bool] = lambda index: True
) -> Iterator[tuple[int, Map]]:
    """Yield the index and the map of each wanted protein: those that fit a window longest first, then the others.

    Which proteins share a batch, and so the last digits of a result, does not depend on `wanted`. Memory: the attention
    maps of one layer of a batch, and `map_bytes` of a long protein. Raises `UserError` for a model without a contact
    head.
    """
    check_head(engine)
    lengths = np.array([len(protein) for protein in proteins], dtype=np.int64)
    short = np.flatnonzero(lengths <= spec.window)
    for batch in batches_by_length(lengths[short], engine.batch_tokens):
        indices = short[batch].tolist()
        if any(map(wanted, indices)):
            found = _together(engine, [proteins[index] for index in indices])
            yield from ((index, found_RR) for index, found_RR in zip(indices, found, strict=True) if wanted(index))
    for index in filter(wanted, np.flatnonzero(lengths > spec.window).tolist()):
        yield index, _in_windows(engine, proteins[index], spec)


def map_bytes(residues: int) -> int:
    """Return the bytes that a long protein's map takes in memory at its peak: sums and weights, float32 [R, R] each."""
    return 2 * 4 * residues**2


def contacts_of(engine: Engine, tokens: Residues, spec: WindowSpec) -> Map:
    """Return the contacts of one protein."""
    ((_, found),) = predict_contacts(engine, [tokens], spec)
    return found


@torch.inference_mode()
def _together(engine: Engine, proteins: Sequence[Residues]) -> list[Map]:
    found = contacts(engine.encoder, engine.packed(proteins))
    return [((half_RR + half_RR.T) / 2).cpu().numpy() for half_RR in found]  # symmetric up to rounding before


def _in_windows(engine: Engine, tokens: Residues, spec: WindowSpec) -> Map:
    """Average over the windows that cover a pair, weighted by the product of the blending weights of its residues."""
    cover = spec.cover(len(tokens))
    total_RR = np.zeros((len(tokens), len(tokens)), dtype=np.float32)
    weight_RR = np.zeros_like(total_RR)
    together = max(engine.batch_tokens // (spec.window + 2), 1)
    pieces = list(zip(cover, blending_weights(cover), strict=True))
    for first in range(0, len(pieces), together):
        some = pieces[first : first + together]
        maps = _together(engine, [tokens[begin:end] for (begin, end), _ in some])
        for ((begin, end), weight_W), found_WW in zip(some, maps, strict=True):
            weight_WW = np.outer(weight_W, weight_W)
            total_RR[begin:end, begin:end] += weight_WW * found_WW
            weight_RR[begin:end, begin:end] += weight_WW
    with np.errstate(invalid="ignore"):  # 0 / 0, NaN, for pairs that no window covers
        total_RR /= weight_RR
    return total_RR
