"""Tests of continued pretraining from an imported model: initial validation, resume and model selection."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from bionemo_esm import config_directory
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import TrainingBatches, ValidationBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore, sha256_of_file
from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.summary import ArchiveSummary
from bionemo_esm.pretraining.preflight import check_requirements
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from faults import Fault, history, run, send
from imported import ADAPTED, ESM1B, ESM2, adapt, brought_here, loss_of, source_model
from imported import TOKENS as LONGEST
from models import tiny_model
from runs import ROOT, command_here, composed, losses

FIXED = "encoder.contact_head.weight", "encoder.contact_head.bias"
AS_IN_ARCHIVE = tuple(  # `faults.run` sets these sizes
    f"model.{name}=null"
    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length", "hidden_dropout")
)
APART = (*ADAPTED, *AS_IN_ARCHIVE, "data.micro_batch_size=null", "data.global_batch_size=null")
"""Overrides for `faults.run`, over its own."""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an imported model of each family."""
    folder = tmp_path_factory.mktemp("imported")
    return {family: brought_here(source_model(family), folder / family) for family in (ESM1B, ESM2)}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, archives: dict[str, Path]) -> Path:
    """Return the folder of a finished three-step run that starts from an ESM-2."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    adapt(folder, archives[ESM2])
    return folder


def adapting(*overrides: str) -> Recipe:
    return load_recipe(composed("recipe=adapt", "data=sample", *overrides))


def validations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in history(folder) if line["kind"] == "validation"]


def fixed_tensors(path: Path) -> dict[str, Tensor]:
    weights = ArchiveFile.open(path).load_weights()
    return {name: tensor for name, tensor in weights.items() if "contact_head" in name or "rotary" in name}


# --- the source model's loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [ESM1B, ESM2])
def test_loss_before_and_at_the_first_step_equals_hugging_face(
    family: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    source, folder = source_model(family), tmp_path / "run"
    summary = adapt(folder, archives[family], "trainer.max_steps=2", "trainer.limit_val_batches=null")
    store, policy = ProteinStore.open(folder / "store"), MaskingPolicy()
    queries = ValidationBatches(SampleReader(store.split("validation"), LONGEST, policy.for_evaluation(), 42), 8)
    before = loss_of(source, (queries[index] for index in range(len(queries))))
    assert validations(folder)[0]["step"] == 0
    assert validations(folder)[0]["loss"] == pytest.approx(before, abs=1e-4)
    assert summary["initial_validation_loss"] == validations(folder)[0]["loss"]
    assert summary["initial_validation_perplexity"] == pytest.approx(math.exp(before), rel=1e-4)
    assert summary["initial_masked_residues"] == summary["masked_residues"]

    plan = adapting(*ADAPTED, f"restore_from_path={archives[family]}").batch_plan()
    stream = TrainingBatches(SampleReader(store.split("train"), LONGEST, policy, 42), plan)
    assert losses(folder)[1] == pytest.approx(loss_of(source, stream[0].micro_batches), abs=1e-4)
    second = stream[stream[0].samples].micro_batches
    assert losses(folder)[2] != pytest.approx(loss_of(source, second), abs=1e-4), "the first step has changed nothing"


def test_two_ranks_run_the_initial_validation_together(archives: dict[str, Path], tmp_path: Path) -> None:
    every = ("trainer.limit_val_batches=null", f"restore_from_path={archives[ESM2]}")
    found = []
    for ranks, keys in ((1, ()), (2, ()), (2, ("trainer.tensor_model_parallel_size=2",))):
        folder = tmp_path / f"{ranks}-{len(keys)}"
        outcome = run(folder, *APART, *every, *keys, ranks=ranks)
        assert outcome.codes == [0] * ranks, outcome.ranks
        assert outcome.console.count("before any training") == 1
        assert [line["step"] for line in validations(folder)] == [0, 3]
        found.append((validations(folder)[0]["residues"], validations(folder)[0]["loss"], losses(folder)))
    for residues, loss, curve in found[1:]:
        assert residues == found[0][0]
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert curve == pytest.approx(found[0][2], rel=2e-5)


def test_initial_validation_has_no_dropout_and_the_first_step_has(
    adapted: Path, archives: dict[str, Path], tmp_path: Path
) -> None:
    adapt(tmp_path / "run", archives[ESM2], "model.hidden_dropout=0.3", "trainer.max_steps=1")
    assert validations(tmp_path / "run")[0] == validations(adapted)[0]
    assert losses(tmp_path / "run")[1] != pytest.approx(losses(adapted)[1], abs=1e-3)


def test_initial_validation_is_in_console_history_summary_and_report(
    archives: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = adapt(tmp_path / "run", archives[ESM2], "trainer.limit_val_batches=null")
    perplexity = f"{summary['initial_validation_perplexity']:.2f}"
    console = capfd.readouterr().out
    assert f"step 0  validation perplexity {perplexity} (residue frequencies: " in console
    assert "masked residues right, before any training" in console
    assert f"against {perplexity} before training and {summary['unigram_perplexity']:.2f} for residue" in console
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<dt>Perplexity before training</dt><dd>{summary['initial_validation_perplexity']:.3f}</dd>" in page
    assert f"against {summary['initial_validation_perplexity']:,.1f} before training and " in page


def test_initial_validation_on_fewer_batches_is_not_compared_with_the_final_one(
    adapted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`limit_val_batches` limits validation during training but not at the end."""
    summary = json.loads((adapted / "summary.json").read_text())
    assert summary["initial_masked_residues"] < summary["masked_residues"]
    assert "before training and" not in (adapted / "report.html").read_text()


def test_run_from_random_weights_has_no_initial_validation(tmp_path: Path) -> None:
    assert run(tmp_path / "run").codes == [0]
    assert [line["step"] for line in validations(tmp_path / "run")] == [3, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["initial_validation_loss"] is None


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resumed_run_keeps_the_initial_validation_and_equals_the_unbroken_run(
    archives: dict[str, Path], adapted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(adapted, cut, ignore=shutil.ignore_patterns("step-000000003*", "summary.json", "adapt*.nemo"))
    capfd.readouterr()
    summary = adapt(cut, archives[ESM2])
    assert summary["resumed_from_step"] == 2
    assert "before any training" not in capfd.readouterr().out
    assert history(cut) == history(adapted)
    for name in ("adapt.nemo", "adapt-averaged.nemo"):
        assert (cut / name).read_bytes() == (adapted / name).read_bytes(), name
    unbroken = json.loads((adapted / "summary.json").read_text())
    assert summary["initial_validation_loss"] == unbroken["initial_validation_loss"]


def test_run_killed_before_its_first_checkpoint_restarts_with_one_initial_validation(
    archives: dict[str, Path], adapted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(adapted, folder, ignore=shutil.ignore_patterns("checkpoints", "summary.json", "adapt*.nemo"))
    adapt(folder, archives[ESM2])
    assert history(folder) == history(adapted)


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_stopped_by_a_signal_in_the_initial_validation_can_be_restarted(
    archives: dict[str, Path], tmp_path: Path, ranks: int
) -> None:
    stop = Fault("bionemo_esm.model.esm1nv.ESM1nvModel.score", partial(send, signal.SIGTERM), call=2, rank=ranks - 1)
    overrides = (*APART, f"restore_from_path={archives[ESM2]}")
    outcome = run(tmp_path / "run", *overrides, ranks=ranks, faults=[stop])
    assert outcome.codes == [143] * ranks, outcome.ranks
    assert "before any training" not in outcome.console
    assert history(tmp_path / "run") == []
    assert run(tmp_path / "run", *overrides, ranks=ranks).codes == [0] * ranks
    assert [line["step"] for line in validations(tmp_path / "run")] == [0, 3]


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("family", [ESM1B, ESM2])
def test_fixed_tensors_are_identical_in_every_written_file(
    family: str, precision: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    before = fixed_tensors(archives[family])
    assert before.keys() == {*FIXED, *(["encoder.rotary.frequencies"] if family == ESM2 else [])}
    folder = tmp_path / "run"
    adapt(folder, archives[family], f"trainer.precision={precision}", "optim.lr=1e-2")
    files = [*folder.glob("*.nemo"), *folder.glob("checkpoints/*.ckpt"), *folder.glob("averaging/*.nemo")]
    assert len(files) > 5
    for path in files:
        assert ArchiveFile.open(path).config["encoder"] == ArchiveFile.open(archives[family]).config["encoder"]
        for name, tensor in fixed_tensors(path).items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name]), f"{name} in {path.name}"
    name = "encoder.embedding.word_embeddings.weight"
    changed = [ArchiveFile.open(path).load_weights()[name] for path in (archives[family], folder / "adapt.nemo")]
    assert not torch.equal(*changed)


def test_continued_pretraining_on_real_proteins_lowers_the_perplexity(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    """Train from random weights on low-complexity peptides of a custom FASTA file, then on real proteins."""
    generator, letters = np.random.default_rng(3), list("LKEA")
    peptides = ["".join(generator.choice(letters, 60)) for _ in range(300)]
    fasta = tmp_path / "peptides.fasta"
    fasta.write_text("".join(f">{index}\n{peptide}\n" for index, peptide in enumerate(peptides)))
    longer = ("trainer.max_steps=30", "trainer.val_check_interval=30", "optim.lr=1e-2", "trainer.log_every_n_steps=30")
    longer += ("exp_manager.checkpoints.every_n_train_steps=30", "trainer.limit_val_batches=null")
    first = adapt(tmp_path / "first", archives[ESM2], f"data.fasta={fasta}", *longer)
    assert first["validation_perplexity"] < 8 < first["initial_validation_perplexity"]
    second = adapt(tmp_path / "second", Path(first["nemo"]), *longer)
    assert second["initial_validation_perplexity"] > 40
    assert second["validation_perplexity"] < 25
    provenance = ArchiveFile.open(Path(second["nemo"])).provenance
    assert provenance["imported_from"] == ArchiveFile.open(archives[ESM2]).provenance["imported_from"]
    assert provenance["restored_weights_sha256"] == ArchiveFile.open(Path(first["nemo"])).weights_sha256


# --- model selection --------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_archive_and_dropout_can_be_overridden(archives: dict[str, Path]) -> None:
    for path in archives.values():
        archived = EncoderConfig.from_config(ArchiveFile.open(path).config["encoder"])
        told = adapting(f"restore_from_path={path}")
        assert told.model == archived
        assert told.model.contact_head
        other = adapting(f"restore_from_path={path}", "model.hidden_dropout=0.1", "model.attention_dropout=0.2")
        assert (other.model.hidden_dropout, other.model.attention_dropout) == (0.1, 0.2)
        assert not other.model.differences(archived.to_dict())
        check_requirements(other)


def test_of_archive_group_lists_every_model_key_and_sets_none() -> None:
    values = yaml.safe_load((config_directory() / "model" / "of_archive.yaml").read_text())
    assert values.pop("of_archive") is True
    assert values.keys() == EncoderConfig.model_fields.keys()
    assert set(values.values()) == {None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "model=of_archive takes its sizes from an archive, and restore_from_path is not set; name a .nemo there"),
        (("restore_from_path=/nowhere.nemo",), "restore_from_path: /nowhere.nemo is not a file"),
        (("restore_from_path={esm2}", "model.num_layers=3"), r"model.num_layers=3: with model=of_archive it is what "),
        (("restore_from_path={esm2}", "model.seq_length=128"), "model.seq_length=128: with model=of_archive it is"),
        (("restore_from_path={esm2}", "model.token_dropout=false"), "model.token_dropout=False: with model=of_archive"),
        (("restore_from_path={esm2}", "+model.depth=3"), "unknown key model.depth; known are: of_archive, num_layers"),
        (("restore_from_path={esm2}", "model.hidden_dropout=2"), r"model.hidden_dropout must lie in \[0, 1\)"),
        (("restore_from_path={readme}",), "README.md: "),
        (("restore_from_path={esm2}", "model=esm2_8m"), "set model.num_layers=2, or choose model=of_archive"),
        (("continue_from_path=/nowhere",), "continue_from_path: there is no /nowhere"),
    ],
)
def test_invalid_model_settings_are_refused_in_one_line(
    overrides: tuple[str, ...], message: str, archives: dict[str, Path]
) -> None:
    places = {"esm2": archives[ESM2], "readme": ROOT / "README.md"}
    with pytest.raises(UserError, match=message):
        check_requirements(adapting(*(override.format(**places) for override in overrides)))


def test_contact_head_comes_from_the_archive_and_not_from_the_recipe(archives: dict[str, Path], tmp_path: Path) -> None:
    sizes = ("num_layers=2", "hidden_size=32", "num_attention_heads=4", "ffn_hidden_size=64", f"seq_length={LONGEST}")
    named = ("model=esm2_8m", *(f"model.{size}" for size in sizes))
    told = adapting(*named, f"restore_from_path={archives[ESM2]}")
    assert told.model.contact_head
    assert told == adapting(f"restore_from_path={archives[ESM2]}")
    check_requirements(told)
    tiny_model(position_embedding="rotary", token_dropout=True, seq_length=LONGEST).save_to(str(tmp_path / "bare.nemo"))
    assert not adapting(*named, f"restore_from_path={tmp_path / 'bare.nemo'}").model.contact_head
    assert not adapting(*named).model.contact_head


def test_run_continues_from_a_run_whose_model_came_from_an_archive(adapted: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path / "longer", *APART, f"continue_from_path={adapted}", "trainer.max_steps=4")
    assert outcome.codes == [0], outcome.errors
    assert [line["step"] for line in history(tmp_path / "longer") if line["kind"] == "train"] == [4]
    assert fixed_tensors(tmp_path / "longer" / "adapt.nemo").keys() == fixed_tensors(adapted / "adapt.nemo").keys()


def test_run_fingerprint_depends_on_the_initial_weights_and_not_on_their_path(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    here, there = archives[ESM2], tmp_path / "copy.nemo"
    shutil.copy(here, there)
    first, copied = (adapting(f"restore_from_path={path}") for path in (here, there))
    assert copied.fingerprint == first.fingerprint
    assert adapting(f"restore_from_path={archives[ESM1B]}").fingerprint != first.fingerprint
    model = ESM1nvModel.restore_from(str(here), map_location="cpu")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_to(str(there))
    changed = adapting(f"restore_from_path={there}")
    assert changed.model == first.model
    assert changed.fingerprint != first.fingerprint
    assert changed.settings_text != copied.settings_text, "a rank that sees another file is found out"


def test_resume_is_refused_when_restore_from_path_has_other_weights(
    archives: dict[str, Path], adapted: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.nemo"
    model = ESM1nvModel.restore_from(str(archives[ESM2]), map_location="cpu")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_to(str(other))
    shutil.copytree(adapted, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    outcome = run(tmp_path / "run", *APART, f"restore_from_path={other}", "trainer.max_steps=4")
    assert outcome.codes == [2]
    assert "the checkpoint was written with restore_from_path = weights of SHA-256 " in outcome.errors


def test_resolving_the_model_imports_neither_torch_nor_nemo(archives: dict[str, Path]) -> None:
    code = (
        "import sys; from hydra import compose, initialize_config_dir\n"
        "from bionemo_esm import config_directory\n"
        "from bionemo_esm.pretraining.resolve_model import resolve_model\n"
        "from bionemo_esm.settings import plain_values; from pathlib import Path\n"
        "with initialize_config_dir(str(config_directory()), version_base='1.3'):\n"
        "    values = plain_values(compose('pretrain_esm1nv', overrides=['recipe=adapt']))\n"
        f"found = resolve_model(values['model'], Path({str(archives[ESM2])!r}), None)\n"
        "print(found.encoder.position_embedding, sorted({'torch', 'nemo', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "rotary []"


def test_summary_of_an_imported_model_gives_its_type_and_source(archives: dict[str, Path]) -> None:
    texts = {family: ArchiveSummary.of(ArchiveFile.open(path)).text() for family, path in archives.items()}
    for family, parts in ((ESM1B, ("", "2", "yes")), (ESM2, ("rotary", "", "yes"))):
        rows = {line[:26].strip(): line[26:] for line in texts[family].splitlines()}
        labels = ("position embedding", "position offset", "contact head")
        assert tuple(rows.get(label, "") for label in labels) == parts
        assert rows["imported from"] == "a_small_one, Hugging Face"
        digest = sha256_of_file(archives[family].parent / "a_small_one" / "model.safetensors")
        assert f"\n{' ' * 26}SHA-256 {digest[:12]}…, model.safetensors\n" in texts[family]


def test_import_provenance_is_shown_verbatim_and_truncated_when_long(tmp_path: Path) -> None:
    whole = {"format": "Hugging Face", "source": "lab/esm", "revision": "5" * 40, "sha256": {"a": "6" * 64}}
    lines = ("lab/esm, Hugging Face", f"revision {'5' * 40}", "SHA-256 666666666666…, a\n")
    long = whole | {"sha256": {f"shard-{number}": "7" * 64 for number in range(300)}}
    cases = (whole, f"\n{' ' * 26}".join(lines)), ("a friend", "a friend"), ({"source": 3}, "source 3"), (long, "… ")
    for origin, expected in cases:
        model = tiny_model()
        model.provenance = {"imported_from": origin}
        model.save_to(str(tmp_path / "odd.nemo"))
        text = ArchiveSummary.of(ArchiveFile.open(tmp_path / "odd.nemo")).text() + "\n"
        assert expected in text.split("imported from")[1]
        assert len(text.splitlines()) < 40


@pytest.mark.slow
def test_one_command_continues_pretraining_on_a_custom_fasta(
    archives: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """200 proteins give 180 for training and 10 for validation. `inspect` prints the source of the model."""
    fasta = ROOT / "bionemo_esm" / "data" / "sample" / "validation.fasta.gz"
    place = (f"restore_from_path={archives[ESM2]}", f"exp_manager.exp_dir={tmp_path}")
    command_here("pretrain", "recipe=adapt", f"data.fasta={fasta}", *place, "trainer.max_steps=2")
    output = capfd.readouterr().out
    assert "180 sequences to train on" in output
    assert "10 to validate on" in output
    assert "before any training" in output
    (folder,) = tmp_path.glob("adapt-*")
    command_here("inspect", str(folder / "adapt.nemo"))
    assert "a_small_one, Hugging Face" in capfd.readouterr().out
