"""Fused Adam over float32 masters, one flat gradient buffer, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import INVERSE_SQUARE_ROOT, OptimConfig
from bionemo_esm.model.parallel import (
    gather_shards,
    is_first_rank,
    is_split,
    own_shard,
    tensor_parallel_rank,
    tensor_parallel_size,
    tensor_parallel_sum,
)
from bionemo_esm.model.reduction import BUCKET_BYTES, OverlappedReduction
from bionemo_esm.model.schedule import learning_rate


def build_schedule(optimizer: Optimizer, config: OptimConfig) -> LRScheduler:
    """NeMo's cosine, or the inverse square root; `learning_rate` is the formula of both.

    NeMo's `InverseSquareRootAnnealing` is not fairseq's: it is a step ahead of a warm-up a step longer, and falls to
    `min_lr` after `max_steps`.
    """
    if config.schedule == INVERSE_SQUARE_ROOT:
        return _RateByFormula(optimizer, config)
    schedule: LRScheduler = CosineAnnealing(
        optimizer,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        constant_steps=config.constant_steps,
        min_lr=config.min_lr,
    )
    return schedule


class _RateByFormula(LRScheduler):
    """The rate of every group is `learning_rate(config, step)`; the state is the step, in plain values."""

    def __init__(self, optimizer: Optimizer, config: OptimConfig) -> None:
        self._config = config
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [learning_rate(self._config, self.last_epoch) for _ in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_config"}


_NORM_PIECE = 2**12  # gradients of which the squares are added up in float32


class MasterWeights:
    """Float32 masters of a model's parameters, with all gradients in one float32 buffer.

    A float32 parameter is its own master. A bfloat16 parameter gets a float32 copy which the optimizer steps, and is
    rewritten from it after each step. Gradients of all micro batches add up in float32, in one buffer, which is summed
    over data-parallel ranks (`reducing`) and clipped as a whole.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`bucket_bytes`: of the buffer, that are reduced at a time."""
        self.parameters = dict(named_parameters)
        device = next(iter(self.parameters.values())).device
        backwards = list(reversed(self.parameters.items()))  # about the order in which backward makes gradients
        sizes = [parameter.numel() for _, parameter in backwards]
        self.gradients = torch.zeros(sum(sizes), device=device)
        self._reduction = OverlappedReduction(self.gradients, sizes, bucket_bytes)
        views = zip(backwards, self.gradients.split(sizes), strict=True)
        self._views = {name: view.view_as(parameter) for (name, parameter), view in views}
        self.masters: dict[str, Parameter] = {}
        for name, parameter in self.parameters.items():
            own = parameter.dtype == torch.float32
            self.masters[name] = parameter if own else Parameter(parameter.detach().float())
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collect(self._views[name], place))
            for place, (name, parameter) in enumerate(backwards)
        ]
        self._are_split = any(is_split(parameter) for parameter in self.parameters.values())
        self._whole: dict[str, Tensor] | None = None  # kept for when process groups are down
        self.zero_gradients()

    def _collect(self, view: Tensor, place: int) -> Callable[[Tensor], None]:
        """What is done when backward has a parameter's gradient, the sum over all places where it is used."""
        reduction = self._reduction

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if parameter.dtype != torch.float32:
                view.add_(parameter.grad)
                parameter.grad = None
            assert parameter.grad is None or parameter.grad.data_ptr() == view.data_ptr(), "zero_gradients comes first"
            reduction.gradient_is_complete(place)

        return collect

    def release(self) -> None:
        """Stop listening to the parameters, so that others may be their masters."""
        for hook in self._hooks:
            hook.remove()

    def zero_gradients(self) -> None:
        """Start a step: nothing in the buffer, and every master's gradient a view of it (Lightning drops them)."""
        self.gradients.zero_()
        for name, master in self.masters.items():
            master.grad = self._views[name]

    def reducing(self) -> AbstractContextManager[None]:
        """Around the last backward pass of a step: sums the gradients over data-parallel ranks while it runs."""
        return self._reduction.during_backward()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients down to a total L2 norm of `max_norm` (0: leave them); returns the norm before."""
        norm = self._gradient_norm()
        if max_norm > 0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _gradient_norm(self) -> Tensor:
        """Of the whole model: what every tensor-parallel rank holds counts once. The same bits on all of them.

        Piece by piece: a CPU adds up squares in float32, one after another, and of 43 million loses a hundredth.
        """
        own = [self.gradients]
        if tensor_parallel_size() > 1:
            counted = tensor_parallel_rank() == 0
            own = [view.flatten() for name, view in self._views.items() if counted or is_split(self.parameters[name])]
        return tensor_parallel_sum(torch.stack([_sum_of_squares(part) for part in own]).sum()).sqrt().float()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[n]) for n, p in self.parameters.items() if p is not self.masters[n]]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        self._whole = None

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by parameter name, float32 and whole; collective where they are split over ranks."""
        if self._whole is not None:
            return self._whole
        assert not self._are_split or tensor_parallel_size() > 1, "the ranks with the other parts have gone"
        return {name: gather_shards(master.detach(), self.parameters[name]) for name, master in self.masters.items()}

    def keep_whole(self) -> None:
        """Gather once more before process groups go down; rank 0 can give `state_dict` after that. Collective."""
        if self._are_split:
            whole = self.state_dict()
            if is_first_rank():
                self._whole = {name: tensor.cpu() for name, tensor in whole.items()}

    @torch.no_grad()
    def load_state_dict(self, masters: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(own_shard(masters[name], self.parameters[name]))
        self.write_back()


def _sum_of_squares(gradients: Tensor) -> Tensor:
    """Of float32 [n], float64: float32 only within pieces."""
    whole = len(gradients) // _NORM_PIECE * _NORM_PIECE
    pieces = torch.linalg.vector_norm(gradients[:whole].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(gradients[whole:], keepdim=True)
    return torch.cat([pieces, rest]).double().square().sum()


def parameter_groups(masters: MasterWeights, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices and the rest; biases and layer norms take no weight decay, as in Megatron."""
    matrices = [master for master in masters.masters.values() if master.ndim >= 2]
    vectors = [master for master in masters.masters.values() if master.ndim < 2]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def build_optimizer(masters: MasterWeights, config: OptimConfig, backends: FusedBackends) -> Optimizer:
    """Fused Adam over the masters."""
    groups = parameter_groups(masters, config)
    optimizer: Optimizer = backends.adam(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps)
    return optimizer
