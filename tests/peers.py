"""Other people's ESMs with random weights, brought here, and how far our answers are from theirs.

For the tests of parity, and for `benchmarks/interchange_parity.py` at full size. Shape suffixes: B proteins, T tokens
of the row or of the longest protein, N heads, L tokens and R residues of one protein, H hidden size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import esm
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE
from bionemo_esm.data.masking import Corruption
from bionemo_esm.data.packing import PackedBatch, pack
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange.convert import import_model
from bionemo_esm.model.reading import contacts, representations, show_attention_maps

Proteins = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder; `spread` is the standard deviation of its random weights."""

    layers: int
    hidden: int
    heads: int
    spread: float = 0.2

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads"


@dataclass(frozen=True)
class Answers:
    """What a model says of some proteins, padded to [B, T, ...]."""

    states: tuple[Tensor, ...]  # of layer 0 (embeddings) to the last
    logits: Tensor
    attentions: tuple[Tensor, ...] = ()  # of layer 1 to the last
    contacts: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """A model of another library, and where its own code saved it."""

    name: str
    model: nn.Module
    path: Path
    ask: Callable[[Tensor, bool], Answers]  # int64 [B, T], padded; with attention maps and contacts, or without


# --- the peers --------------------------------------------------------------------------------------------------------


def hugging_face(family: str, shape: Shape, folder: Path, **options: Any) -> Peer:
    """`EsmForMaskedLM` like ESM-1nv, ESM-1b, ESM-1v or ESM-2, saved by `save_pretrained(**options)`."""
    model = EsmForMaskedLM(
        EsmConfig(
            vocab_size=VOCABULARY_SIZE,
            mask_token_id=MASK_ID,
            pad_token_id=PAD_ID,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=1026,
            position_embedding_type="rotary" if family == "ESM-2" else "absolute",
            emb_layer_norm_before=family == "ESM-1b",
            token_dropout=family != "ESM-1nv",
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
    ).eval()
    randomize(model, shape.spread)
    model.save_pretrained(folder, **options)

    @torch.no_grad()
    def ask(tokens_BT: Tensor, maps: bool) -> Answers:
        real_BT = tokens_BT.ne(PAD_ID).long()
        told = model(tokens_BT, attention_mask=real_BT, output_hidden_states=True, output_attentions=maps)
        if not maps:
            return Answers(told.hidden_states, told.logits)
        return Answers(told.hidden_states, told.logits, told.attentions, model.predict_contacts(tokens_BT, real_BT))

    return Peer(f"Hugging Face, {family}", model, folder, ask)


def fair_esm(family: str, shape: Shape, folder: Path) -> Peer:
    """fair-esm's class for ESM-1b, ESM-1v or ESM-2, in files laid out as the released ones are."""
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    sizes = {"layers": shape.layers, "embed_dim": shape.hidden, "attention_heads": shape.heads}
    if family == "ESM-2":
        model = esm.ESM2(shape.layers, shape.hidden, shape.heads, alphabet).eval()
        told = {f"encoder_{key}": value for key, value in sizes.items()} | {"token_dropout": True}
        head: dict[str, Any] = {"cfg": {"model": Namespace(**told)}}
        path = folder / "esm2_t0_random.pt"
    else:
        sizes |= {"ffn_embed_dim": 4 * shape.hidden}
        common = {"arch": "roberta_large", "max_positions": 1024, "token_dropout": True}
        before = family == "ESM-1b"
        model = esm.ProteinBertModel(Namespace(**sizes, **common, emb_layer_norm_before=before), alphabet).eval()
        head = {"args": Namespace(**{f"encoder_{key}": value for key, value in sizes.items()}, **common)}
        path = folder / ("esm1b_t0_random.pt" if before else "esm1v_t0_random.pt")
    randomize(model, shape.spread)
    stored = {_fair_esm_name(name): tensor for name, tensor in model.state_dict().items() if "contact" not in name}
    regression = {name: tensor for name, tensor in model.state_dict().items() if "contact" in name}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(head | {"model": stored}, path)
    torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
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


def _fair_esm_name(name: str) -> str:
    return f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}"


@torch.no_grad()
def randomize(model: nn.Module, spread: float) -> None:
    """Give every parameter its own random values, so that none can be taken for another.

    Rotary frequencies are rounded to float16, as those of released models may be.
    """
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(spread * noise)
        else:
            parameter.add_(0.2 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half())


def brought_here(peer: Peer, folder: Path) -> ESM1nvModel:
    """The peer's files through our conversion, as a restored model."""
    path = folder / "imported.nemo"
    import_model(str(peer.path), path)
    model: ESM1nvModel = ESM1nvModel.restore_from(str(path))
    return model


# --- both asked the same ----------------------------------------------------------------------------------------------


def batch_of(proteins: Proteins, masked: float = 0.15) -> PackedBatch:
    """A packed row in which a share of the residues, chosen at random, is shown as <mask> and asked for."""
    residues, lengths = np.concatenate(proteins), np.array([len(protein) for protein in proteins])
    chosen = np.random.default_rng(5).random(len(residues)) < masked
    return pack(residues, lengths, Corruption(np.where(chosen, np.uint8(MASK_ID), residues), chosen))


def padded(batch: PackedBatch, row_T: Tensor, filling: float = PAD_ID) -> Tensor:
    """A packed row [T, ...] as [B, longest, ...]."""
    pieces = row_T.split(batch.cu_seqlens.diff().tolist())
    return nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=filling)


@torch.no_grad()
def errors(peer: Peer, ours: ESM1nvModel, batch: PackedBatch, maps: bool = True) -> dict[str, float]:
    """The largest absolute difference of each quantity, over all that is no padding.

    Without `maps` only of hidden states and logits: other libraries hold the maps of all layers, several times.
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
    show_attention_maps(encoder, batch, compare_maps)
    for index, contact_RR in enumerate(contacts(encoder, batch)):
        note("contacts", contact_RR, theirs.contacts[index, : len(contact_RR), : len(contact_RR)])
    return found
