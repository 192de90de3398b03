"""Fully sharded training: parameters, gradients, float32 masters and moments split over data-parallel ranks.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP") gathers one block at a time for its forward and its
backward pass, in the dtype of computation, and sums gradients in float32. A rank keeps whole rows of each float32
parameter. They are its masters: the optimizer updates them in place, and needs no other copy.

Every forward pass is collective. Ranks with fewer micro batches than others therefore compute `idle_batch`, whose loss
and gradient are exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Parameter
from torch.utils.data import Dataset

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.masking import MaskedResidues
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.optimizer import MasterWeights, sum_of_squares
from bionemo_esm.model.parallel import (
    data_parallel_group,
    data_parallel_size,
    data_parallel_sum,
    held_part,
    is_first_rank,
    is_fully_sharded,
)

IGNORED_TARGET = -100
"""A target that `torch.nn.functional.cross_entropy` leaves out."""


def shard_encoder(encoder: ESMEncoder, dtype: torch.dtype) -> None:
    """Split the encoder's parameters over data-parallel ranks, as float32; compute in `dtype`.

    The encoder is on the device of the run, with equal weights on all ranks. Its blocks are gathered one by one, the
    next during the current one; embedding, last norm and head together.
    """
    mesh = DeviceMesh.from_group(data_parallel_group(), encoder.device_type)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = list(encoder.encoder.layers)
    sharded = []
    for module in (*blocks, encoder):
        for parameter in module.parameters():
            if not is_fully_sharded(parameter):
                parameter.data = parameter.data.float()
        sharded.append(fully_shard(module, mesh=mesh, mp_policy=policy))
    for module in sharded:
        module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by the count of the global batch
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for block, following in pairwise(sharded[:-1]):
        block.set_modules_to_forward_prefetch([following])


class ShardedMasters(MasterWeights):
    """`MasterWeights` of a fully sharded model: a rank's rows of each parameter, and of its gradient.

    FSDP2 reduces the gradients of every micro batch, so that no rank holds a whole one, and adds them up in float32.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> None:
        self.parameters = dict(named_parameters)
        self.masters = {
            name: Parameter(held_part(parameter.detach()), requires_grad=parameter.requires_grad)
            for name, parameter in self.parameters.items()
        }
        self._full_copy: dict[str, Tensor] | None = None
        self.zero_gradients()

    def release(self) -> None:
        """Do nothing: there are no hooks."""

    def zero_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            assert held_part(parameter.detach()).data_ptr() == self.masters[name].data_ptr(), "FSDP2 moved a parameter"
            parameter.grad = self.masters[name].grad = None

    @contextmanager
    def overlapped_reduction(self) -> Iterator[None]:
        """Enclose the last backward pass of a step; then the masters have their summed gradients."""
        yield
        for name, master in self.masters.items():
            gradient = self.parameters[name].grad
            master.grad = torch.zeros_like(master) if gradient is None else held_part(gradient)

    def clip_gradients(self, max_norm: float) -> Tensor:
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        squares = torch.stack([sum_of_squares(gradient.flatten()) for gradient in gradients]).sum()
        norm = data_parallel_sum(squares).sqrt().float()
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def write_back(self) -> None:
        """Forget the full copy: the masters are the parameters."""
        self._full_copy = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole masters on the CPU of rank 0, and shapes alone on other ranks. Collective."""
        if self._full_copy is None:
            return {name: whole_on_first_rank(parameter) for name, parameter in self.parameters.items()}
        return self._full_copy

    def keep_full_copy(self) -> None:
        self._full_copy = self.state_dict()


def whole_on_first_rank(parameter: Tensor) -> Tensor:
    """Return a sharded tensor whole, on the CPU of rank 0; on other ranks without data (device "meta"). Collective."""
    assert is_fully_sharded(parameter)
    whole: Tensor = parameter.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if is_first_rank() else torch.empty_like(whole, device="meta")


# --- equal numbers of forward passes ----------------------------------------------------------------------------------


def idle_batch() -> PackedBatch:
    """Return the smallest batch, one masked residue whose loss and gradients are zero."""
    residue = np.array([5], dtype=np.uint8)
    batch = pack(residue, np.array([1]), MaskedResidues(residue, np.array([True])))
    batch.targets.fill_(IGNORED_TARGET)
    return batch


class IdleBatches(Dataset[PackedBatch]):
    """One idle batch, for a rank with one validation batch less than others."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> PackedBatch:
        return idle_batch()


def with_idle_batches(batches: Sequence[PackedBatch], device: torch.device) -> list[PackedBatch]:
    """Return the batches and as many idle ones as make their number that of the rank with most. Collective."""
    most = torch.tensor(len(batches), device=device)
    if data_parallel_size() > 1:
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=data_parallel_group())
    return [*batches, *(idle_batch().to(device) for _ in range(int(most) - len(batches)))]
