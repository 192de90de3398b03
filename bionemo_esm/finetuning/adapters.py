"""Low-rank adapters on Megatron's linear layers: W x + scale B A x (LoRA, Hu et al. 2021, arXiv:2106.09685).

A and B are parameters of the adapted layer, `lora_a` [rank, inputs] and `lora_b` [outputs, rank], in the encoder's
dtype; the optimizer keeps float32 masters of them, as of all weights. Rows of `lora_b` are in the order of the layer's
own, which for queries, keys and values is Megatron's, head by head. Names of other parameters do not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import AdapterConfig
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.parallel import tensor_parallel_size

LORA_A, LORA_B = "lora_a", "lora_b"
ADAPTER_NAMES = (LORA_A, LORA_B)


@dataclass(frozen=True)
class _LowRank:
    """The forward hook of an adapted layer, which returns its output and, if that is added later, its bias."""

    scale: float
    dropout: float

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> Any:
        seen = dropout(inputs[0], self.dropout, layer.training)
        added = linear(linear(seen, layer.lora_a), layer.lora_b)  # type: ignore[arg-type]
        return outputs[0] + self.scale * added, outputs[1]


def add_adapters(encoder: ESMEncoder, config: AdapterConfig) -> None:
    """Add adapters to the layers that `config` names, and freeze all other parameters; B is zero: outputs stay equal.

    A is drawn from PyTorch's generator on the CPU, uniform within 1 / sqrt(inputs), as in the authors' code. Raises
    `ConfigError` under tensor parallelism.
    """
    if tensor_parallel_size() > 1:
        raise ConfigError("adapters need whole layers; run with tensor_model_parallel_size=1, or train without LoRA")
    layers = list(_targets(encoder, config))
    assert not any(_is_adapted(module) for module in encoder.modules()), "the encoder has adapters already"
    for parameter in encoder.parameters():
        parameter.requires_grad = False
    for layer in layers:
        weight: Any = layer.weight
        outputs, inputs = weight.shape
        drawn = torch.empty(config.rank, inputs, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        layer.register_parameter(LORA_A, nn.Parameter(drawn.to(weight)))
        layer.register_parameter(LORA_B, nn.Parameter(weight.new_zeros(outputs, config.rank)))
        layer.register_forward_hook(_LowRank(config.scale, config.dropout))


@torch.no_grad()
def merge_adapters(encoder: ESMEncoder, config: AdapterConfig) -> None:
    """Add the adapters' products to the weights, and remove the adapters; outputs stay equal, to rounding."""
    layers = list(_targets(encoder, config))
    assert all(_is_adapted(layer) for layer in layers), "the encoder has no such adapters"
    assert sum(_is_adapted(module) for module in encoder.modules()) == len(layers), "the encoder has other adapters"
    for layer in layers:
        weight: Any = layer.weight
        weight.copy_(_merged(weight, layer.lora_a, layer.lora_b, config.scale))  # type: ignore[arg-type]
        del layer.lora_a, layer.lora_b
        for key in [key for key, hook in layer._forward_hooks.items() if isinstance(hook, _LowRank)]:
            del layer._forward_hooks[key]


@torch.no_grad()
def merged_weights(weights: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return named weights with their adapters merged: for float32 masters, or an archive's tensors."""
    merged = {name: tensor for name, tensor in weights.items() if not name.endswith(ADAPTER_NAMES)}
    for name in weights:
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            lora_a, lora_b = weights[name], weights[layer + LORA_B]
            merged[layer + "weight"] = _merged(weights[layer + "weight"], lora_a, lora_b, config.scale)
    return merged


def adapter_shapes(config: AdapterConfig, encoder_config: EncoderConfig) -> dict[str, tuple[int, int]]:
    """Return name, as in `ESMEncoder.named_parameters`, and shape of every parameter that `add_adapters` adds."""
    shapes = {}
    for name, shape in encoder_config.tensors():
        layer, _, kind = name.removeprefix("encoder.").rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in config.targets:
            outputs, inputs = shape
            shapes[f"{layer}.{LORA_A}"] = (config.rank, inputs)
            shapes[f"{layer}.{LORA_B}"] = (outputs, config.rank)
    return shapes


def _merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale B A, computed in float64 and rounded once, to the dtype of W."""
    return (weight.double() + scale * (lora_b.double() @ lora_a.double())).to(weight.dtype)


def _targets(encoder: ESMEncoder, config: AdapterConfig) -> Iterator[nn.Module]:
    for name, module in encoder.encoder.layers.named_modules():
        if name.rpartition(".")[2] in config.targets:
            yield module


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(hook, _LowRank) for hook in module._forward_hooks.values())
