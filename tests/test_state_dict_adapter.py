"""Importing weights under another library's names and exporting them: bit for bit, with every tensor accounted for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bionemo_esm.alphabet import MASK_ID, VOCABULARY_SIZE
from bionemo_esm.model.attention import rotary_frequencies
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.state_dict_adapter import (
    FAIR_ESM,
    HUGGING_FACE,
    ImportedWeights,
    InterchangeError,
    KeyMapping,
    SourceTensors,
    from_native,
    rules,
    to_native,
)
from bionemo_esm.model.tar_format import Section
from bionemo_esm.model.tensor_io import TensorTable

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "seq_length": 24}
ESM1NV = EncoderConfig.from_config(SIZES)
ESM1B = EncoderConfig.from_config(SIZES | {"embedding_layernorm": True, "token_dropout": True, "contact_head": True})
ESM2 = EncoderConfig.from_config(SIZES | {"token_dropout": True, "position_embedding": "rotary", "contact_head": True})
FAMILIES = pytest.mark.parametrize("config", [ESM1NV, ESM1B, ESM2], ids=["ESM-1nv", "ESM-1b", "ESM-2"])
KEY_MAPPINGS = pytest.mark.parametrize("key_mapping", [HUGGING_FACE, FAIR_ESM], ids=["Hugging Face", "fair-esm"])
WORDS, DECODER = "esm.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
POSITIONS, REGRESSION = "esm.embeddings.position_embeddings.weight", "esm.contact_head.regression.weight"
FREQUENCIES = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
Weights = dict[str, Tensor]


def foreign(config: EncoderConfig, key_mapping: KeyMapping = HUGGING_FACE) -> Weights:
    """Return random weights under another library's names; position tables start with two unused rows."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(rule.shape, generator=generator)
        if rule.ours != "encoder.rotary.frequencies"
        else rotary_frequencies(config.head_size).half().float()
        for rule in rules(config, key_mapping)
        for name in rule.theirs
    }


def opened(
    folder: Path, weights: Weights, key_mapping: KeyMapping = HUGGING_FACE, name: str = "model"
) -> SourceTensors:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, path)
    table = TensorTable.open(path, "weights", Section(0, path.stat().st_size))
    return SourceTensors.of(str(folder), [table], key_mapping)


def taken(
    folder: Path, config: EncoderConfig, weights: Weights, key_mapping: KeyMapping = HUGGING_FACE
) -> ImportedWeights:
    return to_native(opened(folder, weights, key_mapping), config, key_mapping)


def given(result: ImportedWeights, key_mapping: KeyMapping = HUGGING_FACE) -> Weights:
    dtypes = {name: tensor.dtype for name, tensor in result.weights.outline.items()}
    return dict(from_native(result.config, dtypes, result.weights.__getitem__, key_mapping))


def identical(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


# --- round trip -------------------------------------------------------------------------------------------------------


@FAMILIES
@KEY_MAPPINGS
def test_import_then_export_is_bit_for_bit(tmp_path: Path, config: EncoderConfig, key_mapping: KeyMapping) -> None:
    weights = foreign(config, key_mapping)
    assert identical(given(taken(tmp_path, config, weights, key_mapping), key_mapping), weights)


@FAMILIES
def test_weights_convert_from_one_library_to_the_other(tmp_path: Path, config: EncoderConfig) -> None:
    weights = foreign(config, FAIR_ESM)
    theirs = given(taken(tmp_path, config, weights, FAIR_ESM), HUGGING_FACE)
    again = given(taken(tmp_path, config, theirs, HUGGING_FACE), FAIR_ESM)
    assert identical(again, weights)


@FAMILIES
def test_imported_weights_have_the_tensors_of_the_encoder(tmp_path: Path, config: EncoderConfig) -> None:
    result = taken(tmp_path, config, foreign(config))
    expected = dict(result.config.tensors()) | dict(result.config.fixed_tensors())
    assert {name: tuple(tensor.shape) for name, tensor in result.weights.items()} == expected
    assert {name: tuple(tensor.shape) for name, tensor in result.weights.outline.items()} == expected
    assert result.config.contact_head == config.contact_head


def test_fused_qkv_keeps_query_key_and_value_of_a_head_together(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    mixed = taken(tmp_path, ESM1NV, weights).weights["encoder.encoder.layers.1.self_attention.linear_qkv.weight"]
    size = ESM1NV.head_size
    for index, role in enumerate(("query", "key", "value")):
        whole = weights[f"esm.encoder.layer.1.attention.self.{role}.weight"]
        for head in range(ESM1NV.num_attention_heads):
            start = (3 * head + index) * size
            assert torch.equal(mixed[start : start + size], whole[head * size : (head + 1) * size])


def test_padding_rows_of_the_vocabulary_are_zero(tmp_path: Path) -> None:
    weights = taken(tmp_path, ESM1NV, foreign(ESM1NV)).weights
    for name in ("encoder.embedding.word_embeddings.weight", "encoder.output_layer.bias"):
        assert not weights[name][VOCABULARY_SIZE:].any() and weights[name][:VOCABULARY_SIZE].all()


def test_unused_position_rows_are_kept_unless_they_are_zero(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    kept = taken(tmp_path, ESM1NV, weights)
    assert kept.config.position_offset == 2
    assert torch.equal(kept.weights["encoder.embedding.position_embeddings.weight"], weights[POSITIONS])
    weights[POSITIONS][:2] = 0
    dropped = taken(tmp_path, ESM1NV, weights)
    assert dropped.config.position_offset == 0
    assert torch.equal(dropped.weights["encoder.embedding.position_embeddings.weight"], weights[POSITIONS][2:])
    assert identical(given(dropped), weights)


def test_rotary_frequencies_are_taken_from_the_file(tmp_path: Path) -> None:
    weights = foreign(ESM2)
    ours = taken(tmp_path, ESM2, weights).weights["encoder.rotary.frequencies"]
    assert torch.equal(ours, rotary_frequencies(8).half().float())
    assert not torch.equal(ours, rotary_frequencies(8))


@pytest.mark.parametrize(
    "name", ["esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq", "esm.rotary_embeddings.inv_freq"]
)
def test_rotary_frequencies_can_be_shared_by_all_layers(tmp_path: Path, name: str) -> None:
    weights = foreign(ESM2)
    one = weights.pop(FREQUENCIES.format(0))
    del weights[FREQUENCIES.format(1)]
    result = taken(tmp_path, ESM2, weights | {name: one})
    assert torch.equal(result.weights["encoder.rotary.frequencies"], one) and not result.notes


def test_missing_rotary_frequencies_are_computed_and_noted(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in foreign(ESM2).items() if "inv_freq" not in name}
    result = taken(tmp_path, ESM2, weights)
    assert torch.equal(result.weights["encoder.rotary.frequencies"], rotary_frequencies(8))
    assert any("frequencies" in note for note in result.notes)


def test_transformers_5_names_of_layer_norms_are_accepted(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    spelt = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }
    assert spelt.keys() != weights.keys()
    assert identical(given(taken(tmp_path, ESM1NV, spelt)), weights)


def test_output_equal_to_the_embedding_is_accepted_and_another_is_rejected(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    assert identical(given(taken(tmp_path, ESM1NV, weights | {DECODER: weights[WORDS]})), weights)
    with pytest.raises(InterchangeError, match=r"decoder\.weight.*ties its output"):
        taken(tmp_path, ESM1NV, weights | {DECODER: weights[WORDS] + 1})


def test_unused_position_table_of_a_rotary_model_is_dropped_and_noted(tmp_path: Path) -> None:
    weights = foreign(ESM2)
    result = taken(tmp_path, ESM2, weights | {POSITIONS: torch.randn(26, 32)})
    assert identical(given(result), weights) and any(POSITIONS in note for note in result.notes)


def test_model_without_contact_head_is_imported_and_noted(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in foreign(ESM2).items() if "contact" not in name}
    result = taken(tmp_path, ESM2, weights)
    assert not result.config.contact_head and any("contact head" in note for note in result.notes)
    assert identical(given(result), weights)


def test_export_holds_at_most_one_of_our_tensors_at_a_time(tmp_path: Path) -> None:
    weights = taken(tmp_path, ESM1NV, foreign(ESM1NV)).weights
    loaded: list[weakref.ref[Tensor]] = []

    def load(name: str) -> Tensor:
        tensor = weights[name]
        loaded.append(weakref.ref(tensor))
        return tensor

    for name in from_native(ESM1NV, dict.fromkeys(weights, torch.float32), load, HUGGING_FACE).items():
        del name
        assert sum(reference() is not None for reference in loaded) <= 1
    assert len(loaded) > 10


def test_embedding_row_that_the_library_erases_on_loading_is_erased(tmp_path: Path) -> None:
    tensors = opened(tmp_path, foreign(ESM1B, FAIR_ESM), FAIR_ESM)
    erasing = SourceTensors(tensors.where, tensors.places, {"embed_tokens.weight": MASK_ID})
    words = to_native(erasing, ESM1B, FAIR_ESM).weights["encoder.embedding.word_embeddings.weight"]
    assert not words[MASK_ID].any() and words[MASK_ID - 1].all()


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_weights_stay_bfloat16_and_fixed_tensors_are_float32(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in foreign(ESM2).items()}
    result = taken(tmp_path, ESM2, weights)
    assert result.precision == "bf16"
    dtypes = {name: tensor.dtype for name, tensor in result.weights.items()}
    assert {dtypes[name] for name, _ in ESM2.tensors()} == {torch.bfloat16}
    assert {dtypes[name] for name, _ in ESM2.fixed_tensors()} == {torch.float32}
    assert {name: tensor.dtype for name, tensor in result.weights.outline.items()} == dtypes


@pytest.mark.parametrize("dtype", [torch.float16, "mixed"])
def test_other_precisions_become_float32_without_loss(tmp_path: Path, dtype: torch.dtype | str) -> None:
    weights = foreign(ESM1NV)
    for index, name in enumerate(sorted(weights)):
        weights[name] = weights[name].to((torch.bfloat16, torch.float32)[index % 2] if dtype == "mixed" else dtype)
    result = taken(tmp_path, ESM1NV, weights)
    assert result.precision == "32"
    assert identical(given(result), {name: tensor.float() for name, tensor in weights.items()})


# --- strictness -------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def with_one(name: str, tensor: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: tensor}


def damaged(weights: Weights) -> Weights:
    weights[WORDS][3, 3] = torch.nan
    return weights


QUERY = "esm.encoder.layer.1.attention.self.query.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.dense.bias"), r"'lm_head\.dense\.bias' is missing"),
        (without(QUERY), r"self\.query\.bias' is missing"),
        (without(REGRESSION), r"regression\.weight' is missing"),
        (without(FREQUENCIES.format(1)), r"layer\.1\..*inv_freq' is missing"),
        (with_one("esm.pooler.dense.bias", torch.zeros(32)), r"esm\.pooler\.dense\.bias' has no place"),
        (with_one("esm.encoder.layer.2.output.dense.bias", torch.zeros(32)), r"layer\.2\..* has no place"),
        (with_one(QUERY, torch.zeros(31)), r"query\.bias' has shape \[31\]; .*\[32\]"),
        (with_one(WORDS, torch.zeros(34, 32)), r"word_embeddings\.weight' has shape \[34, 32\]; .*\[33, 32\]"),
        (with_one(DECODER, torch.zeros(33, 31)), r"decoder\.weight' has shape \[33, 31\]"),
        (with_one(QUERY, torch.zeros(32, dtype=torch.int64)), r"query\.bias' has dtype I64; known are F32"),
        (with_one(FREQUENCIES.format(1), rotary_frequencies(8)), r"layer\.1\..*differs.*one set of rotary"),
    ],
)
def test_missing_unknown_or_misshapen_tensor_is_rejected(
    tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    with pytest.raises(InterchangeError, match=message):
        taken(tmp_path, ESM2, change(foreign(ESM2)))


def test_nonfinite_value_is_rejected_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"model\.safetensors.*word_embeddings\.weight' holds NaN"):
        dict(taken(tmp_path, ESM2, damaged(foreign(ESM2))).weights)


def test_position_table_of_another_length_is_rejected(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    with pytest.raises(InterchangeError, match=r"position_embeddings\.weight' has shape \[25, 32\]; .*\[26, 32\]"):
        taken(tmp_path, ESM1NV, weights | {POSITIONS: weights[POSITIONS][:25]})


def test_tensor_in_two_files_is_rejected(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    tables = []
    for name in ("one", "two"):
        save_file(weights, tmp_path / name)
        tables.append(TensorTable.open(tmp_path / name, "weights", Section(0, (tmp_path / name).stat().st_size)))
    with pytest.raises(InterchangeError, match=r"two: tensor .* is there twice, as .* in one"):
        SourceTensors.of(str(tmp_path), tables, HUGGING_FACE)


def test_two_spellings_of_one_tensor_are_rejected(tmp_path: Path) -> None:
    weights = foreign(ESM1NV)
    twice = weights | {"esm.encoder.layer.0.LayerNorm.gamma": weights["esm.encoder.layer.0.LayerNorm.weight"]}
    with pytest.raises(InterchangeError, match=r"LayerNorm\.(gamma|weight)' is there twice"):
        taken(tmp_path, ESM1NV, twice)
