"""`bionemo-esm finetune`: one-line refusals before any model is loaded, and files left by signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.finetuning import comparison, fitting
from bionemo_esm.finetuning.model import ESMFineTunedModel
from fine_tuned import WORDS, fine_tuned
from finetuning_runs import QUICK, per_protein, per_residue, pretrained, run_here
from runs import command_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def refused(
    folder: Path, model: Path, *overrides: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the one-line error of a job that ends before a model is loaded."""

    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(comparison, "compare", never)
    with pytest.raises(SystemExit) as stopped:
        run_here(folder / "out", model, *overrides)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["head.kind=attention"], "head.kind attention weighs the residues of a protein, and neighbours asks about"),
        (["head.kind=transformer"], "head.kind must be one of attention, convnet, linear, mlp, not 'transformer'"),
        (["head.kernel_size=4"], "head.kernel_size odd"),
        (["reading.layer=3"], "layer 3"),
        (["reading.window=200"], "reading.window must be from 1 to 126 residues, not 200"),
        (["reading.window=20", "reading.overlap=20"], "an overlap of 20 does not go with windows of 20 residues"),
        (["tuning.mode=partial"], "tuning.mode must be one of frozen, full, lora, not 'partial'"),
        (["tuning.mode=lora", "reading.layer=0"], "reading.layer=0 lies before all of them"),
        (["tuning.mode=lora", "lora.targets=[qkv]"], "lora.targets must be one of linear_qkv"),
        (["tuning.keep_adapters=true"], "tuning.keep_adapters is for tuning.mode=lora"),
        (["tuning.lr=-1"], "tuning.lr must be positive, not -1"),
        (["seeds=[1,1]"], "seeds must be different numbers"),
        (["baselines=[one-hot]"], "baselines are one_hot, untrained, composition, not 'one-hot'"),
        (["trainer.precision=16"], "trainer.precision must be one of auto, 32, bf16, not '16'"),
        (["task.classes=[N,O]"], "'B'"),
        (["task.metric=spearman"], "task.metric must be one of accuracy, f1, mcc, not 'spearman'"),
        (["data.train=nowhere.fasta"], "nowhere.fasta"),
        (["data.validation=null", "data.train=null"], "data.train"),
    ],
)
def test_an_invalid_job_is_refused_before_a_model_is_loaded(
    overrides: list[str],
    words: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = per_residue(tmp_path)
    error = refused(tmp_path, base, *given, *overrides, monkeypatch=monkeypatch, capsys=capsys)
    assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("NOB", "NO", ("labels.fasta, record ", "residues")),  # one label too few
        ("VALIDATION=True", "VALIDATION=False", ("data.split.validation",)),
    ],
)
def test_bad_labels_are_named_by_record(
    old: str,
    new: str,
    words: tuple[str, ...],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = per_residue(tmp_path)
    labels = tmp_path / "labels.fasta"
    text = labels.read_text()
    assert old in text
    labels.write_text(text.replace(old, new, 1 if old == "NOB" else -1))
    error = refused(tmp_path, base, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("bad", ["nan", "", "much", "inf"])
def test_a_target_that_is_not_a_number_is_named_by_row(
    bad: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = per_protein(tmp_path)
    table = tmp_path / "shares.csv"
    lines = table.read_text().splitlines()
    fields = lines[4].split(",")
    lines[4] = ",".join([*fields[:2], bad, *fields[3:]])
    table.write_text("\n".join(lines) + "\n")
    error = refused(tmp_path, base, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert "shares.csv, record 4" in error


def test_constant_targets_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = per_protein(tmp_path)
    table = tmp_path / "shares.csv"
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    table.write_text("\n".join(",".join(row) for row in [header, *([*r[:2], "7", *r[3:]] for r in rows)]) + "\n")
    error = refused(tmp_path, base, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert "7" in error


def test_a_fine_tuned_model_is_refused_as_the_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fine_tuned(tmp_path / "tuned.nemo", WORDS)
    error = refused(tmp_path, tuned, *per_residue(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert "has learned a task already; give the pretrained archive that it came from" in error


def test_a_damaged_model_is_refused_before_any_file_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(base.read_bytes())
    content[-3000] ^= 1
    (tmp_path / "damaged.nemo").write_bytes(content)
    given = per_residue(tmp_path)
    error = refused(tmp_path, tmp_path / "damaged.nemo", *given, monkeypatch=monkeypatch, capsys=capsys)
    assert "damaged.nemo" in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_an_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.nemo"
    other.write_bytes(b"PK\x03\x04 something else")
    error = refused(tmp_path, other, *per_residue(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert "other.nemo" in error


def test_an_output_folder_with_other_files_is_refused_and_unchanged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = per_residue(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    error = refused(tmp_path, base, *given, monkeypatch=monkeypatch, capsys=capsys)
    assert "has other files in it" in error
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_finished_output_is_unchanged_and_other_settings_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = per_residue(tmp_path)
    run_here(tmp_path / "out", base, *given)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "compare", None)
        run_here(tmp_path / "out", base, *given)
    assert capsys.readouterr().out.startswith("Finished already: ")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    error = refused(tmp_path, base, *given, "head.hidden=9", monkeypatch=monkeypatch, capsys=capsys)
    assert "is of another fine-tuning, whose head.hidden was 32, not 9" in error


def unfinished(folder: Path, base: Path) -> list[str]:
    """Return the arguments of a job that takes hours."""
    place = (f"model={base}", f"output={folder / 'out'}")
    return [*QUICK, *per_residue(folder), *place, "tuning.max_epochs=100000", "tuning.patience=100000", "seeds=[1,2]"]


def has_checkpoint(output: Path) -> bool:
    return any(output.glob("fits/*.ckpt"))


def has_results(output: Path) -> bool:
    return (output / "model.nemo").exists() or (output / "report.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_checkpoints_and_no_results(
    number: signal.Signals,
    code: int,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, output = ESMFineTunedModel.training_step, tmp_path / "out"

    def signalled(self: ESMFineTunedModel, *arguments: Any) -> None:
        if has_checkpoint(output):
            signal.raise_signal(number)
        assert self.steps < 100, "no checkpoint was saved"
        step(self, *arguments)

    monkeypatch.setattr(ESMFineTunedModel, "training_step", signalled)
    monkeypatch.setattr(fitting, "_SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(SystemExit) as stopped:
        command_here("finetune", *unfinished(tmp_path, base))
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert "the same command goes on" in error
    assert "Traceback" not in error
    assert has_checkpoint(output)
    assert not has_results(output)


@pytest.mark.slow
def test_a_kill_leaves_checkpoints_and_no_results(base: Path, tmp_path: Path) -> None:
    code = "from bionemo_esm.__main__ import main\nfrom bionemo_esm.finetuning import fitting\n"
    code += "fitting._SECONDS_BETWEEN_SAVES = 0.0\nmain()\n"
    command = [sys.executable, "-c", code, "finetune", *unfinished(tmp_path, base)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + 120
        while not has_checkpoint(tmp_path / "out") and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)  # wait until the first epoch is saved
        job.kill()
        assert job.wait(60) == -signal.SIGKILL
    assert has_checkpoint(tmp_path / "out")
    assert not has_results(tmp_path / "out")
