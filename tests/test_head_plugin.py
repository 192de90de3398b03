"""A head from another installed package: training, saving, restoring, and the error if it is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nemo.core.classes import ModelPT
from torch import Tensor

from bionemo_esm import FineTunedPredictor
from bionemo_esm.finetuning import heads
from bionemo_esm.finetuning.archive import FineTunedFile
from bionemo_esm.finetuning.finetune_command import main as finetune
from bionemo_esm.model.archive import ArchiveError
from bionemo_esm.pretraining.run import main as pretrain
from errors import refused
from finetuning_runs import per_residue, pretrained, run_here
from finetuning_runs import proteins as some_sequences

CODE = """
from torch import nn

from bionemo_esm.finetuning.config import HeadConfig
from bionemo_esm.finetuning.heads import Head


class GatedConfig(HeadConfig, section="head"):
    gates: int = 4


class GatedHead(Head):
    settings = GatedConfig

    def __init__(self, config, task, features):
        super().__init__(features)
        self.gate, self.value = nn.Linear(features, config.gates), nn.Linear(features, config.gates)
        self.output = nn.Linear(config.gates, task.outputs)

    def predict(self, features_RF, segments):
        return self.output(self.gate(features_RF).sigmoid() * self.value(features_RF))
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the package `gated-head` as pip does: a module and metadata with an entry point."""
    site = tmp_path / "site"
    info = site / "gated_head-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "gated_head.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-head\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bionemo_esm.heads]\ngated = gated_head:GatedHead\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(heads.HEADS, "_parts", dict(heads.HEADS._parts))
    monkeypatch.setattr(heads.HEADS, "_plugins_loaded", False)
    yield
    sys.modules.pop("gated_head", None)


@pytest.mark.usefixtures("plugin")
def test_a_head_from_another_package_is_trained_saved_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrained(tmp_path)
    run_here(tmp_path / "out", base, *per_residue(tmp_path), "head.kind=gated", "++head.gates=3", "tuning.max_epochs=1")
    path = tmp_path / "out" / "model.nemo"
    opened = FineTunedFile.open(path)
    assert opened.file.config["head"] == {**opened.parts.head.model_dump(), "kind": "gated", "gates": 3}
    assert opened.file.weights.infos["head.gate.weight"].shape == (3, 32)
    sequences = dict(list(some_sequences().items())[:3])
    predicted = FineTunedPredictor.load(path, "cpu").predict(sequences)
    assert [one.shape for one in predicted] == [(len(sequence), 3) for sequence in sequences.values()]
    assert np.allclose(np.concatenate(predicted).sum(axis=1), 1, atol=1e-5)
    ModelPT.restore_from(str(path), map_location="cpu")

    monkeypatch.setattr(heads.HEADS, "_parts", {name: heads.HEADS._parts[name] for name in ("linear", "mlp")})
    with pytest.raises(
        ArchiveError, match="'gated'; if another package adds this head, install that package"
    ) as caught:
        FineTunedPredictor.load(path, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("plugin")
def test_unknown_or_invalid_settings_of_a_head_are_refused() -> None:
    assert heads.head_config({"kind": "gated", "gates": 2}).model_dump()["gates"] == 2
    with refused("config.unknown-key", "head.gates"):
        heads.head_config({"kind": "linear", "gates": 2})
    with refused("config.type", "head.gates"):
        heads.head_config({"kind": "gated", "gates": "many"})


def test_a_head_that_returns_another_shape_is_refused_by_name() -> None:
    class FlatHead(heads.Head):
        def predict(self, features_RF: Tensor, segments: heads.Segments) -> Tensor:
            return features_RF.sum(dim=1)

    with refused("head.shape", "head FlatHead returns [5]", "[5, outputs] for a task per residue, [2, outputs]"):
        FlatHead(3)(torch.ones(5, 3), torch.tensor([0, 2, 5]))


def test_a_key_of_a_plugin_needs_no_plus_on_the_command_line() -> None:
    assert finetune.for_hydra("head.gates=2") == "++head.gates=2"
    assert finetune.for_hydra("seeds=[1]") == "seeds=[1]"
    assert pretrain.for_hydra("optim.options.momentum=0.9") == "++optim.options.momentum=0.9"
