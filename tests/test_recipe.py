"""The recipes: the model cards' numbers, the run fingerprint, and batch arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from bionemo_esm.console import duration
from bionemo_esm.errors import ConfigError
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from bionemo_esm.pretraining.run_context import validation_batch_size
from errors import assert_sections_must_be_mappings, refused
from models import tiny_model
from runs import composed


def recipe(*overrides: str) -> Recipe:
    return load_recipe(composed(*overrides))


def test_default_recipe_on_22_nodes_equals_the_model_cards_phase_1() -> None:
    card = recipe()
    assert recipe("trainer.num_nodes=22") == card
    assert card.name == "esm1nv_phase1"
    assert card.trainer.world_size == 176
    assert card.global_batch_size == 65_120
    assert card.trainer.max_steps == 349_500
    assert card.batch_departure() is None
    assert (card.optim.betas, card.optim.weight_decay) == ((0.9, 0.98), 0.01)
    assert (card.optim.lr, card.optim.min_lr) == (2e-4, 2e-5)
    assert (card.optim.warmup_steps, card.optim.constant_steps, card.optim.max_steps) == (500, 50_000, 957_610)
    assert (card.model.hidden_dropout, card.optim.gradient_clip_val) == (0.1, 1.0)
    assert card.model.parameters == 43_612_544
    assert card.data.max_residues == 1024


@pytest.mark.parametrize("value", ["0", "false", "null", "5"])
def test_masking_that_is_not_a_section_is_rejected(value: str) -> None:
    with refused("config.type", "data.masking must be a mapping"):
        recipe(f"data.masking={value}")


@pytest.mark.parametrize("sequences", [176, 177, 5_000, 1_000_000])
def test_every_one_of_176_ranks_gets_validation_batches(sequences: int) -> None:
    card = recipe()
    batches = -(-sequences // validation_batch_size(card, sequences))
    assert batches >= 176
    with pytest.raises(ConfigError, match="175 validation sequences cannot be divided among 176 ranks"):
        validation_batch_size(card, 175)


def test_phase_2_continues_the_schedule_of_phase_1_with_batches_of_144_gpus() -> None:
    first, second = recipe(), recipe("recipe=esm1nv_phase2")
    assert second.optim == first.optim
    assert second.model == first.model
    assert second.trainer.world_size == 144
    assert second.global_batch_size == 53_280
    assert second.trainer.max_steps == 957_610
    assert second.exp_manager.checkpoints.average_last == 47
    assert second.published is not None
    assert second.published.continues == "esm1nv_phase1"
    assert second.batch_departure() is None


def test_esm1b_uses_batches_of_131072_tokens_on_128_gpus() -> None:
    card = recipe("recipe=esm1b")
    assert (card.model.num_layers, card.model.hidden_size, card.model.num_attention_heads) == (33, 1280, 20)
    assert (card.model.seq_length, card.model.embedding_layernorm, card.model.token_dropout) == (1024, True, True)
    assert card.trainer.world_size == 128
    assert card.trainer.max_steps == 500_000
    assert card.data.global_batch_tokens == 131_072
    assert card.global_batch_size is None
    assert card.mean_batch_sequences(256.0) == 512
    assert (card.optim.lr, card.optim.warmup_steps, card.optim.schedule) == (1e-4, 16_000, "InverseSquareRoot")
    assert (card.optim.betas, card.optim.weight_decay) == ((0.9, 0.999), 0.0)
    assert card.batch_departure() is None


@pytest.mark.parametrize(
    ("machine", "accumulation"),
    [
        (("trainer.num_nodes=1", "trainer.devices=1"), 176),
        (("trainer.num_nodes=2",), 11),
        (("trainer.num_nodes=44",), 1),
    ],
)
def test_other_machines_accumulate_to_the_same_global_batch(machine: tuple[str, ...], accumulation: int) -> None:
    micro = ("data.micro_batch_size=185",) if machine == ("trainer.num_nodes=44",) else ()
    other = recipe(*machine, *micro)
    assert other.batch_plan().accumulation == accumulation
    assert other.batch_departure() is None
    assert other.fingerprint == recipe().fingerprint


def test_another_global_batch_is_reported_as_another_optimisation() -> None:
    other = recipe("data.global_batch_size=null", "trainer.num_nodes=2")
    assert other.global_batch_size == 5_920
    assert "5,920 sequences, the recipe's 65,120: this is another optimisation" in (other.batch_departure() or "")
    assert "data.global_batch_size=65120 keeps it" in (other.batch_departure() or "")
    pairs = recipe("data.global_batch_size=null", "trainer.num_nodes=2", "trainer.tensor_model_parallel_size=2")
    assert pairs.global_batch_size == 2_960, "two devices that share a copy share its sequences"
    tokens = recipe("recipe=esm1b", "data.global_batch_tokens=262144")
    assert "262,144 tokens, the recipe's 131,072" in (tokens.batch_departure() or "")
    sequences = recipe("recipe=esm1b", "data.global_batch_tokens=null", "data.global_batch_size=512")
    assert "not counted in tokens" in (sequences.batch_departure() or "")
    assert recipe("recipe=laptop", "data.global_batch_size=32").batch_departure() is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2 has no say"),
        (["trainer.tensor_model_parallel_size=5"], r"tensor_model_parallel_size \(5\) must divide the 176 devices"),
        (["trainer.tensor_model_parallel_size=8"], r"parallel_size \(8\) must divide model.num_attention_heads \(12\)"),
        (["data.global_batch_tokens=99999"], "global_batch_size and data.global_batch_tokens are both set"),
        (["data.micro_batch_tokens=4096"], "micro_batch_size .* and data.micro_batch_tokens are both set"),
        (["data.micro_batch_size=null", "data.micro_batch_tokens=400"], r"\(400\) must hold a sequence .* \(512\)"),
        (["recipe=esm1b", "trainer.num_nodes=32"], "at least 262144, or at most 128 ranks"),
        (["recipe=esm1b", "data.global_batch_tokens=null"], "needs data.global_batch_size or data.global_batch_tokens"),
        (["published.mfu=0"], "published.mfu must be positive"),
        (["trainer.hang_timeout_seconds=0"], "trainer.hang_timeout_seconds must be positive, or null"),
    ],
)
def test_impossible_batches_and_parallelism_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(*overrides)


def test_group_on_the_command_line_overrides_the_group_of_the_recipe() -> None:
    chosen = recipe("recipe=laptop", "model=esm1nv", "trainer.max_steps=2")
    assert chosen.model.parameters == 43_612_544
    assert chosen.trainer.accelerator == "cpu"
    assert chosen.optim.warmup_steps == 0


def test_warmup_is_given_in_steps_or_as_a_ratio_but_not_both() -> None:
    ratio = ("optim.sched.warmup_steps=null", "optim.sched.warmup_ratio=0.1")
    assert recipe("recipe=laptop", *ratio, "trainer.max_steps=200").optim.warmup_steps == 20
    with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio are both set"):
        recipe("recipe=laptop", "optim.sched.warmup_steps=5", "optim.sched.warmup_ratio=0.1")


def test_run_folder_depends_only_on_settings_that_change_the_result() -> None:
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


def test_adapt_recipe_requires_own_proteins_or_the_sample_by_name(tmp_path: Path) -> None:
    tiny_model().save_to(str(tmp_path / "tiny.nemo"))
    adapting = ("recipe=adapt", f"restore_from_path={tmp_path / 'tiny.nemo'}")
    asks = r"^recipe adapt trains on your own proteins: set data\.fasta=\.\.\. or data\.store=\.\.\. \(data=sample for"
    for missing in ((), ("plan=true",), (f"continue_from_path={tmp_path}", "restore_from_path=null", "model=esm2_8m")):
        with pytest.raises(ConfigError, match=asks):
            recipe(*adapting, *missing)
    sample, mine = recipe(*adapting, "data=sample"), recipe(*adapting, "data.fasta=mine.fasta")
    assert (sample.data.fasta, sample.data.store) == (None, None)
    assert mine.data == sample.data.replace(fasta=Path("mine.fasta"))
    assert recipe(*adapting, "data.store=mine").data == sample.data.replace(store=Path("mine"))
    assert recipe("recipe=laptop", "data=own", "data.store=x") == recipe("recipe=laptop", "data.store=x")
    with pytest.raises(ConfigError, match=r"data\.own must be true or false, not 'yes, mine'"):
        recipe(*adapting, "data.own='yes, mine'")


def test_store_is_identified_by_content_not_by_path(tmp_path: Path) -> None:
    """A copy on the local disk of a node gives the same run."""
    for name, content in (("a", "{1}"), ("b", "{1}"), ("c", "{2}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
    a, b, c, d = (recipe("recipe=laptop", f"data.store={tmp_path / name}").fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_world_size_does_not_change_the_run_for_the_same_global_batch() -> None:
    laptop = recipe("recipe=laptop", "data.global_batch_size=8", "data.micro_batch_size=4")
    assert laptop.replace(trainer=laptop.trainer.replace(devices=2)).fingerprint == laptop.fingerprint


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (200_000, "2 d 7:33:20")]
)
def test_durations_are_formatted_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "''"])
def test_run_name_must_be_a_single_folder_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"exp_manager\.name must be the name of one folder"):
        recipe("recipe=laptop", f"exp_manager.name={name}")


def test_section_that_is_not_a_mapping_is_rejected() -> None:
    cfg = composed("recipe=esm1nv_phase1", "probe.task=secondary_structure", "probe.data.train=x")
    optional = ("published", "probe", "probe.data", "probe.data.split")
    assert_sections_must_be_mappings(load_recipe, cfg, optional)


def test_null_or_scalar_masking_policy_is_rejected() -> None:
    for value in ("0", "false", "null", "5"):
        with pytest.raises(ConfigError, match=r"^data\.masking must be a mapping, not "):
            recipe("recipe=laptop", f"data.masking={value}")
