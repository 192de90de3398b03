"""Steps that must not be taken: a loss or gradient that is not finite, and, where asked for, a loss that leaps.

Loss and gradient norm are sums over all ranks, so every rank comes to the same judgement on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bionemo_esm.model.config import OptimConfig

_MEMORY = 0.98  # of the running mean of the loss, a step: about 50 steps
_STEPS_TO_LEARN = 50  # before a leap can be told


@dataclass(frozen=True)
class SuspectSamples:
    """What one rank showed the model in one micro batch of a step that was not taken."""

    rank: int
    epoch: int  # of the first sample
    samples: tuple[int, ...]  # sequences, or clusters, of the training split


@dataclass(frozen=True)
class SkippedStep:
    """A step that no rank has taken, and where its trouble came from."""

    reason: str
    in_a_row: int  # with this one
    suspects: tuple[SuspectSamples, ...]


@dataclass
class NonFiniteGuard:
    """Judges steps, and counts those refused in a row; its state is part of a checkpoint."""

    config: OptimConfig
    in_a_row: int = 0
    _mean_loss: float = 0.0
    _steps: int = field(default=0)

    def skip_reason(self, loss: float, gradient_norm: float) -> str | None:
        """Why the step must not be taken, or None; to be asked once for each step."""
        reason = self._reason(loss, gradient_norm)
        if reason is not None:
            self.in_a_row += 1
            return reason
        self.in_a_row = 0
        self._steps += 1
        weight = max(1 - _MEMORY, 1 / self._steps)
        self._mean_loss += weight * (loss - self._mean_loss)
        return None

    def _reason(self, loss: float, gradient_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"its gradient has norm {gradient_norm}"
        limit = self.config.skip_loss_above
        if limit is not None and self._steps >= _STEPS_TO_LEARN and loss > limit * self._mean_loss:
            return f"its loss is {loss:.3f}, over {limit:g} times the recent mean of {self._mean_loss:.3f}"
        return None

    @property
    def gave_up(self) -> bool:
        """Whether so many steps in a row were refused that going on makes no sense."""
        return self.in_a_row >= self.config.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "mean_loss": self._mean_loss, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that gave up and is started again gets as many tries as before."""
        self.in_a_row, self._mean_loss, self._steps = state["in_a_row"], state["mean_loss"], state["steps"]
        if self.gave_up:
            self.in_a_row = 0
