"""Fine-tuning end to end: a tiny encoder, real proteins and learnable labels."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemo.core.classes import ModelPT

from bionemo_esm import FineTunedPredictor
from bionemo_esm.alphabet import encode
from bionemo_esm.finetuning import comparison
from bionemo_esm.finetuning import fitting as fit
from bionemo_esm.finetuning.archive import FineTunedFile
from bionemo_esm.finetuning.batches import Collator, EvaluationBatches
from bionemo_esm.finetuning.config import HeadConfig
from bionemo_esm.finetuning.heads import build_head
from bionemo_esm.finetuning.model import ESMFineTunedModel
from bionemo_esm.finetuning.splits import LabelledDataset, SealedTestSet
from bionemo_esm.finetuning.tasks import Task
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import ArchiveFile, read_archive
from finetuning_runs import QUICK, neighbours, per_protein, per_residue, pretrained, proteins, run_here
from models import reconfigured
from runs import ROOT

MODES = {
    "frozen": (),
    "full": ("tuning.mode=full", "tuning.encoder_lr=1e-3", "tuning.layer_decay=0.8"),
    "lora": ("tuning.mode=lora", "tuning.encoder_lr=1e-2", "lora.rank=2"),
    "lora kept": ("tuning.mode=lora", "tuning.encoder_lr=1e-2", "lora.rank=2", "tuning.keep_adapters=true"),
}
CONVNET = ("head.hidden=8", "head.kernel_size=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def residues(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return per_residue(tmp_path_factory.mktemp("residues"))


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return per_protein(tmp_path_factory.mktemp("shares"))


@pytest.fixture(autouse=True)
def sigint() -> Iterator[None]:
    """Restore SIGINT: Lightning leaves it ignored after an interruption, and later subprocesses inherit that."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def some_proteins() -> list[Protein]:
    """Return proteins that the model has not seen; one exceeds its window of 126 residues."""
    known = list(proteins(60, longest=200).items())[-8:]
    return [Protein(name, encode(sequence), number) for number, (name, sequence) in enumerate(known, start=1)]


def answers_of_nemos(path: Path, known: list[Protein]) -> list[np.ndarray[Any, Any]]:
    """Return the predictions of the model that NeMo restores, computed on evaluation batches."""
    model = ModelPT.restore_from(str(path), map_location="cpu")
    assert isinstance(model, ESMFineTunedModel)
    assert not model.training
    shape = [protein.residues if model.task.is_per_residue else 1 for protein in known]
    blank = LabelledDataset(known, [np.full(size, np.nan, dtype=np.float32) for size in shape])
    batches = EvaluationBatches(Collator(model.task, blank, model.parts.reading), 300)
    found: dict[int, Any] = {}
    for index in range(len(batches)):
        batch = batches[index]
        found |= dict(zip(batch.numbers.tolist(), model.predictions(batch), strict=True))
    return [found[number] for number in range(len(known))]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_a_task_and_the_archive_is_self_contained(
    mode: str, base: Path, residues: list[str], tmp_path: Path
) -> None:
    mine = tmp_path / "base.nemo"
    mine.write_bytes(base.read_bytes())
    report = run_here(tmp_path / "out", mine, *residues, *CONVNET, *MODES[mode], "tuning.max_epochs=8")
    mine.unlink()
    (row,) = report["rows"]
    chance = max(report["data"]["sets"]["test"]["classes"].values()) / report["data"]["sets"]["test"]["known_targets"]
    assert row["test"]["accuracy"]["value"] > chance + 0.1
    path = tmp_path / "out" / "model.nemo"
    known = some_proteins()
    predicted = FineTunedPredictor.load(path, "cpu").predict(known)
    for one, other in zip(predicted, answers_of_nemos(path, known), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    right = [
        np.mean(prediction.argmax(1) == ["BNO".index(label) for label in neighbours(sequence)])
        for prediction, sequence in zip(predicted, list(proteins(60, longest=200).values())[-8:], strict=True)
    ]
    assert np.mean(right) > chance + 0.1
    assert (FineTunedFile.open(path).parts.adapters is not None) == (mode == "lora kept")


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_archive_keeps_a_frozen_encoder_bit_for_bit(precision: str, residues: list[str], tmp_path: Path) -> None:
    base = pretrained(tmp_path, precision=precision)
    run_here(tmp_path / "out", base, *residues, *CONVNET, "tuning.max_epochs=1")
    before, after = read_archive(base).weights, read_archive(tmp_path / "out" / "model.nemo").weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"head"}


def test_full_tuning_changes_only_the_layers_below_the_features(
    base: Path, residues: list[str], tmp_path: Path
) -> None:
    run_here(tmp_path / "out", base, *residues, *CONVNET, *MODES["full"], "reading.layer=1", "tuning.max_epochs=1")
    before, after = read_archive(base).weights, read_archive(tmp_path / "out" / "model.nemo").weights
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert "encoder.encoder.layers.0.mlp.linear_fc1.weight" in moved
    assert "encoder.embedding.word_embeddings.weight" in moved
    assert not [name for name in moved if "layers.1." in name or "lm_head" in name or "final_layernorm" in name]


def test_a_regression_predicts_in_the_unit_of_its_targets(base: Path, shares: list[str], tmp_path: Path) -> None:
    report = run_here(tmp_path / "out", base, *shares, "head.kind=linear", "tuning.max_epochs=40", "tuning.lr=3e-2")
    (row,) = report["rows"]
    assert row["test"]["spearman"]["value"] > 0.6
    predicted = FineTunedPredictor.load(tmp_path / "out" / "model.nemo", "cpu").predict(some_proteins())
    percent = np.concatenate(predicted)
    assert 20 < percent.mean() < 60
    for one, other in zip(predicted, answers_of_nemos(tmp_path / "out" / "model.nemo", some_proteins()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_gives_equal_output_for_pooled_and_unpooled_states(kind: str) -> None:
    task, states = Task(name="shares", level="sequence", kind="regression", metric="mse"), torch.randn(30, 6)
    head = build_head(HeadConfig(kind=kind, dropout=0.0), task, 6)
    head.standardise(torch.randn(6), torch.rand(6) + 0.5)
    bounds = torch.tensor([0, 4, 5, 30])
    means = torch.stack([states[begin:end].mean(0) for begin, end in pairwise(bounds.tolist())])
    torch.testing.assert_close(head(means, torch.arange(4)), head(states, bounds))


def test_pooled_states_are_stored_only_for_heads_with_mean_pooling(
    base: Path, shares: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    stored = comparison.Comparison._stored

    def told(self: Any, *arguments: Any) -> Any:
        sizes.append(len((found := stored(self, *arguments)).table))
        return found

    monkeypatch.setattr(comparison.Comparison, "_stored", told)
    for name, head in (("mean", ["head.kind=mlp"]), ("max", ["head.kind=mlp", "head.pooling=max"])):
        run_here(tmp_path / name, base, *shares, *head, "tuning.max_epochs=1")
    assert sizes[0] == len(proteins())
    assert sizes[1] == sum(map(len, proteins().values()))


def test_the_same_seed_gives_the_same_archive(base: Path, residues: list[str], tmp_path: Path) -> None:
    for name in ("one", "other"):
        run_here(tmp_path / name, base, *residues, *CONVNET, *MODES["full"])
    one, other = ((tmp_path / name / "model.nemo").read_bytes() for name in ("one", "other"))
    assert one == other
    assert (tmp_path / "one" / "report.json").read_bytes() != b""


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_an_interrupted_fit_resumes_bit_for_bit(
    mode: str, base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*residues, *CONVNET, *MODES[mode], "tuning.max_epochs=4", "head.dropout=0.5", "seeds=[1,2]")
    run_here(tmp_path / "whole", base, *arguments)
    monkeypatch.setattr(fit, "_SECONDS_BETWEEN_SAVES", 0.0)
    step, stop_at = ESMFineTunedModel.training_step, iter((9, 15))
    limit = [next(stop_at)]

    def interrupted(self: ESMFineTunedModel, *arguments: Any) -> None:
        limit[0] -= 1
        if limit[0] == 0:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(ESMFineTunedModel, "training_step", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run_here(tmp_path / "cut", base, *arguments)
        assert stopped.value.code == 130
        assert not (tmp_path / "cut" / "model.nemo").exists()
        limit[0] = next(stop_at, 10**6)
    run_here(tmp_path / "cut", base, *arguments)
    assert (tmp_path / "cut" / "model.nemo").read_bytes() == (tmp_path / "whole" / "model.nemo").read_bytes()


def test_a_resumed_fit_keeps_a_best_epoch_from_before_the_interruption(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[int, float] = {4: 0.9}  # step 4 ends the first epoch

    def scripted(self: ESMFineTunedModel) -> None:
        on_end(self)
        self.last_scores = {"accuracy": known.get(self.steps, 0.1), "f1": 0.0, "mcc": 0.0}

    on_end = ESMFineTunedModel.on_validation_epoch_end
    monkeypatch.setattr(ESMFineTunedModel, "on_validation_epoch_end", scripted)
    monkeypatch.setattr(fit, "_SECONDS_BETWEEN_SAVES", 0.0)
    run_here(tmp_path / "whole", base, *residues, *CONVNET)
    step = ESMFineTunedModel.training_step

    def interrupted(self: ESMFineTunedModel, *arguments: Any) -> None:
        if self.steps == 9:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ESMFineTunedModel, "training_step", interrupted)
        with pytest.raises(SystemExit):
            run_here(tmp_path / "cut", base, *residues, *CONVNET)
    assert run_here(tmp_path / "cut", base, *residues, *CONVNET)["rows"][0]["epochs"] == [1]
    assert (tmp_path / "cut" / "model.nemo").read_bytes() == (tmp_path / "whole" / "model.nemo").read_bytes()


def test_early_stopping_keeps_the_best_epoch(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    kept: list[torch.Tensor] = []

    def scripted(task: Any, targets: Any, predictions: Any) -> dict[str, float]:
        return {"accuracy": next(told), "f1": 0.0, "mcc": 0.0}

    end = fit._EpochRecorder.on_validation_end

    def remember(self: Any, trainer: Any, module: ESMFineTunedModel) -> None:
        kept.append(module.trained()["head.output.weight"].clone())
        end(self, trainer, module)

    monkeypatch.setattr("bionemo_esm.finetuning.model.scores", scripted)
    monkeypatch.setattr(fit._EpochRecorder, "on_validation_end", remember)
    report = run_here(tmp_path / "out", base, *residues, *CONVNET, "tuning.patience=3", "tuning.max_epochs=50")
    assert len(kept) == 5
    assert report["rows"][0]["epochs"] == [2]
    saved = read_archive(tmp_path / "out" / "model.nemo").weights["head.output.weight"]
    assert torch.equal(saved, kept[1])
    assert not torch.equal(saved, kept[4])


def test_test_labels_are_opened_only_after_the_last_fit(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    one_fit, opened = comparison.fit, SealedTestSet.open

    def told_fit(*arguments: Any) -> Any:
        order.append("fit")
        return one_fit(*arguments)

    def told_open(self: SealedTestSet) -> LabelledDataset:
        order.append("open")
        return opened(self)

    monkeypatch.setattr(comparison, "fit", told_fit)
    monkeypatch.setattr(SealedTestSet, "open", told_open)
    run_here(tmp_path / "out", base, *residues, *CONVNET, "seeds=[1,2]", "baselines=[one_hot]", "tuning.max_epochs=1")
    assert order == ["fit"] * 4 + ["open"]


def test_baselines_use_the_same_data_and_head(base: Path, residues: list[str], tmp_path: Path) -> None:
    report = run_here(
        tmp_path / "out", base, *residues, *CONVNET, "baselines=[one_hot,untrained,composition]", "seeds=[1,2]"
    )
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["pretrained", "one-hot", "untrained", "composition"]
    assert rows["pretrained"]["trained_parameters"] == rows["untrained"]["trained_parameters"]
    one_hot = 20 * 3 * 8 + 8 + 8 * 3 * 3 + 3  # two convolutions of width 3 with 8 channels between them
    assert rows["untrained"]["trained_parameters"] > rows["one-hot"]["trained_parameters"] == one_hot
    assert len(rows["one-hot"]["runs_validation"]) == 2
    assert {(each["one"], each["other"]) for each in report["differences"]} == {
        ("pretrained", other) for other in ("one-hot", "untrained", "composition")
    }
    assert not (tmp_path / "out" / "fits").exists()
    assert not (tmp_path / "out" / "cache").exists()


def test_the_seed_with_the_best_validation_score_is_kept(base: Path, residues: list[str], tmp_path: Path) -> None:
    report = run_here(tmp_path / "out", base, *residues, *CONVNET, "seeds=[5,4,6]")
    found = [run["accuracy"] for run in report["rows"][0]["runs_validation"]]
    told = ArchiveFile.open(tmp_path / "out" / "model.nemo")
    assert len(set(found)) == 3
    assert told.config["seed"] == [5, 4, 6][int(np.argmax(found))]
    assert told.provenance["finetuning"]["validation"]["accuracy"] == pytest.approx(max(found), abs=1e-5)
    assert int(np.argmax(found)) > 0, "choose seeds of which the first is not the best"


def test_the_untrained_baseline_starts_without_pretrained_weights_in_full_tuning(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: dict[str, Any] = {}
    one_fit = comparison.fit

    def told(plan: Any, console: Any) -> Any:
        plans[plan.name.split(",")[0]] = plan
        return one_fit(plan, console)

    monkeypatch.setattr(comparison, "fit", told)
    baselines = "baselines=[one_hot,untrained]"
    run_here(tmp_path / "out", base, *residues, *CONVNET, *MODES["full"], baselines, "tuning.max_epochs=1")
    assert plans["pretrained"].initial_weights == base
    assert plans["untrained"].initial_weights is plans["one-hot"].initial_weights is None
    assert plans["one-hot"].tuning.mode == "frozen"
    assert plans["untrained"].tuning == plans["pretrained"].tuning


def test_a_given_cache_is_reused_for_equal_settings_only(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache={tmp_path / 'cache'}"
    first = run_here(tmp_path / "one", base, *residues, *CONVNET, cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(comparison.Engine, "load", never)
    again = run_here(tmp_path / "other", base, *residues, *CONVNET, cache)
    assert first["rows"][0]["test"] == again["rows"][0]["test"]
    for name, other in (("layer", "reading.layer=1"), ("precision", "trainer.precision=bf16")):
        with pytest.raises(AssertionError):
            run_here(tmp_path / name, base, *residues, *CONVNET, cache, other)
    twin = reconfigured(base, tmp_path / "twin.nemo", token_dropout=True)
    with pytest.raises(AssertionError):
        run_here(tmp_path / "twin", twin, *residues, *CONVNET, cache)


def test_cached_states_are_stored_by_their_resolved_precision(
    base: Path, residues: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache={tmp_path / 'cache'}"
    for multiplies, files in ((True, 1), (False, 2)):  # "auto" means bf16 with CPU support, else 32
        monkeypatch.setattr("bionemo_esm.model.backends._multiplies_bfloat16", lambda device, answer=multiplies: answer)
        auto = ("trainer.precision=auto", "tuning.max_epochs=1")
        run_here(tmp_path / str(files), base, *residues, *CONVNET, cache, *auto)
        assert len(list((tmp_path / "cache").iterdir())) == files


def test_long_proteins_are_trained_on_in_windows(base: Path, tmp_path: Path) -> None:
    long_ones = per_residue(tmp_path, count=12, longest=400)
    report = run_here(tmp_path / "out", base, *long_ones, *CONVNET, *MODES["full"], "reading.window=60")
    assert report["settings"]["reading"] == {"layer": 2, "window": 60, "overlap": 30}
    assert report["data"]["sets"]["train"]["known_targets"] == report["data"]["sets"]["train"]["residues"]


@pytest.mark.parametrize("program", [[str(ROOT / "examples" / "finetune.py")], ["-m", "bionemo_esm", "finetune"]])
def test_two_ranks_train_like_one_rank(program: list[str], base: Path, residues: list[str], tmp_path: Path) -> None:
    arguments = (*residues, *CONVNET, *MODES["full"], "head.dropout=0", "tuning.max_epochs=2", "seeds=[1,2]")
    alone = run_here(tmp_path / "alone", base, *arguments)
    command = [sys.executable, *program, *QUICK, *arguments, "trainer.devices=2"]
    done = subprocess.run(
        [*command, f"model={base}", f"output={tmp_path / 'both'}"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "both" / "output.log").read_text()
    assert "GLOBAL_RANK: 1" in log
    both = json.loads((tmp_path / "both" / "report.json").read_text())
    for one, other in zip(alone["rows"][0]["runs_validation"], both["rows"][0]["runs_validation"], strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.02)
    weights = [read_archive(tmp_path / name / "model.nemo").weights for name in ("alone", "both")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-3, rtol=0)
    assert done.stdout.count("Done in") == 1


def test_the_archive_records_its_base_model_data_and_validation(
    base: Path, residues: list[str], tmp_path: Path
) -> None:
    run_here(tmp_path / "out", base, *residues, *CONVNET)
    told = ArchiveFile.open(tmp_path / "out" / "model.nemo").provenance["finetuning"]
    assert told["base_model"] == "pretrained.nemo"
    assert told["base_weights_sha256"] == ArchiveFile.open(base).weights_sha256
    assert set(told["data"]) == {"labels.fasta", "sequences.fasta"}
    assert set(told["validation"]) == {"accuracy", "f1", "mcc"}
