"""Features of an encoder: hidden states of any layer, attention maps, contacts.

Layers are numbered as in fair-esm: 0 is the input of the first block; the states of the last layer follow the final
layer norm. Shape suffixes: T tokens of the packed row, H hidden size, N heads, L tokens and R residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.errors import UserError
from bionemo_esm.model.attention import MapObserver
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.parallel import tensor_parallel_size


def representations(encoder: ESMEncoder, batch: PackedBatch, layers: Iterable[int]) -> dict[int, Tensor]:
    """Return the hidden states [T, H] after each of these layers, in the parameters' dtype.

    Raises `UserError` for a layer that does not exist.
    """
    wanted, last = set(layers), len(encoder.encoder.layers)
    for layer in sorted(wanted):
        if not 0 <= layer <= last:
            raise UserError(f"layer {layer}: the model has 0 (the embeddings) to {last}")
    states: dict[int, Tensor] = {}

    def keep(layer: int, state_T1H: Tensor) -> None:
        states[layer] = state_T1H.squeeze(1)[: len(batch.tokens)]  # the encoder may pad the row

    def keep_output(layer: int) -> Any:
        return lambda module, inputs, outputs: keep(layer, outputs[0])

    with ExitStack() as hooks:
        if 0 in wanted:
            first = encoder.encoder.layers[0]
            before = first.register_forward_pre_hook(
                lambda module, inputs, named: keep(0, named.get("hidden_states", *inputs[:1])), with_kwargs=True
            )
            hooks.callback(before.remove)
        for layer in wanted - {0, last}:
            hooks.callback(encoder.encoder.layers[layer - 1].register_forward_hook(keep_output(layer)).remove)
        final_TH = encoder.hidden_states(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    if last in wanted:
        states[last] = final_TH
    return states


@torch.no_grad()
def observe_attention_maps(encoder: ESMEncoder, batch: PackedBatch, observer: MapObserver) -> None:
    """Call `observer` with the attention maps of each layer in turn: float32 [N, L, L] of each sequence; none is kept.

    Raises `UserError` under tensor parallelism, where no rank holds all heads.
    """
    if tensor_parallel_size() > 1:
        raise UserError("attention maps need all heads on one device; run with tensor_model_parallel_size=1")
    encoder.hidden_states(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, observer)


@torch.no_grad()
def contacts(encoder: ESMEncoder, batch: PackedBatch) -> list[Tensor]:
    """Return contact probabilities, float32 [R, R] of each sequence. Raises `UserError` without a contact head."""
    head = encoder.contact_head
    if head is None:
        raise UserError("the model has no contact head; import one that has, or fit one")
    evidence: list[Tensor] = []

    def add(layer: int, maps: list[Tensor]) -> None:
        added = [head.evidence(layer, maps_NLL) for maps_NLL in maps]
        evidence[:] = [a + b for a, b in zip(evidence, added, strict=True)] if evidence else added

    observe_attention_maps(encoder, batch, add)
    return [head(evidence_RR) for evidence_RR in evidence]
