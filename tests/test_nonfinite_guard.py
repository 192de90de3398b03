"""Skipped optimizer steps: the criteria, and the limit of consecutive skips."""

from __future__ import annotations

import math

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.nonfinite_guard import NonFiniteGuard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "its loss is nan"),
        (math.inf, 1.0, "its loss is inf"),
        (2.9, math.nan, "its gradient has norm nan"),
        (2.9, math.inf, "its gradient has norm inf"),
        (2.9, 1e30, None),
        (1e30, 1.0, None),
    ],
)
def test_step_with_nonfinite_loss_or_gradient_is_skipped(loss: float, norm: float, reason: str | None) -> None:
    assert NonFiniteGuard(OptimConfig()).skip_reason(loss, norm) == reason


def test_loss_spike_is_skipped_only_if_enabled_and_once_a_mean_is_known() -> None:
    eager, lenient = NonFiniteGuard(OptimConfig(skip_loss_above=1.5)), NonFiniteGuard(OptimConfig())
    assert eager.skip_reason(30.0, 1.0) is None, "nothing is known of the first step"
    for _ in range(200):
        assert eager.skip_reason(2.8, 1.0) is None
        assert lenient.skip_reason(2.8, 1.0) is None
    assert eager.skip_reason(4.0, 1.0) is None
    assert eager.skip_reason(4.5, 1.0) == "its loss is 4.500, over 1.5 times the recent mean of 2.849"
    assert lenient.skip_reason(4.5, 1.0) is None


def test_skipped_loss_does_not_enter_the_mean() -> None:
    guard = NonFiniteGuard(OptimConfig(skip_loss_above=1.5))
    for _ in range(100):
        guard.skip_reason(2.0, 1.0)
    before = guard.state_dict()["mean_loss"]
    assert guard.skip_reason(9.0, 1.0)
    assert guard.skip_reason(math.nan, 1.0)
    assert guard.state_dict()["mean_loss"] == before


def test_guard_gives_up_after_consecutive_skips_and_a_good_step_resets_the_count() -> None:
    guard = NonFiniteGuard(OptimConfig(max_skipped_steps=3))
    for loss in (math.nan, math.nan, 2.0, math.nan, math.nan):
        guard.skip_reason(loss, 1.0)
        assert not guard.gave_up
    guard.skip_reason(math.nan, 1.0)
    assert guard.gave_up


def test_state_resumes_without_the_give_up_flag() -> None:
    guard = NonFiniteGuard(OptimConfig(max_skipped_steps=3))
    for loss in (2.0, 3.0, math.nan, math.nan):
        guard.skip_reason(loss, 1.0)
    resumed = NonFiniteGuard(OptimConfig(max_skipped_steps=3))
    resumed.load_state_dict(guard.state_dict())
    assert resumed == guard
    guard.skip_reason(math.nan, 1.0)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.in_a_row == 0
    assert not resumed.gave_up


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skipped_steps": 0}, "optim.max_skipped_steps must be at least 1, not 0"),
        ({"skip_loss_above": 1.0}, "optim.skip_loss_above must be over 1"),
        ({"skip_loss_above": math.nan}, "optim.skip_loss_above must be over 1"),
    ],
)
def test_invalid_settings_are_rejected_by_key(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**settings)  # type: ignore[arg-type]
