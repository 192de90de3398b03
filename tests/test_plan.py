"""The run plan: the model cards' numbers by hand, the sources of its facts, its warnings, and its output."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bionemo_esm import config_directory
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, write_archive
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.plan import (
    SPREAD,
    DataFacts,
    DeviceFacts,
    Facts,
    Plan,
    StartFacts,
    findings,
    gather_facts,
    plan_of,
    scientific,
    sharding_choices,
)
from bionemo_esm.pretraining.plan_report import describe_plan, key_rates
from bionemo_esm.pretraining.preflight import _missing_space
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from bionemo_esm.pretraining.run import pretrain
from runs import ROOT, command_here, composed

CARD = DataFacts("published", 51_000_000, 248.0, SPREAD * 248.0**2)
SAMPLE = DataFacts("the shipped sample", 2_600, 309.1, 309.1**2 * 1.25, 200, 1_024)
A100 = DeviceFacts("A100", "published", "bf16", 40 * 10**9, 312e12, 19.5e12)
V100 = DeviceFacts("V100-SXM2-32GB", "published", "32", 32 * 10**9, None, 15.7e12)
FACTS = Facts(CARD, A100, next_recipe="esm1nv_phase2")
PHASE_1_SAMPLES = 22_759_440_000  # 349,500 x 65,120
H, F, L, V = 768, 3072, 6, 128  # ESM-1nv: hidden size, MLP width, layers, embedding rows


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@cache
def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(composed(*overrides))


def planned(*overrides: str, facts: Facts = FACTS) -> Plan:
    return plan_of(recipe_of(*overrides), facts)


def gathered(*overrides: str) -> Plan:
    recipe = recipe_of(*overrides)
    return plan_of(recipe, gather_facts(recipe))


def text_of(plan: Plan) -> str:
    """Return the printed plan on one line."""
    return " ".join(describe_plan(plan).split())


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_plan_of_phase_1_matches_its_model_card() -> None:
    plan = planned()
    assert plan.samples == PHASE_1_SAMPLES
    assert plan.tokens == PHASE_1_SAMPLES * 248 == pytest.approx(5.644e12, rel=1e-3)
    assert plan.steps_per_epoch == pytest.approx(783.17, abs=0.01)
    assert plan.epochs == pytest.approx(446.26, abs=0.01)
    forward_of_a_sequence = (
        248 * L * (8 * H * H + 4 * H * F) + 1.4 * 248**2 * L * 4 * H + 0.15 * 246 * (2 * H * H + 2 * H * V)
    )
    assert plan.flops == pytest.approx(3 * forward_of_a_sequence * PHASE_1_SAMPLES)
    assert plan.device_seconds == pytest.approx(plan.flops / (312e12 * 0.35))
    assert plan.wall_seconds == pytest.approx(plan.flops / (312e12 * 0.35) / 176)
    assert plan.tokens_per_second_and_device == pytest.approx(5.644e12 / plan.wall_seconds / 176, rel=1e-3)


def test_plan_of_phase_2_starts_where_phase_1_ends() -> None:
    plan = gathered("recipe=esm1nv_phase2")
    assert plan.facts.start.step == 349_500
    assert plan.steps == 608_110
    assert plan.samples == 608_110 * 53_280
    assert plan.epochs == pytest.approx(635.3, abs=0.05)


def test_plan_of_esm1b_counts_tokens() -> None:
    plan = gathered("recipe=esm1b")
    assert plan.tokens == pytest.approx(500_000 * 131_072)
    assert plan.batch.sequences == pytest.approx(131_072 / 289)
    assert plan.batch.micro_tokens == pytest.approx(1_024)  # a 128th of the batch
    assert plan.batch.most_micro_tokens == 2_048  # shares differ by at most one longest sequence
    assert plan.precision == "32"  # V100s do not support bf16
    assert plan.device_seconds == pytest.approx(plan.flops / (15.7e12 * 0.35))


@pytest.mark.parametrize("name", ["esm1nv_phase1", "esm1nv_phase2", "esm1b"])
def test_cost_in_a_recipe_header_equals_its_plan(name: str) -> None:
    header = (config_directory() / "recipe" / f"{name}.yaml").read_text().split("# expect")[0].split("# cost")[1]
    plan = gathered(f"recipe={name}")
    assert plan.device_seconds is not None
    for pattern, value in (
        (r"([\d.e]+) tokens", plan.tokens),
        (r"([\d.e]+) FLOPs", plan.flops),
        (r"([\d,]+) [AV]100 hours", plan.device_seconds / 3600),
    ):
        (written,) = re.findall(pattern, header.split(" in float32")[0].replace("248 tokens", ""))
        assert float(written.replace(",", "")) == pytest.approx(value, rel=0.015), pattern


def test_fewer_gpus_only_take_longer() -> None:
    whole, alone = planned(), planned("trainer.num_nodes=1", "trainer.devices=1")
    assert whole.wall_seconds is not None
    assert alone.batch.accumulation == 176
    assert (alone.samples, alone.flops, alone.memory) == (whole.samples, whole.flops, whole.memory)
    assert alone.wall_seconds == pytest.approx(176 * whole.wall_seconds)
    assert "the published batch" in text_of(alone)
    assert "the source had 176, which does not matter" in text_of(alone)


@pytest.mark.parametrize(
    ("overrides", "accumulation", "micro_tokens"),
    [
        (("data.micro_batch_size=185",), 2, 45_880),
        (("data.micro_batch_size=null", "data.micro_batch_tokens=30000"), 4, 22_940),  # 91,760 tokens per rank
        (("trainer.num_nodes=11", "data.micro_batch_size=null", "data.micro_batch_tokens=200000"), 1, 183_520),
        (("trainer.tensor_model_parallel_size=2",), 2, 91_760),  # 88 data-parallel ranks
    ],
)
def test_micro_batches_add_up_to_the_global_batch(
    overrides: tuple[str, ...], accumulation: int, micro_tokens: float
) -> None:
    batch = planned(*overrides).batch
    assert (batch.accumulation, batch.micro_tokens) == (accumulation, pytest.approx(micro_tokens))


def test_memory_is_estimated_for_the_mean_and_the_largest_micro_batch() -> None:
    plan = planned()
    assert plan.memory.masters == plan.memory.gradients == 4 * 43_612_544
    assert plan.most_memory.activations / plan.memory.activations == pytest.approx(512 / 248)
    halves = planned("trainer.tensor_model_parallel_size=2")
    assert halves.memory.parameters < 0.52 * plan.memory.parameters
    shared_by_8 = planned("trainer.shard_optimizer=true", "trainer.num_nodes=1", "trainer.devices=8")
    assert shared_by_8.memory.moments == plan.memory.moments / 8
    sharded = planned("trainer.shard_optimizer=true")
    assert sharded.memory.moments == 8 * 3072 * 768, "tensors are not cut: the largest is the least"


def test_recomputation_saves_memory_and_costs_time_but_no_flops_of_the_model() -> None:
    plan, selective, full = (planned(f"trainer.recompute={kind}") for kind in ("none", "selective", "full"))
    saved = [kind.memory.activations + kind.memory.recomputed for kind in (plan, selective, full)]
    assert saved[0] > saved[1] > saved[2]
    assert plan.flops == selective.flops == full.flops
    assert plan.wall_seconds and full.wall_seconds
    assert full.wall_seconds / plan.wall_seconds == pytest.approx(4 / 3, rel=0.02)  # the head is not computed again
    assert "recomputed" in text_of(full)
    assert "33% more are computed again" in text_of(full)
    assert "again" not in text_of(plan)


def test_sharding_choices_are_those_that_work_with_the_least_work_first() -> None:
    found = sharding_choices(planned())
    assert [(choice.sharding, choice.recompute) for choice in found] == [
        *((sharding, recompute) for sharding in ("none", "optimizer", "full") for recompute in ("none", "selective")),
        *((sharding, "full") for sharding in ("none", "optimizer", "full")),
    ]
    assert found[0].memory_bytes == planned().most_memory.total
    assert min(found, key=lambda choice: choice.memory_bytes) == found[-1]
    split = sharding_choices(planned("trainer.tensor_model_parallel_size=2"))
    assert {choice.recompute for choice in split} == {"none", "full"}
    assert {choice.sharding for choice in split} == {"none", "optimizer"}


def test_disk_space_is_the_sum_of_file_sizes() -> None:
    storage, weights = planned().storage, 4 * 43_612_544
    assert storage.checkpoints == 350  # one every 1,000 steps (349), and one at the end
    assert storage.written_bytes == 350 * (3 + 1) * weights + 2 * weights
    # Checkpoints: 3 last, best, next. Snapshots: 47 and the next. 2 archives.
    assert storage.peak_bytes == (5 * 3 + 48 + 2) * weights
    plain = planned("exp_manager.checkpoints.average_last=0", "exp_manager.checkpoints.keep_best=false").storage
    assert plain.peak_bytes == (4 * 3 + 1) * weights
    short = planned("trainer.max_steps=3000").storage
    assert short.peak_bytes == short.written_bytes == (3 * (3 + 1) + 2) * weights, "no more than is written"
    continued = planned("recipe=esm1nv_phase2", facts=replace(FACTS, start=StartFacts(349_500))).storage
    assert continued.checkpoints == 957 - 349 + 1


def test_disk_space_error_of_a_run_states_the_same_space_as_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    recipe = load_recipe(composed())
    (planned_line,) = (line for line in findings(plan_of(recipe, gather_facts(recipe))) if "exp_dir" in line)
    (refusal,) = _missing_space(recipe)
    assert re.findall(r"[\d.]+ GB", refusal)[0] == re.findall(r"[\d.]+ GB", planned_line)[0] == "11.3 GB"


def test_key_steps_of_the_schedule_are_in_order() -> None:
    assert [(step, scientific(rate)) for step, rate, _ in key_rates(planned())] == [
        (0, "0"),
        (500, "2e-4"),
        (349_500, "1.42e-4"),
        (907_610, "2e-5"),
    ]
    said = (
        "0 at first; 2e-4 at its peak (step 500); 1.42e-4 at the end (step 349,500); 2e-5 from step 907,610 on, after"
    )
    assert said in text_of(planned())
    phase_2 = planned("recipe=esm1nv_phase2", facts=replace(FACTS, start=StartFacts(349_500)))
    assert [step for step, _, _ in key_rates(phase_2)] == [349_500, 907_610, 957_610]
    assert [step for step, _, _ in key_rates(planned("recipe=esm1b"))] == [0, 16_000, 500_000]


# --- sources of facts -------------------------------------------------------------------------------------------------


def test_existing_store_takes_precedence_over_published_numbers(sample_store: ProteinStore) -> None:
    data = gathered(f"data.store={sample_store.folder}").facts.data
    tokens = np.minimum(sample_store.split("train").lengths.astype(float) + 2, 512)
    assert data.source == f"store {sample_store.folder}"
    assert (data.train_sequences, data.validation_sequences) == (2_600, 200)
    assert data.mean_tokens == pytest.approx(tokens.mean())
    assert data.mean_squared_tokens == pytest.approx((tokens**2).mean())
    assert data.longest_residues == sample_store.split("train").lengths.max()


def test_without_a_store_the_plan_uses_published_numbers_and_states_it() -> None:
    plan = gathered()
    assert plan.facts.data.train_sequences == 51_000_000
    assert "(published, as there is no store in data/uniref50_2022_05)" in text_of(plan)


def test_laptop_recipe_is_planned_from_the_sample_before_a_store_exists(sample_store: ProteinStore) -> None:
    of_files, of_store = gathered("recipe=laptop"), gathered("recipe=laptop", f"data.store={sample_store.folder}")
    assert of_files.facts.data == replace(of_store.facts.data, source="the shipped sample")
    assert of_files.device_seconds is None
    assert "not known for a CPU before it runs" in text_of(of_files)
    assert findings(of_files) == []


def test_unknown_dataset_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match=r"plan: what mine\.fasta holds is known when it is a store"):
        gathered("recipe=laptop", "data.fasta=mine.fasta")
    with pytest.raises(ConfigError, match=r"plan: data\.store: nowhere is not here, and recipe laptop does not say"):
        gathered("recipe=laptop", "data.store=nowhere")


def test_fasta_file_can_be_planned_after_the_command_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proteins = ("MKTAYIAKQRQISFVKSHFSRQ", "LEERLGLIEVQAPILSRVGDGT", "QDNLSGAEKAVQVKVKALPDAQ")
    Path("three of mine.fasta").write_text("".join(f">{text[:3]}\n{text}\n" for text in proteins))
    with pytest.raises(ConfigError) as refused:
        gathered("recipe=laptop", "data.fasta='three of mine.fasta'")
    command, _, keys = str(refused.value).partition("bionemo-esm ")[2].partition(", then plan with ")
    command_here(*shlex.split(command))
    data = gathered("recipe=laptop", *keys.split()).facts.data
    assert (data.source, data.train_sequences, data.validation_sequences) == ("store data/mine", 1, 1)


def test_local_gpu_is_used_if_this_machine_could_be_a_node_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    here = gathered().facts.device
    assert (here.name, here.memory_bytes, here.bf16_flops) == ("NVIDIA H100 80GB HBM3", 85 * 10**9, 989e12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    there = gathered().facts.device
    assert (there.name, there.source, there.bf16_flops) == ("A100", "published", 312e12)
    unnamed = gathered(
        "recipe=laptop", "trainer.accelerator=gpu", "trainer.devices=8", "data.micro_batch_size=1"
    ).facts.device
    assert unnamed.name == "NVIDIA H100 80GB HBM3"


def test_without_a_published_mfu_time_is_bounded_by_peak_flops() -> None:
    text = text_of(planned("recipe=laptop", "trainer.accelerator=gpu"))
    assert re.search(r"at least [\d.e-]+ GPU hours, at the peak of 312 TFLOP/s", text)
    unknown = replace(FACTS, device=DeviceFacts("NVIDIA Next", "of this machine", "bf16"))
    assert "no peak is on record for NVIDIA Next in bfloat16" in text_of(planned(facts=unknown))


def checkpoint(path: Path, steps: int, samples: int, seed: int = 42, rate: float | None = None) -> Path:
    """Write a checkpoint of ESM-1nv's phase 1 with the fields that a plan reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    card = recipe_of()
    provenance = {"steps": steps, "consumed_samples": samples}
    rate = learning_rate(card.optim, steps) if rate is None else rate
    state = {
        "identity": {"seed": seed, "data.masking": card.data.masking.record},
        "optimizer_states": [{"param_groups": [{"lr": rate}]}],
    }
    config = {"encoder": card.model.to_dict()}
    return write_archive(path, Archive("ESM1nvModel", config, {"w": torch.zeros(2)}, provenance, state))


def test_continued_run_starts_at_the_newest_readable_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "phase1" / "checkpoints"
    first = checkpoint(folder / "step-000000900.ckpt", 900, 51_000_000)
    checkpoint(folder / "step-000001000.ckpt", 1_000, 102_000_000)
    (folder / "step-000002000.ckpt").write_bytes(b"cut short")
    phase_2 = ("recipe=esm1nv_phase2", "trainer.max_steps=2000")
    plan = gathered(*phase_2, f"continue_from_path={tmp_path}/phase1")
    assert (plan.facts.start.step, plan.steps) == (1_000, 1_000)
    text = text_of(plan)
    assert "after the first 1,000 (step-000001000.ckpt of" in text
    assert "3.0 epochs with those before" in text  # two epochs, plus 1,000 x 53,280 / 51 million
    assert gathered(*phase_2, f"continue_from_path={first}").facts.start.step == 900
    with pytest.raises(ConfigError, match=r"continue_from_path: .* is at step 1,000 already, and trainer\.max_steps"):
        gathered("recipe=esm1nv_phase2", "trainer.max_steps=1000", f"continue_from_path={tmp_path}/phase1")
    for good in ("step-000000900.ckpt", "step-000001000.ckpt"):
        (folder / good).unlink()
    with pytest.raises(ConfigError, match=r"continue_from_path: .*step-000002000\.ckpt"):
        gathered(*phase_2, f"continue_from_path={tmp_path}/phase1")


def test_plan_refuses_a_checkpoint_that_the_run_would_refuse(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "a.ckpt", 900, 51_000_000, seed=7)
    with pytest.raises(ConfigError, match="seed = 7, this run has 42; continue_from_path goes on in the same stream"):
        gathered("recipe=esm1nv_phase2", f"continue_from_path={theirs}")
    ours = checkpoint(tmp_path / "b.ckpt", 900, 51_000_000)
    with pytest.raises(ConfigError, match=r"another model: model\.num_layers differ"):
        gathered("recipe=esm1nv_phase2", f"continue_from_path={ours}", "model.num_layers=5")


def test_checkpoint_without_a_pretraining_state_is_rejected(tmp_path: Path) -> None:
    odd = Archive("ESM1nvModel", {}, {"w": torch.zeros(2)}, {"steps": 3}, {"identity": [1]})
    write_archive(tmp_path / "odd.ckpt", odd)
    with pytest.raises(ConfigError, match=r"odd\.ckpt is not the checkpoint of a pretraining run"):
        gathered("recipe=esm1nv_phase2", f"continue_from_path={tmp_path / 'odd.ckpt'}")


def test_learning_rate_jump_after_the_parent_run_is_reported(tmp_path: Path) -> None:
    smooth = gathered("recipe=esm1nv_phase2", f"continue_from_path={checkpoint(tmp_path / 'a.ckpt', 900, 1)}")
    assert not any("the rate goes from" in line for line in findings(smooth))
    other = checkpoint(tmp_path / "b.ckpt", 900, 1, rate=1e-5)
    jumping = gathered("recipe=esm1nv_phase2", f"continue_from_path={other}")
    assert any("the rate goes from 1.00e-05, where the run before left it, to 2.00e-04" in x for x in findings(jumping))


# --- warnings ---------------------------------------------------------------------------------------------------------


EPOCHS_OF_PHASE_1 = "the source's 349,500 steps of 65,120 make 446 epochs of 51,000,000 sequences; it says about 420"
# With this number of sequences the card's epochs are right.
IN_420_EPOCHS = replace(FACTS, data=replace(CARD, train_sequences=54_189_143))


def test_published_recipes_only_warn_about_their_epochs() -> None:
    (line,) = findings(planned())
    assert line.startswith(EPOCHS_OF_PHASE_1)
    assert "trainer.max_steps=328931 would make 420" in line
    (line,) = findings(planned("recipe=esm1nv_phase2", facts=replace(FACTS, start=StartFacts(349_500))))
    assert "make 635 epochs of 51,000,000 sequences; it says about 600" in line
    assert findings(planned(facts=IN_420_EPOCHS)) == []


def of_data(**changes: Any) -> Facts:
    return replace(IN_420_EPOCHS, data=replace(IN_420_EPOCHS.data, **changes))


def cases() -> Iterator[tuple[str, tuple[str, ...], Facts, str]]:
    plain, schedule = IN_420_EPOCHS, "optim.sched.max_steps (957,610)"
    yield "batch", ("data.global_batch_size=32560", "data.micro_batch_size=185"), plain, "the recipe's 65,120"
    yield "length", ("trainer.max_steps=300000",), plain, "300,000 steps long, the published one 349,500"
    yield (
        "an epoch",
        ("trainer.max_steps=500",),
        plain,
        "the run sees 60.1% of the training sequences; trainer.max_steps=833",
    )
    yield "tiny data", (), of_data(train_sequences=60_000), "a global batch of 65,120 sequences is more than the 60,000"
    yield "warm-up", ("trainer.max_steps=500",), plain, "optim.sched.warmup_steps (500) are not over when the run ends"
    yield (
        "short schedule",
        ("optim.sched.max_steps=300000",),
        plain,
        "stays at its minimum for the 49,500 steps after it",
    )
    yield (
        "long schedule",
        (),
        replace(plain, next_recipe=None),
        f"{schedule}: the run ends at step 349,500, at a rate of 0.00014",
    )
    yield (
        "positions",
        ("data.max_residues=400",),
        plain,
        "no sequence is so long (data.max_residues: 400), and its last 110",
    )
    yield "store's longest", (), of_data(longest_residues=300), "(the store's longest: 300), and its last 210"
    yield (
        "shares",
        ("recipe=esm1b",),
        plain,
        "a rank's share of a batch is 1,024 tokens, about 4.1 sequences of up to 1,024",
    )
    yield "two nodes", ("trainer.num_nodes=33", "trainer.tensor_model_parallel_size=3"), plain, "lie on two nodes"
    yield (
        "memory",
        ("data.micro_batch_size=8140", "trainer.num_nodes=1"),
        plain,
        "CUDA a few; micro_batch_size=407 always fits",
    )
    tokens = ("trainer.num_nodes=11", "data.micro_batch_size=null", "data.micro_batch_tokens=300000")
    yield "memory of tokens", tokens, plain, "micro_batch_tokens=244736 fits"
    small = replace(plain, device=replace(A100, memory_bytes=24 * 10**9))
    yield (
        "memory at worst",
        (),
        small,
        "data.micro_batch_size takes 14.0, but would take 28.0 GB of the 24.0 that A100 has if all",
    )
    derived = (
        "recipe=esm1nv_phase1",
        "data.global_batch_size=null",
        "data.micro_batch_size=740",
        "trainer.num_nodes=11",
    )
    yield (
        "memory without a global batch",
        derived,
        plain,
        "micro_batch_size=370 and global_batch_size=65120 always fits",
    )
    tiny = replace(plain, device=replace(A100, memory_bytes=3 * 10**8))
    weights = ("data.micro_batch_size=1",)
    yield "memory for weights", weights, tiny, "trainer.sharding=full trainer.recompute=none fits: 0.2 GB"
    less = replace(plain, device=replace(A100, memory_bytes=10**8))
    yield "memory for less", weights, less, "more devices with trainer.sharding=full"
    volta = replace(plain, device=V100)
    yield "bf16", (), volta, "trainer.precision=bf16: V100-SXM2-32GB has no units for it"
    yield (
        "validation",
        (),
        of_data(validation_sequences=175),
        "175 validation sequences cannot be divided among 176 ranks",
    )
    yield "validating late", ("trainer.val_check_interval=400000",), plain, "only its end is validated"
    every = "exp_manager.checkpoints.every_n_train_steps=400000"
    yield "checkpoints", (every,), plain, "no checkpoint to resume from before its end"
    yield "no average", (every,), plain, "there is one checkpoint and no average"
    yield (
        "average",
        ("trainer.max_steps=10000",),
        plain,
        "(47) x every_n_train_steps (1,000) reach back beyond the run's 10,000",
    )
    yield "disk", (), replace(plain, free_bytes=10**10), "the run takes 11.3 GB, 10.0 are free"
    absent = replace(plain, start=StartFacts(349_500, None, "published", missing=True))
    away = ("recipe=esm1nv_phase2", "continue_from_path=/away")
    yield "origin", away, absent, "there is no /away here; its number of steps is not known, and taken as 349,500"


@pytest.mark.parametrize(("overrides", "facts", "said"), [pytest.param(*case, id=name) for name, *case in cases()])
def test_inconsistent_settings_are_reported_with_a_remedy(overrides: tuple[str, ...], facts: Facts, said: str) -> None:
    assert any(said in line for line in findings(planned(*overrides, facts=facts))), "\n".join(
        findings(planned(*overrides, facts=facts))
    )


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (("trainer.precision=auto",), replace(IN_420_EPOCHS, device=V100)),  # float32 on V100
        (("data.max_residues=510",), IN_420_EPOCHS),
        ((), of_data(validation_sequences=176, longest_residues=510)),
        ((), replace(IN_420_EPOCHS, free_bytes=11_400_000_000)),
        (("trainer.num_nodes=1", "trainer.devices=1"), IN_420_EPOCHS),
        (("trainer.val_check_interval=349500",), IN_420_EPOCHS),
        (
            ("recipe=laptop", "data.micro_batch_size=4", "data.global_batch_size=4"),
            replace(FACTS, data=SAMPLE),
        ),  # one device
    ],
)
def test_consistent_settings_give_no_warning(overrides: tuple[str, ...], facts: Facts) -> None:
    lines = findings(planned(*overrides, facts=facts))
    assert [line for line in lines if "micro_batch_size" not in line] == []


# --- output -----------------------------------------------------------------------------------------------------------


def refusal(capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    with pytest.raises(SystemExit) as stop:
        pretrain(composed("plan=true", *overrides))
    assert stop.value.code == 2
    return capfd.readouterr().err


def test_plan_of_an_impossible_run_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert "100 sequences leaves some of 176 ranks idle" in refusal(capfd, "data.global_batch_size=100")
    short_budget = ("recipe=esm1b", "data.micro_batch_tokens=1000")
    assert "(1000) must hold a sequence of model.seq_length (1024)" in refusal(capfd, *short_budget)
    assert "leave no step for the cosine" in refusal(capfd, "optim.sched.max_steps=50500")
    assert "trainer.precision must be one of" in refusal(capfd, "trainer.precision=16")


def test_command_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    """Run in a separate process, which must not import NeMo, Lightning or Megatron."""
    code = (
        "import atexit, runpy, sys\n"
        "names = ('nemo', 'lightning', 'megatron')\n"
        "atexit.register(lambda: print('imported:', [name for name in names if name in sys.modules]))\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'pretrain_esm1nv.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "plan=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    assert "esm1nv_phase1: a plan; nothing is started" in done.stdout
    assert EPOCHS_OF_PHASE_1[:60] in done.stdout
    assert "imported: []" in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
    assert not list(tmp_path.iterdir())


def test_only_rank_0_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    pretrain(composed("plan=true"))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_next_recipe_is_found_among_the_shipped_recipes() -> None:
    assert gathered().facts.next_recipe == "esm1nv_phase2"
    assert gathered("recipe=laptop").facts.next_recipe is None
