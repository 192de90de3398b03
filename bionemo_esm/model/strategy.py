"""A Lightning strategy that brings Megatron's process groups up and takes them down again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.nn import Module
from torch.optim import Optimizer

from bionemo_esm.model.optimizer import MasterWeights, load_whole_state, whole_state
from bionemo_esm.model.parallel import destroy_groups, ensure_groups, tensor_parallel_size


class MegatronStrategy(DDPStrategy):
    """Data and tensor parallelism over Megatron's groups, without a wrapper around the model.

    Our models have `masters`: they add up their gradients in one float32 buffer and reduce that while the last backward
    pass of a step runs, so Lightning's DistributedDataParallel, which would reduce bfloat16 gradients of every micro
    batch, is left out. Works over NCCL and gloo, under Lightning's own launcher, torchrun and Slurm.
    """

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        timeout: timedelta = timedelta(minutes=30),
        leave_groups_up: bool = False,
        **kwargs: Any,
    ) -> None:
        """`tensor_model_parallel_size`: ranks that share one copy of the model; it must divide their number.

        `timeout`: of a collective operation; longer than the time after which `HangWatch` ends a run, for that says
        more. `leave_groups_up`: for who trains several models one after another, and takes the groups down at the end.
        """
        super().__init__(timeout=timeout, **kwargs)
        self._leave_groups_up = leave_groups_up
        self._collective_timeout = timeout
        self.tensor_model_parallel_size = tensor_model_parallel_size
        self._owns_groups = False

    @property
    def _works_alone(self) -> bool:
        return bool(self.num_processes * self.num_nodes == 1)

    def _configure_launcher(self) -> None:
        """Alone, nothing is launched, and no rendezvous is left behind in the environment."""
        if not self._works_alone:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        if self._works_alone:
            self.set_world_ranks()
        else:
            super().setup_distributed()
        ensure_groups(self.tensor_model_parallel_size, self._collective_timeout)
        self._owns_groups = not self._leave_groups_up
        assert distributed.get_world_size() == self.num_processes * self.num_nodes, "another world was up before"
        assert tensor_parallel_size() == self.tensor_model_parallel_size, "other groups were up in this process before"

    def setup(self, trainer: Trainer) -> None:
        """As for one device. DDP's own would make the ranks' weights equal where only validation is asked for."""
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        """Nothing is wrapped: see the class."""
        return model

    @property
    def _masters(self) -> MasterWeights:
        masters = getattr(self.lightning_module, "masters", None)
        assert isinstance(masters, MasterWeights)
        return masters

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """For a checkpoint: the whole state on rank 0, nothing on others; every rank takes part."""
        return whole_state(optimizer, self._masters)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From a checkpoint that any number of ranks has written: what this rank holds of the state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_whole_state(optimizer, self._masters, state)

    def on_train_end(self) -> None:
        """The last moment at which every rank can be asked for its part of the weights."""
        super().on_train_end()
        self._masters.keep_whole()

    def teardown(self) -> None:
        super().teardown()
        if self._owns_groups:
            destroy_groups()
            self._owns_groups = False
