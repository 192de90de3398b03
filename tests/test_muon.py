"""Muon against PyTorch's own step, its resume, its runs, the schedule of its configuration, and its plan."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.config import MUON, WARMUP_STABLE_DECAY, EncoderConfig, OptimConfig
from bionemo_esm.model.costs import memory_per_device, newton_schulz_flops
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, build_schedule, full_state, load_full_state
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.plan import Orthogonalization, gather_facts, plan_of
from bionemo_esm.pretraining.plan_report import describe_plan
from bionemo_esm.pretraining.recipe import load_recipe
from errors import refused
from faults import Fault, run, send
from models import tiny_model
from runs import SMALL, composed, losses, run_here

BACKENDS = choose_backends("cpu", torch.float32, 0.0)
CONFIG = OptimConfig(name=MUON, lr=1e-2, weight_decay=0.1, options={"adamw_lr_ratio": 0.5, "momentum": 0.9})
WSD = OptimConfig(
    schedule=WARMUP_STABLE_DECAY, lr=1e-2, min_lr=1e-3, warmup_steps=3, constant_steps=0, decay_steps=4, max_steps=12
)


def masters_of(seed: int, dtype: torch.dtype = torch.float32) -> MasterWeights:
    named = tiny_model(seed=seed).named_parameters()
    return MasterWeights((name, Parameter(parameter.detach().to(dtype))) for name, parameter in named)


def train(masters: MasterWeights, optimizer: Any, steps: range) -> None:
    for step in steps:
        masters.gradients.copy_(torch.randn(len(masters.gradients), generator=torch.Generator().manual_seed(step)))
        optimizer.step()
        masters.write_back()


def test_step_equals_pytorch_muon_on_hidden_matrices_and_adamw_on_the_rest() -> None:
    ours, theirs = masters_of(1), masters_of(1)
    train(ours, build_optimizer(ours, CONFIG, BACKENDS), range(4))
    hidden = {n: p for n, p in theirs.masters.items() if p.ndim == 2 and "embedding" not in n}
    assert {name.split(".")[-2] for name in hidden} == {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
        "dense",
    }
    rest = [(n, p) for n, p in theirs.masters.items() if n not in hidden]
    muon = torch.optim.Muon(hidden.values(), lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for _, p in rest if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for _, p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=5e-3, betas=CONFIG.betas, eps=CONFIG.eps, fused=True)
    for step in range(4):
        theirs.gradients.copy_(torch.randn(len(theirs.gradients), generator=torch.Generator().manual_seed(step)))
        muon.step()
        adamw.step()
    for name, master in theirs.masters.items():
        assert torch.equal(ours.masters[name], master), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_resumes_bit_for_bit_from_its_stored_state(dtype: torch.dtype) -> None:
    whole, first, second = (masters_of(1, dtype) for _ in range(3))
    optimizers = [build_optimizer(masters, CONFIG, BACKENDS) for masters in (whole, first, second)]
    train(whole, optimizers[0], range(5))
    train(first, optimizers[1], range(3))
    state = full_state(optimizers[1], first, OPTIMIZERS.get(MUON))
    second.load_state_dict(first.state_dict())
    load_full_state(optimizers[2], second, state)
    train(second, optimizers[2], range(3, 5))
    for name, master in whole.masters.items():
        assert torch.equal(second.masters[name], master), name
        assert torch.equal(second.parameters[name], whole.parameters[name]), name


def test_unknown_option_of_muon_is_refused_by_name() -> None:
    with refused("config.unknown-key", "optim.options.nesterow", "nesterov"):
        load_recipe(composed(*SMALL, "optim=muon", "+optim.options.nesterow=true"))


# --- runs -------------------------------------------------------------------------------------------------------------

MUON_RUN = ("optim=muon", "optim.sched.decay_ratio=0.5", "optim.sched.min_lr=0", "trainer.val_check_interval=6")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Muon, bfloat16 weights, warm-up, constant rate, decay, and growing batches."""
    folder = tmp_path_factory.mktemp("muon") / "run"
    growing = "data.batch_warmup={start: 8, increment: 8, samples: 16}"
    run_here(folder, *MUON_RUN, "trainer.precision=bf16", growing)
    return folder


def test_run_with_muon_learns_and_its_batches_grow(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["consumed_samples"] for line in steps] == [8, 16, 32, 48, 64, 80]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (finished / "laptop-averaged.nemo").is_file()


def test_run_with_muon_resumes_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    stop = Fault(
        "bionemo_esm.pretraining.checkpoints.Checkpoints.on_train_batch_end",
        functools.partial(send, signal.SIGTERM),
        call=3,
    )
    settings = (*MUON_RUN, "trainer.precision=bf16", "data.batch_warmup={start: 8, increment: 8, samples: 16}")
    folder = tmp_path / "run"
    assert run(folder, *settings, faults=[stop]).codes == [143]
    run_here(folder, *settings)
    assert losses(folder) == losses(finished)
    newest = [path / "checkpoints" / "step-000000006.ckpt" for path in (folder, finished)]
    assert newest[0].read_bytes() == newest[1].read_bytes()


def test_run_with_muon_continues_a_run_with_muon_and_refuses_the_state_of_adam(finished: Path, tmp_path: Path) -> None:
    parent = f"continue_from_path={finished}"
    summary = run_here(tmp_path / "more", *MUON_RUN, "trainer.precision=bf16", "trainer.max_steps=8", parent)
    assert summary["continued_from"]["steps"] == 6
    with refused("config.another-optimizer", "optim.name = muon", "fused_adam", "restore_from_path"):
        plan_of(*_planned(*SMALL, "trainer.max_steps=8", parent, f"data.store={finished / 'store'}"))


def test_diverging_run_with_muon_stops_by_the_guard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(tmp_path / "run", *MUON_RUN, "optim.lr=1e30", "optim.max_skipped_steps=2", "trainer.max_steps=9")
    assert ended.value.code == 3
    assert "a lower optim.lr" in capfd.readouterr().out


def _planned(*overrides: str) -> tuple[Any, Any]:
    recipe = load_recipe(composed(*overrides))
    return recipe, gather_facts(recipe)


# --- the plan ---------------------------------------------------------------------------------------------------------


TWO = ("data.micro_batch_size=4",)  # a global batch of 8 for two ranks


def test_plan_counts_the_state_the_work_and_the_gathered_bytes_of_muon() -> None:
    encoder = EncoderConfig()
    matrices = 6 * (3 * 768**2 + 768**2 + 2 * 768 * 3072) + 768**2
    memory = memory_per_device(encoder, 1000, precision="bf16", optimizer=MUON)
    assert memory.moments == 8 * encoder.parameters - 4 * matrices
    recipe = load_recipe(composed("recipe=laptop", "model=esm1nv", "optim=muon", "trainer.devices=2", *TWO))
    split = recipe.replace(trainer=recipe.trainer.replace(tensor_model_parallel_size=2))
    cost = Orthogonalization.of(split)
    assert cost.gathered_bytes == 4 * (matrices - 768**2) / 2
    assert Orthogonalization.of(recipe) == Orthogonalization(cost.flops, 0.0)
    assert newton_schulz_flops(2, 3) == newton_schulz_flops(3, 2) == 2 * (2 * 2 * 3) * 2 + 2 * 2**3
    text = " ".join(describe_plan(plan_of(split, gather_facts(split))).split())
    assert "muon orthogonalizes matrices" in text and "gathers" in text
    adam = load_recipe(composed(*SMALL))
    assert "orthogonalizes" not in describe_plan(plan_of(adam, gather_facts(adam)))


# --- warm-up, constant rate, linear decay -----------------------------------------------------------------------------


def test_schedule_warms_up_stays_constant_and_decays_linearly() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=WSD.lr)
    schedule, rates = build_schedule(optimizer, WSD), []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [2.5e-3, 5e-3, 7.5e-3, *[1e-2] * 6, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3, 1e-3]
    assert rates == pytest.approx(expected)
    assert rates == [learning_rate(WSD, step) for step in range(14)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_steps": 0}, "needs decay_steps"),
        ({"decay_steps": 10}, r"fit with warmup_steps \(3\) into max_steps \(12\)"),
        ({"constant_steps": 2}, "set constant_steps \\(2\\) to 0"),
        ({"schedule": "CosineAnnealing"}, "decay_steps \\(4\\) belongs to WarmupStableDecay"),
    ],
)
def test_impossible_decay_is_refused_with_its_keys(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**{**WSD.model_dump(), **values})


def test_record_of_other_schedules_has_no_decay() -> None:
    assert "decay_steps" not in OptimConfig().to_dict()
    assert WSD.to_dict()["decay_steps"] == 4
