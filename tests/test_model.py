"""The encoder: parameter count, agreement with the padded Transformers model, and no attention across sequences."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy

from bionemo_esm.alphabet import PAD_ID, VOCABULARY_SIZE
from bionemo_esm.data.collate import PackedBatch, SampleReader, pack, unpack
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.attention import ATTENTION, PackedRow, attention_by_sequence
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from models import padded_twin, tiny_model


@pytest.fixture(scope="module")
def batch(tiny_split: SequenceSplit) -> PackedBatch:
    """All 37 proteins, of 1 to 510 residues, masked and packed."""
    reader = SampleReader(tiny_split, 512, MaskingPolicy(), seed=5)
    return reader.collate(np.zeros(len(tiny_split), dtype=np.int64), np.arange(len(tiny_split)))


def test_esm1nv_has_43_6_million_parameters() -> None:
    model = ESM1nvModel(OmegaConf.create({"encoder": {}, "precision": "32"}))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == EncoderConfig().parameters == 43_612_544


def test_parameter_formula_holds_for_other_shapes() -> None:
    model = tiny_model(num_layers=3, hidden_size=40, ffn_hidden_size=72, seq_length=99)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.encoder_config.parameters


def test_packed_and_padded_models_agree_on_logits_loss_and_gradients(batch: PackedBatch) -> None:
    model = tiny_model()
    twin = padded_twin(model)

    packed_logits = model.logits(batch)
    packed_loss = cross_entropy(model(batch), batch.targets)
    packed_loss.backward()

    padded_tokens = unpack(batch.tokens, batch.cu_seqlens)
    attention_mask = padded_tokens != PAD_ID
    padded_logits = twin(padded_tokens, attention_mask=attention_mask.long()).logits[attention_mask]
    padded_loss = cross_entropy(padded_logits[batch.target_index], batch.targets)
    padded_loss.backward()

    torch.testing.assert_close(packed_logits, padded_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed_loss, padded_loss, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    embedding = gradients["encoder.embedding.word_embeddings.weight"]
    assert embedding is not None
    torch.testing.assert_close(
        embedding[:VOCABULARY_SIZE], twin.esm.embeddings.word_embeddings.weight.grad, atol=1e-5, rtol=1e-3
    )
    for number, layer in enumerate(twin.esm.encoder.layer):
        torch.testing.assert_close(
            gradients[f"encoder.encoder.layers.{number}.mlp.linear_fc1.weight"],
            layer.intermediate.dense.weight.grad,
            atol=1e-5,
            rtol=1e-3,
        )


def test_hidden_states_of_a_protein_do_not_depend_on_the_batch(batch: PackedBatch) -> None:
    model = tiny_model()
    together = model.hidden_states(batch)
    bounds = batch.cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        alone = pack(batch.tokens[first + 1 : last - 1].numpy().astype(np.uint8), np.array([last - first - 2]))
        torch.testing.assert_close(model.hidden_states(alone), together[first:last], atol=2e-5, rtol=1e-4)


def test_changing_one_protein_does_not_change_its_neighbours(batch: PackedBatch) -> None:
    model = tiny_model()
    changed = replace(batch, tokens=batch.tokens.clone())
    first, last = batch.cu_seqlens[5].item(), batch.cu_seqlens[6].item()
    changed.tokens[first + 1 : last - 1] = 20
    difference = (model.hidden_states(changed) - model.hidden_states(batch)).abs().amax(1)
    assert difference[first:last].max() > 1e-2
    assert difference[:first].max() == 0
    assert difference[last:].max() == 0


@pytest.mark.parametrize("backend", sorted(set(ATTENTION) - {"varlen-flash"}))  # varlen-flash needs a GPU
@pytest.mark.parametrize("lengths", [[5, 1, 130, 64], [7, 7, 7, 3, 3, 7], [9]])
def test_attention_backends_agree_with_plain_softmax(backend: str, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    query, key, value = (torch.randn(sum(lengths), 3, 16, dtype=torch.float64) for _ in range(3))
    layout = packed_row(bounds)
    expected = torch.cat(
        [
            torch.einsum("nqk,knd->qnd", torch.softmax(torch.einsum("qnd,knd->nqk", q, k) / 4, dim=-1), v)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
    )
    attend = ATTENTION.get(backend).attend
    torch.testing.assert_close(attend(query, key, value, layout, 0.0), expected, atol=1e-9, rtol=1e-9)
    asking = torch.tensor([bounds[i] + j for i, length in enumerate(lengths) for j in {0, length // 3, length - 1}])
    asking = asking.sort().values
    some = attend(query[asking], key, value, layout.query_index(asking), 0.0)
    torch.testing.assert_close(some, expected[asking], atol=1e-9, rtol=1e-9)


def packed_row(bounds: torch.Tensor) -> PackedRow:
    longest = int(bounds.diff().max())
    return PackedRow(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def test_batching_sequences_of_equal_length_changes_no_bit_of_attention() -> None:
    """The output for a sequence must not depend on the lengths of the others in its batch."""
    query, key, value = (torch.randn(60, 3, 16) for _ in range(3))
    bounds = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    together = attention_by_sequence(query, key, value, packed_row(bounds), 0.0)
    alone = [
        attention_by_sequence(*(t[first : first + 20] for t in (query, key, value)), packed_row(bounds[:2]), 0.0)
        for first in (0, 20, 40)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", [{}, {"position_embedding": "rotary", "token_dropout": True}])
def test_hidden_states_at_selected_positions_equal_rows_of_the_full_output(
    kind: dict[str, Any], batch: PackedBatch
) -> None:
    encoder = tiny_model(**kind).encoder
    assert encoder is not None
    row = (batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    places = torch.cat([batch.cu_seqlens[:-1] + 1, batch.cu_seqlens[1:] - 1]).long().sort().values
    some = encoder.hidden_states_at(*row, places)
    torch.testing.assert_close(some, encoder.hidden_states(*row)[places], atol=1e-5, rtol=1e-5)


def test_logits_cover_the_alphabet_without_padding_rows(batch: PackedBatch) -> None:
    assert tiny_model()(batch).shape == (len(batch.targets), VOCABULARY_SIZE)


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(100)
    first = tiny_model(seed=3)
    torch.manual_seed(200)
    again, other = tiny_model(seed=3), tiny_model(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_initial_weights_have_the_standard_deviation_of_the_recipe() -> None:
    model = ESM1nvModel(OmegaConf.create({"encoder": {"num_layers": 2, "hidden_size": 192}, "seed": 0}))
    weights = dict(model.named_parameters())
    words = weights["encoder.embedding.word_embeddings.weight"]
    assert words[:VOCABULARY_SIZE].std().item() == pytest.approx(0.02, rel=0.02)
    assert not words[VOCABULARY_SIZE:].any()  # no token reaches them
    # Megatron scales the weights of output projections by 1 / sqrt(2 layers).
    assert weights["encoder.encoder.layers.0.mlp.linear_fc2.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    assert weights["encoder.output_layer.bias"].abs().max() == 0


def test_dropout_is_active_in_training_only(batch: PackedBatch) -> None:
    model = tiny_model(hidden_dropout=0.3, attention_dropout=0.3)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def test_bf16_loss_equals_float32_loss_within_rounding(batch: PackedBatch) -> None:
    in_bf16, in_float32 = tiny_model("bf16", init_method_std=0.05), tiny_model("32", init_method_std=0.05)
    assert {parameter.dtype for parameter in in_bf16.parameters()} == {torch.bfloat16}
    losses = [cross_entropy(model(batch), batch.targets).item() for model in (in_bf16, in_float32)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_evaluation_averages_over_all_scored_tokens(batch: PackedBatch) -> None:
    model = tiny_model()
    logits = model(batch).double()
    result = model.evaluation(model.score(batch) + model.score(batch))
    assert result.loss == pytest.approx(cross_entropy(logits, batch.targets).item(), rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(result.loss), rel=1e-9)
    assert result.accuracy == pytest.approx((logits.argmax(1) == batch.targets).double().mean().item())
    assert result.residues == 2 * len(batch.targets)


def test_cpu_backends_are_pytorch_and_are_described() -> None:
    backends = choose_backends("cpu", torch.float32, 0.1)
    ours = "layer norm: PyTorch fused; Adam: PyTorch AdamW(fused); attention: sdpa-by-sequence; linear: oneDNN"
    assert backends.describe() == ours


def test_precision_names_map_to_parameter_dtypes() -> None:
    assert parameter_dtype("32", "cpu") == torch.float32
    assert parameter_dtype("bf16", "cpu") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"trainer\.precision must be one of auto, 32, bf16, not '16'"):
        parameter_dtype("16", "cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 100}, r"model\.hidden_size \(100\) is not divisible by model\.num_attention_heads \(12\)"),
        ({"seq_length": 4}, r"model\.seq_length is 4 tokens; .* at least 8"),
        ({"num_layers": 0}, r"model\.num_layers must be at least 1"),
        ({"num_layers": 2.5}, r"model\.num_layers must be an integer, not 2\.5"),
        ({"hidden_size": "wide"}, r"model\.hidden_size must be an integer, not 'wide'"),
        ({"hidden_dropout": 1.0}, r"model\.hidden_dropout must lie in \[0, 1\)"),
        ({"layers": 6}, r"unknown key model\.layers; known are: attention_dropout"),
    ],
)
def test_impossible_shape_is_rejected_by_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderConfig.from_config(values)


def test_config_lists_name_and_shape_of_every_tensor() -> None:
    """An archive is checked against this list before a model is built from it."""
    model = tiny_model()
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(model.encoder_config.tensors()) == built
    assert model.encoder_config.parameters == sum(parameter.numel() for parameter in model.parameters())
