"""Tests of invalid input to pretraining: a one-line error with file and key, exit code 2, and no files left."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.pretraining.recipe import load_recipe
from bionemo_esm.pretraining.run import pretrain
from imported import ESM1B, ESM2, brought_here, source_model
from models import tiny_model
from runs import ROOT, SMALL, command_here, composed


def complaint(capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Return the error that a refused run prints on standard error."""
    with pytest.raises(SystemExit) as stop:
        pretrain(composed(*overrides))
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    return [*SMALL, f"exp_manager.exp_dir={tmp_path}/runs"]


def test_default_recipe_reports_all_missing_requirements_and_names_the_laptop_recipe(
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = complaint(capfd)
    assert "trainer.devices asks for 8 GPUs a node; this machine has 0" in error
    assert "data.store: data/uniref50_2022_05 is not a store" in error
    assert "bionemo-esm pretrain recipe=laptop" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=33", "model.hidden_size (33) is not divisible by model.num_attention_heads (4)"),
        ("model.seq_length=5", "model.seq_length is 5 tokens"),
        ("model.num_layers=two", "model.num_layers must be an integer, not 'two'"),
        (
            "data.global_batch_size=0",
            "data.global_batch_size must be",
        ),
        ("data.masking.masked=0.95", "data.masking.masked (0.95)"),
        ("data.fasta=/nowhere/x.fasta", "data.fasta: /nowhere/x.fasta is not a file"),
        ("restore_from_path=/nowhere/x.nemo", "restore_from_path: /nowhere/x.nemo is not a file"),
        ("data.store=/nowhere", "data.store: /nowhere is not a store"),
        ("trainer.precision=16", "trainer.precision must be one of auto, 32, bf16"),
        ("trainer.accelerator=tpu", "trainer.accelerator must be one of cpu, gpu"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("optim.lr=1e-6", "optim.sched.min_lr (0.0001) must lie in [0, optim.lr = 1e-06)"),
        ("optim.sched.constant_steps=100", "leave no step for the cosine in max_steps (6)"),
        ("optim.sched.name=Noam", "optim.sched.name must be one of CosineAnnealing"),
        ("+trainer.max_step=5", "unknown key trainer.max_step; known are: accelerator"),
        ("+speed=5", "unknown key speed"),
        ("seed=-1", "seed must lie in 0..2**63 - 1, not -1"),
        ("exp_manager.create_wandb_logger=true", "Weights & Biases needs name and project"),
        ("+model._target_=os.system", "unknown key model._target_"),
    ],
)
def test_invalid_configuration_is_refused_with_its_key(
    override: str, message: str, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capfd, *small, override)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"MKTAYIAKQR\n", "'>'"),
        (b">a\n\n>b\n*\n", "0 of 2"),
        (b">a\nMKTAYIAKQR\n", "1 distinct sequences are too few for 1 in validation"),
        (gzip.compress(b">a\nMKTAYIAKQR\n" * 9, mtime=0)[:-9], "ends before its end mark"),
        (b">a\nACGTACGTACGTTTGACA\n" * 99, "DNA"),
    ],
)
def test_unusable_fasta_file_is_named_in_the_error(
    content: bytes, message: str, small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_bytes(content)
    error = complaint(capfd, *small, f"data.fasta={fasta}")
    assert str(fasta) in error or "data." in error
    assert message.lower() in error.lower()
    assert not list((tmp_path / "runs").rglob("store*"))


def test_fasta_and_store_together_are_refused(small: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert "data.fasta and data.store are both set" in complaint(capfd, *small, "data.fasta=a", "data.store=b")


def test_store_that_does_not_match_its_manifest_is_refused(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], sample_store: object
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(sample_store.folder, folder)  # type: ignore[attr-defined]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["residues"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    error = complaint(capfd, *small, f"data.store={folder}")
    assert str(folder) in error
    assert "train" in error


def test_archive_of_another_size_or_truncated_is_refused(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_to(str(tmp_path / "other.nemo"))
    error = complaint(capfd, *small, f"restore_from_path={tmp_path}/other.nemo")
    assert "other.nemo has num_layers = 2, the recipe model.num_layers = 1" in error
    (tmp_path / "cut.nemo").write_bytes((tmp_path / "other.nemo").read_bytes()[:9000])
    assert "cut.nemo: cut short (model_weights.safetensors claims" in complaint(
        capfd, *small, f"restore_from_path={tmp_path}/cut.nemo"
    )


def test_checkpoint_of_another_configuration_is_refused(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [*small, "exp_manager.name=same", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    pretrain(composed(*named))
    (tmp_path / "runs" / "same" / "summary.json").unlink()
    capfd.readouterr()
    error = complaint(capfd, *named, "model.num_layers=2", "trainer.max_steps=4")
    assert "written by another model: model.num_layers differ" in error
    error = complaint(capfd, *named, "seed=43", "trainer.max_steps=4")
    assert "the checkpoint was written with seed = 42, this run has 43" in error
    fasta = ROOT / "bionemo_esm" / "data" / "sample" / "test.fasta.gz"
    error = complaint(capfd, *named, f"data.fasta={fasta}", "trainer.max_steps=4")
    assert "was built from other files (train.fasta.gz, validation.fasta.gz, test.fasta.gz)" in error
    shutil.rmtree(tmp_path / "runs" / "same" / "store")
    error = complaint(capfd, *named, f"data.fasta={fasta}", "trainer.max_steps=4")
    assert "samples of an epoch = 2600, this run has 180" in error
    shutil.rmtree(tmp_path / "runs" / "same" / "store")
    assert "written with optim.lr = 0.0015, this run has 0.01" in complaint(capfd, *named, "optim.lr=1e-2")
    other = tmp_path / "runs" / "same" / "laptop.nemo"
    error = complaint(capfd, *named, f"restore_from_path={other}")
    weights = f"weights of SHA-256 {ArchiveFile.open(other).weights_sha256}"
    assert f"written with restore_from_path = none, this run has {weights}" in error


def test_finished_run_of_another_configuration_is_refused(small: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    named = [*small, "exp_manager.name=same", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    pretrain(composed(*named))
    capfd.readouterr()
    assert "holds a finished run of another configuration" in complaint(capfd, *named, "optim.lr=1e-2")


def test_empty_validation_set_is_refused_before_training(small: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    fasta = ROOT / "bionemo_esm" / "data" / "sample" / "test.fasta.gz"
    error = complaint(capfd, *small, f"data.fasta={fasta}", "data.validation_sequences=0")
    assert "data.validation_sequences: 0 validation sequences cannot be divided among 1 ranks" in error


@pytest.mark.parametrize("recipe", [("recipe=adapt", "data=sample"), SMALL], ids=["adapt", "laptop"])
@pytest.mark.parametrize(
    ("path", "found", "target"),
    [
        ("lab/esm2_8m", "there is no lab/esm2_8m; if it is a model on the Hugging Face Hub,", "esm2_8m.nemo"),
        ("a model", "a model is a Hugging Face folder;", "a model.nemo"),
        ("a model/mine.pt", "a model/mine.pt is a fair-esm file;", "mine.nemo"),
    ],
    ids=["of the Hub", "Hugging Face", "fair-esm"],
)
def test_model_of_another_library_is_refused_with_its_conversion_command(
    path: str,
    found: str,
    target: str,
    recipe: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a model").mkdir()
    Path("a model/config.json").write_text("{}")
    Path("a model/mine.pt").write_bytes(b"PK")
    error = complaint(capfd, *recipe, f"restore_from_path={path}")
    ends = (f"'{word}'" if " " in word else word for word in (f"source={path}", f"target={target}"))
    assert f"restore_from_path: {found} bring it here first: bionemo-esm convert {' '.join(ends)}, then " in error
    assert f"then restore_from_path={target}\n" in error
    assert "of_archive" not in error


@pytest.mark.parametrize(
    ("family", "length", "stretch"),
    [(ESM1B, 200, " stretch_positions=true"), (ESM1B, 100, ""), (ESM2, 200, "")],
    ids=["learned, longer", "learned, shorter", "rotary, longer"],
)
def test_conversion_command_in_the_error_gives_the_requested_length(
    family: str, length: int, stretch: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, new = brought_here(source_model(family), tmp_path), tmp_path / "new.nemo"
    capfd.readouterr()  # discards the progress bar of another library
    adapting = ("recipe=adapt", "data=sample", f"model.seq_length={length}")
    error = complaint(capfd, *adapting, f"restore_from_path={archive}")
    assert f"model.seq_length={length}: {archive} is for sequences of up to 128 tokens. For another length " in error
    assert error.endswith(f"bionemo-esm convert source=… target=….nemo seq_length={length}{stretch}\n")
    words = error.split("again: bionemo-esm ")[1].replace("source=…", f"source={tmp_path}/a_small_one").split()
    command = [word.replace("target=….nemo", f"target={new}") for word in words]
    command_here(*command)
    assert load_recipe(composed(*adapting[:2], f"restore_from_path={new}")).model.seq_length == length


def test_trained_imported_model_must_be_exported_before_its_length_changes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, archive = tiny_model(), tmp_path / "trained.nemo"
    model.provenance, model.steps = {"imported_from": "a friend"}, 3
    model.save_to(str(archive))
    adapting = ("recipe=adapt", "data=sample", f"restore_from_path={archive}")
    home = f"export it (bionemo-esm convert source={archive} target=…), and import that: bionemo-esm convert source=…"
    assert home in complaint(capfd, *adapting, "model.seq_length=2048")
    model.provenance = {}
    model.save_to(str(archive))
    assert "with model=of_archive it is what" in complaint(capfd, *adapting, "model.seq_length=2048")
