"""Tests of LoRA adapters on Megatron's linear layers against the written-out formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning import adapters
from bionemo_esm.finetuning.adapters import adapter_shapes, add_adapters, merge_adapters, merged_weights
from bionemo_esm.finetuning.config import TARGETS, AdapterConfig
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.feature_extraction import representations
from models import TINY, tiny_model

ALL = AdapterConfig(rank=3, alpha=6.0, targets=TARGETS)
ESM_2 = {"position_embedding": "rotary", "token_dropout": True}
Reading = Callable[[ESMEncoder, PackedBatch], Tensor]


def final_states(encoder: ESMEncoder, batch: PackedBatch) -> Tensor:
    return encoder.hidden_states(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)


def first_block(encoder: ESMEncoder, batch: PackedBatch) -> Tensor:
    return representations(encoder, batch, [1])[1]


def states_at_places(encoder: ESMEncoder, batch: PackedBatch) -> Tensor:
    places = torch.tensor([2, 30, int(batch.cu_seqlens[1]) + 1])
    return encoder.hidden_states_at(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, places)


reading = pytest.mark.parametrize("read", [final_states, first_block, states_at_places], ids=lambda read: read.__name__)


@pytest.fixture(scope="module")
def batch(tiny_split: SequenceSplit) -> PackedBatch:
    proteins = [tiny_split[index] for index in (3, 1)]
    return pack(np.concatenate(proteins), np.array([len(protein) for protein in proteins]))


def adapted(config: AdapterConfig = ALL, precision: str = "32", **sizes: Any) -> ESMEncoder:
    """Return a tiny encoder whose adapters change its output: B is random, as after training."""
    encoder = tiny_model(precision, **sizes).encoder
    torch.manual_seed(5)
    add_adapters(encoder, config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return encoder


@reading
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_fresh_adapters_do_not_change_the_output(read: Reading, precision: str, batch: PackedBatch) -> None:
    encoder = tiny_model(precision, **ESM_2).encoder
    before = read(encoder, batch)
    add_adapters(encoder, ALL)
    assert torch.equal(read(encoder, batch), before)
    for name, parameter in encoder.named_parameters():
        assert not name.endswith("lora_b") or not parameter.any()
        assert not name.endswith("lora_a") or parameter.abs().max() > 0.1
        assert parameter.dtype == before.dtype


@reading
@pytest.mark.parametrize("sizes", [{}, ESM_2], ids=["ESM-1nv", "ESM-2"])
def test_merged_weights_give_the_same_output_as_adapters(
    read: Reading, sizes: dict[str, Any], batch: PackedBatch
) -> None:
    encoder = adapted(**sizes)
    plain, before = read(tiny_model(**sizes).encoder, batch), read(encoder, batch)
    assert (before - plain).abs().max() > 0.1
    merge_adapters(encoder, ALL)
    assert (read(encoder, batch) - before).abs().max() < 1e-5
    assert not any(module._forward_hooks for module in encoder.modules())
    names = {name: parameter.shape for name, parameter in tiny_model(**sizes).encoder.named_parameters()}
    assert {name: parameter.shape for name, parameter in encoder.named_parameters()} == names


def test_adapted_layer_and_its_gradients_equal_the_formula() -> None:
    encoder = adapted(AdapterConfig(rank=2, alpha=3.0, targets=("linear_fc1",))).double()
    layer = encoder.encoder.layers[1].mlp.linear_fc1
    seen = torch.randn(4, 1, 32, dtype=torch.float64, requires_grad=True)
    weight, lora_a, lora_b = (part.detach().clone() for part in (layer.weight, layer.lora_a, layer.lora_b))
    output, _ = layer(seen)
    found = torch.autograd.grad(output.sin().sum(), [seen, layer.lora_a, layer.lora_b])
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    expected = seen @ (weight + 3.0 / 2 * lora_b @ lora_a).T + layer.bias
    gradients = torch.autograd.grad(expected.sin().sum(), [seen, lora_a, lora_b])
    assert torch.allclose(output, expected, atol=1e-12)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, gradients, strict=True))


def test_training_updates_only_the_adapters(batch: PackedBatch) -> None:
    encoder = tiny_model(**ESM_2).encoder
    add_adapters(encoder, ALL)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(adapter_shapes(ALL, EncoderConfig.from_config(TINY | ESM_2)))
    optimizer = torch.optim.AdamW([encoder.get_parameter(name) for name in trained], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (final_states(encoder, batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if name not in trained)
    moved = [name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])]
    assert sorted(moved) == sorted(trained)


@pytest.mark.parametrize("targets", [("linear_qkv",), ("linear_proj", "linear_fc2"), TARGETS], ids="+".join)
def test_adapter_names_and_shapes_follow_from_the_configuration(targets: tuple[str, ...]) -> None:
    config = AdapterConfig(rank=2, targets=targets)
    encoder = tiny_model().encoder
    names = [name for name, _ in encoder.named_parameters()]
    add_adapters(encoder, config)
    added = {name: tuple(part.shape) for name, part in encoder.named_parameters() if name not in names}
    assert added == adapter_shapes(config, EncoderConfig.from_config(TINY))
    assert len(added) == 2 * 2 * len(targets)
    assert added.get("encoder.layers.1.self_attention.linear_qkv.lora_b", (96, 2)) == (96, 2)
    assert [name for name, _ in encoder.named_parameters() if name not in added] == names


def test_stored_adapters_give_the_same_output_in_another_encoder(batch: PackedBatch) -> None:
    trained, fresh = adapted(), tiny_model().encoder
    add_adapters(fresh, ALL)
    stored = {name: trained.get_parameter(name).detach() for name in adapter_shapes(ALL, EncoderConfig(**TINY))}
    fresh.load_state_dict(stored, strict=False)
    assert torch.equal(final_states(fresh, batch), final_states(trained, batch))


def test_adapter_dropout_is_active_only_in_training(batch: PackedBatch) -> None:
    encoder = adapted(AdapterConfig(rank=3, dropout=0.5))
    assert torch.equal(final_states(encoder, batch), final_states(encoder, batch))
    encoder.train()  # the tiny encoder's own dropout is 0
    assert not torch.equal(final_states(encoder, batch), final_states(encoder, batch))


def test_adapter_initialisation_depends_on_the_seed_and_not_on_precision() -> None:
    name = "encoder.layers.1.self_attention.linear_proj.lora_a"
    one, same, narrow = (adapted(precision=precision).get_parameter(name) for precision in ("32", "32", "bf16"))
    assert torch.equal(one, same)
    assert torch.equal(one.bfloat16(), narrow)
    assert one.abs().max() <= 32**-0.5
    assert not torch.equal(one, adapted().get_parameter(name.replace("1", "0")))


def test_weights_are_merged_in_float64_and_rounded_once() -> None:
    encoder = adapted()
    weights = {f"encoder.{name}": parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    merged = merged_weights(weights, ALL)
    merge_adapters(encoder, ALL)
    assert list(merged) == [f"encoder.{name}" for name, _ in encoder.named_parameters()]
    for name, parameter in encoder.named_parameters():
        assert torch.equal(merged[f"encoder.{name}"], parameter), name
    name = "encoder.encoder.layers.0.mlp.linear_fc2"
    lora_a, lora_b = (weights[f"{name}.{part}"].double() for part in ("lora_a", "lora_b"))
    exact = weights[f"{name}.weight"].double() + 2.0 * lora_b @ lora_a
    assert torch.equal(merged[f"{name}.weight"], exact.float())


def test_all_parameters_stay_frozen_after_merging_adapters() -> None:
    encoder = adapted()
    merge_adapters(encoder, ALL)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_adding_or_merging_adapters_twice_is_refused() -> None:
    encoder = adapted()
    with pytest.raises(AssertionError, match="has adapters already"):
        add_adapters(encoder, ALL)
    merge_adapters(encoder, ALL)
    with pytest.raises(AssertionError, match="no such adapters"):
        merge_adapters(encoder, ALL)
    add_adapters(encoder, ALL)


def test_merging_with_a_different_adapter_config_is_refused() -> None:
    encoder = adapted()
    with pytest.raises(AssertionError, match="other adapters"):
        merge_adapters(encoder, AdapterConfig(rank=3, alpha=6.0))


def test_adapters_are_refused_with_tensor_parallel_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_model().encoder
    monkeypatch.setattr(adapters, "tensor_parallel_size", lambda: 2)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=1"):
        add_adapters(encoder, ALL)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
