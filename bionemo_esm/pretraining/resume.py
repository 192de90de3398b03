"""The starting point of a run: new weights, its own newest checkpoint, or the checkpoint of a parent run.

The preflight check and the plan use this file, too. It imports neither NeMo nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bionemo_esm.console import Console, is_rank_zero
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile
from bionemo_esm.model.resume import check_compatible, check_optimizer
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.resolve_model import newest_archive

DAMAGED = ".damaged"  # suffix of a checkpoint that could not be read


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file."""


@dataclass(frozen=True)
class ParentRun:
    """The checkpoint that `continue_from_path` names: the newest readable one of a run, or a file."""

    file: ArchiveFile
    steps: int
    samples: int | None  # consumed by then
    learning_rate: float | None  # of its next step


def find_parent_run(recipe: Recipe) -> ParentRun | None:
    """Return the parent run; None if `continue_from_path` is not set.

    Raises `ConfigError` if there is no checkpoint, if it has another model or another stream of samples, or if it has
    reached the recipe's last step. Hashes are checked later, by the run.
    """
    path = recipe.continue_from_path
    if path is None:
        return None
    file = newest_archive(path)
    steps, samples = file.provenance["steps"], file.provenance.get("consumed_samples")
    if steps >= recipe.trainer.max_steps:
        raise ConfigError(
            f"continue_from_path: {file.path} is at step {steps:,} already, and trainer.max_steps "
            f"({recipe.trainer.max_steps:,}) counts those steps, too; raise it"
        )
    outline = file.load_outline()
    checkpoint = {"model": file, "identity": outline.get("identity")}
    if not isinstance(file.config.get("encoder"), dict) or not isinstance(checkpoint["identity"], dict):
        raise ConfigError(f"continue_from_path: {file.path} is not the checkpoint of a pretraining run")
    check_compatible(checkpoint, recipe.model, _stream(recipe), continues=True)
    check_optimizer(checkpoint, recipe.optim.name)
    return ParentRun(file, steps, samples if type(samples) is int else None, _rate(outline))


def _stream(recipe: Recipe) -> dict[str, Any]:
    """Return the part of the run's identity that is known before its store is open."""
    known: dict[str, Any] = {"seed": recipe.seed, "data.masking": recipe.data.masking.record}
    if recipe.data.store is not None and (recipe.data.store / MANIFEST_NAME).is_file():
        train = ProteinStore.open(recipe.data.store).split("train")
        known |= {"samples of an epoch": train.num_clusters, "train.bin": train.summary.bin_sha256}
    return known


def _rate(outline: dict[str, Any]) -> float | None:
    try:
        return float(outline["optimizer_states"][0]["param_groups"][0]["lr"])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def list_checkpoints(folder: Path, suffix: str = ".ckpt") -> list[Path]:
    """Return a folder's checkpoints, or snapshots, sorted by the step in their manifest; unreadable ones come first."""
    return sorted(folder.glob(f"step-*{suffix}"), key=lambda path: (recorded_step(path), path.name))


def recorded_step(path: Path) -> int:
    """Return the step that an archive or a checkpoint records; -1 if it cannot be read."""
    try:
        step = ArchiveFile.open(path).provenance.get("steps")
    except ArchiveError:
        return -1
    return step if type(step) is int else -1


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose hashes are right, and a message for each newer, damaged one.

    Raises `CheckpointError` if all checkpoints are damaged: a new start would look like a resume.
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


def set_aside_damaged(folder: Path, newest: Path) -> None:
    """Rename the checkpoints that `newest_checkpoint` skipped to `….damaged`."""
    for path in list_checkpoints(folder):
        if path != newest and (recorded_step(path) < 0 or recorded_step(path) > recorded_step(newest)):
            path.rename(path.with_name(path.name + DAMAGED))


@dataclass(frozen=True)
class StartingPoint:
    """The state from which training starts."""

    checkpoint: Path | None = None
    steps: int = 0  # that the checkpoint has done
    first_step: int = 0  # of this run; over 0 if it continues a parent run
    of_another_run: bool = False  # the checkpoint is a parent run's, whose configuration may differ


def choose_starting_checkpoint(folder: Path, origin: Path | None, console: Console) -> StartingPoint:
    """Return where the run in `folder` starts. origin: the parent run (a run directory or a checkpoint), or None.

    Damaged checkpoints of the run are renamed, with a warning. Raises `CheckpointError` or `ArchiveError` if none can
    be read, `ConfigError` for a parent run without a checkpoint.
    """
    own = _newest_own_checkpoint(folder / "checkpoints", console)
    if own is not None:
        provenance = ArchiveFile.open(own).provenance
        continued = provenance.get("continued_from")
        first_step = int(continued["steps"]) if isinstance(continued, dict) else 0
        return StartingPoint(own, int(provenance["steps"]), first_step)
    if origin is None:
        return StartingPoint()
    checkpoint = _newest_parent_checkpoint(origin, console)
    steps = int(ArchiveFile.open(checkpoint).provenance["steps"])
    return StartingPoint(checkpoint, steps, steps, of_another_run=True)


def _newest_own_checkpoint(folder: Path, console: Console) -> Path | None:
    checkpoint, complaints = newest_checkpoint(folder)
    for complaint in complaints:
        console.print_line(
            f"warning: {complaint}; renamed to *{DAMAGED}, resuming from {checkpoint and checkpoint.name}"
        )
    if checkpoint is not None and is_rank_zero():
        set_aside_damaged(folder, checkpoint)
    return checkpoint


def _newest_parent_checkpoint(origin: Path, console: Console) -> Path:
    """Return the newest intact checkpoint of the parent run, whose directory stays unchanged."""
    if origin.is_file():
        ArchiveFile.open(origin).verify()
        return origin
    checkpoint, complaints = newest_checkpoint(origin / "checkpoints")
    for complaint in complaints:
        console.print_line(f"warning: {complaint}; continuing from {checkpoint and checkpoint.name}, which is older")
    if checkpoint is None:
        raise ConfigError(f"continue_from_path: {origin} has no checkpoint; name a run's folder, or a .ckpt")
    return checkpoint
