"""An optimizer plugin: discovery by entry point, training, sharded state in checkpoints, and planning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bionemo_esm.errors import UserError
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.config import EncoderConfig, OptimConfig
from bionemo_esm.model.costs import memory_per_device, optimizer_state_bytes
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, full_state, load_full_state
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.pretraining.recipe import load_recipe
from errors import refused
from runs import SMALL, composed

PLUGIN = '''
import torch
from bionemo_esm.model.optimizer_registry import OptimizerFamily


class MomentumAdam(torch.optim.Optimizer):
    """Matrices by momentum alone, one state tensor; vectors by Adam, two."""

    def __init__(self, groups, lr, momentum):
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                direction = buffer
                if parameter.ndim < 2:
                    squares = state.setdefault("squares", torch.zeros_like(parameter))
                    squares.mul_(0.9).addcmul_(parameter.grad, parameter.grad, value=0.1)
                    direction = buffer / (squares.sqrt() + 1e-8)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)


FAMILY = OptimizerFamily(
    build=lambda backends: MomentumAdam,
    state=lambda name, shape: ("momentum_buffer",) if len(shape) >= 2 else ("momentum_buffer", "squares"),
    settings=lambda config: {"lr": config.lr, "momentum": config.options.get("momentum", 0.9)},
)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package as pip installs it: a module, and metadata with an entry point."""
    (tmp_path / "momentum_plugin.py").write_text(PLUGIN)
    info = tmp_path / "momentum_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: momentum-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bionemo_esm.optimizers]\nmomentum = momentum_plugin:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(OPTIMIZERS, "_plugins_loaded", False)
    monkeypatch.setattr(OPTIMIZERS, "_parts", dict(OPTIMIZERS._parts))
    yield
    sys.modules.pop("momentum_plugin", None)


CONFIG = EncoderConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)


def masters_of(seed: int) -> MasterWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (6, 4), "vector": (5,), "table": (7, 3)}
    return MasterWeights((name, Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items())


def train(masters: MasterWeights, optimizer: Any, steps: range) -> None:
    for step in steps:
        masters.gradients.copy_(torch.randn(len(masters.gradients), generator=torch.Generator().manual_seed(step)))
        optimizer.step()


@pytest.mark.usefixtures("plugin")
def test_plugin_optimizer_gets_its_groups_and_resumes_bit_for_bit() -> None:
    config = OptimConfig(name="momentum", options={"momentum": 0.5}, weight_decay=0.1)
    backends, family = choose_backends("cpu", torch.float32, 0.0), OPTIMIZERS.get("momentum")
    whole, first, second = (masters_of(1) for _ in range(3))
    optimizers = [build_optimizer(masters, config, backends) for masters in (whole, first, second)]
    assert [group["weight_decay"] for group in optimizers[0].param_groups] == [0.1, 0.0]
    assert optimizers[0].param_groups[0]["momentum"] == 0.5
    train(whole, optimizers[0], range(5))
    train(first, optimizers[1], range(3))
    state = full_state(optimizers[1], first, family)
    assert {key for values in state["state"].values() for key in values} == {"momentum_buffer", "squares"}
    second.load_state_dict(first.state_dict())
    load_full_state(optimizers[2], second, state)
    train(second, optimizers[2], range(3, 5))
    for name, master in whole.masters.items():
        assert torch.equal(second.masters[name], master), name


@pytest.mark.usefixtures("plugin")
def test_state_that_the_family_does_not_name_is_refused() -> None:
    config = OptimConfig(name="momentum")
    masters = masters_of(1)
    optimizer = build_optimizer(masters, config, choose_backends("cpu", torch.float32, 0.0))
    train(masters, optimizer, range(1))
    with refused("optimizer.unknown-state", "momentum_buffer"):
        full_state(optimizer, masters)  # reads it as Adam state


@pytest.mark.usefixtures("plugin")
def test_plan_counts_the_state_of_the_plugin() -> None:
    matrices = sum(a.numel() for a in map(torch.empty, (s for _, s in CONFIG.tensors() if len(s) >= 2)))
    vectors = CONFIG.parameters - matrices
    assert optimizer_state_bytes(CONFIG, "momentum") == 4 * matrices + 8 * vectors
    memory = memory_per_device(CONFIG, 1000, precision="bf16", optimizer="momentum")
    assert memory.moments == 4 * matrices + 8 * vectors
    assert memory_per_device(CONFIG, 1000, precision="bf16").moments == 8 * CONFIG.parameters


@pytest.mark.usefixtures("plugin")
def test_recipe_selects_the_plugin_by_name_and_its_identity_records_it() -> None:
    recipe = load_recipe(composed(*SMALL, "optim.name=momentum"))
    assert recipe.optim.name == "momentum"
    assert recipe.optim.to_dict()["name"] == "momentum"
    assert "name" not in load_recipe(composed(*SMALL)).optim.to_dict()


def test_unknown_optimizer_is_rejected_with_the_known_names() -> None:
    with refused("registry.unknown-name", "optim.name", "fused_adam", "'muom'"):
        load_recipe(composed(*SMALL, "optim.name=muom"))
    assert issubclass(UserError, ValueError)
