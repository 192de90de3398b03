"""Base of the NeMo models: an encoder over packed rows, trained with one optimizer step per batch.

Lightning's manual optimisation is used, so that a loss can be divided by a count over the whole global batch: all ranks
and all micro batches. Intervals of the configuration then count optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import Parameter

from bionemo_esm.compat import count_skipped_step
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.errors import UserError
from bionemo_esm.model.backends import FusedBackends, choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.nemo_connector import ESMSaveRestoreConnector
from bionemo_esm.model.optimizer import MasterWeights
from bionemo_esm.model.parallel import data_parallel_rank, is_fully_sharded, unequal_over_data_parallel
from bionemo_esm.model.sharding import ShardedMasters
from bionemo_esm.model.step_stats import Stopwatch

Batch = TypeVar("Batch")


class PackedModel(ModelPT):
    """A `ModelPT` with an `ESMEncoder`, float32 masters, and an optimizer step that it runs itself.

    Subclasses build their parts in `configure_model`, compute the loss, and give data loaders and optimizer. With a
    trainer, Lightning calls `configure_model` after it has created the process groups; without one the subclass calls
    it in its initialiser.
    """

    def __init__(self, values: Mapping[str, Any], trainer: Trainer | None) -> None:
        """`values`: plain values of `encoder` (see `EncoderConfig`), `precision` ("32", "bf16", "auto"), `seed`."""
        self.encoder_config = EncoderConfig.from_config(values["encoder"])
        super().__init__(OmegaConf.create(dict(values)), trainer=trainer)
        self._save_restore_connector = ESMSaveRestoreConnector()
        self.automatic_optimization = False
        self.seed = int(values.get("seed", 0))
        self.encoder: ESMEncoder | None = None
        self.backends: FusedBackends | None = None
        self.masters: MasterWeights | None = None
        self.initial_weights: Path | None = None  # a pretrained archive; None: random weights
        self.provenance: dict[str, Any] = {}
        self.steps = 0  # over all sessions; skipped steps count
        self.stopwatch = Stopwatch()  # of forward and backward passes

    def choose_kernels(self) -> torch.dtype:
        """Set `backends` for a CPU, on which a model is built; return the dtype for the device on which it will run.

        That is the trainer's device, or a GPU if there is one. Kernels follow when the model is moved there.
        """
        if self._trainer is not None:
            device_type = self._trainer.strategy.root_device.type
        else:
            device_type = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = parameter_dtype(str(self.cfg.get("precision", "32")), device_type)
        self._choose_backends("cpu", dtype)
        return dtype

    def _choose_backends(self, device_type: str, dtype: torch.dtype) -> None:
        config = self.encoder_config
        self.backends = choose_backends(device_type, dtype, config.attention_dropout, config.head_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the model, as `to` and `cuda` do. `backends` follow to another kind of device."""
        before = self._where()
        super()._apply(fn, recurse)
        if (now := self._where()) is not None and before is not None and now[0] not in (before[0], "meta"):
            self._choose_backends(*now)
        return self

    def _where(self) -> tuple[str, torch.dtype] | None:
        """Return the kind of device and the dtype of the parameters; None while there are none."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else (parameter.device.type, parameter.dtype)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch without waiting, if it is pinned; Lightning would wait for anything but a tensor."""
        return batch.to(device, non_blocking=True)

    @property
    def is_fully_sharded(self) -> bool:
        """Whether data-parallel ranks hold rows of the parameters; then every forward pass is collective."""
        parameter = next(self.parameters(), None)
        return parameter is not None and is_fully_sharded(parameter)

    def on_train_start(self) -> None:
        """Check that data-parallel ranks begin with equal weights. Raises `UserError` on all of them. Collective."""
        if not self.is_fully_sharded:  # checked before they were split
            self.check_equal_weights()

    def check_equal_weights(self) -> None:
        """Raise `UserError` on all data-parallel ranks if their weights differ. Collective."""
        if names := unequal_over_data_parallel(dict(self.named_parameters())):
            raise UserError(
                f"ranks begin with different weights ({len(names)} tensors, {names[0]} first): they must run the same "
                "versions and read the same files; `bionemo-esm doctor` on each node shows them",
                code="ranks.unequal-weights",
            )

    def make_masters(self, named_parameters: Iterable[tuple[str, Parameter]]) -> MasterWeights:
        """Return new masters of these parameters, in place of earlier ones."""
        if self.masters is not None:
            self.masters.release()
        self.masters = (ShardedMasters if self.is_fully_sharded else MasterWeights)(named_parameters)
        return self.masters

    def accumulate_gradients(
        self, batches: Sequence[Batch], loss: Callable[[Batch], Tensor], *dropout_key: int
    ) -> Tensor:
        """Run forward and backward over this rank's micro batches; return their losses, float32 [batches].

        loss: a part of the loss of the global batch, already divided by its global count. Gradients are summed over
        data-parallel ranks during the last backward pass. Collective, also for a rank without batches.

        Dropout depends on (seed, dropout_key, data-parallel rank): a resumed run needs no generator state, and ranks
        that share one replica of the model drop the same activations.
        """
        assert self.masters is not None
        torch.manual_seed(int(derive_key(self.seed, *dropout_key, data_parallel_rank())[0] >> 1))
        self.masters.zero_gradients()
        losses = torch.zeros(len(batches), device=self.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            reduction = self.masters.overlapped_reduction() if is_last else nullcontext()
            with reduction, self.stopwatch.running(self.device):
                part = loss(batch)
                self.manual_backward(part)
            losses[index] = part.detach()
        if not batches:
            with self.masters.overlapped_reduction():
                pass
        return losses

    def finish_step(self, skip: bool = False) -> float:
        """Update the weights, unless `skip`; advance schedule and counters; return the learning rate of the step.

        A skipped step counts in the schedule and in Lightning's loops, so that a resumed run skips it as well.
        """
        assert self.masters is not None
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        rate = float(optimizer.param_groups[0]["lr"])
        if skip:
            count_skipped_step(self.trainer)
        else:
            optimizer.step()
            self.masters.write_back()
        schedule.step()
        self.steps += 1
        return rate

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """Return no model: weights are files, and none are downloaded."""
        return []
