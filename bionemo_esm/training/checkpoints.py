"""Checkpoints to go on from: written whole or not at all, read without unpickling, deleted when a newer one is safe.

NeMo's checkpoint callback keeps state in file names, unpickles what it reads, and heeds preemption on GPUs only; this
one takes its place.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from bionemo_esm.errors import UserError
from bionemo_esm.model.parallel import data_parallel_sum
from bionemo_esm.training.recipe import CheckpointConfig

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the message names the file."""


class SafeCheckpointIO(CheckpointIO):
    """`torch.save` under a temporary name, synced, renamed; `torch.load` with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises `CheckpointError` for a file that is missing, damaged, or holds more than tensors and plain values."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports damage by half a dozen types
            raise CheckpointError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from error
        if not isinstance(checkpoint, dict) or "consumed_samples" not in checkpoint:
            raise CheckpointError(f"{path}: is not a checkpoint of a pretraining run")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Writes `step=….ckpt` every n steps, at the end, and when SIGINT or SIGTERM asks the run to stop.

    A signal to any rank lets the step under way finish, then saves and ends training on all ranks; `stopped_by` tells
    which it was. A second SIGINT interrupts at once; the checkpoints on disk stay whole.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.stopped_by: signal.Signals | None = None
        self._last_saved_step = -1
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_saved_step = trainer.global_step
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._note_signal)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stop = self._any_rank_was_asked_to_stop(pl_module)
        if stop or trainer.global_step % self.config.every_n_train_steps == 0:
            self._save(trainer)
        if stop:
            trainer.limit_val_batches = 0  # Lightning would validate before it stops; a scheduler does not wait
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._last_saved_step:
            return
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:09d}.ckpt")
        self._last_saved_step = trainer.global_step
        if trainer.is_global_zero:
            for old in list_checkpoints(self.folder)[: -self.config.keep_last]:
                trainer.strategy.remove_checkpoint(old)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number)

    def _any_rank_was_asked_to_stop(self, pl_module: LightningModule) -> bool:
        """The same answer on every rank: a signal that comes while they agree counts from the next step."""
        flag = torch.tensor(int(self.stopped_by or 0), device=pl_module.device)
        asked = bool(data_parallel_sum(flag).item())
        if asked and self.stopped_by is None:
            self.stopped_by = signal.SIGTERM  # another rank was asked
        return asked

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest step first."""
    return sorted(folder.glob("step=*.ckpt"))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and a message for each newer one that cannot.

    Raises `CheckpointError` when there are checkpoints and none can be read: starting anew would look like going on.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            SafeCheckpointIO().load_checkpoint(path)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    if complaints:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: {'; '.join(complaints)}. Remove them to start from the beginning"
        )
    return None, complaints
