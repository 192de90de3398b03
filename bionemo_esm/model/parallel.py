"""Parallelism over Megatron's process groups: ranks, sharded tensors, sums.

Data-parallel ranks hold the same weights and see different sequences. Tensor-parallel ranks share one replica and see
the same sequences: matrices are split between them, and each holds all norms and some biases. A process that works
alone needs no process group: every function here then answers for one rank, also while the user's own
`torch.distributed` is initialised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from bionemo_esm.compat import mark_split, single_rank_groups, split_dimension


def ensure_groups(tensor_model_parallel_size: int = 1, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Create Megatron's groups over all ranks of `torch.distributed`, unless they exist.

    `timeout`: of a collective operation.
    """
    assert distributed.is_initialized(), "a launcher initialises torch.distributed first"
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )


def destroy_groups() -> None:
    """Destroy Megatron's groups and `torch.distributed`, if they are initialised."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def model_groups() -> Any:
    """Return the process groups to build Megatron's layers with: those of `ensure_groups`, or groups of one rank."""
    if not parallel_state.is_initialized():
        return single_rank_groups()
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "pp", "cp", "embd"])


# --- ranks ------------------------------------------------------------------------------------------------------------


def data_parallel_rank() -> int:
    """Return this process's data-parallel rank; 0 without groups."""
    return int(parallel_state.get_data_parallel_rank()) if parallel_state.is_initialized() else 0


def data_parallel_size() -> int:
    """Return the data-parallel world size; 1 without groups."""
    return int(parallel_state.get_data_parallel_world_size()) if parallel_state.is_initialized() else 1


def data_parallel_group() -> distributed.ProcessGroup:
    """Return the group of ranks that hold the same part of the weights as this one."""
    group: distributed.ProcessGroup = parallel_state.get_data_parallel_group()
    return group


def tensor_parallel_rank() -> int:
    """Return this process's tensor-parallel rank; 0 without groups."""
    return int(parallel_state.get_tensor_model_parallel_rank()) if parallel_state.is_initialized() else 0


def tensor_parallel_size() -> int:
    """Return the tensor-parallel world size; 1 without groups."""
    return int(parallel_state.get_tensor_model_parallel_world_size()) if parallel_state.is_initialized() else 1


def world_size() -> int:
    """Return the number of ranks of the run; 1 without groups."""
    return distributed.get_world_size() if parallel_state.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this is rank 0 of the run."""
    return data_parallel_rank() == 0 and tensor_parallel_rank() == 0


# --- sharded tensors --------------------------------------------------------------------------------------------------


def is_split(parameter: torch.Tensor) -> bool:
    """Whether every tensor-parallel rank holds a different part of this parameter."""
    return tensor_parallel_size() > 1 and split_dimension(parameter) is not None


def is_fully_sharded(tensor: torch.Tensor) -> bool:
    """Whether data-parallel ranks hold rows of this tensor (`model/sharding.py`)."""
    return isinstance(tensor, DTensor)


def held_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that this rank holds of a tensor: some rows if it is fully sharded, else all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_split(source: Parameter, target: Parameter) -> Parameter:
    """Mark `target` as split over tensor-parallel ranks like `source`; return it."""
    mark_split(target, split_dimension(source))
    return target


def gather_shards(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that is split like `parameter`. Collective.

    Parts are contiguous and in the order of the ranks, also those of the fused query-key-value matrix: Megatron keeps
    the rows of one head together. A tensor that is not split is returned as it is.
    """
    if isinstance(parameter, DTensor):
        form = parameter.device_mesh, parameter.placements
        rows = held_part(tensor)
        shards = DTensor.from_local(rows, *form, run_check=False, shape=parameter.shape, stride=parameter.stride())
        return shards.full_tensor()
    if not is_split(parameter):
        return tensor
    dimension = split_dimension(parameter)
    assert dimension is not None
    return torch.cat(_gather_tensor_parallel(tensor), dim=dimension)


def local_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor that is split like `parameter`: the inverse of `gather_shards`."""
    if isinstance(parameter, DTensor):
        rows = whole.chunk(data_parallel_size())  # fewer than ranks, if there are fewer rows
        return rows[data_parallel_rank()] if data_parallel_rank() < len(rows) else whole[:0]
    if not is_split(parameter):
        return whole
    dimension = split_dimension(parameter)
    assert dimension is not None
    return whole.chunk(tensor_parallel_size(), dim=dimension)[tensor_parallel_rank()]


def _gather_tensor_parallel(part: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(tensor_parallel_size())]
    distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return parts


class GatherLastDimension(torch.autograd.Function):
    """Every tensor-parallel rank's columns [M, N / ranks] -> all of them [M, N], on each rank.

    All ranks then compute the same loss, so the gradient of a part is a slice. Megatron's own gather allocates on CUDA
    even on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        return part if tensor_parallel_size() == 1 else torch.cat(_gather_tensor_parallel(part), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(tensor_parallel_size(), dim=-1)[tensor_parallel_rank()]


@contextmanager
def tensor_parallel_rng(device: torch.device) -> Iterator[None]:
    """Make tensor-parallel ranks draw different numbers within the context, and equal numbers after it.

    For dropout of split activations. Elsewhere the generators must agree, so that all ranks drop the same activations.
    """
    if tensor_parallel_size() == 1:
        yield
        return
    seed = int(torch.randint(2**62, (), device="cpu"))  # equal on all ranks, new at every call
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + tensor_parallel_rank())
        yield


# --- sums -------------------------------------------------------------------------------------------------------------


def data_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks, in place; return the tensor."""
    if data_parallel_size() > 1:
        distributed.all_reduce(tensor, group=data_parallel_group())
    return tensor


def unequal_over_data_parallel(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ between data-parallel ranks; the same on each of them. Collective.

    Compares two sums over the bits of each tensor, so that nothing large is sent.
    """
    if data_parallel_size() == 1:
        return []
    sums = []
    for tensor in tensors.values():
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bits = tensor.detach().contiguous().view(kind).long()
        sums += [bits.sum(), bits.square().sum()]
    least, most = torch.stack(sums), torch.stack(sums)
    distributed.all_reduce(least, distributed.ReduceOp.MIN, group=data_parallel_group())
    distributed.all_reduce(most, distributed.ReduceOp.MAX, group=data_parallel_group())
    differs = (least != most).view(-1, 2).any(dim=1).tolist()
    return [name for name, unequal in zip(tensors, differs, strict=True) if unequal]


def tensor_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks that share one replica of the weights, in place; return the tensor."""
    if tensor_parallel_size() > 1:
        distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def world_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks of the run, in place; return the tensor."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor
