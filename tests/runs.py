"""Pretraining runs for tests, composed as on the command line, in this process or in a separate one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bionemo_esm import config_directory
from bionemo_esm.__main__ import main
from bionemo_esm.pretraining.run import pretrain

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "recipe=laptop",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=64",
    "model.seq_length=128",
    "model.hidden_dropout=0.1",  # dropout makes determinism a real test
    "data.micro_batch_size=8",
    "data.global_batch_size=16",
    "trainer.precision=32",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=4",
    "trainer.log_every_n_steps=1",
    "exp_manager.checkpoints.every_n_train_steps=2",
    "exp_manager.create_tensorboard_logger=false",
    "evaluate.test_sequences=0",
)
"""Overrides for a model that trains in a second. Every test starts from these."""


def tool(name: str) -> str | None:
    """Return the path of a command of this environment (active or not) or of the machine, or None."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def composed(*overrides: str, config: str = "pretrain_esm1nv", part: str = "") -> DictConfig:
    with initialize_config_dir(str(config_directory(part)), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def command_here(*words: str) -> None:
    """Run `bionemo-esm` with these words in this process. A stop raises `SystemExit`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bionemo-esm", *words])
        main()


def run_here(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train in this process and return the summary of the run. A stop raises `SystemExit`."""
    pretrain(composed(*SMALL, f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}", *overrides))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def command(folder: Path, *overrides: str) -> list[str]:
    """Return the command line of the same run for a separate process."""
    place = (f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}")
    return [sys.executable, str(ROOT / "examples" / "pretrain_esm1nv.py"), *SMALL, *place, *overrides]


def run_apart(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, check=False, timeout=300)


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by step from the history of the run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
