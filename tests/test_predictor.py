"""Predictions of a fine-tuned model, their independence from the batch, and their tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bionemo_esm import FineTunedPredictor
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.finetuning import predictor as predicting
from bionemo_esm.finetuning import predictor as tables
from bionemo_esm.finetuning.config import ATTENTION, MAX, MLP, HeadConfig
from bionemo_esm.finetuning.tasks import Task
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import read_archive
from errors import refused
from fine_tuned import (
    CONV,
    LETTERS,
    NUMBER,
    PLACES,
    PROFILE,
    PROTEINS,
    READING,
    TASKS,
    WORDS,
    fine_tuned,
    predictor,
    proteins,
)

# Predictions


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prediction_is_the_output_of_the_head_on_the_states_of_its_layer(task: Task, tmp_path: Path) -> None:
    path = fine_tuned(tmp_path / "tuned.nemo", task, reading=READING.replace(layer=1))
    weights = read_archive(path).weights
    weight, bias, shift, scale = (
        weights[f"head.{name}"].numpy() for name in ("output.weight", "output.bias", "shift", "scale")
    )
    engine = Engine.load(path, "cpu")
    options = EmbeddingOptions(layers=(1,), mean=False, residues=True, window=READING.window, overlap=READING.overlap)
    for protein, found in zip(proteins(), FineTunedPredictor.load(path, "cpu").predict(proteins()), strict=True):
        (embedding,) = embed_proteins(engine, [protein], options)
        assert embedding.windows == (4 if protein.id == "long" else 1)
        states = embedding.arrays["residues_1"].astype(np.float64)
        if not task.is_per_residue:
            states = states.mean(axis=0, keepdims=True)
        outputs = (states - shift) * scale @ weight.T + bias
        if task.is_classification:
            expected = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        else:
            expected = outputs * task.target_scale + task.target_mean
        assert (found.dtype, found.shape) == (np.float32, (len(states), task.outputs))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (LETTERS, CONV),
        (PLACES, HeadConfig(kind=ATTENTION, hidden=4, kernel_size=3)),
        (PLACES, CONV.replace(pooling=ATTENTION)),
        (NUMBER.replace(target_mean=0.0, target_scale=1.0), HeadConfig(kind=MLP, hidden=4, pooling=MAX)),
    ],
    ids=["residues", "attention", "pooled-by-attention", "number"],
)
def test_prediction_does_not_depend_on_the_batch(
    task: Task, head: HeadConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [protein._replace(id=f"{protein.id}{copy}") for copy in range(3) for protein in proteins()]
    whole = predictor(tmp_path, task, head, 10_000).predict(some)
    in_small_batches = predictor(tmp_path, task, head, 60)
    assert in_small_batches.engine.batch_tokens == 60
    by_small_batches = in_small_batches.predict(some)
    backwards = predictor(tmp_path, task, head).predict(some[::-1])[::-1]
    monkeypatch.setattr(predicting, "_GROUP_BYTES", 4 * 32 * 100)
    in_groups = predictor(tmp_path, task, head).predict(some)
    alone = [predictor(tmp_path, task, head).predict([protein])[0] for protein in some[:5]] * 3
    for others in (by_small_batches, backwards, in_groups, alone):
        for one, other in zip(whole, others, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_proteins_are_read_and_predicted_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "_GROUP_BYTES", 4 * 32 * 100)  # 100 residues
    taken: list[str] = []
    told: list[int] = []

    def source() -> Iterator[Protein]:
        for protein in proteins():
            taken.append(protein.id)
            yield protein

    stream = predictor(tmp_path, LETTERS).stream(source(), told.append)
    first, prediction = next(stream)
    assert (first.id, len(prediction)) == ("ubiquitin", 76)
    assert taken == ["ubiquitin", "one", "long"]
    assert sum(told) == 77
    assert [protein.id for protein, _ in stream] == list(PROTEINS)[1:]
    assert sum(told) == sum(map(len, PROTEINS.values()))


def test_nonfinite_prediction_is_an_error_that_names_the_protein(tmp_path: Path) -> None:
    model = predictor(tmp_path, NUMBER)
    with torch.no_grad():
        model.head.output.bias.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match=r"record 1 \(ubiquitin\): the prediction is no finite number"):
        model.predict(proteins())


def test_import_does_not_load_torch_and_prediction_does_not_load_nemo(tmp_path: Path) -> None:
    path = fine_tuned(tmp_path / "tuned.nemo", PLACES)
    code = (
        "import sys, bionemo_esm.finetuning.predict_command\n"
        "from bionemo_esm import FineTunedPredictor\n"
        "before = [name for name in ('torch', 'pandas', 'pyarrow', 'nemo') if name in sys.modules]\n"
        f"print(FineTunedPredictor.load({str(path)!r}, 'cpu').predict_table('MKT').shape)\n"
        "print(before, [name for name in ('nemo', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(1, 7)", "[] []"]


def test_predict_and_predict_table_accept_the_same_forms_of_input(tmp_path: Path) -> None:
    model, sequences = predictor(tmp_path, NUMBER), {"a": "MKTV", "b": "WYWYW"}
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    expected = np.concatenate(model.predict(proteins(sequences)))
    for given in (sequences, list(sequences.values()), list(sequences.items()), tmp_path / "in.fasta"):
        np.testing.assert_array_equal(np.concatenate(model.predict(given)), expected)
        np.testing.assert_array_equal(model.predict_table(given)["prediction"], expected[:, 0])
    assert model.predict("MKTV")[0].shape == (1, 1)
    for wrong in ([None], {}):
        for method in (model.predict, model.predict_table):
            with pytest.raises(UserError, match="sequences"):
                method(wrong)
    for path in (None, 3, ""):
        with refused("config.type", "path must name a .nemo"):
            FineTunedPredictor.load(path)


# Tables


def test_protein_table_has_a_probability_column_for_each_class(tmp_path: Path) -> None:
    model = predictor(tmp_path, PLACES)
    table = model.predict_table(PROTEINS)
    names = ["p_Nucleus", "p_id", "p_Cell, membrane", "p_prediction"]
    assert list(table.columns) == ["id", "prediction", "probability", *names]
    np.testing.assert_array_equal(table[names].to_numpy(), np.concatenate(model.predict(proteins())))
    assert list(table["id"]) == list(PROTEINS)
    assert list(table["prediction"]) == [names[place][2:] for place in table[names].to_numpy().argmax(axis=1)]
    np.testing.assert_array_equal(table["probability"], table[names].to_numpy().max(axis=1))
    assert list(model.predict_table(PROTEINS, probabilities=False).columns) == ["id", "prediction", "probability"]


def test_residue_table_has_a_row_per_protein_or_per_residue(tmp_path: Path) -> None:
    model = predictor(tmp_path, LETTERS)
    found = model.predict(proteins())
    short, long = model.predict_table(PROTEINS), model.predict_table(PROTEINS, residues=True)
    assert list(short.columns) == ["id", "prediction", "probability"]
    assert list(long.columns) == ["id", "position", "residue", "prediction", "probability", "p_H", "p_E", "p_C"]
    letters = ["".join("HEC"[place] for place in rows.argmax(axis=1)) for rows in found]
    assert list(short["prediction"]) == letters
    assert len(set("".join(letters))) > 1
    np.testing.assert_allclose(short["probability"], [rows.max(axis=1).mean() for rows in found], rtol=1e-6)
    assert "".join(long["prediction"]) == "".join(letters)
    assert "".join(long["residue"]) == "".join(PROTEINS.values())
    assert list(long["position"]) == [place for rows in found for place in range(1, len(rows) + 1)]
    assert list(long["id"]) == [name for name, sequence in PROTEINS.items() for _ in sequence]


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (WORDS, ["id", "position", "residue", "prediction", "probability", "p_ordered", "p_disordered"]),
        (PROFILE, ["id", "position", "residue", "prediction"]),
        (NUMBER, ["id", "prediction"]),
    ],
    ids=["words", "profile", "number"],
)
def test_predictions_that_are_not_letters_have_their_own_rows(task: Task, columns: list[str], tmp_path: Path) -> None:
    table = predictor(tmp_path, task).predict_table({"a": "MKT", "b": "W"})
    assert list(table.columns) == columns
    assert list(table["id"]) == (["a", "a", "a", "b"] if task.is_per_residue else ["a", "b"])


def test_rows_that_a_task_does_not_have_are_rejected() -> None:
    with pytest.raises(ConfigError, match="residues=true: melting predicts one thing for each protein"):
        tables.Layout.of(NUMBER, True, True)
    for task in (WORDS, PROFILE):
        with pytest.raises(ConfigError, match=r"residues=false: what .* cannot be one letter for each residue"):
            tables.Layout.of(task, False, True)


@pytest.mark.parametrize("names", [("H", ">"), ("H", " "), ("H", "\x1b"), ("H", "EE"), ("H", "")])
def test_class_names_that_are_not_letters_are_written_in_full(names: tuple[str, ...]) -> None:
    assert not tables.has_letters(LETTERS.replace(classes=names))
