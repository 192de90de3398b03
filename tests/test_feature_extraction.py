"""Hidden states of any layer, attention maps and contacts from packed rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import UserError
from bionemo_esm.model import feature_extraction as reading
from bionemo_esm.model.attention import PackedRow, attention_by_sequence, attention_maps
from bionemo_esm.model.contact_head import ContactHead, average_product_correction
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.feature_extraction import contacts, observe_attention_maps, representations
from models import tiny_model


def row_of(split: SequenceSplit, *proteins: int) -> PackedBatch:
    residues = [split[index] for index in proteins]
    return pack(np.concatenate(residues), np.array([len(protein) for protein in residues]))


@pytest.fixture(scope="module")
def model() -> ESM1nvModel:
    """Return an ESM-2 of 3 layers with a random contact head."""
    built = tiny_model(num_layers=3, position_embedding="rotary", token_dropout=True, contact_head=True)
    generator = torch.Generator().manual_seed(0)
    built.encoder.contact_head.weight.copy_(torch.randn(1, 12, generator=generator))
    built.encoder.contact_head.bias.fill_(-0.5)
    return built


def test_layers_are_numbered_from_the_embeddings_to_the_final_norm(
    model: ESM1nvModel, tiny_split: SequenceSplit
) -> None:
    batch, encoder = row_of(tiny_split, 3, 1), model.encoder
    states = representations(encoder, batch, range(4))
    assert sorted(states) == [0, 1, 2, 3]
    assert torch.equal(states[0], encoder.embedded(batch.tokens, batch.positions, batch.cu_seqlens))
    assert torch.equal(states[3], model.hidden_states(batch))
    assert not torch.allclose(states[1], states[2], atol=0.1)
    final = torch.nn.functional.layer_norm(states[3], (32,))
    assert torch.allclose(final.std(dim=1, correction=0), torch.ones(len(final)), atol=1e-3)


def test_one_requested_layer_equals_that_layer_among_all(model: ESM1nvModel, tiny_split: SequenceSplit) -> None:
    batch = row_of(tiny_split, 3, 1)
    every = representations(model.encoder, batch, range(4))
    for layer in range(4):
        assert torch.equal(representations(model.encoder, batch, [layer])[layer], every[layer])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.encoder.encoder.layers)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_refused(model: ESM1nvModel, tiny_split: SequenceSplit, layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer {layer}: the model has 0 .* to 3"):
        representations(model.encoder, row_of(tiny_split, 1), [layer])


def test_attention_maps_reproduce_the_kernels_output(tiny_split: SequenceSplit) -> None:
    bounds = row_of(tiny_split, 3, 1, 10).cu_seqlens
    query, key, value = torch.randn(3, int(bounds[-1]), 2, 8, generator=torch.Generator().manual_seed(0))
    layout = PackedRow(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    maps = attention_maps(query, key, layout)
    pieces = value.split(bounds.diff().tolist())
    expected = torch.cat([torch.einsum("nqk,knd->qnd", m, piece) for m, piece in zip(maps, pieces, strict=True)])
    assert torch.allclose(attention_by_sequence(query, key, value, layout, 0.0), expected, atol=1e-6)


def test_attention_maps_are_observed_layer_by_layer_for_each_protein(
    model: ESM1nvModel, tiny_split: SequenceSplit
) -> None:
    seen: list[int] = []

    def observe(layer: int, maps: list[Tensor]) -> None:
        seen.append(layer)
        assert [tuple(map_NLL.shape) for map_NLL in maps] == [(4, 79, 79), (4, 4, 4)]
        assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:-1]), atol=1e-5) for m in maps)

    observe_attention_maps(model.encoder, row_of(tiny_split, 3, 1), observe)
    assert seen == [1, 2, 3]


def test_contacts_do_not_depend_on_the_other_proteins_in_the_row(model: ESM1nvModel, tiny_split: SequenceSplit) -> None:
    together = contacts(model.encoder, row_of(tiny_split, 3, 10, 2))
    for found, protein in zip(together, (3, 10, 2), strict=True):
        alone = contacts(model.encoder, row_of(tiny_split, protein))[0]
        assert found.shape == (len(tiny_split[protein]),) * 2
        assert torch.allclose(found, alone, atol=1e-5) and torch.allclose(found, found.T, atol=1e-6)
        assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.005


def test_the_average_product_correction_removes_a_rank_one_map() -> None:
    rank_one = torch.outer(torch.rand(9), torch.rand(9))
    assert torch.allclose(average_product_correction(rank_one), torch.zeros(9, 9), atol=1e-6)


def test_the_contact_head_sums_the_evidence_of_layers() -> None:
    head = ContactHead(6)
    head.weight.copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6]]))
    head.bias.fill_(0.25)
    maps = torch.rand(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    inner = maps.flatten(0, 1)[:, 1:-1, 1:-1]
    expected = torch.einsum("n,nij->ij", head.weight[0], average_product_correction(inner + inner.transpose(1, 2)))
    total = sum(head.evidence(layer + 1, maps[layer]) for layer in range(3))
    assert torch.allclose(head(total), torch.sigmoid(expected + 0.25), atol=1e-6)


def test_a_model_without_a_contact_head_has_no_contacts(tiny_split: SequenceSplit) -> None:
    with pytest.raises(UserError, match="no contact head"):
        contacts(tiny_model().encoder, row_of(tiny_split, 1))


def test_contacts_are_refused_with_tensor_parallelism(
    model: ESM1nvModel, tiny_split: SequenceSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "tensor_parallel_size", lambda: 2)
    with pytest.raises(UserError, match="all heads on one device"):
        contacts(model.encoder, row_of(tiny_split, 1))


def test_a_contact_head_is_saved_and_restored_and_has_no_parameters(
    model: ESM1nvModel, tiny_split: SequenceSplit, tmp_path: Path
) -> None:
    model.save_to(str(tmp_path / "model.nemo"))
    restored = ESM1nvModel.restore_from(str(tmp_path / "model.nemo"))
    batch = row_of(tiny_split, 3, 10)
    for before, after in zip(contacts(model.encoder, batch), contacts(restored.encoder, batch), strict=True):
        assert torch.equal(before, after)
    assert not any("contact" in name for name, _ in restored.named_parameters())
