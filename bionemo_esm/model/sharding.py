"""Adam's moments split over data-parallel ranks, and whole in checkpoints, however they were split.

The first stage of ZeRO (Rajbhandari et al. 2020): each rank keeps the moments of some parameters, steps those, and
sends them to the others. PyTorch's `ZeroRedundancyOptimizer` does this around any optimizer. Its own way to a whole
state pickles, so states are gathered here, into the format of an optimizer that is not sharded: a checkpoint does not
depend on the number of ranks that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Parameter
from torch.optim import Optimizer

from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.optimization import MasterWeights, parameter_groups
from bionemo_esm.model.parallel import (
    data_parallel_group,
    data_parallel_rank,
    data_parallel_sum,
    gather_shards,
    is_first_rank,
    own_shard,
)

State = dict[str, Any]  # of an optimizer: `state` by the place of a parameter, and `param_groups`
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as PyTorch, Apex and Transformer Engine name them
_STEP = "step"  # PyTorch counts it for each parameter, the others for each group


def build_sharded_optimizer(masters: MasterWeights, config: OptimConfig, backends: FusedBackends) -> Optimizer:
    """Fused Adam over the masters, of which each data-parallel rank steps a part: whole tensors, evenly by size."""
    return ZeroRedundancyOptimizer(
        parameter_groups(masters, config),
        optimizer_class=backends.adam,
        process_group=data_parallel_group(),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
    )


def whole_state(optimizer: Optimizer, masters: MasterWeights) -> State:
    """What `optimizer.state_dict()` would be if one rank held everything; empty except on rank 0; collective.

    Tensors travel one at a time. Those that came from other ranks are on the CPU; the others are the optimizer's own,
    not copies.
    """
    layouts = _layouts(optimizer, masters)
    held = _held(optimizer)
    holders = _holders(optimizer, held, layouts[0][0].device)
    state: dict[int, dict[str, Tensor]] = {}
    for place, (holder, steps) in enumerate(holders):
        if holder < 0:
            continue
        values = {name: _fetch(held.get(place, {}).get(name), holder, *layouts[place]) for name in _MOMENTS}
        state[place] = ({} if steps < 0 else {_STEP: torch.tensor(steps, dtype=torch.float32)}) | values
    return {"state": state, "param_groups": _groups(optimizer)} if is_first_rank() else {}


def load_whole_state(optimizer: Optimizer, masters: MasterWeights, whole: Mapping[str, Any]) -> None:
    """Take what this rank holds from a `whole_state` that every rank has been given, whoever wrote it."""
    local, places, layouts = _local(optimizer), _places(optimizer), _layouts(optimizer, masters)
    state = {
        number: {name: _own_part(name, value, layouts[place][1]) for name, value in whole["state"][place].items()}
        for number, place in enumerate(places[master] for master in _masters(local))
        if place in whole["state"]
    }
    groups = []
    for saved, ours, exposed in zip(whole["param_groups"], _groups(local), optimizer.param_groups, strict=True):
        groups.append(dict(saved) | {"params": ours["params"]})
        exposed.update({name: value for name, value in saved.items() if name != "params"})
    local.load_state_dict({"state": state, "param_groups": groups})


# --- which rank holds what --------------------------------------------------------------------------------------------


def _local(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds this rank's moments."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _masters(optimizer: Optimizer) -> list[Tensor]:
    return [master for group in optimizer.param_groups for master in group["params"]]


def _places(optimizer: Optimizer) -> dict[Tensor, int]:
    """Of each master in a state of this optimizer."""
    return {master: place for place, master in enumerate(_masters(optimizer))}


def _layouts(optimizer: Optimizer, masters: MasterWeights) -> list[tuple[Tensor, Parameter]]:
    """By place: the master, and the parameter that says how it is split over tensor-parallel ranks."""
    names: dict[Tensor, str] = {master: name for name, master in masters.masters.items()}
    return [(master, masters.parameters[names[master]]) for master in _masters(optimizer)]


def _held(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """By place: the state of the masters that this rank steps, once it has stepped them."""
    local, places = _local(optimizer), _places(optimizer)
    state = local.state_dict()["state"]
    assert all(values.keys() <= {_STEP, *_MOMENTS} for values in state.values()), "not one of the Adams we know"
    return {places[master]: state[number] for number, master in enumerate(_masters(local)) if number in state}


def _holders(optimizer: Optimizer, held: Mapping[int, Mapping[str, Tensor]], device: torch.device) -> list[list[int]]:
    """By place: the data-parallel rank that holds the state (-1: none), and the steps it counts (-1: none); collective.

    Where every rank holds all, the first one speaks.
    """
    table = torch.zeros(len(_places(optimizer)), 2, dtype=torch.int64, device=device)
    if _local(optimizer) is not optimizer or data_parallel_rank() == 0:
        for place, values in held.items():
            table[place, 0] = data_parallel_rank() + 1
            table[place, 1] = int(values[_STEP]) + 1 if _STEP in values else 0
    holders: list[list[int]] = (data_parallel_sum(table) - 1).tolist()
    return holders


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group and the places of its masters."""
    places, first = _places(optimizer), _local(optimizer).param_groups[0]
    groups = []
    for group, local in zip(optimizer.param_groups, _local(optimizer).param_groups, strict=True):
        settings = {name: value for name, value in group.items() if name != "params"}
        if _STEP in first and not local["params"]:  # who steps none of a group does not count its steps
            settings[_STEP] = first[_STEP]
        groups.append(settings | {"params": [places[master] for master in group["params"]]})
    return groups


# --- parts and wholes -------------------------------------------------------------------------------------------------


def _fetch(moment: Tensor | None, holder: int, master: Tensor, parameter: Parameter) -> Tensor:
    """On rank 0 the whole moment of a master; elsewhere what there is of it. `holder` has this rank's part."""
    part = torch.empty_like(master) if moment is None else moment
    if holder != 0:
        source = distributed.get_global_rank(data_parallel_group(), holder)
        distributed.broadcast(part, source, group=data_parallel_group())
    if data_parallel_rank() != 0:
        return part
    whole = gather_shards(part, parameter)
    return whole if whole is moment or not is_first_rank() else whole.cpu()


def _own_part(name: str, value: Tensor, parameter: Parameter) -> Tensor:
    """Contiguous, and free of the rest of the whole."""
    if name not in _MOMENTS or (part := own_shard(value, parameter)) is value:
        return value
    return part.clone(memory_format=torch.contiguous_format)
