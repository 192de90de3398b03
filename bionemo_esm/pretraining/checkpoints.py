"""Files that a run writes while it trains: checkpoints, and snapshots of the weights for the average.

Files are written atomically, in the background; an old one is deleted when a newer one is on disk. This replaces NeMo's
checkpoint callback, which keeps state in file names, unpickles what it reads, and handles preemption on GPUs only.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bionemo_esm.errors import UserError
from bionemo_esm.files import fsync_directory
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.model.parallel import world_sum
from bionemo_esm.model.safe_serialization import put_tensors_back, take_out_tensors
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.pretraining.averaging import AveragingError, Progress, average_checkpoints
from bionemo_esm.pretraining.recipe import CheckpointConfig
from bionemo_esm.pretraining.resume import DAMAGED, CheckpointError, list_checkpoints, recorded_step

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STATE_KEYS = {"steps", "consumed_samples", "identity", "guard", "callbacks", "optimizer_states", "lr_schedulers"}


class SafeCheckpointIO(CheckpointIO):
    """Store Lightning's checkpoints as archives: a model's members, and the other state as plain values and tensors.

    `ESM1nvModel.on_save_checkpoint` puts the model's `Archive` under the key "model"; loading returns it there.
    """

    def __init__(self, writer: AsyncWriter) -> None:
        self.writer = writer
        self._copies = StateCopies()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the state and submit it to the writer; training may continue when this returns.

        The copy's buffers are reused, so the previous checkpoint must be on disk; `Checkpoints` waits for it.
        storage_options: recorded in the manifest as `checkpoint`.
        """
        archive: Archive = checkpoint.pop("model")
        provenance = {**archive.provenance, "checkpoint": dict(storage_options or {})}
        frozen = self._copies.of(replace(archive, provenance=provenance, state=checkpoint))
        self.writer.submit(lambda: write_archive(Path(path), frozen))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return Lightning's checkpoint. Raises `ArchiveError` for a missing or damaged file, or for no checkpoint."""
        file = ArchiveFile.open(Path(path))
        check_sizes(file)
        state = file.load_state()
        if missing := sorted(_STATE_KEYS - state.keys()):
            raise ArchiveError(f"{path}: state.json has no {missing[0]!r}; it is not of a pretraining run")
        weights = file.load_weights()
        state["model"] = Archive(file.model_class, file.config, weights, file.provenance)
        state["state_dict"] = {}  # Lightning requires the key; `ESM1nvModel.on_load_checkpoint` loads
        return state

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class StateCopies:
    """Copies archives into CPU buffers, so that training cannot change them. Each copy overwrites the one before.

    Buffers are reused: the system needs more time for new memory than for the copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, archive: Archive) -> Archive:
        """Return a copy of the archive with all tensors. Raises `TypeError` for a state that is not plain values."""
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
    """Write `step-….ckpt` every n steps, at the end, and before a stop.

    The last `keep_last` checkpoints stay, and the one with the lowest validation loss. After a signal to any rank, all
    ranks finish the current step or validation batch, save, and stop.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        signals: StopSignals,
        writer: AsyncWriter,
        long_operation: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """long_operation: a context for every save; `HangWatch.long_operation` allows it more time."""
        self.folder, self.config, self.signals, self.writer = folder, config, signals, writer
        self.long_operation = long_operation
        self.best_step: int | None = None  # with the lowest validation loss so far
        self.best_loss = float("inf")
        self._saved_step = -1
        self._on_disk: list[Path] = []  # written by this run, oldest first; these may be deleted

    # --- state in checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    # --- when to save and stop ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        self._check_same_step(trainer, pl_module)
        self._saved_step = -1 if pl_module.continues else trainer.global_step  # a parent run's is in another directory
        self._on_disk = list_checkpoints(self.folder)
        self.signals.install_handlers()  # again: Lightning has installed its own handler for SIGTERM

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        stop = self.should_stop_now(pl_module) or pl_module.gave_up
        if stop or trainer.global_step % self.config.every_n_train_steps == 0:
            self._save(trainer)
        if stop:
            trainer.limit_val_batches = 0  # Lightning would validate before it stops; a scheduler does not wait
            trainer.should_stop = True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Interrupt validation for a stop. The resumed run repeats it."""
        assert isinstance(pl_module, ESM1nvModel)
        if batch_idx < pl_module.shared_validation_batches and self.should_stop_now(pl_module):
            pl_module.validation_interrupted = True
            self._save(trainer)
            trainer.should_stop = True
            raise StopIteration  # ends Lightning's validation loop

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        result = pl_module.last_evaluation
        if pl_module.validation_interrupted or result is None or not result.loss < self.best_loss:
            return
        self.best_step, self.best_loss = trainer.global_step, result.loss
        self._save(trainer)
        self._retire(trainer)  # also if this step was saved before: the best one has changed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        with self.long_operation():
            self._wait_until_safe(pl_module)

    # --- saving -----------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after a step. Readers take the step from the manifest instead."""
        return self.folder / f"step-{step:09d}.ckpt"

    def is_on_schedule(self, trainer: Trainer) -> bool:
        """Whether the schedule saves at this step; other saves are due to a stop or to the best validation loss."""
        return trainer.global_step % self.config.every_n_train_steps == 0 or trainer.global_step == trainer.max_steps

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        path = self.path(trainer.global_step)
        schedule = {
            "every_n_train_steps": self.config.every_n_train_steps,
            "on_schedule": self.is_on_schedule(trainer),
        }
        with self.long_operation():
            self._wait_until_safe(trainer.lightning_module)  # memory holds one state at a time
            trainer.save_checkpoint(path, storage_options=schedule)
        self._saved_step = trainer.global_step
        self._retire(trainer)

    def _retire(self, trainer: Trainer) -> None:
        """After the current write, delete checkpoints that are neither the last ones nor the best one."""
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

    # --- agreement of all ranks ---------------------------------------------------------------------------------------

    def should_stop_now(self, pl_module: ESM1nvModel) -> bool:
        """Whether any rank has received a signal; equal on all ranks. Collective.

        A signal that arrives during the call counts from the next step. Raises on every rank if rank 0 failed to write.
        """
        flags = torch.tensor([int(self.signals.received or 0), int(self.writer.failure is not None)])
        asked, failed = world_sum(flags.to(pl_module.device)).tolist()
        if failed:
            self._raise_failure()
        if asked and self.signals.received is None:
            self.signals.stop_with_another_rank()
        return bool(asked)

    def _wait_until_safe(self, pl_module: LightningModule) -> None:
        """Wait until rank 0 has its checkpoint on disk. Collective."""
        with suppress(Exception):  # kept in `failure`
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
                f"{self.writer.failure}. Training stops; {newest}, and the same command resumes from there"
            )
        raise self.writer.failure

    @staticmethod
    def _check_same_step(trainer: Trainer, pl_module: LightningModule) -> None:
        steps = torch.zeros(trainer.world_size, dtype=torch.int64, device=pl_module.device)
        steps[trainer.global_rank] = trainer.global_step
        if len(set(world_sum(steps).tolist())) > 1:
            raise CheckpointError(
                f"ranks found different checkpoints to resume from (steps {steps.tolist()}); the run's folder must be "
                "the same on every node"
            )


class CheckpointAveraging(Callback):
    """Keep snapshots of the last k checkpoints' weights, each a `.nemo`, and average them at the end.

    A snapshot is on disk before its checkpoint is. So an interrupted run always resumes from a checkpoint that has its
    snapshot, and writes later ones again. Memory: one copy of the weights. Disk: k + 1 times the weights. Sharded
    weights are gathered, so a snapshot does not depend on the world size.
    """

    def __init__(self, folder: Path, last: int, every_n_train_steps: int, writer: AsyncWriter) -> None:
        if last < 2:
            raise AveragingError(f"an average takes at least 2 checkpoints, not {last}")
        self.folder, self.last, self.every_n_train_steps, self.writer = folder, last, every_n_train_steps, writer
        self._copies = StateCopies()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove snapshots that are past the current step or off the schedule, and rename damaged ones."""
        if not trainer.is_global_zero:
            return
        for path in list_checkpoints(self.folder, ".nemo"):
            step = recorded_step(path)
            if step < 0:
                path.rename(path.with_name(path.name + DAMAGED))
            elif step > trainer.global_step or step % self.every_n_train_steps:
                path.unlink()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        step = pl_module.steps
        if step % self.every_n_train_steps and step != trainer.max_steps:
            return
        archive = describe(pl_module)  # on every rank: each may hold a shard
        if not trainer.is_global_zero:
            return
        schedule = {"every_n_train_steps": self.every_n_train_steps, "on_schedule": True}
        self.writer.drain()  # the copy's buffers are reused
        frozen = self._copies.of(replace(archive, provenance={**archive.provenance, "checkpoint": schedule}))
        path = self.folder / f"step-{step:09d}.nemo"
        self.writer.submit(lambda: write_archive(path, frozen))
        self.writer.submit(self._retire)

    def _retire(self) -> None:
        for path in list_checkpoints(self.folder, ".nemo")[: -self.last]:
            path.unlink()
        fsync_directory(self.folder)

    def finish(self, output: Path, progress: Progress | None = None) -> bool:
        """Write the average of the snapshots to `output`. Return False, and write nothing, if there are fewer than two.

        Raises `AveragingError` or `ArchiveError`, naming the snapshot.
        """
        snapshots = list_checkpoints(self.folder, ".nemo")
        if len(snapshots) < 2:
            return False
        average_checkpoints(snapshots, min(self.last, len(snapshots)), output, progress)
        return True


class AsyncWriter:
    """Runs jobs in order on a thread; immediately if `in_background` is False.

    No job runs after a failed one: a later job may delete what the failed one should have replaced. `failure` keeps the
    exception and `drain` raises it. The interpreter exits after the running job.
    """

    def __init__(self, in_background: bool = True) -> None:
        self.failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if in_background else None
        self._waiting: list[Future[None]] = []

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job."""
        if self._thread is None:
            self._run(job)
        else:
            self._waiting.append(self._thread.submit(self._run, job))

    def drain(self) -> None:
        """Wait until all jobs have ended. Raises the exception of a failed job."""
        while self._waiting:
            self._waiting.pop(0).result()
        if self.failure is not None:
            raise self.failure

    def _run(self, job: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            job()
        except BaseException as error:
            self.failure = error


class StopSignals:
    """SIGINT and SIGTERM as requests to stop: `received` is the first signal. A second SIGINT interrupts at once.

    A repeated SIGTERM has no further effect: schedulers repeat it, and send SIGKILL when they will not wait.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals during the block; restore the previous handlers after it."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install_handlers()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install_handlers(self) -> None:
        """Install the handlers over any others."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def stop_with_another_rank(self) -> None:
        """Record that another rank received a signal."""
        self.received = signal.SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> Any:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
