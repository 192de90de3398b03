"""What a recipe needs of the machine and of the files it names, checked before any long work starts."""

from __future__ import annotations

import torch

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.pretraining.plan import Storage, free_space
from bionemo_esm.pretraining.probe_config import read_probe
from bionemo_esm.pretraining.recipe import Recipe, TrainerConfig
from bionemo_esm.pretraining.resolve_model import check_that_it_is_the_archives, how_to_bring
from bionemo_esm.pretraining.resume import find_parent_run

_LAPTOP = "\nTo see the whole path at work on this machine: python examples/pretrain_esm1nv.py recipe=laptop"


def check_requirements(recipe: Recipe, launched: int | None = None) -> None:
    """Raises `ConfigError` with everything that is missing here, in one message, or for a start that does not fit.

    launched: processes that torchrun or Slurm started together, if they did. An archive to start from that is damaged
    raises `ArchiveError`; labels of a probe, another `UserError`.
    """
    parameter_dtype(recipe.trainer.precision, "cpu")
    missing = [
        *_missing_processes(recipe.trainer, launched),
        *_missing_gpus(recipe),
        *_missing_files(recipe),
        *_missing_origin(recipe),
        *_missing_space(recipe),
    ]
    if missing:
        raise ConfigError(
            f"recipe {recipe.name} cannot run here:\n  - "
            + "\n  - ".join(missing)
            + (_LAPTOP if recipe.name != "laptop" else "")
        )
    if recipe.restore_from_path is not None:
        check_that_it_is_the_archives(recipe.model, recipe.restore_from_path)
    if not _has_checkpoints(recipe):
        find_parent_run(recipe)
    if recipe.probe is not None:
        read_probe(recipe.probe, recipe.model)  # a label that is wrong is told before a store is built


def _missing_processes(trainer: TrainerConfig, launched: int | None) -> list[str]:
    product = f"trainer.num_nodes x trainer.devices are {trainer.num_nodes} x {trainer.devices}"
    if launched is None and trainer.num_nodes > 1:
        return [
            f"{product}: srun or torchrun must start a process for every device, on every node (docs/slurm.md); on one "
            "machine alone: trainer.num_nodes=1, and trainer.devices as it has"
        ]
    if launched is not None and launched != trainer.world_size:
        return [f"{product}, but {launched} processes were launched: set both to what the launcher was told"]
    return []


def _missing_gpus(recipe: Recipe) -> list[str]:
    wanted, found = recipe.trainer.devices, torch.cuda.device_count()
    if recipe.trainer.accelerator != "gpu" or found >= wanted:
        return []
    return [f"trainer.devices asks for {wanted} GPUs a node; this machine has {found}"]


def _missing_files(recipe: Recipe) -> list[str]:
    missing = []
    if recipe.data.store is not None and not (recipe.data.store / "manifest.json").is_file():
        missing.append(
            f"data.store: {recipe.data.store} is not a store (no manifest.json); build it with "
            f"`python examples/preprocess_uniref50.py output={recipe.data.store}`, or name the folder of one"
        )
    if (fasta := recipe.data.fasta) is not None and not fasta.is_file():
        missing.append(f"data.fasta: {fasta} is not a file")
    if (archive := recipe.restore_from_path) is not None and not archive.is_file():
        missing.append(f"restore_from_path: {how_to_bring(archive) or f'{archive} is not a file'}")
    return missing


def _missing_origin(recipe: Recipe) -> list[str]:
    """Of the run that this one continues; it is needed for the first start only."""
    origin, before = recipe.continue_from_path, recipe.published and recipe.published.continues
    if _has_checkpoints(recipe):
        return []
    if origin is None and before is not None:
        return [f"continue_from_path: {recipe.name} goes on with a run of {before}; name its folder, or a .ckpt of it"]
    if origin is not None and not origin.exists():
        return [f"continue_from_path: there is no {origin}; name a run's folder, or a .ckpt"]
    return []


def _has_checkpoints(recipe: Recipe) -> bool:
    return any((recipe.run_folder / "checkpoints").glob("step-*.ckpt"))


def _missing_space(recipe: Recipe) -> list[str]:
    """A new run needs room for its checkpoints (weights and two moments, float32), snapshots and archives."""
    if recipe.run_folder.exists():
        return []
    needed = Storage.of(recipe).peak_bytes
    existing, free = free_space(recipe.run_folder)
    if free >= needed:
        return []
    return [
        f"exp_manager.exp_dir: the run's checkpoints will take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free "
        f"in {existing}; choose another place, or lower exp_manager.checkpoints.keep_last or average_last"
    ]
