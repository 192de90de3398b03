"""Master weights, gradients and schedule against plain PyTorch and the closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, build_schedule
from models import tiny_model

EPS = 1e-4  # above the rounding of gradients that are exactly zero in theory, such as those of key biases
SETTINGS = OptimConfig(lr=1e-2, min_lr=1e-3, eps=EPS, weight_decay=0.1, warmup_steps=2, constant_steps=3, max_steps=10)
BACKENDS = choose_backends("cpu", torch.float32, 0.0)


def test_step_equals_plain_adamw_with_clipping(sample_store: ProteinStore) -> None:
    ours, theirs = tiny_model(seed=2), tiny_model(seed=2)
    stream = TrainingBatches(SampleReader(sample_store.split("train"), 128, MaskingPolicy(), 0), BatchPlan(8, 4))
    masters = MasterWeights(ours.named_parameters())
    optimizer = build_optimizer(masters, SETTINGS, BACKENDS)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=EPS)
    for step in range(4):
        share = stream[8 * step].micro_batches
        count = sum(len(batch.targets) for batch in share)
        ours.zero_grad()  # as Lightning does at the start of a fit
        masters.zero_gradients()
        reference.zero_grad()
        for batch in share:
            (cross_entropy(ours(batch), batch.targets, reduction="sum") / count).backward()
            (cross_entropy(theirs(batch), batch.targets, reduction="sum") / count).backward()
        norm = masters.clip_gradients(0.5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)), rel=1e-5)
        assert norm > 0.5, "the gradients are too small for clipping to tell"
        optimizer.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_steps_too_small_for_bf16_accumulate_in_the_master_weights() -> None:
    parameter = Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = MasterWeights([("weight", parameter)])
    optimizer = torch.optim.SGD(masters.masters.values(), lr=1.0)
    for _ in range(20):
        masters.zero_gradients()
        (parameter.float() * 1e-3).sum().backward()  # a step of 0.001; bf16 spacing near 1 is at least 0.004
        optimizer.step()
        masters.write_back()
    assert masters.state_dict()["weight"].tolist() == pytest.approx([0.98] * 4, abs=1e-4)
    assert parameter.tolist() == pytest.approx([0.98] * 4, abs=4e-3)
    assert parameter.dtype == torch.bfloat16


def test_micro_batch_gradients_accumulate_in_float32() -> None:
    parameter = Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = MasterWeights([("weight", parameter)])
    masters.zero_gradients()
    for _ in range(1000):
        (parameter * 1.0).sum().backward()  # a bf16 sum would stay at 256
    assert masters.gradients.item() == 1000


def test_norm_of_many_gradients_equals_the_float64_norm() -> None:
    """A plain float32 norm of this many values, some of them large, is off by 0.1% on a CPU."""
    masters = MasterWeights({"weight": torch.nn.Parameter(torch.zeros(2000, 1500))}.items())
    masters.gradients.normal_(generator=torch.Generator().manual_seed(0))
    masters.gradients[:3000] *= 100
    exact = masters.gradients.double().norm().item()
    assert float(masters.clip_gradients(0.0)) == pytest.approx(exact, rel=1e-6)


def test_clipping_can_be_disabled() -> None:
    parameter = Parameter(torch.ones(2))
    masters = MasterWeights([("weight", parameter)])
    (parameter * 100).sum().backward()
    assert masters.clip_gradients(0.0).item() == pytest.approx(100 * math.sqrt(2))
    assert masters.gradients.tolist() == [100, 100]


def test_schedule_warms_up_decays_along_a_cosine_and_stays_at_the_minimum() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=SETTINGS.lr)
    schedule = build_schedule(optimizer, SETTINGS)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(6)]
    assert rates == pytest.approx([0.0, 5e-3, *cosine, *[1e-3] * 5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_lr": 1.0}, r"optim\.sched\.min_lr \(1\.0\) must lie in"),
        ({"betas": (0.9, 1.0)}, r"optim\.betas must be two numbers in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"optim\.weight_decay must not be negative"),
        ({"warmup_steps": 500, "constant_steps": 0, "max_steps": 500}, r"leave no step for the cosine"),
    ],
)
def test_invalid_settings_are_rejected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_training_on_the_same_parameters_gets_its_own_gradients(dtype: torch.dtype) -> None:
    parameter = Parameter(torch.ones(2, dtype=dtype))
    first = MasterWeights([("weight", parameter)])
    (parameter * 2).sum().backward()
    first.release()
    second = MasterWeights([("weight", parameter)])
    (parameter * 3).sum().backward()
    assert (first.gradients.tolist(), second.gradients.tolist()) == ([2, 2], [3, 3])


def test_gradient_dropped_before_backward_fails_an_assertion() -> None:
    parameter = Parameter(torch.ones(2))
    masters = MasterWeights([("weight", parameter)])
    parameter.grad = None  # as an optimizer's zero_grad does
    with pytest.raises(AssertionError, match="zero_gradients comes first"):
        (parameter * 2).sum().backward()
    masters.zero_gradients()
    (parameter * 2).sum().backward()
    assert masters.gradients.tolist() == [2, 2]
