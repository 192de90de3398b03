"""The learning rate at a step, as a formula that the schedulers must match; plans and figures use it.

Imports neither torch nor NeMo. Steps are counted from 0, the first optimizer step.
"""

from __future__ import annotations

import math

from bionemo_esm.model.config import COSINE, INVERSE_SQUARE_ROOT, WARMUP_STABLE_DECAY, OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the rate of all parameters at an optimizer step (from 0), for any of `SCHEDULES`."""
    assert step >= 0
    return _FORMULAS[config.schedule](config, step)


def inverse_square_root(config: OptimConfig, step: int) -> float:
    """Return the rate that rises linearly from 0 to `lr` over `warmup_steps`, then is lr x sqrt(warmup_steps / step).

    fairseq's `inverse_sqrt` (fairseq/optim/lr_scheduler/inverse_square_root_schedule.py), the schedule of ESM-1b.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.lr * math.sqrt(config.warmup_steps / step)


def cosine(config: OptimConfig, step: int) -> float:
    """Return the rate that rises linearly to `lr`, falls along half a cosine to `min_lr`, and stays there.

    NeMo's `CosineAnnealing` (nemo/core/optim/lr_scheduler.py). Its warm-up starts at 0 if there is a constant end, and
    one step higher without one.
    """
    shift = 0 if config.constant_steps else 1
    if config.warmup_steps and step <= config.warmup_steps:
        return config.lr * (step + shift) / (config.warmup_steps + shift)
    decay_steps = config.max_steps - config.warmup_steps - config.constant_steps
    fraction = min((step - config.warmup_steps) / decay_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))


def warmup_stable_decay(config: OptimConfig, step: int) -> float:
    """Return the rate that rises linearly to `lr`, stays there, and falls linearly to `min_lr` over `decay_steps`.

    Hu et al. 2024 (MiniCPM, arXiv:2404.06395), with the linear decay of Hägele et al. 2024 (arXiv:2405.18392). Neither
    the first nor the last step of `max_steps` is wasted on a rate of 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    left = min(max(config.max_steps - step, 0) / config.decay_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * left


_FORMULAS = {COSINE: cosine, INVERSE_SQUARE_ROOT: inverse_square_root, WARMUP_STABLE_DECAY: warmup_stable_decay}
