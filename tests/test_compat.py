"""Tests of the library internals that `bionemo_esm.compat` uses. Each test names the library and its version."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import Parameter
from torch.utils.data import DataLoader

from bionemo_esm import compat
from bionemo_esm.model.nemo_connector import ESMSaveRestoreConnector
from models import tiny_model


def read_from(distribution: str) -> str:
    return f"{distribution} {version(distribution)}; compat.py was read from {compat.READ_FROM[distribution]}"


def test_importing_compat_imports_no_library() -> None:
    code = (
        "import sys, bionemo_esm.compat\n"
        "print({'torch', 'nemo', 'lightning', 'megatron'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Manual(LightningModule):
    """A module with manual optimization that skips the given steps."""

    def __init__(self, skipped: tuple[int, ...]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.skipped = Parameter(torch.ones(2)), skipped

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx in self.skipped:
            compat.count_skipped_step(self.trainer)
        else:
            self.manual_backward(self.weight.sum())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(steps: int, *skipped: int) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Manual(skipped), DataLoader(range(100)))  # type: ignore[arg-type]
    return trainer


def test_lightning_counts_a_skipped_step_as_a_step() -> None:
    assert trained(5, 1, 3).global_step == 5, read_from("lightning")


def test_constructed_loop_state_equals_the_state_after_training() -> None:
    whole = trained(4).fit_loop.state_dict()
    made = compat.fit_loop_state(trained(1), 4)
    for key in ("epoch_loop.batch_progress", "epoch_loop.manual_optimization.optim_step_progress"):
        assert made[key] == whole[key], read_from("lightning")
    assert made["epoch_loop.state_dict"] == whole["epoch_loop.state_dict"], read_from("lightning")


def test_megatron_uses_only_size_and_rank_of_a_process_group() -> None:
    """If Megatron used more, building an encoder without `torch.distributed` would fail here."""
    assert not torch.distributed.is_initialized()
    encoder = tiny_model().encoder
    assert encoder is not None
    groups = encoder.pg_collection
    assert (groups.tp.size(), groups.tp.rank()) == (1, 0), read_from("megatron-core")
    assert encoder.shared_embedding_or_output_weight() is encoder.embedding.word_embeddings.weight


def test_megatron_marks_the_parameters_that_tensor_parallelism_splits() -> None:
    encoder = tiny_model().encoder
    assert encoder is not None
    split = {name: compat.split_dimension(p) for name, p in encoder.named_parameters() if "layers.0" in name}
    expected = {"linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_proj.weight": 1, "linear_fc1.weight": 0}
    expected |= {"linear_fc1.bias": 0, "linear_fc2.weight": 1}
    found = {".".join(name.split(".")[-2:]): dimension for name, dimension in split.items() if dimension is not None}
    assert found == expected, read_from("megatron-core")
    assert compat.split_dimension(encoder.embedding.word_embeddings.weight) == 0
    assert compat.split_dimension(encoder.output_layer.bias) == 0


def test_nemo_reads_its_connector_from_the_module_of_modelpt() -> None:
    from nemo.core.classes import modelPT

    assert modelPT.SaveRestoreConnector is ESMSaveRestoreConnector, read_from("nemo_toolkit")


@pytest.mark.skipif(not compat.onednn_is_available(torch.float32), reason="PyTorch without oneDNN")
def test_onednn_operator_is_a_linear_layer() -> None:
    given, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    expected = torch.nn.functional.linear(given, weight, bias)
    assert torch.allclose(compat.onednn_linear(given, weight, bias), expected, atol=1e-5), read_from("torch")
    assert torch.allclose(compat.onednn_linear(given, weight, None), expected - bias, atol=1e-5), read_from("torch")


def test_onednn_does_not_support_float64() -> None:
    assert not compat.onednn_is_available(torch.float64)


def test_softmax_backward_operator_equals_autograd() -> None:
    scores = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 4, 5, dtype=torch.float64)
    probabilities = scores.softmax(-1)
    probabilities.backward(gradient)
    assert scores.grad is not None
    found = compat.softmax_backward(gradient, probabilities.detach())
    assert torch.allclose(found, scores.grad), read_from("torch")


def test_cpu_support_of_bfloat16_products_is_reported() -> None:
    assert compat.cpu_multiplies_bfloat16() in (True, False), read_from("torch")
