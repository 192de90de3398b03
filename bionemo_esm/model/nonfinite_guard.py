"""Skip optimizer steps whose loss or gradients are not finite, and, if configured, steps after a loss spike.

Loss and gradient norm are sums over all ranks, so every rank decides alike without communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bionemo_esm.model.config import OptimConfig

_DECAY = 0.98  # of the running mean of the loss: about 50 steps
_SPIKE_WARMUP_STEPS = 50  # steps before the mean is used


@dataclass(frozen=True)
class SuspectSamples:
    """The samples of one micro batch of one rank in a skipped step."""

    rank: int
    epoch: int  # of the first sample
    samples: tuple[int, ...]  # sequences, or clusters, of the training split


@dataclass(frozen=True)
class SkippedStep:
    """A step that every rank skipped, and the samples that may have caused it."""

    reason: str
    in_a_row: int  # consecutive skipped steps, this one included
    suspects: tuple[SuspectSamples, ...]


@dataclass
class NonFiniteGuard:
    """Decides which steps are skipped and counts consecutive ones; checkpoints contain its state."""

    config: OptimConfig
    in_a_row: int = 0
    _mean_loss: float = 0.0
    _steps: int = field(default=0)

    def skip_reason(self, loss: float, gradient_norm: float) -> str | None:
        """Return why the step must be skipped, or None. Call it once for each step."""
        reason = self._reason(loss, gradient_norm)
        if reason is not None:
            self.in_a_row += 1
            return reason
        self.in_a_row = 0
        self._steps += 1
        weight = max(1 - _DECAY, 1 / self._steps)
        self._mean_loss += weight * (loss - self._mean_loss)
        return None

    def _reason(self, loss: float, gradient_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"its gradient has norm {gradient_norm}"
        limit = self.config.skip_loss_above
        if limit is not None and self._steps >= _SPIKE_WARMUP_STEPS and loss > limit * self._mean_loss:
            return f"its loss is {loss:.3f}, over {limit:g} times the recent mean of {self._mean_loss:.3f}"
        return None

    @property
    def gave_up(self) -> bool:
        """Whether `max_skipped_steps` consecutive steps were skipped, so that training must stop."""
        return self.in_a_row >= self.config.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "mean_loss": self._mean_loss, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state. A run that had stopped for its skipped steps starts with a count of zero."""
        self.in_a_row, self._mean_loss, self._steps = state["in_a_row"], state["mean_loss"], state["steps"]
        if self.gave_up:
            self.in_a_row = 0
