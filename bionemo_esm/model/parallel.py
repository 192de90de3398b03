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


def data_parallel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over data-parallel ranks, in place; returns the tensor."""
    if parallel_state.get_data_parallel_world_size() > 1:
        distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor
