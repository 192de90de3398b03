"""Optimizers by name: how one is built, which tensors of state it keeps, and how parameters are grouped.

An optimizer of another package registers an `OptimizerFamily` by an entry point in the group `bionemo_esm.optimizers`;
`optim.name` selects it, `optim.options` configures it. `plan` computes memory and checkpoint sizes from `state`.
Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bionemo_esm.model.config import FUSED_ADAM, MUON, OptimConfig
from bionemo_esm.registry import Registry
from bionemo_esm.settings import Fraction, PositiveFloat, PositiveInt, Settings

if TYPE_CHECKING:
    from bionemo_esm.model.backends import FusedBackends

Shape = tuple[int, ...]
STEP = "step"
"""The only state that is not a tensor of the parameter's shape. An optimizer may count steps for each parameter or for
each group."""


def _adam_settings(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}


def _decay_settings(config: OptimConfig) -> tuple[Mapping[str, Any], ...]:
    return {"weight_decay": config.weight_decay}, {"weight_decay": 0.0}


def _decay_group(name: str, shape: Shape) -> int:
    return 0 if len(shape) >= 2 else 1


@dataclass(frozen=True)
class OptimizerFamily:
    """An optimizer that `optim.name` can select.

    build: returns the class or function for a set of kernels; it is called with parameter groups and `settings` as
    keyword arguments and returns a `torch.optim.Optimizer` over float32 parameters. state: names of the float32 state
    tensors of a parameter (by name and whole shape), each of the parameter's shape; a `step` beside them is allowed.
    settings: of all groups. groups: settings of each group, in order; `group_of` assigns a parameter to one of them.
    orthogonalizing_iterations: Newton-Schulz iterations a step on a parameter; plans count their FLOPs and, where
    tensor parallelism splits the parameter, the bytes that are gathered.
    group_steps: whether it counts steps in its parameter groups, not beside each parameter's state.
    """

    build: Callable[[FusedBackends], Callable[..., Any]]
    state: Callable[[str, Shape], tuple[str, ...]]
    settings: Callable[[OptimConfig], Mapping[str, Any]] = _adam_settings
    groups: Callable[[OptimConfig], tuple[Mapping[str, Any], ...]] = _decay_settings
    group_of: Callable[[str, Shape], int] = _decay_group
    orthogonalizing_iterations: Callable[[OptimConfig, str, Shape], int] = lambda config, name, shape: 0
    group_steps: Callable[[FusedBackends], bool] = lambda backends: False


OPTIMIZERS: Registry[OptimizerFamily] = Registry("optimizer", "optim.name", "optimizers", OptimizerFamily)

FUSED_ADAM_FAMILY = OPTIMIZERS.register(FUSED_ADAM)(
    OptimizerFamily(
        build=lambda backends: backends.adam,
        state=lambda name, shape: ("exp_avg", "exp_avg_sq"),  # names in PyTorch, Apex and Transformer Engine
        group_steps=lambda backends: backends.adam_counts_by_group,
    )
)


# --- Muon -------------------------------------------------------------------------------------------------------------


class MuonOptions(Settings, section="optim.options"):
    """The settings of Muon in `optim.options`; the defaults are its authors' (Jordan et al. 2024)."""

    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = 5  # Newton-Schulz iterations
    adamw_lr_ratio: PositiveFloat = 1.0  # AdamW's rate, for embeddings, biases and norms, as a multiple of optim.lr


def _is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether Muon updates the parameter. Rows of an embedding are looked up, so they keep AdamW."""
    return len(shape) == 2 and "embedding" not in name


def _muon_groups(config: OptimConfig) -> tuple[Mapping[str, Any], ...]:
    """Return the settings of matrices (Muon), embeddings, and biases and norms (both AdamW)."""
    options = MuonOptions.from_config(config.options)
    adamw = {"betas": tuple(config.betas), "eps": config.eps, "adamw_lr_ratio": options.adamw_lr_ratio}
    muon = {"momentum": options.momentum, "nesterov": options.nesterov, "ns_steps": options.ns_steps}
    return (
        {**muon, "adjust_lr_fn": "match_rms_adamw", "weight_decay": config.weight_decay},
        {**adamw, "weight_decay": config.weight_decay},
        {**adamw, "weight_decay": 0.0},
    )


def _muon_adamw(backends: FusedBackends) -> Callable[..., Any]:
    from bionemo_esm.model.muon import MuonAdamW  # imports torch

    return MuonAdamW


OPTIMIZERS.register(MUON)(
    OptimizerFamily(
        build=_muon_adamw,
        state=lambda name, shape: ("momentum_buffer",) if _is_hidden_matrix(name, shape) else ("exp_avg", "exp_avg_sq"),
        settings=lambda config: {"lr": config.lr},
        groups=_muon_groups,
        group_of=lambda name, shape: 0 if _is_hidden_matrix(name, shape) else 2 - (len(shape) >= 2),
        orthogonalizing_iterations=lambda config, name, shape: (
            MuonOptions.from_config(config.options).ns_steps if _is_hidden_matrix(name, shape) else 0
        ),
    )
)
