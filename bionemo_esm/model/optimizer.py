"""Adam's moments split over data-parallel ranks, and whole in checkpoints, however they were split.

The first stage of ZeRO (Rajbhandari et al. 2020): each rank keeps the moments of some parameters, steps those, and
sends them to the others. PyTorch's `ZeroRedundancyOptimizer` does this around any optimizer. Its own way to a whole
state pickles, so states are gathered here, into the format of an optimizer that is not sharded: a checkpoint does not
depend on the number of ranks that wrote it.

Gradients summed over data-parallel ranks while the backward pass still runs, bucket by bucket.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.2. PyTorch's own
DistributedDataParallel is not used: it reduces in the parameters' dtype, and we add up in float32.

Fused Adam over float32 masters, one flat gradient buffer, and the learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing
from torch import Tensor, distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import INVERSE_SQUARE_ROOT, OptimConfig
from bionemo_esm.model.parallel import (
    data_parallel_group,
    data_parallel_rank,
    data_parallel_size,
    data_parallel_sum,
    gather_shards,
    is_first_rank,
    is_split,
    own_shard,
    tensor_parallel_rank,
    tensor_parallel_size,
    tensor_parallel_sum,
)
from bionemo_esm.model.schedule import learning_rate

BUCKET_BYTES = 25 * 2**20
"""Large enough that each reduction uses the network's full width, small enough that the first starts early."""


class OverlappedReduction:
    """Sums slices of a flat gradient buffer over data-parallel ranks, each as soon as it is complete.

    Slices (buckets) hold whole gradients, in the order of the buffer, and are sent in that order on every rank,
    whatever order gradients arrive in: ranks that disagreed on the order would wait for one another forever.
    """

    def __init__(self, buffer: Tensor, sizes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`buffer`: float32 [sum of sizes], one gradient after another; a bucket is closed once it has `bucket_bytes`.

        The buffer is best laid out in the order in which backward makes gradients: the reverse of the parameters'.
        """
        self._bucket_of: list[int] = []  # by gradient
        lengths = [0]
        for size in sizes:
            if lengths[-1] * buffer.element_size() >= bucket_bytes:
                lengths.append(0)
            self._bucket_of.append(len(lengths) - 1)
            lengths[-1] += size
        self.buckets: tuple[Tensor, ...] = buffer.split(lengths)
        self._missing: list[set[int]] = []  # of each bucket, the gradients to come; empty while nothing is reduced
        self._under_way: list[distributed.Work] = []

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Within it: one backward pass, the step's last. After it, the buffer holds the sums over all ranks.

        Every rank takes part once a step. Parameters that this backward does not reach hold nobody up: what was not
        sent by its end is sent then. With one data-parallel rank nothing is sent.
        """
        if data_parallel_size() == 1:
            yield
            return
        assert not self._missing, "the backward passes of one step are reduced once"
        self._missing = [set() for _ in self.buckets]
        for gradient, bucket in enumerate(self._bucket_of):
            self._missing[bucket].add(gradient)
        try:
            yield
            while len(self._under_way) < len(self.buckets):
                self._send_next()
            for work in self._under_way:
                work.wait()
        finally:
            self._missing, self._under_way = [], []

    def gradient_is_complete(self, gradient: int) -> None:
        """To be called when backward has added to a gradient (by its place in `sizes`), in any backward pass."""
        if not self._missing:
            return
        missing = self._missing[self._bucket_of[gradient]]
        assert gradient in missing, "a gradient came twice: only the last backward pass of a step may be reduced"
        missing.remove(gradient)
        while len(self._under_way) < len(self.buckets) and not self._missing[len(self._under_way)]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[len(self._under_way)]
        work = distributed.all_reduce(bucket, group=data_parallel_group(), async_op=True)
        assert work is not None
        self._under_way.append(work)


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
