"""Lightning as pretraining and fine-tuning use it: the strategy, the trainer, and one call that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from torch.optim import Optimizer

from bionemo_esm.model.optimizer import MasterWeights, full_state, load_full_state
from bionemo_esm.model.optimizer_registry import FUSED_ADAM_FAMILY, OPTIMIZERS, OptimizerFamily
from bionemo_esm.model.parallel import destroy_groups, ensure_groups, tensor_parallel_size, world_size


class MegatronStrategy(DDPStrategy):
    """Data and tensor parallelism over Megatron's process groups, without a wrapper around the model.

    The model accumulates gradients in one float32 buffer (`masters`) and reduces it during the last backward pass of a
    step. DistributedDataParallel is not used: it would reduce the bfloat16 gradients of every micro batch. Works with
    NCCL and gloo, and under Lightning's launcher, torchrun and Slurm.
    """

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        timeout: timedelta = timedelta(minutes=30),
        leave_groups_up: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set the parallelism.

        tensor_model_parallel_size: ranks that share one copy of the model; it must divide the world size.
        timeout: of a collective operation; longer than the hang timeout, whose report says more.
        leave_groups_up: if True, process groups survive the fit, so that several models can be trained in one process.
        """
        super().__init__(timeout=timeout, **kwargs)
        self._leave_groups_up = leave_groups_up
        self._collective_timeout = timeout
        self.tensor_model_parallel_size = tensor_model_parallel_size
        self._owns_groups = False

    def _configure_launcher(self) -> None:
        """Configure no launcher for one process: it would leave a rendezvous address in the environment."""
        if self.num_processes * self.num_nodes > 1:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Create the process groups. One process needs none."""
        ranks = self.num_processes * self.num_nodes
        if ranks == 1:
            self.set_world_ranks()
        else:
            super().setup_distributed()
            ensure_groups(self.tensor_model_parallel_size, self._collective_timeout)
            self._owns_groups = not self._leave_groups_up
        assert world_size() == ranks, "torch.distributed was initialised with another world size"
        assert tensor_parallel_size() == self.tensor_model_parallel_size, "Megatron's groups have another size"

    def setup(self, trainer: Trainer) -> None:
        """Set up as for one device. DDP's own setup would broadcast weights for validation alone."""
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        """Return the model without a wrapper."""
        return model

    @property
    def _masters(self) -> MasterWeights:
        masters = getattr(self.lightning_module, "masters", None)
        assert isinstance(masters, MasterWeights)
        return masters

    @property
    def _family(self) -> OptimizerFamily:
        config = getattr(self.lightning_module, "optim_config", None)
        return FUSED_ADAM_FAMILY if config is None else OPTIMIZERS.get(config.name)

    @property
    def _group_steps(self) -> bool:
        """Whether the optimizer counts steps in its groups."""
        model: Any = self.lightning_module
        return self._family.group_steps(model.backends)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state on rank 0, for a checkpoint, and {} on other ranks. Collective."""
        return full_state(optimizer, self._masters, self._family)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the state from a checkpoint that any number of ranks has written."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_full_state(optimizer, self._masters, state, self._group_steps)

    def on_train_end(self) -> None:
        """Gather split weights while every rank still takes part."""
        super().on_train_end()
        self._masters.keep_full_copy()

    def teardown(self) -> None:
        super().teardown()
        if self._owns_groups:
            destroy_groups()
            self._owns_groups = False


def build_trainer(strategy: MegatronStrategy, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """Return a trainer whose batches are optimizer steps: the model accumulates, clips and steps itself.

    settings: further arguments of `lightning.pytorch.Trainer`; intervals count optimizer steps. Lightning's own
    loggers, checkpoints, progress bar, summary and sampler are off.
    """
    return Trainer(
        strategy=strategy,
        callbacks=list(callbacks),
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(trainer: Trainer, model: LightningModule, checkpoint: Path | None = None) -> None:
    """Fit the model, from a checkpoint if one is given. Raises `KeyboardInterrupt` on Ctrl-C, as Python does."""
    try:
        trainer.fit(model, ckpt_path=checkpoint)
    except SystemExit as stop:
        if trainer.interrupted and stop.code == 1:  # Lightning turns KeyboardInterrupt into this
            raise KeyboardInterrupt from None
        raise
