"""The callback that gathers the last checkpoints' weights while they appear, and averages them at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bionemo_esm.files import fsync_directory
from bionemo_esm.model.archive import write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.pretraining.async_writer import BackgroundWriter
from bionemo_esm.pretraining.averaging import AveragingError, Progress, average_checkpoints
from bionemo_esm.pretraining.checkpoints import DAMAGED, Copies, recorded_step


class CheckpointAveraging(Callback):
    """Keeps the weights of the last k checkpoints in a folder, each a `.nemo`, and averages them when asked to.

    A snapshot is written with each checkpoint of the schedule, and is on disk before that checkpoint is: whatever
    moment a run is cut off, it goes on from a checkpoint that has its snapshot, and what lay past it is written again.
    Nothing is added up on the way. Memory: a copy of the weights while one is written; at the end, the average and
    one tensor. Disk: k + 1 times the weights. Sharded weights are gathered, so a snapshot fits any number of ranks.
    """

    def __init__(self, folder: Path, last: int, every_n_train_steps: int, writer: BackgroundWriter) -> None:
        if last < 2:
            raise AveragingError(f"an average takes at least 2 checkpoints, not {last}")
        self.folder, self.last, self.every_n_train_steps, self.writer = folder, last, every_n_train_steps, writer
        self._copies = Copies()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what is not of the series: past the checkpoint from which the run goes on, or of a former end.

        A damaged one is set aside: it must not stand in the place of a good one.
        """
        if not trainer.is_global_zero:
            return
        for path in list_snapshots(self.folder):
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
        archive = describe(pl_module)  # on every rank: each may hold a part
        if not trainer.is_global_zero:
            return
        schedule = {"every_n_train_steps": self.every_n_train_steps, "on_schedule": True}
        self.writer.drain()  # the copy's memory is used again; beside `Checkpoints` there is nothing to wait for
        frozen = self._copies.of(replace(archive, provenance={**archive.provenance, "checkpoint": schedule}))
        path = self.folder / f"step-{step:09d}.nemo"
        self.writer.submit(lambda: write_archive(path, frozen))
        self.writer.submit(self._retire)

    def _retire(self) -> None:
        for path in list_snapshots(self.folder)[: -self.last]:
            path.unlink()
        fsync_directory(self.folder)

    def finish(self, output: Path, progress: Progress | None = None) -> bool:
        """Average what there is into `output`; False where there is only one snapshot, whose average it would be.

        Raises `AveragingError` or `ArchiveError`, naming the snapshot, as `average_checkpoints` does.
        """
        snapshots = list_snapshots(self.folder)
        if len(snapshots) < 2:
            return False
        average_checkpoints(snapshots, min(self.last, len(snapshots)), output, progress)
        return True


def list_snapshots(folder: Path) -> list[Path]:
    """The snapshots of a folder by the step in their manifest, oldest first."""
    return sorted(folder.glob("step-*.nemo"), key=lambda path: (recorded_step(path), path.name))
