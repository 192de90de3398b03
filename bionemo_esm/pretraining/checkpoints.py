"""Checkpoints to go on from: written whole or not at all, in the background, deleted when a newer one is safe.

NeMo's checkpoint callback keeps state in file names, unpickles what it reads, and heeds preemption on GPUs only; this
one takes its place.

Where a run begins: at nothing, at its own newest checkpoint, or at the checkpoint of a run that it continues.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bionemo_esm.console import Console, is_rank_zero
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import fsync_directory
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.parallel import world_sum
from bionemo_esm.model.safe_serialization import put_tensors_back, take_out_tensors
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.pretraining.async_writer import BackgroundWriter
from bionemo_esm.pretraining.recipe import CheckpointConfig
from bionemo_esm.pretraining.signals import StopSignals

_STATE_KEYS = {"steps", "consumed_samples", "identity", "guard", "callbacks", "optimizer_states", "lr_schedulers"}
DAMAGED = ".damaged"  # appended to the name of a checkpoint that could not be read


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file."""


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as archives: the model under its own members, all else as plain values and tensors.

    `ESM1nvModel.on_save_checkpoint` leaves the model's `Archive` under the key "model", and finds it there again.
    """

    def __init__(self, writer: BackgroundWriter) -> None:
        self.writer = writer
        self._copies = Copies()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the state and hand it to the writer; training may go on as soon as this returns.

        The copy's memory is used again: the writer must be done with the checkpoint before, as `Checkpoints` sees to.
        `storage_options` are recorded in the manifest as `checkpoint`.
        """
        archive: Archive = checkpoint.pop("model")
        provenance = {**archive.provenance, "checkpoint": dict(storage_options or {})}
        frozen = self._copies.of(replace(archive, provenance=provenance, state=checkpoint))
        self.writer.submit(lambda: write_archive(Path(path), frozen))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises `ArchiveError` for a file that is missing or damaged, or is no checkpoint."""
        file = ArchiveFile.open(Path(path))
        check_sizes(file)
        state = file.load_state()
        if missing := sorted(_STATE_KEYS - state.keys()):
            raise ArchiveError(f"{path}: state.json has no {missing[0]!r}; it is not of a pretraining run")
        weights = file.load_weights()
        state["model"] = Archive(file.model_class, file.config, weights, file.provenance)
        state["state_dict"] = {}  # Lightning asks for it; `ESM1nvModel.on_load_checkpoint` loads
        return state

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Copies:
    """Copies of archives, on the CPU, which training does not change; each is overwritten by the next.

    Memory is asked for once: new memory costs the system more time than copying does.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, archive: Archive) -> Archive:
        """The same with its own copy of every tensor. Raises `TypeError` for a state that is not plain."""
        tree, tensors = take_out_tensors({"weights": dict(archive.weights), "state": archive.state})
        copied = put_tensors_back(tree, {place: self._copy(place, tensor) for place, tensor in tensors.items()})
        return replace(archive, weights=copied["weights"], state=copied["state"])

    def _copy(self, place: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[place] = torch.empty_like(
                tensor, device="cpu", memory_format=torch.contiguous_format
            )
        return buffer.copy_(tensor.detach())


class Checkpoints(Callback):
    """Writes `step-….ckpt` every n steps, at the end, and when a signal or the model asks the run to stop.

    The last `keep_last` stay, and the one with the lowest validation loss. A signal to any rank lets the step or the
    batch of validation under way finish, then saves and ends training on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        signals: StopSignals,
        writer: BackgroundWriter,
        patience: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`patience`: entered around every save, which may take long; it tells those who watch for hangs."""
        self.folder, self.config, self.signals, self.writer = folder, config, signals, writer
        self.patience = patience
        self.best_step: int | None = None  # of the lowest validation loss so far
        self.best_loss = float("inf")
        self._saved_step = -1
        self._on_disk: list[Path] = []  # what may be deleted: written by this run, oldest first

    # --- what a checkpoint says of the others -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    # --- when to save and when to stop ------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        self._check_that_ranks_agree(trainer, pl_module)
        self._saved_step = -1 if pl_module.continues else trainer.global_step  # another run's is in another folder
        self._on_disk = list_checkpoints(self.folder)
        self.signals.listen()  # again: Lightning has put its own handler for SIGTERM in place

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        stop = self.must_stop(pl_module) or pl_module.gave_up
        if stop or trainer.global_step % self.config.every_n_train_steps == 0:
            self._save(trainer)
        if stop:
            trainer.limit_val_batches = 0  # Lightning would validate before it stops; a scheduler does not wait
            trainer.should_stop = True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """A stop breaks validation off; the run that goes on from here begins it anew."""
        assert isinstance(pl_module, ESM1nvModel)
        if batch_idx < pl_module.shared_validation_batches and self.must_stop(pl_module):
            pl_module.validation_interrupted = True
            self._save(trainer)
            trainer.should_stop = True
            raise StopIteration  # by which Lightning's loop ends, in good order

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        result = pl_module.last_evaluation
        if pl_module.validation_interrupted or result is None or not result.loss < self.best_loss:
            return
        self.best_step, self.best_loss = trainer.global_step, result.loss
        self._save(trainer)
        self._retire(trainer)  # also where it was saved before: another was the best until now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        with self.patience():
            self._wait_until_safe(pl_module)

    # --- saving -----------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Of the checkpoint after a step. Nothing reads the number from the name: the manifest holds it."""
        return self.folder / f"step-{step:09d}.ckpt"

    def is_on_schedule(self, trainer: Trainer) -> bool:
        """Whether an unbroken run would have saved here; others were saved because of a stop or a good validation."""
        return trainer.global_step % self.config.every_n_train_steps == 0 or trainer.global_step == trainer.max_steps

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        path = self.path(trainer.global_step)
        schedule = {
            "every_n_train_steps": self.config.every_n_train_steps,
            "on_schedule": self.is_on_schedule(trainer),
        }
        with self.patience():
            self._wait_until_safe(trainer.lightning_module)  # one state at a time is held in memory
            trainer.save_checkpoint(path, storage_options=schedule)
        self._saved_step = trainer.global_step
        self._retire(trainer)

    def _retire(self, trainer: Trainer) -> None:
        """When what is being written is safe: delete what is neither among the last nor the best as of now."""
        if not trainer.is_global_zero:
            return
        newest, best = self.path(trainer.global_step), None
        if self.config.keep_best and self.best_step is not None:
            best = self.path(self.best_step)
        self.writer.submit(lambda: self._delete_all_but_last_and(best, newest))

    def _delete_all_but_last_and(self, best: Path | None, newest: Path) -> None:
        self._on_disk = [path for path in self._on_disk if path != newest] + [newest]
        kept = {best, *self._on_disk[-self.config.keep_last :]}
        for path in [path for path in self._on_disk if path not in kept]:
            path.unlink(missing_ok=True)
            self._on_disk.remove(path)
        fsync_directory(self.folder)

    # --- all ranks together -----------------------------------------------------------------------------------------

    def must_stop(self, pl_module: ESM1nvModel) -> bool:
        """The same answer on every rank: a signal that comes while they agree counts from the next step.

        Raises on every rank where the writer of rank 0 has failed.
        """
        flags = torch.tensor([int(self.signals.received or 0), int(self.writer.failure is not None)])
        asked, failed = world_sum(flags.to(pl_module.device)).tolist()
        if failed:
            self._raise_failure()
        if asked and self.signals.received is None:
            self.signals.note_another_rank()
        return bool(asked)

    def _wait_until_safe(self, pl_module: LightningModule) -> None:
        """No rank goes on, or ends, before rank 0 has its checkpoint on disk."""
        with suppress(Exception):  # it stays in `failure`
            self.writer.drain()
        failed = torch.tensor(int(self.writer.failure is not None), device=pl_module.device)
        if world_sum(failed).item():
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self.writer.failure is None:
            raise CheckpointError("rank 0 could not write a checkpoint")
        if isinstance(self.writer.failure, UserError):
            newest = f"the newest that is safe is {self._on_disk[-1].name}" if self._on_disk else "none is on disk yet"
            raise CheckpointError(
                f"{self.writer.failure}. Training stops; {newest}, and the same command goes on from there"
            )
        raise self.writer.failure

    @staticmethod
    def _check_that_ranks_agree(trainer: Trainer, pl_module: LightningModule) -> None:
        steps = torch.zeros(trainer.world_size, dtype=torch.int64, device=pl_module.device)
        steps[trainer.global_rank] = trainer.global_step
        if len(set(world_sum(steps).tolist())) > 1:
            raise CheckpointError(
                f"ranks found different checkpoints to go on from (steps {steps.tolist()}); the run's folder must be "
                "the same on every node"
            )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by the step in their manifest, oldest first; unreadable ones come first of all."""
    return sorted(folder.glob("step-*.ckpt"), key=lambda path: (recorded_step(path), path.name))


def recorded_step(path: Path) -> int:
    """The step that an archive or a checkpoint records of itself; -1 where it cannot be read."""
    try:
        step = ArchiveFile.open(path).provenance.get("steps")
    except ArchiveError:
        return -1
    return step if type(step) is int else -1


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and a message for each damaged one met before.

    Raises `CheckpointError` when there are checkpoints and all are damaged: starting anew would look like going on.
    """
    complaints: list[str] = []
    candidates = list_checkpoints(folder)
    unreadable = [path for path in candidates if recorded_step(path) < 0]
    for path in unreadable + [path for path in reversed(candidates) if path not in unreadable]:
        try:
            file = ArchiveFile.open(path)
            file.verify()
        except ArchiveError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    if complaints:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: {'; '.join(complaints)}. Remove them to start from the beginning"
        )
    return None, complaints


def tidy(folder: Path, newest: Path) -> None:
    """Set aside, as `….damaged`, what `newest_checkpoint` passed over."""
    for path in list_checkpoints(folder):
        if path != newest and (recorded_step(path) < 0 or recorded_step(path) > recorded_step(newest)):
            path.rename(path.with_name(path.name + DAMAGED))


@dataclass(frozen=True)
class StartingPoint:
    """What training begins with."""

    checkpoint: Path | None = None
    steps: int = 0  # of the checkpoint
    first_step: int = 0  # where this run itself began: over 0 where it continues another
    of_another_run: bool = False  # whose configuration may have been another


def choose_starting_checkpoint(folder: Path, origin: Path | None, console: Console) -> StartingPoint:
    """The start of the run in `folder`, which continues `origin` (a run's folder, or a checkpoint) if it is given.

    Damaged checkpoints of the run that are newer are set aside, and said to be. Raises `CheckpointError` or
    `ArchiveError` where none can be read, `ConfigError` for an origin that has no checkpoint.
    """
    own = _own_checkpoint(folder / "checkpoints", console)
    if own is not None:
        provenance = ArchiveFile.open(own).provenance
        continued = provenance.get("continued_from")
        first_step = int(continued["steps"]) if isinstance(continued, dict) else 0
        return StartingPoint(own, int(provenance["steps"]), first_step)
    if origin is None:
        return StartingPoint()
    checkpoint = _checkpoint_of(origin, console)
    steps = int(ArchiveFile.open(checkpoint).provenance["steps"])
    return StartingPoint(checkpoint, steps, steps, of_another_run=True)


def _own_checkpoint(folder: Path, console: Console) -> Path | None:
    checkpoint, complaints = newest_checkpoint(folder)
    for complaint in complaints:
        console.print_line(
            f"warning: {complaint}; set aside as *{DAMAGED}, going back to {checkpoint and checkpoint.name}"
        )
    if checkpoint is not None and is_rank_zero():
        tidy(folder, checkpoint)
    return checkpoint


def _checkpoint_of(origin: Path, console: Console) -> Path:
    """The newest intact checkpoint of another run, in which nothing is changed."""
    if origin.is_file():
        ArchiveFile.open(origin).verify()
        return origin
    checkpoint, complaints = newest_checkpoint(origin / "checkpoints")
    for complaint in complaints:
        console.print_line(f"warning: {complaint}; continuing from {checkpoint and checkpoint.name}, which is older")
    if checkpoint is None:
        raise ConfigError(f"continue_from_path: {origin} has no checkpoint; name a run's folder, or a .ckpt")
    return checkpoint
