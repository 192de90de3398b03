"""The probe's proteins and head, its features, and configuration errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.finetuning.splits import LabelledDataset, SealedTestSet
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.pretraining import probe_config
from bionemo_esm.pretraining.preflight import check_requirements
from bionemo_esm.pretraining.probe import _fitted
from bionemo_esm.pretraining.recipe import load_recipe
from faults import run
from labelled_files import preset
from models import tiny_model
from probed import NUMBERS, RESIDUES, probe_of, probed, recipe_of, stub, write_labels
from runs import composed


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels"))


# --- features and head ------------------------------------------------------------------------------------------------


def test_probe_leaves_generators_modes_and_gradients_unchanged(labels: Path) -> None:
    model, probe = tiny_model(hidden_dropout=0.3), None
    model.train()
    model.encoder.lm_head.eval()  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    probe = probe_of(probed(labels))
    first, second = (probe._measure_head(stub(), model) for _ in range(2))
    assert first == second, "dropout, or chance, is at work"
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("table", ["residues", "shares"])
def test_features_equal_those_of_fine_tuning_in_any_batching(labels: Path, table: str) -> None:
    """Windows of long proteins are blended; states are those of the configured layer."""
    model = tiny_model(hidden_dropout=0.3, seq_length=64).train()
    task = RESIDUES if table == "residues" else NUMBERS
    some = probed(labels, table, task, 64, layer=1, **{"proteins": 15})
    reading = some.reading
    assert (reading.layer, reading.window, reading.overlap) == (1, 62, 31)
    assert max(some.train.lengths) > 62
    assert model.encoder is not None
    per_residue = table == "residues"
    options = EmbeddingOptions(layers=(1,), mean=not per_residue, residues=per_residue, window=62, overlap=31)
    with probe_mode(model):
        engine = Engine(model.encoder, model.encoder_config)
        name = "residues_1" if per_residue else "mean_1"
        expected = [np.atleast_2d(e.arrays[name]) for e in embed_proteins(engine, some.train.proteins, options)]
    for most_tokens in (70, 4096):
        found = probe_of(some, most_tokens)
        with probe_mode(model):
            states = dict(found._states(stub(), model, some.train))
        assert sorted(states) == list(range(len(some.train)))
        for number, rows_RF in states.items():
            np.testing.assert_allclose(rows_RF, expected[number], atol=2e-5)


def probe_mode(model: Any) -> Any:
    from bionemo_esm.pretraining.probe import _in_evaluation

    return _in_evaluation(model)


def test_head_learns_a_linear_target_and_predicts_in_its_unit(labels: Path) -> None:
    some = probed(labels, "shares", NUMBERS)
    found = probe_of(some)
    assert found._score_of_one_hot() > 0.9  # the target is linear in the composition of a protein
    rows_NF = np.random.default_rng(1).normal(size=(400, 8)) * 100 + 7
    targets_N = 300 * rows_NF[:, 2] - 5_000
    task = some.task.replace(target_mean=targets_N.mean(), target_scale=targets_N.std())
    told = _fitted(task, rows_NF[:300], targets_N[:300].astype(np.float32))(rows_NF[300:])
    assert told.dtype == np.float32
    assert np.corrcoef(told[:, 0], targets_N[300:])[0, 1] > 0.999
    assert told[:, 0].mean() == pytest.approx(targets_N[300:].mean(), rel=0.05)


def test_classes_absent_from_the_training_set_get_probability_zero(labels: Path) -> None:
    task = probed(labels).task.replace(classes=("C", "E", "H"))
    rows_NF = np.random.default_rng(1).normal(size=(300, 4))
    told = _fitted(task, rows_NF, np.where(rows_NF[:, 0] > 0, 2, 0).astype(np.float32))(rows_NF)
    assert told.shape == (300, 3)
    np.testing.assert_allclose(told.sum(axis=1), 1, atol=1e-5)
    assert not told[:, 1].any()
    assert (told.argmax(axis=1) == np.where(rows_NF[:, 0] > 0, 2, 0)).mean() > 0.97


def test_nonfinite_state_gives_no_score_and_no_error(labels: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    found = probe_of(probed(labels))._measure_head(stub(), model)
    assert found is not None
    assert found["score"] is None
    assert found["one_hot"] > 0.4


# --- chosen proteins --------------------------------------------------------------------------------------------------


def test_chosen_proteins_do_not_depend_on_the_order_of_the_file(labels: Path, tmp_path: Path) -> None:
    header, *records = (labels / "residues.csv").read_text().splitlines()
    (tmp_path / "residues.csv").write_text("\n".join([header, *reversed(records)]) + "\n")
    one, other = probed(labels, proteins=12), probed(tmp_path, proteins=12)
    for ours, theirs in ((one.train, other.train), (one.validation, other.validation)):
        assert len(ours) == 12
        assert texts(ours) == texts(theirs)
    assert len(probed(labels).train) == 40


def texts(labelled: LabelledDataset) -> list[tuple[bytes, bytes]]:
    return [(p.tokens.tobytes(), t.tobytes()) for p, t in zip(labelled.proteins, labelled.targets, strict=True)]


def test_training_residues_are_limited_and_all_validation_residues_are_scored(
    labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = probed(labels)
    monkeypatch.setattr(probe_config, "MOST_RESIDUES", 300)
    fewer = probed(labels)
    assert everything.train.known > 1000
    assert fewer.train.known == 300
    assert fewer.validation.known == everything.validation.known
    for some, every in zip(fewer.train.targets, everything.train.targets, strict=True):
        there = np.isfinite(some)
        assert np.array_equal(some[there], every[there])
    assert sum(np.isfinite(target).any() for target in fewer.train.targets) > 30, "of all proteins, not the first"


def test_labels_of_the_test_set_stay_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: SealedTestSet) -> Any:
        raise AssertionError("the test labels were looked at")

    monkeypatch.setattr(SealedTestSet, "open", look)
    rows = ["MKV,HHC,train,", "GAVL,HCCH,train,True", "WWW,HHH,test,"]
    (tmp_path / "t.csv").write_text("\n".join(["sequence,target,set,validation", *rows]))
    some = probed(tmp_path, "t")
    assert (len(some.train), len(some.validation)) == (1, 1)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_custom_task_rejects_unknown_keys_and_can_override_a_shipped_task() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key probe\.task\.levels"):
        load_recipe(composed("recipe=laptop", "probe.task={name: mine, levels: residue}", "probe.data.train=x"))
    changed = load_recipe(composed("recipe=laptop", "probe.task={name: gb1, metric: spearman}", "probe.data.train=x"))
    shipped = load_recipe(composed("recipe=laptop", "probe.task=gb1", "probe.data.train=x"))
    assert changed.probe is not None
    assert shipped.probe is not None
    assert changed.probe.task == shipped.probe.task.replace(metric="spearman") != shipped.probe.task


def test_shipped_task_equals_the_fine_tuning_preset() -> None:
    recipe = load_recipe(composed("recipe=laptop", "probe.task=secondary_structure", "probe.data.train=x"))
    assert recipe.probe is not None
    task = recipe.probe.task
    wanted = preset("secondary_structure")
    assert (task.name, task.level, task.kind) == ("secondary_structure", "residue", "classification")
    assert list(task.classes or ()) == wanted["classes"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["probe.task=structure"],
            r"^probe\.task must be one of conservation, .*'probe\.task=\{name: mine.*not 'struct",
        ),
        (["probe.task=custom"], r"^probe\.task must be one of"),
        (["probe.task=gb1", "probe.data.train=null"], r"^probe\.data\.train must be given"),
        (["probe.task=null"], r"^probe\.data\.train is given, but no task"),
        (
            ["probe.task={name: mine, level: atom, kind: regression}"],
            r"^probe\.task\.level must be one of residue, seq",
        ),
        (["+probe.data.trian=x"], r"^unknown key probe\.data\.trian"),
        (["+probe.often=1"], r"^unknown key probe\.often"),
        (["probe.data.bad_records=maybe"], r"^probe\.data\.bad_records must be one of error, skip"),
        (["probe.every_n_train_steps=0"], r"^probe\.every_n_train_steps must be at least 1, not 0"),
        (["probe.proteins=some"], r"^probe\.proteins must be an integer, not 'some'"),
        (["+probe.data.download=x", "probe.data.train=null"], r"^probe\.data\.download: every process of a run"),
    ],
)
def test_configuration_error_names_its_key(labels: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(labels, *overrides)


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (["MKV,HH,train,"], [], r"^probe: .*t\.csv, record 1.*3"),
        (
            ["MKV,HHC,train,"],
            [],
            r"^probe: .*t\.csv: no protein is marked for validation; .*by probe\.data\.validation",
        ),
        (["MKV,HHH,train,", "MKL,HCH,train,True"], [], r"^probe: .*two or more classes are needed to train on"),
        (
            ["MKV,HCH,train,", "MKL,HCX,train,True"],
            [],
            r"record 2.*'X' is none of .*probe\.task\.unknown.*probe\.data\.un",
        ),
        (["MKV,HCH,train,", "MKL,HCC,train,True"], ["probe.layer=9"], r"^probe\.layer 9: the model has 0 .* to 2"),
        (
            ["MKV,HHH,train,", "GGG,CCC,train,", "MKL,HCC,train,True"],
            ["probe.proteins=1"],
            r"^probe\.proteins=1: the training proteins that were chosen have one and the same target",
        ),
    ],
)
def test_bad_labels_are_rejected_before_anything_is_written(
    tmp_path: Path, rows: list[str], overrides: list[str], message: str
) -> None:
    (tmp_path / "t.csv").write_text("\n".join(["sequence,target,set,validation", *rows]) + "\n")
    keys = (f"probe.task={RESIDUES}", f"probe.data.train={tmp_path / 't.csv'}", *overrides)
    recipe = load_recipe(composed("recipe=laptop", *keys, f"exp_manager.exp_dir={tmp_path / 'runs'}"))
    with pytest.raises(UserError, match=message):
        check_requirements(recipe)
    assert not (tmp_path / "runs").exists()


def test_bad_label_ends_the_command_with_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,target,set,validation\nMKV,HH,train,\n")
    keys = (f"probe.task={RESIDUES}", f"probe.data.train={tmp_path / 't.csv'}")
    outcome = run(tmp_path / "run", *keys)
    assert outcome.codes == [2]
    assert outcome.errors.startswith("error: probe: ")
    assert outcome.errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
