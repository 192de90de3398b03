"""The run that another one continues: what its newest checkpoint says, and whether it can be continued so.

Looked at before anything is started or written, and by the plan; imports neither NeMo nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.resume import check_compatible
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.resolve_model import newest_archive


@dataclass(frozen=True)
class ParentRun:
    """The newest checkpoint of a run that can be read, or the one that was named."""

    file: ArchiveFile
    steps: int
    samples: int | None  # consumed until then
    learning_rate: float | None  # of the step that it would have taken next


def find_parent_run(recipe: Recipe) -> ParentRun | None:
    """What `continue_from_path` stands for; None where it is not set.

    Raises `ConfigError` where there is no checkpoint, for one of another model or of another stream of samples, and for
    one that has come as far as the recipe goes. Hashes are left to the run itself.
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
    return ParentRun(file, steps, samples if type(samples) is int else None, _rate(outline))


def _stream(recipe: Recipe) -> dict[str, Any]:
    """What of the run's identity is known before it has its proteins at hand."""
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
