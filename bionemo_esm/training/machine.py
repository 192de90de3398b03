"""What a recipe needs of the machine, checked before any long work starts."""

from __future__ import annotations

import os

import torch

from bionemo_esm.model.config import ConfigError
from bionemo_esm.training.recipe import Recipe


def check_machine(recipe: Recipe) -> None:
    """Raises `ConfigError` with everything that is missing here, in one message."""
    missing = [*_missing_gpus(recipe), *_missing_files(recipe)]
    if missing:
        raise ConfigError(
            f"recipe {recipe.name} cannot run here:\n  - "
            + "\n  - ".join(missing)
            + "\nTo see the whole path at work on this machine: python examples/pretrain_esm1nv.py recipe=laptop"
        )


def _missing_gpus(recipe: Recipe) -> list[str]:
    wanted, found = recipe.trainer.devices, torch.cuda.device_count()
    if recipe.trainer.accelerator != "gpu" or found >= wanted:
        return []
    return [f"trainer.devices asks for {wanted} GPUs a node; this machine has {found}"]


def _missing_files(recipe: Recipe) -> list[str]:
    missing = []
    if recipe.data.store is not None and not (recipe.data.store / "manifest.json").is_file():
        missing.append(
            f"data.store: {recipe.data.store} is not a store (no manifest.json); build one from a FASTA file with "
            "data.fasta=/path/to/uniref50.fasta.gz data.store=null, or name the folder of one"
        )
    for key, path in (("data.fasta", recipe.data.fasta), ("restore_from_path", recipe.restore_from_path)):
        if path is not None and not path.is_file():
            missing.append(f"{key}: {path} is not a file")
    return missing


def is_rank_zero() -> bool:
    """Whether this process speaks and writes for all: so where torchrun, Slurm or Lightning's launcher gave rank 0,
    and where nobody gave any."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
