"""Which fused kernels run: chosen here, once, from what imports and from the device, and reported at start.

Transformer Engine and NVIDIA Apex come with the NGC PyTorch container and are optional; PyTorch's own fused kernels
serve everywhere else. No other file asks what is installed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import PRECISIONS


@dataclass(frozen=True)
class FusedBackends:
    """The classes in use and the names a person reads; `attention` is a key of `model.attention.ATTENTION`."""

    layer_norm_name: str
    layer_norm: Any  # built by Megatron as layer_norm(config=, hidden_size=, eps=)
    adam_name: str
    adam: Any  # built as adam(parameter_groups, lr=, betas=, eps=)
    attention: str
    linear: str = "Megatron"  # or "oneDNN": who takes the products of linear layers

    def describe(self) -> str:
        norm_and_adam = f"layer norm: {self.layer_norm_name}; Adam: {self.adam_name}"
        return f"{norm_and_adam}; attention: {self.attention}; linear: {self.linear}"


def choose_backends(device_type: str, dtype: torch.dtype, attention_dropout: float) -> FusedBackends:
    """The best available kernels for `device_type` ("cpu" or "cuda") and the parameters' dtype."""
    layer_norm_name, layer_norm = _choose_layer_norm(device_type)
    adam_name, adam = _choose_adam(device_type)
    attention = _choose_attention(device_type, dtype, attention_dropout)
    return FusedBackends(layer_norm_name, layer_norm, adam_name, adam, attention, _choose_linear(device_type, dtype))


def parameter_dtype(precision: str, device_type: str) -> torch.dtype:
    """float32 for "32"; bfloat16 (with float32 masters) for "bf16"; for "auto" what the hardware multiplies faster.

    Raises `ConfigError` for another word.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device_type) else "32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multiplies_bf16(device_type: str) -> bool:
    """Whether bf16 products run in hardware; emulated on a CPU they are several times slower than float32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def importable(module: str) -> Any | None:
    """The module, or None where it, or a library that it links to, is absent."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        return None


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None where it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _choose_layer_norm(device_type: str) -> tuple[str, Any]:
    if device_type == "cuda":
        if importable("transformer_engine.pytorch"):
            return "Transformer Engine", importlib.import_module("megatron.core.extensions.transformer_engine").TENorm
        if importable("apex.normalization.fused_layer_norm"):
            return "Apex", importlib.import_module("megatron.core.fusions.fused_layer_norm").FusedLayerNorm
    return "PyTorch fused", importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm


def _choose_adam(device_type: str) -> tuple[str, Any]:
    if device_type == "cuda":
        if engine := importable("transformer_engine.pytorch.optimizers"):
            return "Transformer Engine FusedAdam", engine.FusedAdam
        apex = importable("apex.optimizers")
        if apex and hasattr(apex, "FusedAdam"):  # the package named apex on PyPI is another project
            return "Apex FusedAdam", apex.FusedAdam

    def fused_adamw(groups: Any, **options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, fused=True, **options)

    return "PyTorch AdamW(fused)", fused_adamw


def _choose_linear(device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return "Megatron"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "Megatron"
    return "oneDNN"


def _choose_attention(device_type: str, dtype: torch.dtype, attention_dropout: float) -> str:
    if device_type != "cuda":
        return "sdpa-by-sequence"
    # PyTorch's varlen_attn takes neither dropout nor float32; nested tensors reach a fused kernel for both.
    return "varlen-flash" if attention_dropout == 0 and dtype == torch.bfloat16 else "nested"
