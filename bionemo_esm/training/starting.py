"""Where a run begins: at nothing, at its own newest checkpoint, or at the checkpoint of a run that it continues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.screen import Screen, is_rank_zero
from bionemo_esm.training.checkpoints import DAMAGED, newest_checkpoint, tidy


@dataclass(frozen=True)
class Start:
    """What training begins with."""

    checkpoint: Path | None = None
    steps: int = 0  # of the checkpoint
    first_step: int = 0  # where this run itself began: over 0 where it continues another
    of_another_run: bool = False  # whose configuration may have been another


def choose_start(folder: Path, origin: Path | None, screen: Screen) -> Start:
    """The start of the run in `folder`, which continues `origin` (a run's folder, or a checkpoint) if it is given.

    Damaged checkpoints of the run that are newer are set aside, and said to be. Raises `CheckpointError` or
    `ArchiveError` where none can be read, `ConfigError` for an origin that has no checkpoint.
    """
    own = _own_checkpoint(folder / "checkpoints", screen)
    if own is not None:
        provenance = ArchiveFile.open(own).provenance
        continued = provenance.get("continued_from")
        first_step = int(continued["steps"]) if isinstance(continued, dict) else 0
        return Start(own, int(provenance["steps"]), first_step)
    if origin is None:
        return Start()
    checkpoint = _checkpoint_of(origin, screen)
    steps = int(ArchiveFile.open(checkpoint).provenance["steps"])
    return Start(checkpoint, steps, steps, of_another_run=True)


def _own_checkpoint(folder: Path, screen: Screen) -> Path | None:
    checkpoint, complaints = newest_checkpoint(folder)
    for complaint in complaints:
        screen.say(f"warning: {complaint}; set aside as *{DAMAGED}, going back to {checkpoint and checkpoint.name}")
    if checkpoint is not None and is_rank_zero():
        tidy(folder, checkpoint)
    return checkpoint


def _checkpoint_of(origin: Path, screen: Screen) -> Path:
    """The newest intact checkpoint of another run, in which nothing is changed."""
    if origin.is_file():
        ArchiveFile.open(origin).verify()
        return origin
    checkpoint, complaints = newest_checkpoint(origin / "checkpoints")
    for complaint in complaints:
        screen.say(f"warning: {complaint}; continuing from {checkpoint and checkpoint.name}, which is older")
    if checkpoint is None:
        raise ConfigError(f"continue_from_path: {origin} has no checkpoint; name a run's folder, or a .ckpt")
    return checkpoint
