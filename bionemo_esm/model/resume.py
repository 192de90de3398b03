"""What a run goes on with: its own checkpoint, or under a new configuration another run's, as phase 2 phase 1's.

Taken over from another run: weights, Adam's moments, the number of steps and of consumed samples, so that the stream of
samples and the schedule go on where they were. The new configuration's own: global batch, rates, schedule, length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import EncoderConfig, OptimConfig
from bionemo_esm.model.schedule import learning_rate

STREAM_KEYS = frozenset({"seed", "samples of an epoch", "train.bin", "data.masking"})
"""What of a run's identity says which sample comes when, and what is hidden in it."""

_ANOTHER_RUN = (
    "to go on with it under these settings, give this run another exp_manager.name and continue_from_path=<the folder "
    "of the old one>; to begin anew, another exp_manager.name alone"
)
_ANOTHER_STREAM = (
    "continue_from_path goes on in the same stream of samples; for another one begin with the weights alone: "
    "restore_from_path=<the run's .nemo>"
)
_ANOTHER_MODEL = "give this run the same model, or another exp_manager.name and no checkpoint to go on from"
_OF_A_SCHEDULE = ("last_epoch", "_step_count")


def check_that_it_fits(
    checkpoint: Mapping[str, Any], encoder: EncoderConfig, identity: Mapping[str, Any], continues: bool
) -> None:
    """Raises `ConfigError` for a checkpoint of another model or run; where the run `continues` one, of another stream.

    identity: of the run that is to go on; see `RunContext.identity`.
    """
    advice = _ANOTHER_STREAM if continues else _ANOTHER_RUN
    saved, ours = checkpoint["model"].config["encoder"], encoder.to_dict()
    wrong = sorted(key for key in saved.keys() | ours.keys() if saved.get(key) != ours.get(key))
    if continues:  # with other dropout, if so told
        wrong = [key for key, _, _ in encoder.differences(saved)]
    if wrong:
        names = ", ".join(f"model.{key}" for key in wrong)
        raise ConfigError(f"the checkpoint was written by another model: {names} differ; {_ANOTHER_MODEL}")
    for key, value in identity.items():
        theirs = checkpoint["identity"].get(key)
        if theirs != value and (key in STREAM_KEYS or not continues):
            raise ConfigError(f"the checkpoint was written with {key} = {theirs}, this run has {value}; {advice}")


def take_over(checkpoint: dict[str, Any], config: OptimConfig) -> dict[str, Any]:
    """Make another run's checkpoint (as `load_checkpoint` gives it) the start of a run with this configuration.

    Returns where the run comes from, for its provenance. The best checkpoint of the run before is none of this one's.
    """
    steps = int(checkpoint["steps"])
    for state in checkpoint["optimizer_states"]:
        for index, group in enumerate(state["param_groups"]):
            group["lr"], group["initial_lr"] = learning_rate(config, steps), config.lr
            group["betas"], group["eps"] = tuple(config.betas), config.eps
            group["weight_decay"] = config.weight_decay if index == 0 else 0.0  # matrices first: `build_optimizer`
    checkpoint["lr_schedulers"] = [
        {key: state[key] for key in _OF_A_SCHEDULE if key in state} for state in checkpoint["lr_schedulers"]
    ]
    checkpoint["callbacks"] = {}
    provenance = checkpoint["model"].provenance
    return {
        "recipe": provenance.get("recipe"),
        "steps": steps,
        "consumed_samples": int(checkpoint["consumed_samples"]),
        **({"continued_from": before} if (before := provenance.get("continued_from")) else {}),
    }


def loops_after(steps: int, loops: dict[str, Any]) -> dict[str, Any]:
    """Lightning's account of its training loop, `fit_loop.state_dict()`, as it stands after so many steps."""
    counts = {"ready": steps, "started": steps, "processed": steps, "completed": steps}
    for key in ("epoch_loop.batch_progress", "epoch_loop.manual_optimization.optim_step_progress"):
        for span in ("total", "current"):
            loops[key][span] = {name: count for name, count in counts.items() if name in loops[key][span]}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    return loops
