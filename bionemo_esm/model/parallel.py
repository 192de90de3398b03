"""Process groups: Megatron's layers ask for them even where one process works alone.

Data-parallel ranks hold the same weights and see different sequences. Tensor-parallel ranks share one copy of the
weights and see the same sequences: matrices are split between them, norms and some biases are held by each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import distributed


def ensure_groups(tensor_model_parallel_size: int = 1, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Bring up what is missing: a process group of this process alone, and Megatron's groups over the world there is.

    Alone, the rendezvous is in memory: no port, no file, no environment variable. Under a launcher the strategy has
    brought the world up before, and only Megatron's groups are added. Groups that are up stay as they are. `timeout`:
    of a collective operation.
    """
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )


def destroy_groups() -> None:
    """Take down Megatron's groups and the process group, if they are up."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


# --- who is who -------------------------------------------------------------------------------------------------------


def data_parallel_rank() -> int:
    """Which share of a global batch is this process's; 0 where no groups are up."""
    return int(parallel_state.get_data_parallel_rank()) if parallel_state.is_initialized() else 0


def data_parallel_size() -> int:
    """Into how many shares a global batch is dealt; 1 where no groups are up."""
    return int(parallel_state.get_data_parallel_world_size()) if parallel_state.is_initialized() else 1


def data_parallel_group() -> distributed.ProcessGroup:
    """The ranks that hold the same part of the weights as this one."""
    group: distributed.ProcessGroup = parallel_state.get_data_parallel_group()
    return group


def tensor_parallel_rank() -> int:
    """Which part of split weights is this process's; 0 where no groups are up."""
    return int(parallel_state.get_tensor_model_parallel_rank()) if parallel_state.is_initialized() else 0


def tensor_parallel_size() -> int:
    """Into how many parts weights are split; 1 where no groups are up."""
    return int(parallel_state.get_tensor_model_parallel_world_size()) if parallel_state.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this is rank 0 of all."""
    return data_parallel_rank() == 0 and tensor_parallel_rank() == 0


# --- tensors that are split -------------------------------------------------------------------------------------------


def is_split(parameter: torch.Tensor) -> bool:
    """Whether every tensor-parallel rank holds another part of this parameter; if not, each holds all of it."""
    return tensor_parallel_size() > 1 and bool(getattr(parameter, "tensor_model_parallel", False))


def gather_shards(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole of which every tensor-parallel rank holds a part, laid out like `parameter`; collective.

    Parts are contiguous and in the order of the ranks, those of the mixed query-key-value matrix too: Megatron keeps
    the rows of one head together. A tensor that is not split, or of which there is one part, is returned as it is.
    """
    if not is_split(parameter):
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(tensor_parallel_size())]
    distributed.all_gather(parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def local_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, laid out like `parameter`: the inverse of `gather_shards`."""
    if not is_split(parameter):
        return whole
    dimension: int = parameter.partition_dim  # type: ignore[attr-defined]
    return whole.chunk(tensor_parallel_size(), dim=dimension)[tensor_parallel_rank()]


@contextmanager
def tensor_parallel_rng(device: torch.device) -> Iterator[None]:
    """Within it, tensor-parallel ranks draw different numbers; after it, again the same.

    For dropout of what they have split. Elsewhere their generators must agree: each then drops the same activations.
    """
    if tensor_parallel_size() == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))  # the same on all of them, and another at every call
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + tensor_parallel_rank())
        yield


# --- sums -------------------------------------------------------------------------------------------------------------


def data_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks, in place; returns the tensor."""
    if data_parallel_size() > 1:
        distributed.all_reduce(tensor, group=data_parallel_group())
    return tensor


def tensor_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks that share one copy of the weights, in place; returns the tensor."""
    if tensor_parallel_size() > 1:
        distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def world_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, whatever each of them holds of the model, in place; returns the tensor."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor
