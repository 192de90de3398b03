"""Float32 master weights, gradient reduction during backward, the optimizer and its sharded state, and the schedule.

Gradients of all micro batches add up in one float32 buffer. It is summed over data-parallel ranks in buckets while the
last backward pass of a step runs (Li et al. 2020, "PyTorch Distributed", section 3.2). PyTorch's own
DistributedDataParallel would reduce in the parameters' dtype.

`sharding=optimizer` splits the optimizer's state over data-parallel ranks, as the first stage of ZeRO does (Rajbhandari
et al. 2020). `ZeroRedundancyOptimizer` collects a full state by pickling; `full_state` gathers tensors instead, into
the format of an optimizer that is not sharded. So a checkpoint does not depend on the number of ranks that wrote it.
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

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import COSINE, OptimConfig
from bionemo_esm.model.optimizer_registry import FUSED_ADAM_FAMILY, OPTIMIZERS, STEP, OptimizerFamily
from bionemo_esm.model.parallel import (
    copy_split,
    data_parallel_group,
    data_parallel_rank,
    data_parallel_size,
    data_parallel_sum,
    gather_shards,
    is_first_rank,
    is_fully_sharded,
    is_split,
    local_shard,
    tensor_parallel_rank,
    tensor_parallel_size,
    tensor_parallel_sum,
)
from bionemo_esm.model.schedule import learning_rate

BUCKET_BYTES = 25 * 2**20
"""Large enough for the network's full bandwidth, small enough that the first reduction starts early."""
_NORM_CHUNK = 2**12  # gradients whose squares are summed in float32


class OverlappedReduction:
    """Sum slices of a flat gradient buffer over data-parallel ranks, each as soon as it is complete.

    A slice (bucket) holds whole gradients, in the order of the buffer. Every rank sends buckets in that order, in
    whatever order gradients arrive: ranks with different orders would deadlock.
    """

    def __init__(self, buffer: Tensor, sizes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`buffer`: float32 [sum of sizes], one gradient after another. A bucket is closed at `bucket_bytes`.

        The best order of the buffer is that in which backward produces gradients: the reverse of the parameters'.
        """
        self._bucket_of: list[int] = []  # by gradient
        lengths = [0]
        for size in sizes:
            if lengths[-1] * buffer.element_size() >= bucket_bytes:
                lengths.append(0)
            self._bucket_of.append(len(lengths) - 1)
            lengths[-1] += size
        self.buckets: tuple[Tensor, ...] = buffer.split(lengths)
        self._missing: list[set[int]] = []  # gradients that each bucket waits for; empty outside of a reduction
        self._pending: list[distributed.Work] = []

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Reduce during the enclosed backward pass, the last of the step; then the buffer holds the sums.

        Collective, once a step. Buckets of parameters that this backward does not reach are sent at its end. With one
        data-parallel rank nothing is sent.
        """
        if data_parallel_size() == 1:
            yield
            return
        assert not self._missing, "the gradients of one step are reduced once"
        self._missing = [set() for _ in self.buckets]
        for gradient, bucket in enumerate(self._bucket_of):
            self._missing[bucket].add(gradient)
        try:
            yield
            while len(self._pending) < len(self.buckets):
                self._send_next()
            for work in self._pending:
                work.wait()
        finally:
            self._missing, self._pending = [], []

    def gradient_is_complete(self, gradient: int) -> None:
        """Record that backward has added to a gradient (by its index in `sizes`), in any backward pass."""
        if not self._missing:
            return
        missing = self._missing[self._bucket_of[gradient]]
        assert gradient in missing, "a gradient came twice: only the last backward pass of a step may be reduced"
        missing.remove(gradient)
        while len(self._pending) < len(self.buckets) and not self._missing[len(self._pending)]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[len(self._pending)]
        work = distributed.all_reduce(bucket, group=data_parallel_group(), async_op=True)
        assert work is not None
        self._pending.append(work)


# --- the schedule -----------------------------------------------------------------------------------------------------


def build_schedule(optimizer: Optimizer, config: OptimConfig) -> LRScheduler:
    """Return NeMo's cosine schedule, or that of another formula; `learning_rate` is the formula of all.

    NeMo's `InverseSquareRootAnnealing` differs from fairseq's: it is one step ahead of a warm-up that is one step
    longer, and it drops to `min_lr` after `max_steps`.
    """
    if config.schedule != COSINE:
        return _FormulaSchedule(optimizer, config)
    schedule: LRScheduler = CosineAnnealing(
        optimizer,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        constant_steps=config.constant_steps,
        min_lr=config.min_lr,
    )
    return schedule


class _FormulaSchedule(LRScheduler):
    """Set the rate of every group to `learning_rate(config, step)`; the state is the step, in plain values."""

    def __init__(self, optimizer: Optimizer, config: OptimConfig) -> None:
        self._config = config
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [learning_rate(self._config, self.last_epoch) for _ in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_config"}


# --- master weights ---------------------------------------------------------------------------------------------------


class MasterWeights:
    """Float32 masters of a model's parameters, with all gradients in one float32 buffer.

    A float32 parameter is its own master. A bfloat16 parameter has a float32 copy, which the optimizer updates and from
    which the parameter is rounded after each step.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`bucket_bytes`: size of the parts of the buffer that are reduced at a time."""
        self.parameters = dict(named_parameters)
        device = next(iter(self.parameters.values())).device
        backwards = list(reversed(self.parameters.items()))  # about the order in which backward produces gradients
        sizes = [parameter.numel() for _, parameter in backwards]
        self.gradients = torch.zeros(sum(sizes), device=device, dtype=torch.float32)
        self._reduction = OverlappedReduction(self.gradients, sizes, bucket_bytes)
        views = zip(backwards, self.gradients.split(sizes), strict=True)
        self._views = {name: view.view_as(parameter) for (name, parameter), view in views}
        self.masters: dict[str, Parameter] = {}
        for name, parameter in self.parameters.items():
            is_master = parameter.dtype == torch.float32
            self.masters[name] = (
                parameter if is_master else copy_split(parameter, Parameter(parameter.detach().float()))
            )
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collect(self._views[name], index))
            for index, (name, parameter) in enumerate(backwards)
        ]
        self._are_split = any(is_split(parameter) for parameter in self.parameters.values())
        self._full_copy: dict[str, Tensor] | None = None  # for the time after the process groups are destroyed
        self.zero_gradients()

    def _collect(self, view: Tensor, index: int) -> Callable[[Tensor], None]:
        """Return the hook that backward calls with a parameter's gradient, summed over all its uses."""
        reduction = self._reduction

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if parameter.dtype != torch.float32:
                view.add_(parameter.grad)
                parameter.grad = None
            assert parameter.grad is None or parameter.grad.data_ptr() == view.data_ptr(), "zero_gradients comes first"
            reduction.gradient_is_complete(index)

        return collect

    def release(self) -> None:
        """Remove the hooks from the parameters, so that other masters can be made of them."""
        for hook in self._hooks:
            hook.remove()

    def zero_gradients(self) -> None:
        """Start a step: clear the buffer and make every master's gradient a view of it (Lightning drops them)."""
        self.gradients.zero_()
        for name, master in self.masters.items():
            master.grad = self._views[name]

    def overlapped_reduction(self) -> AbstractContextManager[None]:
        """Enclose the last backward pass of a step, and sum the gradients over data-parallel ranks while it runs."""
        return self._reduction.during_backward()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global L2 norm of at most `max_norm` (0: no limit); return the norm before."""
        norm = self._gradient_norm()
        if max_norm > 0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _gradient_norm(self) -> Tensor:
        """Return the norm over the whole model, the same bits on every rank.

        What all tensor-parallel ranks hold counts once. Squares are summed in float32 within chunks only: over 43
        million of them a CPU would lose a hundredth.
        """
        counted = [self.gradients]
        if tensor_parallel_size() > 1:
            is_first = tensor_parallel_rank() == 0
            counted = [
                view.flatten() for name, view in self._views.items() if is_first or is_split(self.parameters[name])
            ]
        return tensor_parallel_sum(torch.stack([sum_of_squares(part) for part in counted]).sum()).sqrt().float()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[n]) for n, p in self.parameters.items() if p is not self.masters[n]]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        self._full_copy = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole masters by parameter name, float32. Collective if they are split over ranks."""
        if self._full_copy is not None:
            return self._full_copy
        assert not self._are_split or tensor_parallel_size() > 1, "the other tensor-parallel ranks have ended"
        return {name: gather_shards(master.detach(), self.parameters[name]) for name, master in self.masters.items()}

    def keep_full_copy(self) -> None:
        """Gather split masters on rank 0, so that `state_dict` works there without process groups. Collective."""
        if self._are_split:
            full = self.state_dict()
            if is_first_rank():
                self._full_copy = {name: tensor.cpu() for name, tensor in full.items()}

    @torch.no_grad()
    def load_state_dict(self, masters: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(local_shard(masters[name], self.parameters[name]))
        self.write_back()


def sum_of_squares(gradients: Tensor) -> Tensor:
    """Return the sum over float32 [n] as float64; float32 is used within chunks only."""
    whole = len(gradients) // _NORM_CHUNK * _NORM_CHUNK
    chunks = torch.linalg.vector_norm(gradients[:whole].view(-1, _NORM_CHUNK), dim=1)
    rest = torch.linalg.vector_norm(gradients[whole:], keepdim=True)
    return torch.cat([chunks, rest]).double().square().sum()


# --- the optimizer ----------------------------------------------------------------------------------------------------


def parameter_groups(masters: MasterWeights, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the masters in the optimizer's groups. With `fused_adam` biases and norms have no weight decay."""
    family = OPTIMIZERS.get(config.name)
    groups: list[dict[str, Any]] = [{"params": [], **settings} for settings in family.groups(config)]
    for name, master in masters.masters.items():
        groups[family.group_of(name, tuple(master.shape))]["params"].append(master)
    return groups


def build_optimizer(masters: MasterWeights, config: OptimConfig, backends: FusedBackends) -> Optimizer:
    """Return the optimizer `config.name` over the masters. Raises `ConfigError` for an unknown name."""
    family = OPTIMIZERS.get(config.name)
    optimizer: Optimizer = family.build(backends)(parameter_groups(masters, config), **family.settings(config))
    return optimizer


def build_sharded_optimizer(masters: MasterWeights, config: OptimConfig, backends: FusedBackends) -> Optimizer:
    """Return the optimizer with its state split over data-parallel ranks: whole tensors, balanced by size."""
    if data_parallel_size() == 1:
        return build_optimizer(masters, config, backends)
    family = OPTIMIZERS.get(config.name)
    build: Any = family.build(backends)
    return ZeroRedundancyOptimizer(
        parameter_groups(masters, config),
        optimizer_class=build,
        process_group=data_parallel_group(),
        **family.settings(config),
    )


# --- its state in checkpoints -----------------------------------------------------------------------------------------

State = dict[str, Any]
"""`state` by the index of a parameter, and `param_groups`, as `torch.optim.Optimizer.state_dict` returns them."""


def full_state(optimizer: Optimizer, masters: MasterWeights, family: OptimizerFamily = FUSED_ADAM_FAMILY) -> State:
    """Return the state of the whole optimizer on rank 0, and {} on other ranks. Collective.

    One form for every implementation of an optimizer: each parameter's state has the number of its steps, also where
    the optimizer counts them in its groups, as Transformer Engine's and Apex's Adam do.

    Tensors are sent one at a time. Those from other ranks are on the CPU; the others are the optimizer's own, not
    copies.
    """
    parameters = _parameters(optimizer, masters)
    local = _local_state(optimizer, parameters, family)
    state: dict[int, dict[str, Tensor]] = {}
    for index, (owner, steps) in enumerate(_owners(optimizer, local, parameters[0][1].device)):
        if owner < 0:
            continue
        name, master, parameter = parameters[index]
        values = {
            key: _gather(local.get(index, {}).get(key), owner, master, parameter)
            for key in family.state(name, tuple(master.shape))
        }
        state[index] = ({} if steps < 0 else {STEP: torch.tensor(steps, dtype=torch.float32)}) | values
    return {"state": state, "param_groups": _group_settings(optimizer)} if is_first_rank() else {}


def local_state(optimizer: Optimizer, masters: MasterWeights, family: OptimizerFamily = FUSED_ADAM_FAMILY) -> State:
    """Return `full_state` of an optimizer that is not sharded, on any rank, without communication."""
    state = _local_state(optimizer, _parameters(optimizer, masters), family)
    return {"state": state, "param_groups": _group_settings(optimizer)}


def load_full_state(
    optimizer: Optimizer, masters: MasterWeights, full: Mapping[str, Any], group_steps: bool = False
) -> None:
    """Load this rank's part of a `full_state`, which every rank has been given, from any number of ranks.

    `group_steps`: this implementation counts steps in its groups; the one that saved may have counted either way.
    Settings that only the other implementation has are left out.
    """
    local, indices, parameters = _unsharded(optimizer), _indices(optimizer), _parameters(optimizer, masters)
    steps = _steps_by_index(full)
    state = {}
    for number, index in enumerate(indices[master] for master in _masters(local)):
        if index in full["state"]:
            values = {key: value for key, value in full["state"][index].items() if key != STEP}
            state[number] = {key: _local_part(value, parameters[index][2]) for key, value in values.items()}
            if index in steps and not group_steps:
                state[number][STEP] = torch.tensor(float(steps[index]), dtype=torch.float32)
    groups = []
    for saved, ours, exposed in zip(full["param_groups"], local.param_groups, optimizer.param_groups, strict=True):
        settings = {name: value for name, value in saved.items() if name in ours and name not in ("params", STEP)}
        if group_steps and (counted := [steps[index] for index in saved["params"] if index in steps]):
            settings[STEP] = max(counted)
        exposed.update(settings)
        groups.append({**ours, **settings})
    local.load_state_dict({"state": state, "param_groups": _numbered(groups)})


def _steps_by_index(full: Mapping[str, Any]) -> dict[int, int]:
    """Return the steps of each parameter, which stand beside its state or, in older checkpoints, in its group."""
    steps = {index: group[STEP] for group in full["param_groups"] if STEP in group for index in group["params"]}
    steps |= {index: values[STEP] for index, values in full["state"].items() if STEP in values}
    return {index: int(count) for index, count in steps.items()}


def _numbered(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups with the numbers of their parameters in place of these, as `Optimizer.state_dict` has them."""
    numbers = iter(range(sum(len(group["params"]) for group in groups)))
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]


def _unsharded(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds this rank's state tensors."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _masters(optimizer: Optimizer) -> list[Tensor]:
    return [master for group in optimizer.param_groups for master in group["params"]]


def _indices(optimizer: Optimizer) -> dict[Tensor, int]:
    """Return the index of each master in a state of this optimizer."""
    return {master: index for index, master in enumerate(_masters(optimizer))}


def _parameters(optimizer: Optimizer, masters: MasterWeights) -> list[tuple[str, Tensor, Parameter]]:
    """Return by index: name, master, and the parameter, whose attributes say how tensor parallelism splits it."""
    names: dict[Tensor, str] = {master: name for name, master in masters.masters.items()}
    return [(names[master], master, masters.parameters[names[master]]) for master in _masters(optimizer)]


def _local_state(
    optimizer: Optimizer, parameters: list[tuple[str, Tensor, Parameter]], family: OptimizerFamily
) -> dict[int, dict[str, Tensor]]:
    """Return by index the state of the masters that this rank has updated at least once."""
    local, indices = _unsharded(optimizer), _indices(optimizer)
    state = local.state_dict()["state"]
    found = {indices[master]: dict(state[number]) for number, master in enumerate(_masters(local)) if number in state}
    for group in local.param_groups:
        for index in (indices[master] for master in group["params"] if STEP in group):
            if index in found:
                found[index][STEP] = torch.tensor(float(group[STEP]))
    for index, values in found.items():
        name, master, _ = parameters[index]
        known = {STEP, *family.state(name, tuple(master.shape))}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"the optimizer keeps {', '.join(unknown)} of {name}, which `state` of its OptimizerFamily does not "
                "name; name every tensor there, or checkpoints would lose it",
                code="optimizer.unknown-state",
            )
    return found


def _owners(optimizer: Optimizer, local: Mapping[int, Mapping[str, Tensor]], device: torch.device) -> list[list[int]]:
    """Return by index: the data-parallel rank that holds the state (-1: none), its step count (-1: none). Collective.

    If every rank holds all, rank 0 is the owner.
    """
    table = torch.zeros(len(_indices(optimizer)), 2, dtype=torch.int64, device=device)
    if _unsharded(optimizer) is not optimizer or data_parallel_rank() == 0:
        for index, values in local.items():
            table[index, 0] = data_parallel_rank() + 1
            table[index, 1] = int(values[STEP]) + 1 if STEP in values else 0
    owners: list[list[int]] = (data_parallel_sum(table) - 1).tolist()
    return owners


def _group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group, and the indices of its masters."""
    indices = _indices(optimizer)
    return [
        {name: value for name, value in group.items() if name != STEP}
        | {"params": [indices[master] for master in group["params"]]}
        for group in optimizer.param_groups
    ]


def _gather(value: Tensor | None, owner: int, master: Tensor, parameter: Parameter) -> Tensor:
    """Return a state tensor, whole on rank 0. `owner` is the data-parallel rank that holds this rank's part."""
    part = torch.empty_like(master) if value is None else value
    if is_fully_sharded(parameter):
        whole = gather_shards(part, parameter)
        return whole.cpu() if is_first_rank() else part
    if owner != 0:
        source = distributed.get_global_rank(data_parallel_group(), owner)
        distributed.broadcast(part, source, group=data_parallel_group())
    if data_parallel_rank() != 0:
        return part
    full = gather_shards(part, parameter)
    return full if full is value or not is_first_rank() else full.cpu()


def _local_part(value: Tensor, parameter: Parameter) -> Tensor:
    """Return this rank's part of a state tensor, contiguous, without the memory of the whole."""
    if (part := local_shard(value, parameter)) is value:
        return value
    return part.clone(memory_format=torch.contiguous_format)
