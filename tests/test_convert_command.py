"""Tests of the conversion command: direction, output, errors and atomic results."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from esm.data import Alphabet
from hydra import compose, initialize_config_dir
from transformers import EsmForMaskedLM, EsmTokenizer

from bionemo_esm import config_directory
from bionemo_esm.model.archive import Archive, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.interchange import convert as convert_module
from bionemo_esm.model.interchange import convert_command as jobs
from models import tiny_model
from peers import PROTEIN, fair_esm, logits_of
from runs import ROOT
from theirs import FAMILIES, SMALL, hugging_face_model, saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source of each kind. Read-only."""
    base = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        saved(hugging_face_model(family, tokens=64), base / family)
    tiny_model(seq_length=64).save_to(str(base / "ours.nemo"))
    archive = read_archive(base / "ours.nemo")
    state = {"moments": torch.ones(3)}
    write_archive(base / "ours.ckpt", Archive(archive.model_class, archive.config, archive.weights, state=state))
    (base / "old.nemo").write_bytes(b"not one of ours")
    (base / "broken.ckpt").write_bytes(b"not one of ours")
    (base / "notes.txt").write_text("nothing")
    (base / "run" / "checkpoints").mkdir(parents=True)
    for step in (50, 500, 1000):
        (base / "trained" / f"checkpoint-{step}").mkdir(parents=True)
        shutil.copy(base / "ESM-2" / "config.json", base / "trained" / f"checkpoint-{step}")
    (base / "adapter").mkdir()
    (base / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copy(base / "ours.nemo", base / "run" / "model.nemo")
    shutil.copy(base / "ESM-2" / "model.safetensors", base / "alone.safetensors")
    return base


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(capfd: pytest.CaptureFixture[str]) -> Job:
    """Return a function that runs the job with overrides as on the command line: exit code, output and errors."""

    def run(*overrides: str) -> tuple[int, str, str]:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            cfg = compose("convert_checkpoint", overrides=list(overrides))
        capfd.readouterr()
        code = 0
        try:
            jobs.convert(cfg)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return code, *capfd.readouterr()

    return run


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_folder_becomes_an_archive_of_the_same_model(
    sources: Path, tmp_path: Path, job: Job, family: str
) -> None:
    target = tmp_path / "deep" / "model.nemo"
    code, out, err = job(f"source={sources / family}", f"target={target}")
    assert (code, err) == (0, "")
    file = ArchiveFile.open(target)
    file.verify()
    with torch.no_grad():
        tokens = EsmTokenizer.from_pretrained(sources / family)(PROTEIN, return_tensors="pt")
        expected = hugging_face_model(family, tokens=64)(**tokens).logits[0]
    torch.testing.assert_close(logits_of(target), expected, rtol=0, atol=1e-4)
    origin = file.provenance["imported_from"]
    assert (origin["format"], origin["source"], origin["revision"]) == ("Hugging Face", family, None)
    assert "model.safetensors" in origin["sha256"]
    assert "torch" in file.provenance["package_versions"]
    assert (file.config["precision"], file.config["seed"], file.config["encoder"]["seq_length"]) == ("32", 0, 64)
    lines = out.splitlines()
    assert lines[0] == f"Reading {sources / family}, a Hugging Face folder"
    assert any(line.startswith(f"  model    {family}, 2 layers, hidden 32, 4 heads") for line in lines)
    assert f"  {file.weights_sha256}" in lines
    assert lines[-1].endswith(f"pretrain recipe=adapt model={target} data.fasta=mine.fasta")
    assert [path.name for path in target.parent.iterdir()] == ["model.nemo"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_fair_esm_file_becomes_an_archive_of_the_same_model(tmp_path: Path, job: Job) -> None:
    peer = fair_esm("ESM-2", SMALL, tmp_path)
    assert job(f"source={peer.path}", f"target={tmp_path / 'model.nemo'}")[0] == 0
    _, _, tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()([("protein", PROTEIN)])
    with torch.no_grad():
        expected = peer.model(tokens)["logits"][0]
    torch.testing.assert_close(logits_of(tmp_path / "model.nemo"), expected, rtol=0, atol=1e-4)
    archive = read_archive(tmp_path / "model.nemo")
    assert torch.equal(archive.weights["encoder.contact_head.weight"], peer.model.contact_head.regression.weight)
    assert archive.provenance["imported_from"]["format"] == "fair-esm"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


def test_hub_model_is_read_from_the_cache_without_a_network(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home" / "hub" / "models--lab--esm"
    shutil.copytree(sources / "ESM-2", cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text(COMMIT)
    (cache / "refs" / "main").write_text(COMMIT[::-1])  # another commit, which is not in the cache
    ends = "source=lab/esm", "target=model.nemo"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "convert_checkpoint.py"), *ends, "revision=v1"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"  commit   {COMMIT}" in done.stdout.splitlines()
    origin = ArchiveFile.open(tmp_path / "model.nemo").provenance["imported_from"]
    assert (origin["source"], origin["revision"]) == ("lab/esm", COMMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model.nemo"]


def test_requested_changes_are_applied_and_listed_as_notes(sources: Path, tmp_path: Path, job: Job) -> None:
    target = tmp_path / "model.nemo"
    asked = ("seq_length=100", "stretch_positions=true", "precision=bf16")
    code, out, err = job(f"source={sources / 'ESM-1nv'}", f"target={target}", *asked)
    assert (code, err) == (0, "")
    file = ArchiveFile.open(target)
    assert (file.config["encoder"]["seq_length"], file.config["precision"]) == (100, "bf16")
    assert file.provenance["notes"] == [
        "position table stretched by linear interpolation from 64 to 100 tokens", "weights rounded to bfloat16",
    ]  # fmt: skip
    assert [line for line in out.splitlines() if "note" in line] == [
        f"  note     {note}" for note in file.provenance["notes"]
    ]
    assert "up to 100 tokens" in out


# --- command ----------------------------------------------------------------------------------------------------------


def test_checkpoint_is_exported_to_hugging_face(sources: Path, tmp_path: Path, job: Job) -> None:
    code, out, err = job(f"source={sources / 'ours.ckpt'}", f"target={tmp_path / 'out'}", "shard_gigabytes=4e-5")
    assert (code, err) == (0, "")
    assert "model.safetensors.index.json" in {path.name for path in (tmp_path / "out").iterdir()}
    EsmForMaskedLM.from_pretrained(tmp_path / "out")
    assert any(line.startswith("  note     the model has no contact head") for line in out.splitlines())
    assert out.splitlines()[-1] == f'Load it:  EsmForMaskedLM.from_pretrained("{tmp_path / "out"}")'


@pytest.mark.parametrize(
    ("source", "target", "more", "complaint"),
    [
        ("ours.nemo", "new.nemo", (), "a folder for Hugging Face is made, so name a folder"),
        ("ours.ckpt", "new.nemo", (), "a folder for Hugging Face is made, so name a folder"),
        ("ours.nemo", "new.pt", (), "a folder for Hugging Face is made, so name a folder"),
        ("ESM-2", "folder", (), "its name must end in .nemo"),
        ("lab/esm", "folder", (), "its name must end in .nemo"),
        ("ESM-2", "there.nemo", (), "exists already"),
        ("ours.nemo", "there", (), "exists already"),
        ("ESM-2", "{sources}/ESM-2/new.nemo", (), "lies within the source"),
        ("ESM-2", "there/file/new.nemo", (), "is not a folder that you may write to"),
        ("missing", "new.nemo", (), "no such folder or file"),
        ("missing/folder/deep", "new.nemo", (), "no such folder or file"),
        ("lab/model.nemo", "new.nemo", (), "no such folder or file"),
        ("old.nemo", "folder", (), "bionemo-esm convert-legacy"),
        ("broken.ckpt", "folder", (), "is not a checkpoint of ours"),
        ("notes.txt", "new.nemo", (), "none of the files we read"),
        ("alone.safetensors", "new.nemo", (), "give the folder that it lies in"),
        ("run", "folder", (), "name one of its files: .*model.nemo"),
        ("trained", "new.nemo", (), "one of them: .*/checkpoint-50, .*/checkpoint-500, .*/checkpoint-1000$"),
        ("adapter", "new.nemo", (), "adapter, not a model; merge it .*merge_and_unload"),
        ("esm2_t6_8M_UR50D", "new.nemo", (), "did you mean facebook/esm2_t6_8M_UR50D[?]$"),
        ("esm1b_t33_650M_UR50S", "new.nemo", (), "did you mean facebook/esm1b_t33_650M_UR50S[?]$"),
        ("esm1v_t33_650M_UR90S_1", "new.nemo", (), "did you mean facebook/esm1v_t33_650M_UR90S_1[?]$"),
        ("https://huggingface.co/lab/esm", "new.nemo", (), "did you mean lab/esm[?]$"),
        ("huggingface.co/lab/esm/", "new.nemo", (), "did you mean lab/esm[?]$"),
        ("https://huggingface.co/lab/esm/tree/main", "new.nemo", (), "did you mean lab/esm[?]$"),
        ("https://hf.co/lab/esm/blob/v1/config.json", "new.nemo", (), "did you mean lab/esm, with revision=v1[?]$"),
        ("https://huggingface.co/lab", "new.nemo", (), "no such folder or file; give"),
        ("ESM-2", "new.nemo", ("revision=main",), "only a model on the Hub has revisions"),
        ("lab/esm", "new.nemo", ("revision=1234567",), "put it in quotes"),
        ("ESM-2", "new.nemo", ("precision=16",), "precision must be 32 or bf16"),
        ("ESM-2", "new.nemo", ("shard_gigabytes=1",), "a .nemo is one file"),
        ("ours.nemo", "folder", ("shard_gigabytes=0",), "must be over 0"),
        ("ours.nemo", "folder", ("seq_length=32",), "are for imports"),
        ("ESM-1b", "new.nemo", ("stretch_positions=true",), "say by seq_length"),
        ("ESM-1b", "new.nemo", ("seq_length=many",), "seq_length must be an integer"),
        ("ESM-1b", "new.nemo", ("stretch_positions=1",), "stretch_positions must be true or false"),
        ("ESM-1b", "null", (), "target must be a path"),
    ],
)  # fmt: skip
def test_inconsistent_settings_are_refused_in_one_line_before_any_work(
    sources: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch,
    source: str, target: str, more: tuple[str, ...], complaint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "there.nemo").touch()
    monkeypatch.setattr(convert_module, "import_model", None)  # a call would raise TypeError
    monkeypatch.setattr(convert_module, "export_model", None)
    given = f"{sources / source}" if (sources / source).exists() else source
    code, out, err = job(f"source={given}", f"target={target.format(sources=sources)}", *more)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(complaint, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.nemo"]
    assert not (sources / "ESM-2" / "new.nemo").exists()


def test_arguments_are_checked_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['bionemo-esm', 'convert', 'source=nothing', 'target=x.nemo']\n"
        "from bionemo_esm.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, [name for name in ('torch', 'nemo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith("error: source: nothing: no such folder or file")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("source", ["ESM-2", "ours.nemo"])
def test_interrupted_conversion_leaves_no_output(
    sources: Path, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch, source: str, by: signal.Signals
) -> None:
    def stop(self: object, done: int, total: int | None, note: str = "") -> None:
        if total and done > 0.7 * total:
            os.kill(os.getpid(), by)

    monkeypatch.setattr(jobs.ProgressBar, "__call__", stop)
    before = signal.getsignal(by)
    target = tmp_path / ("model.nemo" if source == "ESM-2" else "model")
    code, _, err = job(f"source={sources / source}", f"target={target}")
    assert code == 128 + by
    assert err == f"\n{'Interrupted' if by == signal.SIGINT else 'Stopped'}; nothing was written.\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(by) == before
