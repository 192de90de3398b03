"""Tests of checkpoints: content, retention and writing in the background."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel, Evaluation
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.pretraining import checkpoints as module
from bionemo_esm.pretraining.checkpoints import AsyncWriter, SafeCheckpointIO, StopSignals
from bionemo_esm.pretraining.recipe import load_recipe
from bionemo_esm.pretraining.resume import CheckpointError, list_checkpoints, newest_checkpoint
from bionemo_esm.pretraining.run_context import run_directory
from models import tiny_model
from runs import composed, run_here

CHECKPOINTS = "exp_manager.checkpoints."
BIAS = "encoder.output_layer.bias"


def model_at_rest(step: int = 1) -> Archive:
    """Return a small real model whose output bias equals the step."""
    archive = describe(tiny_model(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8, seq_length=8))
    weights = {**archive.weights, BIAS: torch.full((128,), float(step))}
    return replace(archive, weights=weights, provenance={"steps": step})


def checkpoint(folder: Path, step: int, name: str | None = None) -> Path:
    """Write a small checkpoint with the structure of a training checkpoint."""
    state = dict.fromkeys(("consumed_samples", "identity", "guard", "callbacks", "optimizer_states", "lr_schedulers"))
    state |= {"steps": step, "moment": torch.ones(2), 7: (1, None, float("inf"))}
    return write_archive(folder / (name or f"step-{step:09d}.ckpt"), replace(model_at_rest(step), state=state))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_loading_returns_what_was_saved(tmp_path: Path) -> None:
    state = SafeCheckpointIO(AsyncWriter()).load_checkpoint(checkpoint(tmp_path, 4))
    assert torch.equal(state["moment"], torch.ones(2))
    assert state[7] == (1, None, float("inf"))
    assert torch.equal(state["model"].weights[BIAS], torch.full((128,), 4.0))


def test_checkpoint_holds_the_state_at_the_time_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues and changes tensors in place while the file is written."""
    go_on = threading.Event()
    monkeypatch.setattr(module, "write_archive", lambda *arguments: go_on.wait(10) and write_archive(*arguments))
    archive, moment, writer = model_at_rest(), torch.zeros(5), AsyncWriter()
    path = tmp_path / "step-000000001.ckpt"
    SafeCheckpointIO(writer).save_checkpoint({"model": archive, "moment": moment}, path)
    archive.weights[BIAS].fill_(9)
    moment += 1
    go_on.set()
    writer.drain()
    file = ArchiveFile.open(path)
    assert not file.load_state()["moment"].any()
    assert torch.equal(file.load_weights()[BIAS], torch.ones(128))


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 2 is delayed until step 3 is done."""
    taken = threading.Event()
    seen: list[bool] = []

    def held_back(path: Path, archive: Archive) -> Path:
        if path.name == "step-000000002.ckpt":
            seen.append(taken.wait(30))
        return write_archive(path, archive)

    step = ESM1nvModel.training_step

    def watched(model: ESM1nvModel, *arguments: Any) -> None:
        step(model, *arguments)
        if model.steps == 3:
            taken.set()

    monkeypatch.setattr(module, "write_archive", held_back)
    monkeypatch.setattr(ESM1nvModel, "training_step", watched)
    run_here(tmp_path / "run", "trainer.val_check_interval=6")
    assert seen == [True]


def test_best_checkpoint_is_kept_beside_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses are set to 5, 3 and 4 after steps 2, 4 and 6."""
    made_up = iter([5.0, 3.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(ESM1nvModel, "evaluation", staticmethod(lambda sums: Evaluation(next(made_up), 0.1, 10)))
    settings = ("trainer.val_check_interval=2", f"{CHECKPOINTS}keep_last=1", f"{CHECKPOINTS}every_n_train_steps=1")
    summary = run_here(tmp_path / "run", *settings)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000000004.ckpt", "step-000000006.ckpt"]
    assert summary["best_checkpoint"] == str(tmp_path / "run" / "checkpoints" / "step-000000004.ckpt")


def test_validation_between_checkpoints_does_not_change_the_averaging_schedule(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "trainer.val_check_interval=3", f"{CHECKPOINTS}every_n_train_steps=4")
    folder = tmp_path / "run" / "checkpoints"
    schedule = {path.name: ArchiveFile.open(path).provenance["checkpoint"]["on_schedule"] for path in folder.iterdir()}
    assert schedule == {"step-000000004.ckpt": True, "step-000000006.ckpt": True}
    assert names(tmp_path / "run" / "averaging") == ["step-000000004.nemo", "step-000000006.nemo"]


def test_step_is_read_from_the_file_and_not_from_its_name(tmp_path: Path) -> None:
    late = checkpoint(tmp_path, 40, "step-000000001.ckpt")
    early = checkpoint(tmp_path, 3, "step-000000099.ckpt")
    assert list_checkpoints(tmp_path) == [early, late]
    assert newest_checkpoint(tmp_path) == (late, [])


def test_nothing_is_deleted_after_a_failed_write() -> None:
    done: list[str] = []

    def fail() -> None:
        raise ArchiveError("no space")

    for in_background in (True, False):
        writer = AsyncWriter(in_background)
        writer.submit(lambda: done.append("written"))
        writer.submit(fail)
        writer.submit(lambda: done.append("deleted"))
        with pytest.raises(ArchiveError, match="no space"):
            writer.drain()
    assert done == ["written", "written"]


def test_empty_checkpoint_folder_is_valid_and_only_damaged_files_are_an_error(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    checkpoint(tmp_path, 2).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*step-000000002\.ckpt: cut short"):
        newest_checkpoint(tmp_path)


def test_model_archive_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "step-000000001.ckpt", model_at_rest())
    with pytest.raises(ArchiveError, match="holds a model and no state of training"):
        SafeCheckpointIO(AsyncWriter()).load_checkpoint(path)


class Unstorable:
    """A type that cannot be stored in a checkpoint."""


@pytest.mark.parametrize("value", [Unstorable(), {1, 2}, b"bytes", lambda: None, torch.float32])
def test_unstorable_value_is_refused_on_saving_with_its_key_path(tmp_path: Path, value: Any) -> None:
    archive = model_at_rest()
    with pytest.raises(TypeError, match=rf"callbacks\.mine\.1: a {type(value).__name__} cannot be stored"):
        SafeCheckpointIO(AsyncWriter()).save_checkpoint(
            {"model": archive, "callbacks": {"mine": [0, value]}}, tmp_path / "step-000000001.ckpt"
        )
    assert names(tmp_path) == []


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_here(tmp_path / name)
    for part in ("checkpoints/step-000000006.ckpt", "averaging/step-000000002.nemo", "laptop-averaged.nemo"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


def test_summary_reports_the_averaged_model_beside_the_last(tmp_path: Path) -> None:
    summary = run_here(tmp_path / "run")
    assert summary["averaged_checkpoints"] == 3
    assert summary["averaged_validation_perplexity"] != summary["validation_perplexity"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"{summary['averaged_validation_perplexity']:.3f}" in report
    assert "averaged_nemo" not in run_here(tmp_path / "none", f"{CHECKPOINTS}average_last=0")
    assert not (tmp_path / "none" / "averaging").exists()
    assert json.loads((tmp_path / "none" / "summary.json").read_text())["steps"] == 6


def test_missing_result_is_rewritten_and_a_missing_snapshot_gives_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_here(folder)
    model = (folder / "laptop.nemo").read_bytes()
    (folder / "laptop.nemo").unlink()
    (folder / "averaging" / "step-000000002.nemo").unlink()
    capfd.readouterr()
    assert run_here(folder)["averaged_checkpoints"] == 2
    assert (folder / "laptop.nemo").read_bytes() == model
    assert "warning: the average is of 2, not 3 checkpoints; others are missing" in capfd.readouterr().out


@pytest.mark.parametrize("after", [lambda signals: None, lambda signals: signals.stop_with_another_rank()])
def test_second_interrupt_stops_at_once(after: Callable[[StopSignals], None]) -> None:
    signals = StopSignals()
    with signals.handling():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        after(signals)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("key", ["every_n_train_steps=0", "keep_last=0", "average_last=1", "average_last=-1"])
def test_invalid_checkpoint_settings_are_refused_with_their_key(key: str) -> None:
    with pytest.raises(UserError, match=f"exp_manager.checkpoints.{key.split('=')[0]} must be"):
        load_recipe(composed("recipe=laptop", CHECKPOINTS + key))


def test_partial_files_of_a_killed_writer_are_removed(
    tmp_path: Path,
) -> None:
    left = (
        "checkpoints/.step-000000002.ckpt.x.partial",
        "averaging/.step-000000002.nemo.x.partial",
        ".a.nemo.x.partial",
    )
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes.partial").write_bytes(b"mine")
    with run_directory(tmp_path):
        assert [path.name for path in tmp_path.rglob("*.partial")] == ["notes.partial"]
