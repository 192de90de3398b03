"""Fully sharded ranks compute what one rank does, hold their part of the state alone, and resume; real gloo groups."""

from __future__ import annotations

import functools
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, full_state, load_full_state
from bionemo_esm.model.parallel import data_parallel_rank, data_parallel_size, ensure_groups, gather_shards
from bionemo_esm.model.sharding import ShardedMasters, idle_batch, shard_encoder, with_idle_batches
from bionemo_esm.pretraining.recipe import TrainerConfig, load_recipe
from errors import refused
from faults import Fault, history, run, send
from models import tiny_model
from runs import SMALL, composed, losses
from test_parallel import BACKENDS, batch_of, on_ranks

SETTINGS = OptimConfig(lr=1e-2, min_lr=0.0, weight_decay=0.1, warmup_steps=2, constant_steps=0, max_steps=10, eps=1e-4)
BATCHES = 5
STEPS = 3
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


# --- one step, compared with one rank ---------------------------------------------------------------------------------


def trained(precision: str, ranks: int, rank: int) -> dict[str, Tensor]:
    """Train for some steps on a part of `BATCHES` batches; rank 0 has more than others, and with 4 ranks rank 3 none.

    Returns gradients of the first step, norms, losses, whole weights, the whole optimizer state, and the bytes held.
    """
    model = tiny_model(precision, init_method_std=0.05).train()
    assert model.encoder is not None
    if ranks > 1:
        shard_encoder(model.encoder, DTYPES[precision])
    parts = {1: [range(5)], 2: [range(3), range(3, 5)], 3: [range(2), range(2, 3), range(3, 5)]}
    parts[4] = [range(3), range(3, 4), range(4, 5), range(0)]
    own = [batch_of(index) for index in parts[ranks][rank]]
    masters = (ShardedMasters if ranks > 1 else MasterWeights)(model.named_parameters())
    optimizer = build_optimizer(masters, SETTINGS, BACKENDS)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = torch.zeros(())
        masters.zero_gradients()
        batches = with_idle_batches(own, CPU)
        for index, batch in enumerate(batches):
            part = cross_entropy(model(batch), batch.targets, reduction="sum") / 40
            if index < len(batches) - 1:
                part.backward()  # type: ignore[no-untyped-call]
            else:
                with masters.overlapped_reduction():
                    part.backward()  # type: ignore[no-untyped-call]
            loss = loss + part.detach()
        for name, master in masters.masters.items() if step == 0 else ():
            assert master.grad is not None
            found[f"gradient/{name}"] = whole(masters, name, master.grad)
        found[f"norm/{step}"] = masters.clip_gradients(0.5)
        found[f"loss/{step}"] = loss
        optimizer.step()
        masters.write_back()
    state = full_state(optimizer, masters)
    if ranks > 1:
        again = build_optimizer(masters, SETTINGS, BACKENDS)  # a new one loads what rank 0 has, given to every rank
        shared = [state]
        torch.distributed.broadcast_object_list(shared)
        load_full_state(again, masters, shared[0])
        for one, other in zip(optimizer.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    for index, values in state.get("state", {}).items():
        found |= {f"state/{index}/{key}": value for key, value in values.items()}
    found |= {f"weights/{n}": t for n, t in masters.state_dict().items() if t.device.type != "meta"}
    held = [*masters.masters.values(), *(t for values in optimizer.state.values() for t in values.values() if t.ndim)]
    found["held"] = torch.tensor(sum(tensor.numel() for tensor in held))
    return found


def whole(masters: MasterWeights, name: str, part: Tensor) -> Tensor:
    return gather_shards(part, masters.parameters[name]).clone()


def trained_on_ranks() -> dict[str, Tensor]:
    ensure_groups()
    results = {precision: trained(precision, data_parallel_size(), data_parallel_rank()) for precision in DTYPES}
    return {f"{precision}/{name}": tensor for precision, result in results.items() for name, tensor in result.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    results = {precision: trained(precision, 1, 0) for precision in DTYPES}
    return {f"{precision}/{name}": tensor for precision, result in results.items() for name, tensor in result.items()}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sharded_ranks_train_as_one_rank_and_hold_their_part(
    tmp_path: Path, alone: dict[str, Tensor], ranks: int
) -> None:
    results = on_ranks(ranks, tmp_path / "ranks", trained_on_ranks)
    first = results[0]
    assert first.keys() == alone.keys(), "rank 0 has the whole weights and the whole state"
    assert not any("weights/" in name or "state/" in name for name in results[1])
    for name, expected in alone.items():
        part = name.split("/")[1]
        found = sum(result[name] for result in results) if part == "loss" else first[name]
        if part == "held":
            most = max(int(result[name]) for result in results)
            assert sum(int(result[name]) for result in results) == int(expected)
            assert most <= 1.05 * int(expected) / ranks, "memory falls as 1 / ranks"
            continue
        exact = {"atol": 1e-5, "rtol": 1e-4} if name.startswith("32") else {"atol": 0.02, "rtol": 0.05}
        torch.testing.assert_close(found, expected, **exact, msg=lambda text, name=name: f"{name}: {text}")
        if part in ("gradient", "norm"):
            assert all(torch.equal(result[name], found) for result in results), name


def test_an_idle_batch_has_zero_loss_and_zero_gradients() -> None:
    model = tiny_model().train()
    batch = idle_batch()
    loss = cross_entropy(model(batch), batch.targets, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert model.score(batch).tolist() == [0, 0, 0]


# --- whole runs -------------------------------------------------------------------------------------------------------

WET = ("trainer.precision=bf16", "model.hidden_dropout=0.1", "model.attention_dropout=0.1")
DRY = ("model.hidden_dropout=0", "model.attention_dropout=0", "optim.eps=1e-4", "trainer.val_check_interval=2")
TOKENS = ("data.micro_batch_size=null", "data.micro_batch_tokens=256", "data.global_batch_size=null")
TOKENS += ("data.global_batch_tokens=2048",)
FULL = ("trainer.sharding=full", "trainer.recompute=full")


def stop_after(steps: int, rank: int) -> Fault:
    return Fault(
        "bionemo_esm.pretraining.checkpoints.Checkpoints.on_train_batch_end",
        functools.partial(send, signal.SIGTERM),
        call=steps,
        rank=rank,
    )


@pytest.mark.slow
def test_sharded_run_stops_on_four_ranks_and_ends_on_three_as_an_unbroken_run_on_one(tmp_path: Path) -> None:
    settings = (*DRY, *TOKENS, "trainer.max_steps=4", "trainer.limit_val_batches=null")
    assert run(tmp_path / "alone", *settings).codes == [0]
    assert run(tmp_path / "run", *settings, *FULL, ranks=4, faults=[stop_after(2, 3)]).codes == [143] * 4
    assert run(tmp_path / "run", *settings, *FULL, ranks=3).codes == [0] * 3
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    validated = [
        [line["loss"] for line in history(tmp_path / name) if line["kind"] == "validation"] for name in ("run", "alone")
    ]
    assert len(validated[1]) == 2
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    for archive in ("laptop.nemo", "laptop-averaged.nemo"):
        found, expected = (ArchiveFile.open(tmp_path / name / archive).load_weights() for name in ("run", "alone"))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_sharded_run_resumes_bit_for_bit_on_the_same_ranks(tmp_path: Path) -> None:
    settings = (*WET, *FULL, "trainer.max_steps=3", "data.micro_batch_size=4")
    assert run(tmp_path / "whole", *settings, ranks=2).codes == [0] * 2
    assert run(tmp_path / "broken", *settings, ranks=2, faults=[stop_after(1, 1)]).codes == [143] * 2
    assert run(tmp_path / "broken", *settings, ranks=2).codes == [0] * 2
    newest = [tmp_path / name / "checkpoints" / "step-000000003.ckpt" for name in ("whole", "broken")]
    assert newest[0].read_bytes() == newest[1].read_bytes()


@pytest.mark.slow
def test_every_rank_skips_a_step_whose_loss_is_not_finite_on_one(tmp_path: Path) -> None:
    spoil = Fault("bionemo_esm.model.esm1nv.ESM1nvModel.forward", spoil=not_finite, rank=1)
    assert run(tmp_path / "run", *DRY, *FULL, "trainer.max_steps=2", ranks=2, faults=[spoil]).codes == [0, 0]
    skipped = [line for line in history(tmp_path / "run") if line["kind"] == "skipped"]
    assert [(line["step"], {suspect["rank"] for suspect in line["suspects"]}) for line in skipped] == [(1, {1})]
    assert math.isfinite(losses(tmp_path / "run")[2])


def not_finite(tensor: Tensor) -> Tensor:
    return tensor * math.nan


# --- the configuration ------------------------------------------------------------------------------------------------


def test_old_key_of_the_sharded_optimizer_still_works() -> None:
    assert TrainerConfig(shard_optimizer=True).sharding == "optimizer"
    assert TrainerConfig(shard_optimizer=True, sharding="optimizer").sharding == "optimizer"
    assert TrainerConfig().sharding == "none"
    with refused("config.sharding", "trainer.shard_optimizer"):
        TrainerConfig(shard_optimizer=True, sharding="full")


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer=gpu", "trainer.tensor_model_parallel_size=2"),
        ("optim=muon",),
        ("probe.task=stability", "probe.data.train=[train.csv]"),
    ],
    ids=["tensor parallel", "muon", "probe"],
)
def test_full_sharding_is_refused_by_name_where_it_does_not_work(overrides: tuple[str, ...]) -> None:
    with refused("config.sharding", "trainer.sharding=optimizer"):
        load_recipe(composed(*SMALL, *overrides, "trainer.sharding=full"))
