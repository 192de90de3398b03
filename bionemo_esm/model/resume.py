"""Resume rules: a run continues from its own checkpoint, or from another run's under a new configuration.

Continuing another run (as phase 2 continues phase 1) takes over weights, optimizer state, and the counts of steps and
consumed samples, so that the stream of samples and the schedule continue. Global batch, rates, schedule and length are
the new configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import FUSED_ADAM, EncoderConfig, OptimConfig
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.model.schedule import learning_rate

STREAM_KEYS = frozenset({"seed", "samples of an epoch", "train.bin", "data.masking"})
"""Keys of a run's identity that determine the order and the masking of samples."""

_ANOTHER_RUN = (
    "to go on with it under these settings, give this run another exp_manager.name and continue_from_path=<the folder "
    "of the old one>; to begin anew, another exp_manager.name alone"
)
_ANOTHER_STREAM = (
    "continue_from_path goes on in the same stream of samples; for another one begin with the weights alone: "
    "restore_from_path=<the run's .nemo>"
)
_ANOTHER_MODEL = "give this run the same model, or another exp_manager.name and no checkpoint to go on from"
_SCHEDULE_STATE = ("last_epoch", "_step_count")


def check_compatible(
    checkpoint: Mapping[str, Any], encoder: EncoderConfig, identity: Mapping[str, Any], continues: bool
) -> None:
    """Raise `ConfigError` if a run cannot resume from a checkpoint: another model, or another run's settings.

    `continues`: the checkpoint is another run's; then only the stream of samples must be the same, and dropout may
    differ. identity: of the run that resumes; see `RunContext.identity`.
    """
    advice = _ANOTHER_STREAM if continues else _ANOTHER_RUN
    saved, ours = checkpoint["model"].config["encoder"], encoder.to_dict()
    wrong = sorted(key for key in saved.keys() | ours.keys() if saved.get(key) != ours.get(key))
    if continues:
        wrong = [key for key, _, _ in encoder.differences(saved)]
    if wrong:
        names = ", ".join(f"model.{key}" for key in wrong)
        raise ConfigError(f"the checkpoint was written by another model: {names} differ; {_ANOTHER_MODEL}")
    for key, value in identity.items():
        theirs = checkpoint["identity"].get(key)
        if theirs != value and (key in STREAM_KEYS or not continues):
            raise ConfigError(f"the checkpoint was written with {key} = {theirs}, this run has {value}; {advice}")


def check_optimizer(checkpoint: Mapping[str, Any], name: str) -> None:
    """Raise `ConfigError` if a run cannot continue a checkpoint's optimizer state with the optimizer `name`."""
    theirs = checkpoint["identity"].get("optim.name", FUSED_ADAM)
    if theirs != name:
        raise ConfigError(
            f"the checkpoint has the state of optim.name = {theirs}, this run has {name}; set optim.name={theirs}, or "
            "begin with the weights alone: restore_from_path=<the run's .nemo>",
            code="config.another-optimizer",
        )


def adopt_checkpoint(checkpoint: dict[str, Any], config: OptimConfig) -> dict[str, Any]:
    """Change another run's checkpoint (from `load_checkpoint`) into the start of a run with this configuration.

    Returns the origin of the run, for its provenance. The other run's best checkpoint is not this run's.
    """
    check_optimizer(checkpoint, config.name)
    steps, family = int(checkpoint["steps"]), OPTIMIZERS.get(config.name)
    for state in checkpoint["optimizer_states"]:
        for group, settings in zip(state["param_groups"], family.groups(config), strict=True):
            group.update({**family.settings(config), **settings})
            group["lr"], group["initial_lr"] = learning_rate(config, steps), config.lr
    checkpoint["lr_schedulers"] = [
        {key: state[key] for key in _SCHEDULE_STATE if key in state} for state in checkpoint["lr_schedulers"]
    ]
    checkpoint["callbacks"] = {}
    provenance = checkpoint["model"].provenance
    return {
        "recipe": provenance.get("recipe"),
        "steps": steps,
        "consumed_samples": int(checkpoint["consumed_samples"]),
        **({"continued_from": before} if (before := provenance.get("continued_from")) else {}),
    }
