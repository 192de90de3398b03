"""Nothing depends on the user's default device, and kernels and state follow to another device or implementation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch import nn
from torch.nn import Parameter

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.model import attention, backends
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.backends import ADAMS, NORMS, Kernel, choose_backends
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, full_state, load_full_state
from models import TINY, tiny_model


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


# --- default device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", ["random", "archive"])
def test_lightnings_default_device_changes_no_initial_weight(tmp_path: Path, beginning: str) -> None:
    config = OmegaConf.create({"encoder": TINY, "precision": "32", "seed": 1})
    expected = ESM1nvModel(config)
    expected.save_to(str(tmp_path / "first.nemo"))
    model = ESM1nvModel(config, Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    model.initial_weights = tmp_path / "first.nemo" if beginning == "archive" else None
    with torch.device("meta"):
        model.configure_model()
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_archives_are_read_and_restored_under_any_default_device(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    tiny_model().save_to(str(path))
    with torch.device("meta"):
        weights = read_archive(path).weights
        restored = ESM1nvModel.restore_from(str(path), map_location="cpu")
    assert all(tensor.device.type == "cpu" for tensor in weights.values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in restored.named_parameters())


# --- kernels ----------------------------------------------------------------------------------------------------------


class OtherNorm(nn.LayerNorm):
    """Stands for a layer norm of Transformer Engine or Apex, which a CPU does not have."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)


def norms_of(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.LayerNorm)}


def test_kernels_follow_a_model_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS._parts, "other", Kernel(lambda: OtherNorm, priority=9))
    model = tiny_model(attention_dropout=0.1)
    encoder = model.encoder
    assert encoder is not None
    own, before = encoder.backends, dict(encoder.named_parameters())
    encoder._use(choose_backends("cuda", torch.bfloat16, 0.1, 8))
    assert norms_of(encoder) == {"OtherNorm"}
    assert not encoder.pads_rows
    assert {name: id(tensor) for name, tensor in encoder.named_parameters()} == {
        name: id(tensor) for name, tensor in before.items()
    }
    model.to("meta")
    assert norms_of(encoder) == {"OtherNorm"}, "the meta device computes nothing"
    model.to_empty(device="cpu")
    assert model.backends is not None
    assert encoder.backends.describe() == own.describe() == model.backends.describe()
    assert norms_of(encoder) == {type(own.layer_norm(encoder.config, 8, 1e-5)).__name__}


def test_results_stay_the_same_after_kernels_of_a_gpu_have_been_in_use() -> None:
    model = tiny_model()
    assert model.encoder is not None
    tokens = torch.randint(4, 24, (40,), generator=torch.Generator().manual_seed(0))
    row = tokens, torch.arange(40), torch.tensor([0, 40], dtype=torch.int32), 40
    expected = model.encoder(*row)
    model.encoder._use(choose_backends("cuda", torch.float32, 0.0, 8))
    model.encoder._use(choose_backends("cpu", torch.float32, 0.0, 8))
    assert torch.equal(model.encoder(*row), expected)


@pytest.mark.parametrize(
    ("dtype", "dropout", "head_size", "capability", "expected"),
    [
        (torch.bfloat16, 0.0, 64, (8, 0), "varlen-flash"),
        (torch.bfloat16, 0.0, 64, (7, 5), "nested"),
        (torch.bfloat16, 0.0, 264, (9, 0), "nested"),
        (torch.bfloat16, 0.0, 12, (9, 0), "sdpa-by-sequence"),
        (torch.bfloat16, 0.1, 64, (9, 0), "nested"),
        (torch.float32, 0.0, 64, (9, 0), "nested"),
    ],
)
def test_flash_kernels_are_chosen_where_they_exist(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    dropout: float,
    head_size: int,
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert attention.choose_attention("cuda", dtype, dropout, head_size) == expected


def test_an_apex_without_its_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Apex:
        FusedAdam = object

    monkeypatch.setattr(backends, "importable", {"apex.optimizers": Apex}.get)
    assert ADAMS.get("Apex FusedAdam").load() is None
    monkeypatch.setattr(backends, "importable", {"apex.optimizers": Apex, "amp_C": object()}.get)
    assert ADAMS.get("Apex FusedAdam").load() is Apex.FusedAdam


def test_another_optimizer_than_fused_adam_is_named() -> None:
    chosen = choose_backends("cpu", torch.float32, 0.0)
    assert "Adam: PyTorch AdamW(fused)" in chosen.describe("fused_adam")
    assert "; optimizer: lion; " in chosen.describe("lion")
    assert "Adam" not in chosen.describe("lion")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_pinned_batches_are_copied_without_a_wait() -> None:
    class Batch:
        def to(self, device: torch.device, non_blocking: bool = False) -> tuple[torch.device, bool]:
            return device, non_blocking

    device = torch.device("cpu")
    assert tiny_model().transfer_batch_to_device(Batch(), device, 0) == (device, True)
    assert "non_blocking" in PackedBatch.to.__annotations__


# --- the optimizer's state --------------------------------------------------------------------------------------------


class FusedAdam(torch.optim.Optimizer):
    """A stand-in with the state of Transformer Engine's and Apex's: steps in the groups, settings of its own.

    Like theirs it refuses state that it does not know.
    """

    def __init__(self, groups: Any, lr: float, betas: Any, eps: float, weight_decay: float = 0.0) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(groups, settings)

    def load_state_dict(self, state_dict: Any) -> None:
        for values in state_dict["state"].values():
            for name in values:
                {"exp_avg": 0, "exp_avg_sq": 0}[name]
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            rates = [1 - beta ** group["step"] for beta in group["betas"]]
            for parameter in group["params"]:
                state = self.state[parameter]
                first, second = (
                    state.setdefault(name, torch.zeros_like(parameter)) for name in ("exp_avg", "exp_avg_sq")
                )
                first.lerp_(parameter.grad, 1 - group["betas"][0])
                second.lerp_(parameter.grad.square(), 1 - group["betas"][1])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * first / rates[0] / ((second / rates[1]).sqrt() + group["eps"]))


def begun(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MasterWeights, Any, bool]:
    """Return masters, their optimizer, and whether it counts by group."""
    priority = 9 if kind == "fused" else -9
    monkeypatch.setitem(ADAMS._parts, "fused", Kernel(lambda: FusedAdam, ("cpu",), priority, group_steps=True))
    named = {"matrix": Parameter(torch.arange(6.0).view(2, 3)), "bias": Parameter(torch.ones(3))}
    masters, chosen = MasterWeights(named.items()), choose_backends("cpu", torch.float32, 0.0)
    return masters, build_optimizer(masters, OptimConfig(lr=1e-2), chosen), chosen.adam_counts_by_group


def train(masters: MasterWeights, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        masters.gradients.copy_(torch.randn(len(masters.gradients), generator=generator))
        optimizer.step()


@pytest.mark.parametrize("old_form", [False, True], ids=["saved by this version", "saved as the optimizer has it"])
@pytest.mark.parametrize("target", ["PyTorch", "fused"])
@pytest.mark.parametrize("source", ["PyTorch", "fused"])
def test_a_run_resumes_with_another_implementation_of_adam(
    monkeypatch: pytest.MonkeyPatch, source: str, target: str, old_form: bool
) -> None:
    unbroken, whole, _ = begun(source, monkeypatch)
    train(unbroken, whole, range(3))
    saved = whole.state_dict() if old_form else full_state(whole, unbroken)
    if not old_form:
        assert all(float(values["step"]) == 3 for values in saved["state"].values())
        assert not any("step" in group for group in saved["param_groups"])
    masters, optimizer, by_group = begun(target, monkeypatch)
    masters.load_state_dict({name: tensor.detach().clone() for name, tensor in unbroken.masters.items()})
    load_full_state(optimizer, masters, copy.deepcopy(saved), by_group)
    for run in ((unbroken, whole), (masters, optimizer)):
        train(*run, range(3, 6))
    for name, tensor in unbroken.masters.items():
        torch.testing.assert_close(masters.masters[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(float(values["step"]) == 6 for values in full_state(optimizer, masters)["state"].values())
