"""What a recipe needs of the machine and of the files it names, checked before any long work starts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.training.recipe import Recipe


def check_requirements(recipe: Recipe) -> None:
    """Raises `ConfigError` with everything that is missing here, in one message, or for a start that does not fit.

    An archive to start from that is damaged raises `ArchiveError`.
    """
    parameter_dtype(recipe.trainer.precision, "cpu")
    missing = [*_missing_gpus(recipe), *_missing_files(recipe)]
    if missing:
        raise ConfigError(
            f"recipe {recipe.name} cannot run here:\n  - "
            + "\n  - ".join(missing)
            + "\nTo see the whole path at work on this machine: python examples/pretrain_esm1nv.py recipe=laptop"
        )
    if recipe.restore_from_path is not None:
        _check_archive(recipe, recipe.restore_from_path)


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
    for key, path in (("data.fasta", recipe.data.fasta), ("restore_from_path", recipe.restore_from_path)):
        if path is not None and not path.is_file():
            missing.append(f"{key}: {path} is not a file")
    return missing


def _check_archive(recipe: Recipe, path: Path) -> None:
    """The archive must hold a model of the recipe's shape; dropout may differ."""
    theirs = dict(read_archive(path, with_weights=False).config.get("encoder") or {})
    for key, ours in recipe.model.to_dict().items():
        if "dropout" not in key and theirs.get(key) != ours:
            raise ConfigError(
                f"restore_from_path: {path} has {key} = {theirs.get(key)}, the recipe model.{key} = {ours}; "
                f"set model.{key}={theirs.get(key)}, or choose the model group that the archive was trained with"
            )


def is_rank_zero() -> bool:
    """Whether this process speaks and writes for all: so where torchrun, Slurm or Lightning's launcher gave rank 0,
    and where nobody gave any."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
