"""Rotary position embeddings: frequencies, invariances, dtypes, and positions per protein."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import esm.rotary_embedding
import numpy as np
import pytest
import torch
from transformers import EsmConfig
from transformers.models.esm.modeling_esm import EsmRotaryEmbedding

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, write_archive
from bionemo_esm.model.attention import RotaryEmbedding, rotary_frequencies, rotate
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from models import tiny_model

ROTARY = {"position_embedding": "rotary", "token_dropout": True}


def row_of(split: SequenceSplit, *proteins: int) -> PackedBatch:
    residues = [split[index] for index in proteins]
    return pack(np.concatenate(residues), np.array([len(protein) for protein in residues]))


@pytest.mark.parametrize("head_size", [2, 16, 20, 64, 128])
def test_frequencies_equal_fair_esm_and_transformers_bit_for_bit(head_size: int) -> None:
    ours = rotary_frequencies(head_size)
    assert torch.equal(ours, esm.rotary_embedding.RotaryEmbedding(head_size).inv_freq)
    theirs = EsmRotaryEmbedding(EsmConfig(hidden_size=head_size, num_attention_heads=1, pad_token_id=1, vocab_size=33))
    assert torch.equal(ours, theirs.inv_freq)


def test_rotation_of_queries_and_keys_equals_fair_esm() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 50, 3, 16, generator=generator)
    rotation = RotaryEmbedding(16)(torch.arange(50))
    theirs = esm.rotary_embedding.RotaryEmbedding(16)(query.transpose(0, 1), key.transpose(0, 1))
    for ours, their in zip((rotate(query, rotation), rotate(key, rotation)), theirs, strict=True):
        assert torch.allclose(ours.transpose(0, 1), their, atol=1e-6)


def test_rotation_keeps_norms_and_scores_depend_only_on_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, generator=generator, dtype=torch.float64).float()
    rotary = RotaryEmbedding(16)

    def score(at: int, other: int) -> float:
        turned = (rotate(x, rotary(torch.tensor([p]))) for x, p in ((query, at), (key, other)))
        return float(torch.einsum("tnd,tnd->", *turned))

    assert rotate(query, rotary(torch.tensor([700]))).norm() == pytest.approx(float(query.norm()), rel=1e-5)
    assert score(3, 10) == pytest.approx(score(503, 510), abs=1e-3)
    assert abs(score(3, 10) - score(3, 11)) > 0.01


def test_bfloat16_queries_are_rotated_in_float32_and_returned_in_bfloat16() -> None:
    query = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = RotaryEmbedding(16).bfloat16()(torch.arange(1000, 1040))
    turned = rotate(query, rotation)
    assert turned.dtype == torch.bfloat16
    exact = rotate(query.float(), RotaryEmbedding(16)(torch.arange(1000, 1040)))
    assert torch.equal(turned, exact.bfloat16())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "double"])
def test_frequencies_stay_float32_when_the_module_is_cast(cast: str) -> None:
    rotary = RotaryEmbedding(64)
    rotary.to(torch.bfloat16) if cast == "to" else getattr(rotary, cast)()
    assert rotary.frequencies.dtype == torch.float32
    assert torch.equal(rotary.frequencies, rotary_frequencies(64))


def test_bfloat16_model_keeps_float32_frequencies() -> None:
    model = tiny_model("bf16", **ROTARY)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {
        "encoder.rotary.frequencies": torch.float32
    }


def test_bfloat16_model_is_restored_exactly(tmp_path: Path, tiny_split: SequenceSplit) -> None:
    model = tiny_model("bf16", **ROTARY, contact_head=True)
    model.save_to(str(tmp_path / "model.nemo"))
    restored = ESM1nvModel.restore_from(str(tmp_path / "model.nemo"))
    before, after = model.archive_weights(), restored.archive_weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert torch.equal(model.logits(row_of(tiny_split, 3)), restored.logits(row_of(tiny_split, 3)))


@pytest.mark.parametrize("name", ["encoder.rotary.frequencies", "encoder.contact_head.weight"])
def test_fixed_tensor_in_bfloat16_is_rejected(tmp_path: Path, name: str) -> None:
    archive = describe(tiny_model("bf16", **ROTARY, contact_head=True))
    rounded = {**archive.weights, name: archive.weights[name].bfloat16()}
    write_archive(tmp_path / "model.nemo", replace(archive, weights=rounded))
    with pytest.raises(ArchiveError, match=f"{name}.*BF16; it is F32 at any precision"):
        ESM1nvModel.restore_from(str(tmp_path / "model.nemo"))


def test_logits_of_a_protein_do_not_depend_on_the_row(tiny_split: SequenceSplit) -> None:
    model = tiny_model(**ROTARY)
    together = model.logits(row_of(tiny_split, 3, 1, 10, 5))
    alone = torch.cat([model.logits(row_of(tiny_split, protein)) for protein in (3, 1, 10, 5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_logits_depend_on_the_order_of_residues(tiny_split: SequenceSplit) -> None:
    model = tiny_model(**ROTARY)
    protein = tiny_split[3]
    there = model.logits(pack(protein, np.array([len(protein)])))[1:-1]
    back = model.logits(pack(protein[::-1].copy(), np.array([len(protein)])))[1:-1].flip(0)
    assert (there - back).abs().max() > 0.1


def test_rotary_model_has_no_position_table_and_accepts_any_length() -> None:
    model = tiny_model(**ROTARY, seq_length=64)
    assert not any("position" in name for name, _ in model.named_parameters())
    assert dict(model.encoder_config.tensors()).keys() == dict(model.named_parameters()).keys()
    assert dict(model.encoder_config.fixed_tensors()).keys() == dict(model.named_buffers()).keys()
    assert model.encoder_config.parameters == sum(parameter.numel() for parameter in model.parameters())
    residues = np.full(300, 5, dtype=np.uint8)
    assert model.logits(pack(residues, np.array([300]))).isfinite().all()


def test_position_table_with_offset_starts_with_unused_rows(tiny_split: SequenceSplit) -> None:
    model = tiny_model(position_offset=2)
    table = model.encoder.embedding.position_embeddings.weight
    assert table.shape == (514, 32) and not table[:2].any() and table[2:].any(dim=1).all()
    assert model.encoder_config.parameters == sum(parameter.numel() for parameter in model.parameters())
    batch = row_of(tiny_split, 3, 7)  # 510 residues and more fill the table
    model.logits(row_of(tiny_split, 5)).sum().backward()
    assert not table.grad[:2].any() and table.grad[2:512].any()
    assert torch.equal(model.encoder.embedded(batch.tokens[:1], batch.positions[:1], batch.cu_seqlens[:1])[0], (
        model.encoder.embedding.word_embeddings.weight[0] + table[2]
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"position_embedding": "relative_key"}, "position_embedding must be learned or rotary"),
        ({"position_offset": 1}, "position_offset must be 0 or 2"),
        ({"position_offset": 2, "position_embedding": "rotary"}, "0 with position_embedding=rotary"),
        ({"position_embedding": "rotary", "hidden_size": 36}, "make it even"),
        ({"position_embedding": 1}, "position_embedding must be learned or rotary"),
        ({"contact_head": "yes"}, "contact_head must be true or false"),
    ],
)
def test_impossible_position_settings_are_rejected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderConfig.from_config(values)


def test_esm1nv_config_leaves_out_the_newer_position_keys() -> None:
    assert EncoderConfig().to_dict().keys().isdisjoint({"position_embedding", "position_offset", "contact_head"})
    rotary = EncoderConfig(position_embedding="rotary", contact_head=True)
    assert EncoderConfig.from_config(rotary.to_dict()) == rotary
