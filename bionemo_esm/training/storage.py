"""What a run takes on disk: checkpoints, snapshots for the average, and the archives at its end. Arithmetic only."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from bionemo_esm.training.recipe import Recipe

_FLOAT32 = 4


@dataclass(frozen=True)
class Storage:
    """Bytes and numbers of files. Tensors alone are counted: what stands around them is a few kilobytes a file."""

    checkpoint_bytes: int  # weights and Adam's two moments, float32
    weights_bytes: int  # of a snapshot, and of an archive
    checkpoints: int  # written on the schedule, the one at the end included
    kept_checkpoints: int  # at most at a time: the last, the best, and one more while the next is written
    kept_snapshots: int  # at most at a time, one more while the next is written; 0: nothing is averaged
    archives: int  # the model, and its average

    @classmethod
    def of(cls, recipe: Recipe, first_step: int = 0) -> Storage:
        """Of a run that begins after `first_step` optimizer steps of another."""
        saving, weights = recipe.exp_manager.checkpoints, _FLOAT32 * recipe.model.parameters
        every, last = saving.every_n_train_steps, recipe.trainer.max_steps
        checkpoints = max(last // every - first_step // every, 0) + (last % every > 0)
        return cls(
            checkpoint_bytes=3 * weights,
            weights_bytes=weights,
            checkpoints=checkpoints,
            kept_checkpoints=saving.keep_last + 1 + saving.keep_best,
            kept_snapshots=min(saving.average_last, checkpoints) + 1 if saving.average_last else 0,
            archives=1 + (saving.average_last > 0),
        )

    @property
    def peak_bytes(self) -> int:
        """On disk at a time, at most."""
        weights = (self.kept_snapshots + self.archives) * self.weights_bytes
        return min(self.kept_checkpoints * self.checkpoint_bytes + weights, self.written_bytes)

    @property
    def written_bytes(self) -> int:
        """Over the whole run, by its schedule: a stop, or a validation better than all before, saves once more."""
        a_time = self.checkpoint_bytes + (self.weights_bytes if self.kept_snapshots else 0)
        return self.checkpoints * a_time + self.archives * self.weights_bytes


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder above that exists, and the bytes that are free there."""
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    return existing, shutil.disk_usage(existing).free
