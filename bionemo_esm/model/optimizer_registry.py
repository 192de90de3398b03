"""Optimizers by name: how one is built, which tensors of state it keeps, and how parameters are grouped.

An optimizer of another package registers an `OptimizerFamily` by an entry point in the group `bionemo_esm.optimizers`;
`optim.name` selects it, `optim.options` configures it. `plan` computes memory and checkpoint sizes from `state`.
Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bionemo_esm.model.config import FUSED_ADAM, OptimConfig
from bionemo_esm.registry import Registry

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
    """

    build: Callable[[FusedBackends], Callable[..., Any]]
    state: Callable[[str, Shape], tuple[str, ...]]
    settings: Callable[[OptimConfig], Mapping[str, Any]] = _adam_settings
    groups: Callable[[OptimConfig], tuple[Mapping[str, Any], ...]] = _decay_settings
    group_of: Callable[[str, Shape], int] = _decay_group


OPTIMIZERS: Registry[OptimizerFamily] = Registry("optimizer", "optim.name", "optimizers")

FUSED_ADAM_FAMILY = OPTIMIZERS.register(FUSED_ADAM)(
    OptimizerFamily(
        build=lambda backends: backends.adam,
        state=lambda name, shape: ("exp_avg", "exp_avg_sq"),  # names in PyTorch, Apex and Transformer Engine
    )
)
