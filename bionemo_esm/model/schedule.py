"""The learning rate at a step, as a formula: what a plan and a picture show, and what the schedulers must compute.

Imports neither torch nor NeMo. Steps are counted from 0, the first optimizer step.
"""

from __future__ import annotations

import math

from bionemo_esm.model.config import INVERSE_SQUARE_ROOT, OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of all parameters at an optimizer step (from 0), whatever the schedule."""
    assert step >= 0
    return inverse_square_root(config, step) if config.schedule == INVERSE_SQUARE_ROOT else cosine(config, step)


def inverse_square_root(config: OptimConfig, step: int) -> float:
    """Up to `lr` in a line from 0 over `warmup_steps`, then lr x sqrt(warmup_steps / step).

    fairseq's `inverse_sqrt` (fairseq/optim/lr_scheduler/inverse_square_root_schedule.py), which ESM-1b trained with.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    return config.lr * math.sqrt(config.warmup_steps / step)


def cosine(config: OptimConfig, step: int) -> float:
    """Up to `lr` in a line, down to `min_lr` along half a cosine, and on at `min_lr`.

    NeMo's `CosineAnnealing` (nemo/core/optim/lr_scheduler.py). Its warm-up begins at 0 with a constant end, and without
    one a step further up.
    """
    shift = 0 if config.constant_steps else 1
    if config.warmup_steps and step <= config.warmup_steps:
        return config.lr * (step + shift) / (config.warmup_steps + shift)
    decay_steps = config.max_steps - config.warmup_steps - config.constant_steps
    fraction = min((step - config.warmup_steps) / decay_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))
