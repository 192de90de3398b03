"""Process groups: Megatron's layers ask for them even where one process works alone."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import distributed


def ensure_groups() -> None:
    """Bring up what is missing: a process group of this process alone, and Megatron's groups over the world there is.

    Alone, the rendezvous is in memory: no port, no file, no environment variable. Under a launcher the strategy has
    brought the world up before, and only Megatron's groups are added.
    """
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)


def destroy_groups() -> None:
    """Take down Megatron's groups and the process group, if they are up."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def gather_shards(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole of which every tensor-parallel rank holds a part, laid out like `parameter`; collective.

    A tensor that is not split, or of which there is one part, is returned as it is.
    """
    if not _is_split(parameter):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    distributed.all_gather(parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def own_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, laid out like `parameter`: the inverse of `gather_shards`."""
    if not _is_split(parameter):
        return whole
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    part: torch.Tensor = whole.chunk(ranks, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]
    return part


def _is_split(parameter: torch.Tensor) -> bool:
    if not parallel_state.is_initialized() or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return False
    return bool(getattr(parameter, "tensor_model_parallel", False))


def data_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks, in place; returns the tensor."""
    if parallel_state.get_data_parallel_world_size() > 1:
        distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor
