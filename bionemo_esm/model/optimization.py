"""Fused Adam over float32 masters, one flat gradient buffer, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.parallel import gather_shards, own_shard


def build_schedule(optimizer: Optimizer, config: OptimConfig) -> LRScheduler:
    """NeMo's cosine with linear warm-up and a constant end."""
    schedule: LRScheduler = CosineAnnealing(
        optimizer,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        constant_steps=config.constant_steps,
        min_lr=config.min_lr,
    )
    return schedule


class MasterWeights:
    """Float32 masters of a model's parameters, with all gradients in one float32 buffer.

    A float32 parameter is its own master. A bfloat16 parameter gets a float32 copy which the optimizer steps, and is
    rewritten from it after each step. Gradients of all micro batches add up in float32, in one buffer, which is reduced
    over ranks and clipped as a whole.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> None:
        self.parameters = dict(named_parameters)
        device = next(iter(self.parameters.values())).device
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.gradients = torch.zeros(sum(sizes), device=device)
        self._views = self.gradients.split(sizes)
        self.masters: dict[str, Parameter] = {}
        for (name, parameter), view in zip(self.parameters.items(), self._views, strict=True):
            master = parameter
            if parameter.dtype != torch.float32:
                master = Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(self._add_to(view))
            self.masters[name] = master
        self.zero_gradients()

    @staticmethod
    def _add_to(view: Tensor) -> Any:
        def add_and_release(parameter: Tensor) -> None:
            assert parameter.grad is not None
            view.add_(parameter.grad.reshape(-1))
            parameter.grad = None

        return add_and_release

    def zero_gradients(self) -> None:
        """Start a step: nothing in the buffer, and every master's gradient a view of it (Lightning drops them)."""
        self.gradients.zero_()
        for master, view in zip(self.masters.values(), self._views, strict=True):
            master.grad = view.view_as(master)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients down to a total L2 norm of `max_norm` (0: leave them); returns the norm before."""
        norm: Tensor = torch.linalg.vector_norm(self.gradients)
        if max_norm > 0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[n]) for n, p in self.parameters.items() if p is not self.masters[n]]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by parameter name, float32 and whole; collective where they are sharded over ranks."""
        return {name: gather_shards(master.detach(), self.parameters[name]) for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, masters: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(own_shard(masters[name], self.parameters[name]))
        self.write_back()


def build_optimizer(masters: MasterWeights, config: OptimConfig, backends: FusedBackends) -> Optimizer:
    """Fused Adam over the masters; biases and layer norms take no weight decay, as in Megatron."""
    matrices = [master for master in masters.masters.values() if master.ndim >= 2]
    vectors = [master for master in masters.masters.values() if master.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer: Optimizer = backends.adam(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps)
    return optimizer
