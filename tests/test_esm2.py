"""ESM-2 and ESM-1v configurations: sizes against the original classes, and training on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import ROTARY, EncoderConfig
from bionemo_esm.model.costs import parameters_per_device
from bionemo_esm.pretraining.plan import findings, gather_facts, plan_of
from bionemo_esm.pretraining.plan_report import describe_plan
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from bionemo_esm.pretraining.run_context import describe_model
from faults import run
from models import tiny_model
from runs import composed, losses
from theirs import Shape, fair_esm_model, hugging_face_model

PADDED_VOCABULARY = 128
SIZES = {  # Lin et al. 2023, table S1: layers, hidden size, heads; then the parameters of our encoder
    "esm2_8m": (6, 320, 20, 7_542_848),
    "esm2_35m": (12, 480, 20, 33_546_848),
    "esm2_150m": (30, 640, 20, 148_200_448),
    "esm2_650m": (33, 1280, 20, 651_164_288),
    "esm2_3b": (36, 2560, 40, 2_839_247_488),
    "esm2_15b": (48, 5120, 40, 15_129_584_768),
}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(composed(*overrides))


def counted(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def only_theirs(config: EncoderConfig) -> int:
    """Return the parameters of the original classes minus ours: plus a contact head, minus padded vocabulary rows."""
    contact_head = config.num_layers * config.num_attention_heads + 1
    filling_rows = (PADDED_VOCABULARY - VOCABULARY_SIZE) * (config.hidden_size + 1)  # embedding, bias of the output
    return contact_head - filling_rows


@pytest.mark.parametrize("name", SIZES)
def test_the_parameter_counts_of_esm2_match_fair_esm_and_hugging_face(name: str) -> None:
    layers, hidden, heads, parameters = SIZES[name]
    ours = recipe(f"model={name}").model
    assert (ours.num_layers, ours.hidden_size, ours.num_attention_heads) == (layers, hidden, heads)
    assert ours.parameters == parameters
    with torch.device("meta"):
        theirs = [make("ESM-2", Shape(layers, hidden, heads)) for make in (fair_esm_model, hugging_face_model)]
    assert [counted(model) for model in theirs] == 2 * [ours.parameters + only_theirs(ours)]


def test_the_parameter_count_of_esm1v_matches_fair_esm() -> None:
    ours = recipe("model=esm1v").model
    with torch.device("meta"):
        theirs = fair_esm_model("ESM-1v", Shape(33, 1280, 20))
    assert counted(theirs) == ours.parameters + only_theirs(ours)


@pytest.mark.parametrize("name", SIZES)
def test_esm2_configurations_match_their_description(name: str) -> None:
    """All sizes share these settings: rotary positions, no dropout, no layer norm before the blocks."""
    config = recipe(f"model={name}").model
    assert (config.position_embedding, config.position_rows, config.token_dropout) == (ROTARY, 0, True)
    assert (config.hidden_dropout, config.attention_dropout, config.embedding_layernorm) == (0.0, 0.0, False)
    assert (config.seq_length, config.ffn_hidden_size) == (1024, 4 * config.hidden_size)
    header = (Path(__file__).parent.parent / "conf" / "model" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"ESM-2, {config.parameters:,} parameters, {95 * (config.hidden_size + 1):,} of them" in header


@pytest.mark.parametrize(
    ("overrides", "family"),
    [
        (("model=esm1nv",), "ESM-1nv, 6 layers"),
        (("model=esm1b",), "ESM-1b, 33 layers"),
        (("model=esm1v",), "ESM-1v, 33 layers"),
        (("model=esm2_8m",), "ESM-2, 6 layers"),
        (("model=esm2_8m", "model.embedding_layernorm=true"), "ESM, 6 layers"),
    ],
    ids=["ESM-1nv", "ESM-1b", "ESM-1v", "ESM-2", "none of them"],
)
def test_a_run_reports_the_family_of_its_model(overrides: tuple[str, ...], family: str) -> None:
    assert describe_model(recipe(*overrides)).startswith(family)


def test_a_plan_of_esm2_has_no_position_table_and_no_warning_about_it(tmp_path: Path) -> None:
    """The sample has no protein of 4,096 tokens, so a position table would have untrained rows."""
    place = (f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=400")
    rotary, learned = (
        plan_of(told, gather_facts(told))
        for told in (
            recipe("recipe=laptop", "model=esm2_650m", "model.seq_length=4096", *place, *more)
            for more in ((), ("model.position_embedding=learned",))
        )
    )
    assert "ESM-2, 33 layers, hidden 1280, 20 heads, 651,164,288 parameters" in describe_plan(rotary)
    assert learned.recipe.model.parameters - rotary.recipe.model.parameters == 4096 * 1280
    assert rotary.flops == learned.flops
    assert rotary.memory.activations > learned.memory.activations
    assert parameters_per_device(rotary.recipe.model, 2) < rotary.recipe.model.parameters
    blamed = [any("positions are never trained" in text for text in findings(plan)) for plan in (rotary, learned)]
    assert blamed == [False, True]


SMALL_ESM2 = ("model=esm2_8m", "model.hidden_dropout=0", "data.micro_batch_size=4", "optim.eps=1e-4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on one rank."""
    folder = tmp_path_factory.mktemp("esm2") / "alone"
    outcome = run(folder, *SMALL_ESM2)
    assert outcome.codes == [0], outcome.errors
    return folder


@pytest.mark.parametrize("spread", [(2, False), (1, True)], ids=["tensor parallel", "moments sharded"])
def test_two_ranks_train_esm2_like_one_rank(spread: tuple[int, bool], alone: Path, tmp_path: Path) -> None:
    tensor, sharded = spread
    keys = (f"trainer.tensor_model_parallel_size={tensor}", f"trainer.shard_optimizer={str(sharded).lower()}")
    outcome = run(tmp_path / "two", *SMALL_ESM2, *keys, ranks=2)
    assert outcome.codes == [0, 0], outcome.ranks
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=2e-5)
    files = [ArchiveFile.open(folder / "laptop.nemo") for folder in (alone, tmp_path / "two")]
    frequencies = [file.load_weights()["encoder.rotary.frequencies"] for file in files]
    assert torch.equal(*frequencies)


def test_rotary_frequencies_and_the_contact_head_are_float32_buffers() -> None:
    model = tiny_model("bf16", position_embedding=ROTARY, contact_head=True)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == {
        *("encoder.rotary.frequencies", "encoder.contact_head.weight", "encoder.contact_head.bias")
    }
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert not buffers.keys() & dict(model.named_parameters()).keys()
