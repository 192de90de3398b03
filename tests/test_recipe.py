"""The recipes: the card's numbers, what changes a run's identity, and the arithmetic of batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.screen import duration
from bionemo_esm.training.prepared import validation_batch_size
from bionemo_esm.training.recipe import Recipe, load_recipe
from runs import composed


def recipe(*overrides: str) -> Recipe:
    return load_recipe(composed(*overrides))


def test_the_default_recipe_on_22_nodes_is_the_model_cards_phase_1() -> None:
    card = recipe("trainer.num_nodes=22")
    assert card.name == "esm1nv_phase1"
    assert card.trainer.world_size == 176
    assert card.global_batch_size == 65_120
    assert card.trainer.max_steps == 349_500
    assert card.epochs(52_000_000) == pytest.approx(437.7, abs=0.1)
    assert (card.optim.betas, card.optim.weight_decay) == ((0.9, 0.98), 0.01)
    assert (card.optim.lr, card.optim.min_lr) == (2e-4, 2e-5)
    assert (card.optim.warmup_steps, card.optim.constant_steps, card.optim.max_steps) == (500, 50_000, 957_610)
    assert (card.model.hidden_dropout, card.optim.gradient_clip_val) == (0.1, 1.0)
    assert card.model.parameters == 43_612_544
    assert card.data.max_residues == 1024


@pytest.mark.parametrize("sequences", [176, 177, 5_000, 1_000_000])
def test_validation_is_dealt_so_that_none_of_176_ranks_goes_without(sequences: int) -> None:
    card = recipe("trainer.num_nodes=22")
    batches = -(-sequences // validation_batch_size(card, sequences))
    assert batches >= 176
    with pytest.raises(ConfigError, match="175 validation sequences cannot be dealt to 176 ranks"):
        validation_batch_size(card, 175)


def test_accumulation_takes_the_place_of_nodes() -> None:
    assert recipe("trainer.accumulate_grad_batches=22").global_batch_size == 65_120
    whole = recipe("data.global_batch_size=65120", "trainer.num_nodes=2")
    assert whole.batch_plan().accumulation == 11


def test_a_group_on_the_command_line_overrides_the_recipes_own() -> None:
    chosen = recipe("recipe=laptop", "model=esm1nv", "trainer.max_steps=2")
    assert chosen.model.parameters == 43_612_544
    assert chosen.trainer.accelerator == "cpu"
    assert chosen.optim.warmup_steps == 0


def test_warm_up_may_be_a_share_of_the_steps_but_not_both() -> None:
    ratio = ("optim.sched.warmup_steps=null", "optim.sched.warmup_ratio=0.1")
    assert recipe("recipe=laptop", *ratio, "trainer.max_steps=200").optim.warmup_steps == 20
    with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio are both set"):
        recipe("recipe=laptop", "optim.sched.warmup_steps=5", "optim.sched.warmup_ratio=0.1")


def test_the_run_folder_follows_from_what_is_computed_and_from_nothing_else() -> None:
    laptop = recipe("recipe=laptop")
    same = (
        "data.num_workers=3",
        "trainer.log_every_n_steps=7",
        "trainer.val_check_interval=9",
        "data.micro_batch_size=4",
    )
    other = (
        "seed=1",
        "model.num_layers=1",
        "optim.lr=1e-3",
        "trainer.max_steps=9",
        "data.fasta=x",
        "trainer.precision=32",
    )
    assert laptop.run_folder == Path("runs") / f"laptop-{laptop.fingerprint}"
    for override in same:
        assert recipe("recipe=laptop", override).run_folder == laptop.run_folder, override
    for override in other:
        assert recipe("recipe=laptop", override).run_folder != laptop.run_folder, override
    assert recipe("recipe=laptop", "exp_manager.name=mine").run_folder == Path("runs/mine")


def test_other_ranks_with_the_same_global_batch_are_the_same_run() -> None:
    laptop = recipe("recipe=laptop", "data.global_batch_size=8", "data.micro_batch_size=4")
    assert replace(laptop, trainer=replace(laptop.trainer, devices=2)).fingerprint == laptop.fingerprint


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (200_000, "2 d 7:33:20")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
