"""Recomputed activations: the same loss and gradients bit for bit, less memory, and the counted operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from allocations import LiveBytes
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import RECOMPUTE, EncoderConfig
from bionemo_esm.model.costs import memory_per_device, recomputed_flops, training_flops
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.pretraining.recipe import TrainerConfig
from errors import refused
from runs import run_here
from test_costs import ESM1B, ESM2, SMALL, SQUARES, WIDER, attended_rows, counted_flops, model_of, row

RECOMPUTED = RECOMPUTE[1:]
WET = ESM1B.replace(hidden_dropout=0.2, attention_dropout=0.2)


@pytest.fixture(autouse=True)
def unpadded_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the tokens that there are: the plan leaves out the padding of lengths on a CPU."""
    monkeypatch.setattr("bionemo_esm.model.cpu_kernels._LENGTH_BUCKET", 1)


def recomputing(config: EncoderConfig, precision: str, recompute: str) -> ESM1nvModel:
    model = model_of(config, precision)
    assert model.encoder is not None
    model.encoder.set_recompute(recompute)
    return model


def loss_and_gradients(config: EncoderConfig, precision: str, recompute: str) -> dict[str, Tensor]:
    model, batch = recomputing(config, precision, recompute), row()
    torch.manual_seed(3)
    loss = cross_entropy(model(batch), batch.targets, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), "next draw": torch.rand(1), **gradients}


@pytest.mark.parametrize("config", [WET, ESM2], ids=["with dropout", "rotary"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_loss_and_gradients_are_those_without_recomputation_bit_for_bit(config: EncoderConfig, precision: str) -> None:
    expected = loss_and_gradients(config, precision, "none")
    for recompute in RECOMPUTED:
        found = loss_and_gradients(config, precision, recompute)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", [SMALL, WIDER, ESM1B, ESM2], ids=["small", "wider", "as ESM-1b", "as ESM-2"])
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_activation_memory_equals_what_is_alive_after_the_forward_pass(
    config: EncoderConfig, precision: str, recompute: str
) -> None:
    model, batch = recomputing(config, precision, recompute), row()
    with LiveBytes([*model.parameters(), batch.tokens]) as live:
        loss = cross_entropy(model(batch), batch.targets, reduction="sum")
        measured = live.now()
        del loss
    if precision == "bf16" and recompute == "selective":  # CPU attention in bf16 is not fused and computed again
        measured += (2 * config.hidden_size + 4 * config.num_attention_heads) * attended_rows(config, batch)
    whole, expected = (
        memory_per_device(config, len(batch.tokens), precision=precision, device_type="cpu", recompute=kind).activations
        for kind in ("none", recompute)
    )
    assert expected == pytest.approx(measured, abs=0.012 * whole)  # as exact as without recomputation


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_peak_of_the_backward_pass_is_one_recomputed_block_above_what_is_saved(recompute: str) -> None:
    """The difference of peaks for two depths is what the additional blocks save, and nothing else."""
    peaks, saved = [], []
    for layers in (3, 6):
        config = WIDER.replace(num_layers=layers)
        model, batch = recomputing(config, "32", recompute), row()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]) as live:
            cross_entropy(model(batch), batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
        memory = memory_per_device(config, len(batch.tokens), precision="32", device_type="cpu", recompute=recompute)
        peaks.append(live.peak)
        saved.append(memory.activations)
        estimate = memory.activations + memory.recomputed
        block_gradients = 4 * 6 * config.hidden_size * len(batch.tokens)  # which the estimate leaves out
        assert 0.95 * estimate < live.peak < 1.05 * estimate + block_gradients
    assert peaks[1] - peaks[0] == pytest.approx(saved[1] - saved[0], rel=0.03)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputed_flops_equal_the_count_of_pytorch(recompute: str) -> None:
    """Exact equality, with all tokens as queries; selective: attention by matrix products, which is computed again."""
    model, batch = recomputing(ESM2, "32", recompute), row()
    assert model.encoder is not None
    with counted_flops() as counted:
        logits = model.encoder.logits(model.hidden_states(batch)[batch.target_index])
        cross_entropy(logits, batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    tokens = len(batch.tokens)
    again = counted.get_total_flops() - training_flops(ESM2, tokens, SQUARES, len(batch.targets))
    expected = recomputed_flops(ESM2, tokens, SQUARES, recompute)
    assert again == expected + (4 * SQUARES * ESM2.num_layers * ESM2.hidden_size if recompute == "selective" else 0)


def test_runs_that_recompute_train_bit_for_bit_as_one_that_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for recompute in RECOMPUTE:
        wet = (
            "model.hidden_dropout=0.1",
            "model.attention_dropout=0.1",
            "trainer.max_steps=3",
            "trainer.shard_optimizer=true",
        )
        summary = run_here(tmp_path / recompute, f"trainer.recompute={recompute}", *wet)
        assert "trainer.shard_optimizer=true is now trainer.sharding=optimizer" in capfd.readouterr().out
        weights.append(ArchiveFile.open(Path(summary["nemo"])).load_weights())
    for found in weights[1:]:
        assert all(torch.equal(found[name], weights[0][name]) for name in weights[0])


def test_selective_recomputation_is_refused_with_tensor_parallelism() -> None:
    with refused("config.recompute", "trainer.recompute=full"):
        TrainerConfig(recompute="selective", tensor_model_parallel_size=2)
    TrainerConfig(recompute="full", tensor_model_parallel_size=2)
