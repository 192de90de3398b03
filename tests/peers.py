"""ESMs of other libraries with random weights, their imports, and the difference between their outputs and ours.

Used by the parity tests, and by `benchmarks/interchange_parity.py` at full size. Shape suffixes: B proteins, T tokens
of the row or of the longest protein, N heads, L tokens and R residues of one protein, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bionemo_esm.alphabet import MASK_ID, PAD_ID, encode
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.masking import MaskedResidues
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.feature_extraction import contacts, observe_attention_maps, representations
from bionemo_esm.model.interchange.convert import import_model
from theirs import Shape, fair_esm_model, hugging_face_model, released, saved

Proteins = list[NDArray[np.uint8]]
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQXBLEERUZO"


@dataclass(frozen=True)
class Answers:
    """Outputs of a model for some proteins, padded to [B, T, ...]."""

    states: tuple[Tensor, ...]  # layer 0 (embeddings) to the last
    logits: Tensor
    attentions: tuple[Tensor, ...] = ()  # layer 1 to the last
    contacts: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """A model of another library and the path where its own code saved it."""

    name: str
    model: nn.Module
    path: Path
    ask: Callable[[Tensor, bool], Answers]  # int64 [B, T], padded; with attention maps and contacts, or without


# --- models of other libraries ----------------------------------------------------------------------------------------


def hugging_face(family: str, shape: Shape, folder: Path, **options: Any) -> Peer:
    """Return `EsmForMaskedLM` like ESM-1nv, ESM-1b, ESM-1v or ESM-2, saved by `save_pretrained(**options)`."""
    model = hugging_face_model(family, shape)
    saved(model, folder, **options)

    @torch.no_grad()
    def ask(tokens_BT: Tensor, maps: bool) -> Answers:
        real_BT = tokens_BT.ne(PAD_ID).long()
        told = model(tokens_BT, attention_mask=real_BT, output_hidden_states=True, output_attentions=maps)
        if not maps:
            return Answers(told.hidden_states, told.logits)
        return Answers(told.hidden_states, told.logits, told.attentions, model.predict_contacts(tokens_BT, real_BT))

    return Peer(f"Hugging Face, {family}", model, folder, ask)


def fair_esm(family: str, shape: Shape, folder: Path) -> Peer:
    """Return fair-esm's class for ESM-1b, ESM-1v or ESM-2, saved in the layout of the released files."""
    model = fair_esm_model(family, shape)
    state, regression = released(model)
    path = folder / f"{family.lower().replace('-', '')}_t0_random.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    torch.save(regression, path.with_name(f"{path.stem}-contact-regression.pt"))
    if family != "ESM-2":
        with torch.no_grad():
            model.embed_tokens.weight[MASK_ID] = 0  # as `esm/pretrained.py` does when it loads such a file

    @torch.no_grad()
    def ask(tokens_BT: Tensor, maps: bool) -> Answers:
        told = model(tokens_BT, repr_layers=list(range(shape.layers + 1)), return_contacts=maps)
        states = tuple(told["representations"][layer] for layer in range(shape.layers + 1))
        if not maps:
            return Answers(states, told["logits"])
        return Answers(states, told["logits"], tuple(told["attentions"].unbind(1)), told["contacts"])

    return Peer(f"fair-esm, {family}", model, path, ask)


def brought_here(peer: Peer, folder: Path) -> ESM1nvModel:
    """Import the files of the peer and return the restored model."""
    path = folder / "imported.nemo"
    import_model(str(peer.path), path)
    model: ESM1nvModel = ESM1nvModel.restore_from(str(path))
    return model


# --- comparison -------------------------------------------------------------------------------------------------------


def batch_of(proteins: Proteins, masked: float = 0.15) -> PackedBatch:
    """Return a packed row in which a random share of the residues is replaced by <mask> and is the target."""
    residues, lengths = np.concatenate(proteins), np.array([len(protein) for protein in proteins])
    chosen = np.random.default_rng(5).random(len(residues)) < masked
    return pack(residues, lengths, MaskedResidues(np.where(chosen, np.uint8(MASK_ID), residues), chosen))


def padded(batch: PackedBatch, row_T: Tensor, filling: float = PAD_ID) -> Tensor:
    """Return a packed row [T, ...] as [B, longest, ...]."""
    pieces = row_T.split(batch.cu_seqlens.diff().tolist())
    return nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=filling)


def logits_of(archive: Path) -> Tensor:
    """Return the logits of an archive of ours for `PROTEIN`."""
    tokens = encode(PROTEIN)
    return ESM1nvModel.restore_from(str(archive)).logits(pack(tokens, np.array([len(tokens)])))


@torch.no_grad()
def errors(peer: Peer, ours: ESM1nvModel, batch: PackedBatch, maps: bool = True) -> dict[str, float]:
    """Return the largest absolute difference of each quantity over all positions that are not padding.

    Without `maps`, compare only hidden states and logits: other libraries hold the maps of all layers several times.
    """
    theirs = peer.ask(padded(batch, batch.tokens), maps)
    real_BT = padded(batch, torch.ones_like(batch.tokens), 0).bool()
    lengths = batch.cu_seqlens.diff().tolist()
    encoder = ours.encoder
    assert encoder is not None
    found: dict[str, float] = {}

    def note(quantity: str, mine: Tensor, their: Tensor) -> None:
        found[quantity] = max(found.get(quantity, 0.0), float((mine - their).abs().max()))

    def compare_maps(layer: int, maps: list[Tensor]) -> None:
        for index, (length, map_NLL) in enumerate(zip(lengths, maps, strict=True)):
            note("attentions", map_NLL, theirs.attentions[layer - 1][index, :, :length, :length])

    for layer, state_TH in representations(encoder, batch, range(len(theirs.states))).items():
        note("hidden states", state_TH, theirs.states[layer][real_BT])
    note("logits", ours.logits(batch), theirs.logits[real_BT])
    if theirs.contacts is None:
        return found
    observe_attention_maps(encoder, batch, compare_maps)
    for index, contact_RR in enumerate(contacts(encoder, batch)):
        note("contacts", contact_RR, theirs.contacts[index, : len(contact_RR), : len(contact_RR)])
    return found
