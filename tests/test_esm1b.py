"""ESM-1b: size, embedding and loss against Hugging Face, schedule against fairseq's formula."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.nn import Parameter, functional
from torch.nn.functional import cross_entropy

from bionemo_esm.alphabet import CLS_ID, EOS_ID, MASK_ID, PAD_ID
from bionemo_esm.data.collate import PackedBatch, pack, unpack
from bionemo_esm.data.masking import MaskedResidues, MaskingPolicy, mask_sequences
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile, read_archive, write_archive
from bionemo_esm.model.config import COSINE, INVERSE_SQUARE_ROOT, EncoderConfig, OptimConfig
from bionemo_esm.model.encoder import token_dropout_scale
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.model.optimizer import build_schedule
from bionemo_esm.model.safe_serialization import put_tensors_back, take_out_tensors
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.model.summary import ArchiveSummary
from bionemo_esm.pretraining.recipe import load_recipe
from faults import FORK_SERVER, Fault, history, run
from models import padded_twin, tiny_model, translated
from reference_masking import sample_keys
from runs import composed
from theirs import Shape, hugging_face_model

ESM1B = {"embedding_layernorm": True, "token_dropout": True}
NORM = "encoder.embedding_layernorm."
Proteins = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def proteins(tiny_split: SequenceSplit) -> Proteins:
    """Return real proteins: of 77 and 509 residues, of 1, 2, 3 and 510, and some under 400."""
    return [tiny_split[index] for index in (3, 4, 0, 1, 2, 5, 10, 20, 30)]


def corrupted(proteins: Proteins) -> PackedBatch:
    """Return a packed masked batch. The first protein has targets but no <mask>; the second has only <mask>."""
    lengths = np.array([len(protein) for protein in proteins], dtype=np.int64)
    residues = np.concatenate(proteins)
    keys = sample_keys(7, np.zeros(len(lengths), dtype=np.int64), np.arange(len(lengths)))
    tokens, chosen = mask_sequences(residues, lengths, keys, MaskingPolicy())
    first, second = lengths[0], lengths[0] + lengths[1]
    tokens[:first] = residues[:first]
    tokens[first:second] = MASK_ID
    assert chosen[:first].any()
    return pack(residues, lengths, MaskedResidues(tokens, chosen))


def gradients(model: ESM1nvModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return each parameter's gradient of the mean loss over the batch's targets."""
    model.zero_grad()
    cross_entropy(model(batch), batch.targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- size -------------------------------------------------------------------------------------------------------------


def test_the_parameter_count_of_esm1b_matches_the_public_model() -> None:
    ours = EncoderConfig.from_config(load_recipe(composed("model=esm1b", "optim=esm1b")).model.to_dict())
    with torch.device("meta"):
        theirs = hugging_face_model("ESM-1b", Shape(33, 1280, 20))
    theirs_counted = sum(parameter.numel() for parameter in theirs.parameters())
    vocabulary_padding = (128 - 33) * (1280 + 1)  # rows of the embedding table, and output biases
    contact_head = 33 * 20 + 1  # a regression on attention maps; pretraining does not touch it
    assert theirs_counted == 652_359_094
    assert ours.parameters == theirs_counted + vocabulary_padding - contact_head == 652_480_128
    assert ours.replace(position_offset=0).parameters == ours.parameters - 2 * 1280, "rows before the first position"


def test_the_esm1b_flags_add_one_layer_norm_and_keep_the_other_initial_weights() -> None:
    plain, esm1b = tiny_model(), tiny_model(**ESM1B)
    built = {name: tuple(parameter.shape) for name, parameter in esm1b.named_parameters()}
    assert dict(esm1b.encoder_config.tensors()) == built
    assert sum(map(math.prod, built.values())) == esm1b.encoder_config.parameters
    assert built.keys() - dict(plain.named_parameters()).keys() == {f"{NORM}weight", f"{NORM}bias"}
    fresh = [dict(ESM1nvModel(model.cfg).named_parameters()) for model in (plain, esm1b)]
    assert all(torch.equal(parameter, fresh[1][name]) for name, parameter in fresh[0].items())


# --- embedding, loss and gradients ------------------------------------------------------------------------------------


def test_token_dropout_is_scaled_for_each_sequence_separately() -> None:
    rows = [[5, 6, 7, 8], [MASK_ID, 5, MASK_ID, 6, 7, 8], [MASK_ID] * 3, [], [9, MASK_ID]]
    sequences = [[CLS_ID, *row, EOS_ID] for row in rows]
    expected: list[float] = []
    for sequence in sequences:
        share = sequence.count(MASK_ID) / len(sequence)
        expected += [0.0 if token == MASK_ID else 0.88 / (1 - share) for token in sequence]
    bounds = torch.tensor([0, *np.cumsum([len(sequence) for sequence in sequences])], dtype=torch.int32)
    scale = token_dropout_scale(torch.tensor([token for sequence in sequences for token in sequence]), bounds)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.tensor(expected), atol=0, rtol=1e-6)


def test_a_row_of_only_masks_gives_zeros_and_no_nan() -> None:
    """Packing always adds unmasked <cls> and <eos>; a direct caller of the encoder may not."""
    scale = token_dropout_scale(torch.full((4,), MASK_ID), torch.tensor([0, 4], dtype=torch.int32))
    assert scale.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "flags", [ESM1B, {"embedding_layernorm": True}, {"token_dropout": True}], ids=["both", "layer norm", "dropout"]
)
def test_packed_esm1b_matches_padded_logits_loss_and_gradients(proteins: Proteins, flags: dict[str, bool]) -> None:
    batch, model = corrupted(proteins), tiny_model(**flags)
    twin = padded_twin(model)
    padded_tokens = unpack(batch.tokens, batch.cu_seqlens)
    attention_mask = padded_tokens != PAD_ID
    padded_logits = twin(padded_tokens, attention_mask=attention_mask.long()).logits[attention_mask]
    padded_loss = cross_entropy(padded_logits[batch.target_index], batch.targets)
    padded_loss.backward()

    ours = translated(gradients(model, batch), model.encoder_config)
    torch.testing.assert_close(model.logits(batch), padded_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(cross_entropy(model(batch), batch.targets), padded_loss, atol=1e-5, rtol=0)
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )
        assert theirs[name].abs().max() > 1e-3 or "key.bias" in name, f"{name}: too small for the tolerance to tell"


def test_hidden_states_do_not_depend_on_the_masking_of_neighbours(proteins: Proteins) -> None:
    model, batch = tiny_model(**ESM1B), corrupted(proteins)
    unmasked = pack(np.concatenate(proteins), np.array([len(protein) for protein in proteins], dtype=np.int64))
    first, last = batch.cu_seqlens[:2].tolist()
    states = [model.hidden_states(row)[first:last] for row in (batch, unmasked)]
    assert torch.equal(batch.tokens[first:last], unmasked.tokens[first:last])
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=0)


def test_dropout_follows_the_embedding_layer_norm(proteins: Proteins) -> None:
    """Dropout before the layer norm would leave no exact zeros."""
    model, batch = tiny_model(**ESM1B, hidden_dropout=0.25), corrupted(proteins)
    assert model.encoder is not None
    row = (batch.tokens, batch.positions, batch.cu_seqlens)
    kept = model.encoder.embedded(*row)
    dropped = model.train().encoder.embedded(*row)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.75)


def test_bf16_embeddings_are_scaled_in_float32_before_rounding(proteins: Proteins) -> None:
    model, batch = tiny_model("bf16", token_dropout=True), corrupted(proteins)
    assert model.encoder is not None
    embedding = model.encoder.embedding
    scale = token_dropout_scale(batch.tokens, batch.cu_seqlens)[:, None]
    words = functional.embedding(batch.tokens, embedding.word_embeddings.weight)
    positions = embedding.position_embeddings(batch.positions)
    expected = (words.float() * scale).bfloat16() + positions
    assert torch.equal(model.encoder.embedded(batch.tokens, batch.positions, batch.cu_seqlens), expected)


def half(rank: int, folder: Path, proteins: Proteins) -> None:
    """Run one of two tensor-parallel ranks: restore the model, save its loss and its norms' gradients."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model = ESM1nvModel.restore_from(str(folder / "whole.nemo"), map_location="cpu")
    batch = corrupted(proteins)
    found = {name: gradient for name, gradient in gradients(model, batch).items() if name.startswith(NORM)}
    found["logits"] = model(batch).detach()
    assert dict(model.named_parameters())["encoder.embedding.word_embeddings.weight"].shape == (64, 32)
    np.savez(folder / f"rank-{rank}.npz", **{name: tensor.numpy() for name, tensor in found.items()})
    distributed.destroy_process_group()


def test_two_tensor_parallel_ranks_agree_on_layer_norm_and_loss(proteins: Proteins, tmp_path: Path) -> None:
    model = tiny_model(**ESM1B)
    write_archive(tmp_path / "whole.nemo", describe(model))
    ranks = [FORK_SERVER.Process(target=half, args=(rank, tmp_path, proteins)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]

    batch = corrupted(proteins)
    alone = gradients(model, batch)
    for rank in (0, 1):
        with np.load(tmp_path / f"rank-{rank}.npz") as found:
            np.testing.assert_allclose(found["logits"], model(batch).detach().numpy(), atol=1e-4)
            for name in (f"{NORM}weight", f"{NORM}bias"):
                np.testing.assert_allclose(found[name], alone[name].numpy(), atol=1e-5)


# --- configuration and archives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 0, "true", None, 1.0])
def test_a_flag_must_be_a_boolean(value: object) -> None:
    with pytest.raises(ConfigError, match=r"model\.token_dropout must be true or false, not "):
        EncoderConfig.from_config({"token_dropout": value})


def test_an_archive_without_the_flags_is_an_esm1nv_and_esm1b_lists_its_flags(
    proteins: Proteins, tmp_path: Path
) -> None:
    plain, esm1b = tiny_model(), tiny_model(**ESM1B)
    for name, model in (("plain", plain), ("esm1b", esm1b)):
        write_archive(tmp_path / name, describe(model))
    assert not ESM1B.keys() & read_archive(tmp_path / "plain", with_weights=False).config["encoder"].keys()
    batch = corrupted(proteins)
    for name, model in (("plain", plain), ("esm1b", esm1b)):
        restored = ESM1nvModel.restore_from(str(tmp_path / name), map_location="cpu")
        assert restored.encoder_config == model.encoder_config
        assert torch.equal(restored(batch), model(batch))
    assert not torch.equal(plain(batch), esm1b(batch))
    texts = [ArchiveSummary.of(ArchiveFile.open(tmp_path / name)).text() for name in ("plain", "esm1b")]
    for label in ("embedding layer norm", "token dropout"):
        assert [label in text for text in texts] == [False, True]


def test_encoder_differences_are_listed_by_key_and_ignore_dropout_rates() -> None:
    ours = EncoderConfig(hidden_dropout=0.0, token_dropout=True)
    old = EncoderConfig().to_dict()
    assert ours.differences(old) == [("token_dropout", False, True)]
    assert EncoderConfig().differences(old | {"attention_dropout": 0.0}) == []
    assert EncoderConfig().differences(old | {"num_layers": 7}) == [("num_layers", 7, 6)]


# --- schedules --------------------------------------------------------------------------------------------------------

INVERSE = OptimConfig(
    lr=1e-4, min_lr=0.0, warmup_steps=16_000, constant_steps=0, max_steps=500_000, schedule=INVERSE_SQUARE_ROOT
)
SHORT = {
    "cosine, constant end": OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3, constant_steps=4, max_steps=20),
    "cosine, no constant end": OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3, constant_steps=0, max_steps=20),
    "cosine, no warm-up": OptimConfig(lr=1e-2, min_lr=0.0, warmup_steps=0, constant_steps=0, max_steps=20),
    "cosine, constant end, no warm-up": OptimConfig(lr=1e-2, warmup_steps=0, constant_steps=5, max_steps=20),
    "inverse square root": INVERSE.replace(warmup_steps=3, max_steps=20),
}


def scheduled(config: OptimConfig) -> tuple[torch.optim.Optimizer, Any]:
    groups = [{"params": [Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    return optimizer, build_schedule(optimizer, config)


def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> Iterator[float]:
    """The rate of each optimizer step."""
    for _ in range(steps):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        yield first
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("config", SHORT.values(), ids=SHORT)
def test_the_formula_equals_the_scheduler_at_every_step_and_past_the_end(config: OptimConfig) -> None:
    formula = [learning_rate(config, step) for step in range(30)]
    assert list(rates(*scheduled(config), 30)) == pytest.approx(formula, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (OptimConfig(), {0: 0.0, 500: 2e-4, 349_500: 1.41882e-4, 907_610: 2e-5, 957_610: 2e-5, 957_611: 2e-5}),
        (
            INVERSE,
            {0: 0.0, 8_000: 5e-5, 16_000: 1e-4, 64_000: 5e-5, 500_000: 1e-4 * math.sqrt(0.032), 501_000: 1.787068e-5},
        ),
    ],
    ids=["ESM-1nv", "ESM-1b"],
)
def test_published_schedules_have_their_rates_at_key_steps(config: OptimConfig, points: dict[int, float]) -> None:
    optimizer, schedule = scheduled(config)
    for step, rate in points.items():
        assert learning_rate(config, step) == pytest.approx(rate, rel=1e-6, abs=0)
        if step:  # the scheduler stands at step 0
            schedule.last_epoch = step - 1
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(config, step), rel=1e-12, abs=0)


def test_the_inverse_square_root_decays_from_the_peak_without_a_jump() -> None:
    curve = [learning_rate(INVERSE, step) for step in range(15_000, 17_001)]
    assert max(curve) == curve[1_000] == 1e-4
    assert max(abs(after - before) for before, after in pairwise(curve)) < 1e-4 / 16_000 * 1.001


@pytest.mark.parametrize("config", SHORT.values(), ids=SHORT)
def test_a_schedule_resumes_exactly_from_its_stored_state(config: OptimConfig) -> None:
    unbroken = list(rates(*scheduled(config), 25))
    optimizer, schedule = scheduled(config)
    before = list(rates(optimizer, schedule, 11))
    tree, tensors = take_out_tensors({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    state = put_tensors_back(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    optimizer, schedule = scheduled(config)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert before + list(rates(optimizer, schedule, 14)) == unbroken


def test_the_inverse_square_root_resumes_from_the_step_of_another_schedule() -> None:
    """A run may continue another run under a different schedule: it needs only the step from the state."""
    optimizer, schedule = scheduled(SHORT["cosine, constant end"])
    list(rates(optimizer, schedule, 11))
    config = SHORT["inverse square root"]
    optimizer, going_on = scheduled(config)
    going_on.load_state_dict({key: schedule.state_dict()[key] for key in ("last_epoch", "_step_count")})
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(config, 11)
    assert list(rates(optimizer, going_on, 5)) == [learning_rate(config, step) for step in range(11, 16)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optim.sched.constant_steps=5", r"has no end.*set constant_steps \(5\) and min_lr \(0\.0\) to 0"),
        ("optim.sched.min_lr=1e-5", r"has no end.*min_lr \(1e-05\) to 0"),
        ("optim.sched.warmup_steps=0", r"optim\.sched\.warmup_steps must be at least 1 with InverseSquareRoot"),
        (
            "optim.sched.name=InverseSquareRootAnnealing",
            f"must be one of {COSINE}, {INVERSE_SQUARE_ROOT}, WarmupStableDecay, not 'Inv",
        ),
        ("optim.sched.name=null", f"must be one of {COSINE}, {INVERSE_SQUARE_ROOT}, WarmupStableDecay, not 'None'"),
    ],
)
def test_an_invalid_schedule_is_refused_with_its_keys(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(composed("model=esm1b", "optim=esm1b", overrides))


def test_the_esm1b_configuration_matches_the_paper() -> None:
    recipe = load_recipe(composed("model=esm1b", "optim=esm1b"))
    assert recipe.optim == INVERSE.replace(
        betas=(0.9, 0.999), weight_decay=0.0, max_steps=recipe.optim.max_steps, gradient_clip_val=1.0
    )
    sizes = {"num_layers": 33, "num_attention_heads": 20, "hidden_size": 1280, "ffn_hidden_size": 5120}
    expected = EncoderConfig(**sizes, seq_length=1024, **ESM1B, position_offset=2)  # dropout 0.1, as in ESM-1nv
    assert recipe.model == expected


# --- training ---------------------------------------------------------------------------------------------------------

SMALL_ESM1B = ("model=esm1b", "optim=esm1b")
SMALL_ESM1B += ("optim.sched.min_lr=0", "optim.sched.warmup_ratio=null", "optim.sched.warmup_steps=2")


def die() -> None:
    raise MemoryError("killed in the test")


def test_an_interrupted_esm1b_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *SMALL_ESM1B)
    assert whole.codes == [0], whole.errors
    cut = Fault("bionemo_esm.model.esm1nv.ESM1nvModel.training_step", die, call=4)
    assert run(tmp_path / "cut", *SMALL_ESM1B, faults=[cut]).codes != [0]
    again = run(tmp_path / "cut", *SMALL_ESM1B)
    assert again.codes == [0], again.errors
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert (tmp_path / "cut" / "laptop.nemo").read_bytes() == (tmp_path / "whole" / "laptop.nemo").read_bytes()
    rates = [line["learning_rate"] for line in history(tmp_path / "whole") if line["kind"] == "train"]
    assert rates == pytest.approx([0, 0.75e-3, 1.5e-3, *(1.5e-3 * math.sqrt(2 / step) for step in (3, 4, 5))])
