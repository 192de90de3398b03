"""Whole runs on real proteins and process groups: outputs, reproducibility, resuming and scaling out."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import ValidationBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from runs import ROOT, command, command_here, losses, run_apart, run_here

SUMMARY_KEYS = {
    "parameters", "consumed_samples", "steps", "validation_perplexity", "unigram_perplexity", "masked_accuracy", "nemo",
    "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_here(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_archive(folder / "laptop.nemo").weights)


def test_run_writes_summary_report_history_configuration_checkpoints_and_archive(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["steps"], summary["consumed_samples"]) == (6, 96)
    assert 17 < summary["unigram_perplexity"] < 19
    for name in ("report.html", "report.png", "config.yaml", "metrics.jsonl", "store/manifest.json"):
        assert (finished / name).stat().st_size > 0, name
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "step-000000004.ckpt",
        "step-000000006.ckpt",
    ]
    assert not list(finished.rglob("*.partial"))


def test_single_step_is_written_in_the_singular(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for expected in (r"\nDone in \d+:\d\d: 1 step, 0\.0 epochs\.\n", r"finished already \(1 step\): "):
        run_here(tmp_path / "run", "trainer.max_steps=1", "trainer.val_check_interval=1")
        assert re.search(expected, capfd.readouterr().out)


def test_archive_reproduces_the_perplexity_of_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    store = ProteinStore.open(finished / "store")
    reader = SampleReader(store.split("validation"), 128, MaskingPolicy().for_evaluation(), seed=42)
    result = ESM1nvModel.restore_from(summary["nemo"]).evaluate(ValidationBatches(reader, micro_batch_size=8))
    assert result.perplexity == pytest.approx(summary["validation_perplexity"], rel=1e-6)
    assert result.accuracy == summary["masked_accuracy"]


def test_inspect_of_a_run_folder_lists_its_files(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command_here("inspect", str(finished))
    output = capfd.readouterr().out
    assert "run" in output.splitlines()[0]
    assert str(finished / "laptop.nemo") in output


def test_finished_run_is_not_repeated(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    run_here(finished)
    assert "finished already (6 steps)" in capfd.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_same_seed_gives_the_same_run_with_any_number_of_workers(finished: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "workers", "data.num_workers=2")
    assert losses(tmp_path / "workers") == losses(finished)
    expected = weights_of(finished)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(tmp_path / "workers").items())


def test_another_seed_gives_another_run(finished: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "seed", "seed=43")
    assert losses(tmp_path / "seed") != losses(finished)


def test_accumulation_does_not_change_the_optimisation(tmp_path: Path) -> None:
    run_here(tmp_path / "whole", "model.hidden_dropout=0", "data.micro_batch_size=16", "model.attention_dropout=0")
    run_here(tmp_path / "parts", "model.hidden_dropout=0", "data.micro_batch_size=4", "model.attention_dropout=0")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_interrupted_run_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    """Simulate a kill after step 4: the disk has the checkpoint of step 4 and a history that may reach further."""
    unbroken, cut = tmp_path / "unbroken", tmp_path / "cut"
    run_here(unbroken, f"trainer.precision={precision}", "exp_manager.checkpoints.keep_last=9")
    cut.mkdir()
    for name in ("store", "config.yaml", "metrics.jsonl"):
        source = unbroken / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, cut / name)
    (cut / "checkpoints").mkdir()
    shutil.copy(unbroken / "checkpoints" / "step-000000004.ckpt", cut / "checkpoints")

    summary = run_here(cut, f"trainer.precision={precision}")
    assert summary["resumed_from_step"] == 4
    assert summary["consumed_samples"] == 96
    assert losses(cut) == losses(unbroken)
    expected = weights_of(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(cut).items())


def test_damaged_checkpoint_is_skipped_and_reported(
    tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "step-000000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:5000])
    summary = run_here(folder)
    assert summary["resumed_from_step"] == 4
    assert "step-000000006.ckpt: cut short" in capfd.readouterr().out
    assert (folder / "checkpoints" / "step-000000006.ckpt.damaged").is_file(), "nothing is thrown away"
    assert losses(folder) == losses(finished)


def test_training_starts_from_the_weights_of_an_archive(finished: Path, tmp_path: Path) -> None:
    archive = finished / "laptop.nemo"
    run_here(
        tmp_path / "more",
        f"restore_from_path={archive}",
        "trainer.max_steps=2",
        "optim.lr=1e-9",
        "optim.sched.min_lr=0",
    )
    before, after = weights_of(finished), weights_of(tmp_path / "more")
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=1e-7, rtol=0)
    manifest = read_archive(tmp_path / "more" / "laptop.nemo").provenance
    assert manifest["restored_from"] == str(archive)


def test_own_fasta_file_is_trained_on_in_one_command(tmp_path: Path) -> None:
    fasta = ROOT / "bionemo_esm" / "data" / "sample" / "validation.fasta.gz"
    summary = run_here(tmp_path / "own", f"data.fasta={fasta}", "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert summary["data"] == str(fasta)
    assert (summary["train_sequences"], summary["validation_sequences"]) == (180, 10)


def assert_only_our_lines(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that the output has only our lines."""
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == "laptop"
    for word in ("model", "data", "batch", "steps", "device", "fused", "results"):
        assert any(line.startswith(f"  {word} ") for line in lines), word
    assert len(lines) < 20, done.stdout


@pytest.mark.slow
def test_interrupted_run_is_saved_and_resumed_by_the_same_command(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "checkpoints").exists():
        time.sleep(0.005)  # until the checkpoint of step 2 is being written
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 130, output + error
    assert "Stopped by SIGINT at step" in output
    assert error == ""
    run_here(folder)
    assert losses(folder) == losses(finished)
    kinds = [[json.loads(line)["kind"] for line in (run / "metrics.jsonl").open()] for run in (folder, finished)]
    assert kinds[0] == kinds[1], "a stop must not validate on its way out"


@pytest.mark.slow
def test_ranks_of_a_node_start_from_one_command_and_train_as_one(tmp_path: Path) -> None:
    dry = ("model.hidden_dropout=0", "model.attention_dropout=0")  # dropout may differ between ranks
    run_here(tmp_path / "one", *dry)
    done = run_apart(tmp_path / "two", *dry, "trainer.devices=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_only_our_lines(done)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_full_esm1nv_takes_a_step_on_a_cpu(tmp_path: Path) -> None:
    sizes = ("num_layers=6", "hidden_size=768", "num_attention_heads=12", "ffn_hidden_size=3072", "seq_length=512")
    fasta = ROOT / "bionemo_esm" / "data" / "sample" / "validation.fasta.gz"  # 200 proteins, 10 of them for validation
    overrides = [f"model.{size}" for size in sizes] + ["data.micro_batch_size=4", "data.global_batch_size=4"]
    overrides += [f"data.fasta={fasta}"]
    summary = run_here(tmp_path / "full", *overrides, "trainer.max_steps=1", "trainer.val_check_interval=1")
    assert summary["parameters"] == 43_612_544
