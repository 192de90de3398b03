"""Parameter groups of an encoder and a head: which parameters are trained, and their learning rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bionemo_esm.data.collate import pack
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.finetuning.adapters import add_adapters
from bionemo_esm.finetuning.config import AdapterConfig, HeadConfig
from bionemo_esm.finetuning.heads import build_head
from bionemo_esm.finetuning.model import freeze, layer_of, parameter_groups, set_trainable
from bionemo_esm.finetuning.tasks import Task
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.feature_extraction import representations
from models import tiny_model

LAYERS = 3


class Model(nn.Module):
    """An encoder of three blocks and a head, with the parameter names of a fine-tuned model."""

    def __init__(self, **sizes: float) -> None:
        super().__init__()
        self.encoder: ESMEncoder = tiny_model(num_layers=LAYERS, **sizes).encoder
        task = Task(name="stability", level="sequence", kind="regression", metric="spearman")
        self.head = build_head(HeadConfig(kind="mlp", hidden=4), task, 32)


def rates_by_name(model: Model, num_layers: int = LAYERS, decay: float = 0.5) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by parameter name, for lr 0.1, head_lr 0.7 and weight_decay 0.01."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), num_layers, 0.1, 0.7, decay, 0.01)
    rates = [(names[part], (group["lr"], group["weight_decay"])) for group in groups for part in group["params"]]
    assert len(dict(rates)) == len(rates), "a parameter is in two groups"
    assert len({rate for _, rate in rates}) == len(groups), "two groups are alike"
    return dict(rates)


def trained_names(encoder: ESMEncoder) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def test_learning_rate_decays_by_layer_from_the_top() -> None:
    model = Model(embedding_layernorm=True)
    rates = rates_by_name(model)
    assert rates["encoder.embedding.word_embeddings.weight"] == pytest.approx((0.0125, 0.01))
    assert rates["encoder.embedding_layernorm.weight"] == pytest.approx((0.0125, 0))
    assert rates["encoder.encoder.layers.0.mlp.linear_fc1.weight"] == pytest.approx((0.025, 0.01))
    assert rates["encoder.encoder.layers.0.mlp.linear_fc1.bias"] == pytest.approx((0.025, 0))
    assert rates["encoder.encoder.layers.1.input_layernorm.weight"] == pytest.approx((0.05, 0))
    assert rates["encoder.encoder.layers.2.self_attention.linear_qkv.weight"] == pytest.approx((0.1, 0.01))
    assert rates["encoder.encoder.final_layernorm.weight"] == pytest.approx((0.1, 0))
    assert rates["encoder.lm_head.dense.weight"] == pytest.approx((0.1, 0.01))
    assert rates["head.hidden.weight"] == pytest.approx((0.7, 0.01))
    assert rates["head.output.bias"] == pytest.approx((0.7, 0))
    assert rates.keys() == {name for name, _ in model.named_parameters()}


def test_without_layer_decay_there_are_four_groups() -> None:
    assert set(rates_by_name(Model(), decay=1.0).values()) == {(0.1, 0.01), (0.1, 0.0), (0.7, 0.01), (0.7, 0.0)}


def test_frozen_parameters_are_in_no_group() -> None:
    model = Model()
    set_trainable(model.encoder, "full", 2)
    rates = rates_by_name(model, num_layers=2)  # a parameter of block 3 would be above the features
    assert rates["encoder.encoder.layers.1.mlp.linear_fc1.weight"] == pytest.approx((0.1, 0.01))
    assert rates["encoder.embedding.word_embeddings.weight"] == pytest.approx((0.025, 0.01))
    assert not any("layers.2" in name or "lm_head" in name for name in rates)
    freeze(model.encoder)
    assert {name.partition(".")[0] for name in rates_by_name(model)} == {"head"}


def test_every_parameter_has_a_layer() -> None:
    model = Model(embedding_layernorm=True)
    add_adapters(model.encoder, AdapterConfig())
    layers = {name: layer_of(name, LAYERS) for name, _ in model.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3, 4}
    assert layers["encoder.encoder.layers.1.self_attention.linear_qkv.lora_a"] == 2
    assert layers["encoder.output_layer.bias"] == 3
    assert layer_of("encoder.encoder.layers.11.mlp.linear_fc1.weight", 12) == 12


@pytest.mark.parametrize("name", ["encoder.pooler.weight", "decoder.weight", "header.weight", "encoder.encoder.x"])
def test_unknown_parameter_name_fails_an_assertion(name: str) -> None:
    with pytest.raises(AssertionError, match="no layer is known"):
        layer_of(name, LAYERS)


def test_block_above_the_features_fails_an_assertion() -> None:
    with pytest.raises(AssertionError, match="above layer 2"):
        layer_of("encoder.encoder.layers.2.mlp.linear_fc1.weight", 2)


@pytest.mark.parametrize("layer", range(LAYERS + 1))
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_trained_parameters_equal_those_with_a_gradient_from_the_features(
    mode: str, layer: int, tiny_split: SequenceSplit
) -> None:
    sizes = {"embedding_layernorm": True, "token_dropout": True, "contact_head": True}
    encoder = tiny_model(num_layers=LAYERS, **sizes).encoder
    if mode == "lora":
        add_adapters(encoder, AdapterConfig())
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if name.endswith("lora_b"):
                    nn.init.normal_(parameter)
    freeze(encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad = mode == "full" or "lora_" in name
    batch = pack(tiny_split[3], np.array([77]))
    features = representations(encoder, batch, [layer])[layer]
    if features.requires_grad:
        features.sin().sum().backward()
    reached = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    set_trainable(encoder, mode, layer)
    assert trained_names(encoder) == reached
    assert bool(reached) == (mode == "full" or layer > 0)


def test_freezing_can_be_undone() -> None:
    encoder = tiny_model().encoder
    set_trainable(encoder, "full", 2)
    everything = trained_names(encoder)
    assert "encoder.final_layernorm.weight" in everything
    set_trainable(encoder, "frozen", 2)
    assert not trained_names(encoder)
    set_trainable(encoder, "full", 2)
    assert trained_names(encoder) == everything


@pytest.mark.parametrize(("mode", "layer"), [("full", 4), ("full", -1), ("half", 2)])
def test_unknown_mode_or_layer_fails_an_assertion(mode: str, layer: int) -> None:
    with pytest.raises(AssertionError):
        set_trainable(tiny_model(num_layers=LAYERS).encoder, mode, layer)
