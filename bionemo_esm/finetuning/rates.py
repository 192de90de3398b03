"""Which parameters are trained, and how fast: slower the deeper they lie.

Layers are numbered as everywhere: 0 is the embeddings, k the k-th block. The rate of layer k is that of the uppermost
times decay to the power of the blocks above it: discriminative fine-tuning (Howard & Ruder 2018, arXiv:1801.06146,
section 3.1, which divides by 2.6 from layer to layer).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from bionemo_esm.finetuning.adapters import ADAPTER_NAMES
from bionemo_esm.finetuning.config import FROZEN, FULL, LORA
from bionemo_esm.model.encoder import ESMEncoder

_BLOCKS = "encoder.encoder.layers."
_EMBEDDINGS = ("encoder.embedding.", "encoder.embedding_layernorm.")
_ABOVE_ALL_BLOCKS = ("encoder.encoder.final_layernorm.", "encoder.lm_head.", "encoder.output_layer.")
_HEAD = "head."


def layer_of(name: str, num_layers: int) -> int:
    """To which layer a parameter of a model with parts `encoder` and `head` belongs.

    0: embeddings; k: the k-th block, whose name has k - 1; `num_layers`: what stands above all blocks as well;
    `num_layers` + 1: the head.
    """
    if name.startswith(_HEAD):
        return num_layers + 1
    if name.startswith(_EMBEDDINGS):
        return 0
    if name.startswith(_BLOCKS):
        layer = int(name.removeprefix(_BLOCKS).partition(".")[0]) + 1
        assert layer <= num_layers, f"{name} lies above layer {num_layers}"
        return layer
    assert name.startswith(_ABOVE_ALL_BLOCKS), f"no layer is known for {name}"
    return num_layers


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    num_layers: int,
    lr: float,
    head_lr: float,
    decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with keys params, lr and weight_decay; those that need no gradient are left out.

    `named`: parameters by name, of a model with parts `encoder` and `head`. `num_layers`: the layer that features are
    taken from, which learns at `lr`; layer k below it at lr * decay**(num_layers - k), the head at `head_lr`. Biases
    and norms have no weight decay. Parameters of equal rate and decay are one group; order is that of their first.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers)
        rate = head_lr if layer > num_layers else lr * decay ** (num_layers - layer)
        groups.setdefault((rate, 0.0 if parameter.ndim < 2 else weight_decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": shrink} for (rate, shrink), members in groups.items()]


def freeze(module: nn.Module) -> None:
    """No parameter of the module is trained."""
    module.requires_grad_(False)


def set_trainable(encoder: ESMEncoder, mode: str, layer: int) -> None:
    """Say which parameters of an encoder are trained, when features are the hidden states of `layer`.

    frozen: none; lora: adapters, which have been added, of the blocks that features come through; full: those blocks
    and the embeddings, and the final layer norm where features are the last layer's. What predicts tokens never is.
    """
    blocks = len(encoder.encoder.layers)
    assert mode in (FROZEN, FULL, LORA) and 0 <= layer <= blocks
    freeze(encoder)
    if mode == FROZEN:
        return
    for name, parameter in encoder.named_parameters(prefix="encoder"):
        if name.startswith(_ABOVE_ALL_BLOCKS):
            reached = layer == blocks and name.startswith("encoder.encoder.final_layernorm.")
        else:
            reached = layer_of(name, blocks) <= layer
        parameter.requires_grad = reached and (mode == FULL or name.endswith(ADAPTER_NAMES))
