"""Choice of fused kernels, by what is installed and by device: layer norm, Adam, attention, linear layers.

Each kind has a table. The installed entry with the highest priority that supports the device is used, and reported at
start. Another package adds an entry by an entry point in the groups `bionemo_esm.norms`, `bionemo_esm.adams` and
`bionemo_esm.attention`. No other module checks what is installed. The environment variable `BIONEMO_ESM_WITHOUT` leaves
kernels out by name.

Transformer Engine and NVIDIA Apex come with the NGC PyTorch container and are optional.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bionemo_esm.compat import cpu_multiplies_bfloat16, onednn_is_available
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import FUSED_ADAM, PRECISIONS
from bionemo_esm.registry import Registry

ONEDNN, MEGATRON = "oneDNN", "Megatron"
WITHOUT = "BIONEMO_ESM_WITHOUT"
"""Environment variable with the names of kernels not to use, separated by commas: "varlen-flash, Apex FusedAdam"."""
_ALWAYS = ("PyTorch fused", "PyTorch AdamW(fused)", "sdpa-by-sequence")  # something must remain


@dataclass(frozen=True)
class Kernel:
    """A fused implementation. `load` returns its class, or None if it is not installed."""

    load: Callable[[], Any | None]
    device_types: tuple[str, ...] = ("cuda",)
    priority: int = 0  # the highest that is installed is used
    group_steps: bool = False  # of an Adam: it counts steps in its parameter groups, not for each parameter


NORMS: Registry[Kernel] = Registry("layer norm", "layer norm", "norms", Kernel)
"""Classes that Megatron builds as norm(config=, hidden_size=, eps=)."""
ADAMS: Registry[Kernel] = Registry("Adam", "Adam", "adams", Kernel)
"""Classes that are built as adam(parameter_groups, lr=, betas=, eps=)."""


@dataclass(frozen=True)
class FusedBackends:
    """The chosen kernels and their names. `attention` is a name in `model.attention.ATTENTION`."""

    layer_norm_name: str
    layer_norm: Any  # an entry of NORMS
    adam_name: str
    adam: Any  # an entry of ADAMS
    attention: str
    linear: str = MEGATRON  # GEMM backend of the linear layers: MEGATRON or ONEDNN

    @property
    def adam_counts_by_group(self) -> bool:
        return ADAMS.get(self.adam_name).group_steps

    def describe(self, optimizer: str = FUSED_ADAM) -> str:
        """Return the names of the kernels. `optimizer`: the value of `optim.name`; others than fused Adam are named."""
        update = f"Adam: {self.adam_name}" if optimizer == FUSED_ADAM else f"optimizer: {optimizer}"
        norm_and_adam = f"layer norm: {self.layer_norm_name}; {update}"
        return f"{norm_and_adam}; attention: {self.attention}; linear: {self.linear}"


def choose_backends(
    device_type: str, dtype: torch.dtype, attention_dropout: float, head_size: int = 64
) -> FusedBackends:
    """Return the best installed kernels for `device_type` ("cpu" or "cuda") and the parameters' dtype.

    Raises `ConfigError` if `BIONEMO_ESM_WITHOUT` names a kernel that cannot be left out.
    """
    from bionemo_esm.model.attention import choose_attention  # imports Megatron, which takes seconds

    without = excluded_kernels()
    uses_onednn = device_type == "cpu" and onednn_is_available(dtype) and ONEDNN not in without
    linear = ONEDNN if uses_onednn else MEGATRON
    attention = choose_attention(device_type, dtype, attention_dropout, head_size, without)
    return FusedBackends(*_best(NORMS, device_type), *_best(ADAMS, device_type), attention, linear)


def _best(kernels: Registry[Kernel], device_type: str) -> tuple[str, Any]:
    """Return name and class of the installed kernel with the highest priority."""
    excluded = excluded_kernels()
    allowed = [name for name in kernels if name not in excluded]  # in one order on all ranks
    for name in sorted(allowed, key=lambda name: -kernels.get(name).priority):
        kernel = kernels.get(name)
        if device_type in kernel.device_types and (found := kernel.load()) is not None:
            return name, found
    raise AssertionError(f"PyTorch's own {kernels.kind} is always installed")


def excluded_kernels() -> frozenset[str]:
    """Return the names in `BIONEMO_ESM_WITHOUT`. Raises `ConfigError` for an unknown name, and for PyTorch's own."""
    from bionemo_esm.model.attention import ATTENTION

    excluded = frozenset(name for part in os.environ.get(WITHOUT, "").split(",") if (name := part.strip()))
    known = sorted({ONEDNN, *NORMS, *ADAMS, *ATTENTION} - set(_ALWAYS)) if excluded else []
    if unknown := sorted(excluded.difference(known)):
        raise ConfigError(
            f"{WITHOUT} names {', '.join(unknown)}; kernels that can be left out: {', '.join(known)}",
            code="backends.unknown-name",
        )
    return excluded


def parameter_dtype(precision: str, device_type: str) -> torch.dtype:
    """Return float32 for "32", bfloat16 (with float32 masters) for "bf16", and the faster one for "auto".

    Raises `ConfigError` for another word.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "auto":
        precision = "bf16" if _multiplies_bfloat16(device_type) else "32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multiplies_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_multiplies_bfloat16()


@contextmanager
def default_torch_state(device_type: str = "cpu") -> Iterator[None]:
    """Compute as in a fresh process: default device CPU, default dtype float32, no autocast, no inference mode.

    For code that a user's program, or Lightning, calls under settings of its own.
    """
    with ExitStack() as settings:
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        if (default := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            settings.callback(torch.set_default_dtype, default)
        for kind in {"cpu", device_type}:
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            settings.enter_context(torch.inference_mode(mode=False))
        yield


# --- what may be installed --------------------------------------------------------------------------------------------


def importable(module: str) -> Any | None:
    """Return the module, or None if it, or a library that it links to, is missing."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        return None


def import_problem(module: str) -> str | None:
    """Return in one line why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _megatron_wrapper(module: str, name: str, *requires: str) -> Callable[[], Any | None]:
    """Return a loader of Megatron's class around another library's kernel, where all `requires` can be imported."""

    def load() -> Any | None:
        installed = all(importable(each) for each in requires)
        return getattr(importlib.import_module(f"megatron.core.{module}"), name) if installed else None

    return load


def _fused_adam_of(module: str, *requires: str) -> Callable[[], Any | None]:
    """Return a loader of a library's `FusedAdam`, where all `requires` can be imported.

    Apex installs without its kernels, too; the package named apex on PyPI is another project.
    """
    return lambda: getattr(importable(module), "FusedAdam", None) if all(map(importable, requires)) else None


def _pytorch_adam() -> Any:
    def fused_adamw(groups: Any, **options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, fused=True, **options)

    return fused_adamw


def _pytorch_norm() -> Any:
    return importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm


_EVERYWHERE = ("cpu", "cuda")
NORMS.register("Transformer Engine")(
    Kernel(_megatron_wrapper("extensions.transformer_engine", "TENorm", "transformer_engine.pytorch"), priority=2)
)
_APEX_NORM = ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
NORMS.register("Apex")(Kernel(_megatron_wrapper("fusions.fused_layer_norm", "FusedLayerNorm", *_APEX_NORM), priority=1))
NORMS.register("PyTorch fused")(Kernel(_pytorch_norm, _EVERYWHERE))
ADAMS.register("Transformer Engine FusedAdam")(
    Kernel(_fused_adam_of("transformer_engine.pytorch.optimizers"), priority=2, group_steps=True)
)
ADAMS.register("Apex FusedAdam")(Kernel(_fused_adam_of("apex.optimizers", "amp_C"), priority=1, group_steps=True))
ADAMS.register("PyTorch AdamW(fused)")(Kernel(_pytorch_adam, _EVERYWHERE))
