"""`bionemo-esm evaluate` against plain loops over single proteins, Hugging Face's loss, and counts by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from bionemo_esm.alphabet import CLS_ID, EOS_ID, decode, encode
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import ValidationBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore, SequenceSplit, StoreWriter
from bionemo_esm.errors import UserError
from bionemo_esm.inference.batching import WindowSpec
from bionemo_esm.inference.embedding.embeddings import pseudo_perplexities
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.evaluation import evaluate_command, evaluation
from bionemo_esm.inference.evaluation.baselines import (
    BASELINES,
    FOUR_NEIGHBOURS,
    FREQUENCIES,
    OTHER,
    OUTSIDE,
    TWO_NEIGHBOURS,
    NeighbourCounts,
)
from bionemo_esm.inference.evaluation.masked import MaskedProtein, log_probabilities, masked_protein
from bionemo_esm.inference.evaluation.tally import SIZES, Estimates, Tally
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.pretraining.recipe import load_recipe
from bionemo_esm.statistics import resampled_indices
from errors import refused
from models import padded_twin, tiny_model
from runs import SMALL, composed, run_here

SEED, PROTEINS = 5, 12
NAMES = ("model", "reference", *BASELINES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_split: SequenceSplit) -> Path:
    """Return a folder with two models, a store, and its test split in other formats."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, seed in (("x.nemo", 1), ("y.nemo", 2)):
        tiny_model(seed=seed).save_to(str(folder / name))
    with StoreWriter(folder / "store") as writer:
        for number in range(len(tiny_split)):
            writer.add("test" if number < PROTEINS else "train", tiny_split[number])
        writer.finish({"source": "tests"})
    test = [tiny_split[number] for number in range(PROTEINS)]
    rows = {"id": [f"p{number}" for number in range(PROTEINS)], "sequence": [decode(tokens) for tokens in test]}
    parquet.write_table(arrow.table(rows), folder / "p.parquet")
    pairs = list(zip(rows["id"], rows["sequence"], strict=True))
    (folder / "p.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in pairs))
    (folder / "p.csv").write_text("id,sequence\n" + "".join(f"{name},{text}\n" for name, text in pairs))
    return folder


@pytest.fixture(scope="module")
def test_split(place: Path) -> SequenceSplit:
    return ProteinStore.open(place / "store").split("test")


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """Return a function that runs the command in this process and returns what it wrote."""

    def command(*overrides: str, source: str = "store", name: str = "e") -> dict[str, Any]:
        output = tmp_path / f"{name}.json"
        keys = (f"model={place / 'x.nemo'}", f"input={place / source}", f"output={output}", f"seed={SEED}")
        cfg = composed(*keys, "picture=false", "resamples=200", *overrides, config="evaluate", part="inference")
        code = evaluate_command._evaluate(evaluate_command.load_evaluate_config(cfg))
        assert code == 0
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return command


def alone(place: Path, name: str, split: SequenceSplit, dtype: torch.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield log-probabilities and targets of each protein by Hugging Face's model, one window at a time.

    A masked residue of a long protein is predicted in the window that has most residues on its shorter side.
    """
    twin = padded_twin(ESM1nvModel.restore_from(str(place / name))).to(dtype)
    for number in range(len(split)):
        protein = masked_protein(number, split[number], 0.15, SEED)
        answers, most = np.empty((len(protein.positions), 33)), np.full(len(protein.positions), -1)
        for begin, end in WindowSpec(510, 255).cover(len(protein.tokens)):
            shown = [CLS_ID, *protein.shown[begin:end].tolist(), EOS_ID]
            with torch.no_grad():
                logits = twin(input_ids=torch.tensor([shown]), attention_mask=torch.ones(1, len(shown))).logits[0]
            found = logits.double().log_softmax(-1).numpy()
            for index, position in enumerate(protein.positions.tolist()):
                before = position - begin if begin else 10**6
                after = end - 1 - position if end < len(protein.tokens) else 10**6
                if begin <= position < end and min(before, after) > most[index]:
                    answers[index], most[index] = found[1 + position - begin], min(before, after)
        yield answers, protein.targets.astype(np.int64)


def test_figures_equal_a_float64_loop_over_single_proteins(place: Path, run: Run, test_split: SequenceSplit) -> None:
    figures = run(f"reference={place / 'y.nemo'}")
    for name, file in (("model", "x.nemo"), ("reference", "y.nemo")):
        answers = list(alone(place, file, test_split, torch.float64))
        losses = [-answer[np.arange(len(targets)), targets] for answer, targets in answers]
        right = [answer.argmax(1) == targets for answer, targets in answers]
        confidence = np.concatenate([np.exp(answer.max(1)) for answer, _ in answers])
        found, count = figures["predictors"][name], sum(map(len, losses))
        assert figures["masked_residues"] == count > 300
        assert found["loss"] == pytest.approx(np.concatenate(losses).sum() / count, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["accuracy"] == pytest.approx(np.concatenate(right).mean())
        bins = np.minimum((confidence * 15).astype(int), 14)
        gaps = [abs((confidence - np.concatenate(right))[bins == b].sum()) for b in range(15)]
        assert found["expected_calibration_error"] == pytest.approx(sum(gaps) / count, abs=2e-3)
        long = [loss for loss, number in zip(losses, range(PROTEINS), strict=True) if len(test_split[number]) >= 500]
        rows = [row for row in found["by_length"] if row["from"] >= 500]
        total = sum(row["loss"] * row["masked_residues"] for row in rows)
        assert total == pytest.approx(np.concatenate(long).sum(), rel=1e-6)
        for kind in SIZES:
            assert sum(row["masked_residues"] for row in found[kind]) == count
            assert sum(row["loss"] * row["masked_residues"] for row in found[kind]) / count == pytest.approx(
                found["loss"]
            )


def test_loss_equals_that_of_hugging_face_on_the_same_masks(place: Path, run: Run, test_split: SequenceSplit) -> None:
    twin, total, count = padded_twin(ESM1nvModel.restore_from(str(place / "x.nemo"))), 0.0, 0
    short = [number for number in range(PROTEINS) if len(test_split[number]) <= 510]
    for number in short:
        protein = masked_protein(number, test_split[number], 0.15, SEED)
        shown, labels = [CLS_ID, *protein.shown.tolist(), EOS_ID], [-100] * (len(protein.tokens) + 2)
        for position, target in zip(protein.positions.tolist(), protein.targets.tolist(), strict=True):
            labels[position + 1] = target
        if len(protein.positions):
            with torch.no_grad():
                loss = twin(input_ids=torch.tensor([shown]), labels=torch.tensor([labels])).loss
            total, count = total + float(loss) * len(protein.positions), count + len(protein.positions)
    engine, windows = Engine.load(place / "x.nemo"), WindowSpec(510, 255)
    proteins = [masked_protein(number, test_split[number], 0.15, SEED) for number in short]
    tally = Tally.of(proteins, log_probabilities(engine, proteins, windows))
    assert tally.proteins[:, 0].sum() / count == pytest.approx(total / count, abs=1e-4)


def test_masks_equal_those_of_validation_with_the_same_seed(tiny_split: SequenceSplit) -> None:
    reader = SampleReader(tiny_split, 4096, MaskingPolicy().for_evaluation(), SEED)
    batches, counted = ValidationBatches(reader, 4), 0
    for number in range(0, 36, 4):
        for at, targets in enumerate(_targets_by_sequence(batches[number // 4])):
            protein = masked_protein(number + at, tiny_split[number + at], 0.15, SEED)
            assert targets == protein.targets.tolist()
            counted += len(targets)
    assert counted > 500


def _targets_by_sequence(batch: Any) -> list[list[int]]:
    edges = np.searchsorted(batch.target_index.numpy(), batch.cu_seqlens.numpy())
    return [batch.targets[a:b].tolist() for a, b in pairwise(edges)]


@pytest.mark.parametrize("source", ["p.fasta", "p.csv", "p.parquet"])
def test_files_give_the_figures_of_the_store_with_the_same_proteins(place: Path, run: Run, source: str) -> None:
    store = run(name="store")
    found = run(f"store={place / 'store'}", source=source, name="file")
    assert found["predictors"] == store["predictors"]
    assert "residue frequencies" not in run(source=source, name="bare")["predictors"]


def test_python_gives_the_figures_of_the_command(place: Path, run: Run) -> None:
    found = run(f"store={place / 'store'}", source="p.fasta")
    model = ProteinModel.load(place / "x.nemo")
    figures = model.evaluate(str(place / "p.fasta"), store=place / "store", seed=SEED, resamples=200)
    assert json.loads(json.dumps(figures["predictors"])) == found["predictors"]


def test_sequences_are_a_random_part_and_fewer_are_part_of_more(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    few, more = (set(evaluate_command.choose(100, wanted, SEED).tolist()) for wanted in (10, 30))
    assert len(few) == 10 and few < more
    assert run("sequences=4", name="four")["proteins"] == 4
    assert run("sequences=4", source="p.fasta", name="file")["proteins"] == 4
    everything = run("sequences=1000", name="all")
    assert everything["proteins"] == PROTEINS
    assert "sequences=1,000: there are 12; all are used" in capsys.readouterr().out


def test_pseudo_perplexity_equals_that_of_embeddings(place: Path, run: Run, test_split: SequenceSplit) -> None:
    found = run("pseudo_perplexity=true", "sequences=3", "window=60")["predictors"]["model"]
    numbers = evaluate_command.choose(PROTEINS, 3, SEED).tolist()
    proteins = [test_split[number] for number in numbers]
    expected = np.array(list(pseudo_perplexities(Engine.load(place / "x.nemo"), proteins, 60)))
    lengths = np.array([len(protein) for protein in proteins])
    assert found["mean_pseudo_perplexity_of_proteins"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["pseudo_loss"] == pytest.approx((np.log(expected) * lengths).sum() / lengths.sum(), rel=1e-6)


# --- comparison -------------------------------------------------------------------------------------------------------


def test_intervals_equal_those_of_resampled_proteins() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([0.0, *rng.integers(5, 60, 40)])
    losses = {"a": counts * rng.normal(2.8, 0.1, 41), "b": counts * rng.normal(2.9, 0.1, 41)}
    empty = {name: np.zeros((size, 4)) for name, size in SIZES.items()}
    tallies = {name: Tally(np.stack([loss, counts / 10], axis=1), empty) for name, loss in losses.items()}
    estimates = Estimates(counts, tallies, resamples=300, seed=3)
    kept = counts > 0
    drawn = list(resampled_indices(40, 300, 3))
    means = {n: [(loss[kept][d].sum() / counts[kept][d].sum()) for d in drawn] for n, loss in losses.items()}
    assert estimates.interval("a") == pytest.approx(tuple(np.percentile(means["a"], (2.5, 97.5))))
    difference, interval = estimates.difference("a", "b")
    assert difference == pytest.approx((losses["a"].sum() - losses["b"].sum()) / counts.sum())
    assert interval == pytest.approx(tuple(np.percentile(np.subtract(means["a"], means["b"]), (2.5, 97.5))))


def test_a_model_compared_with_itself_has_a_difference_of_zero(place: Path, run: Run) -> None:
    found = run(f"reference={place / 'x.nemo'}")
    assert found["differences"]["reference"] == {"loss": 0.0, "interval": [0.0, 0.0]}


# --- baselines --------------------------------------------------------------------------------------------------------


def classes_of(tokens: np.ndarray) -> list[int]:
    return [int(token) - 4 if 4 <= token < 24 else OTHER for token in tokens.tolist()]


def test_ngrams_equal_counts_by_hand(place: Path) -> None:
    train = ProteinStore.open(place / "store").split("train")
    found = NeighbourCounts.of(train)
    two, four, one = Counter(), Counter(), Counter()  # type: ignore[var-annotated]
    for number in range(len(train)):
        padded = [OUTSIDE] * 2 + classes_of(train[number]) + [OUTSIDE] * 2
        for at in range(2, len(padded) - 2):
            two[padded[at - 1], padded[at + 1], padded[at]] += 1
            four[padded[at - 2], padded[at - 1], padded[at + 1], padded[at + 2], padded[at]] += 1
            one[padded[at - 1], padded[at]] += 1
    first, second = encode("MKLLVAGX"), encode("MKLLVAGX")
    (masked_alone, beside) = (MaskedProtein(0, first, np.array([3])), MaskedProtein(0, second, np.array([3, 4])))
    unigram = np.bincount([min(c, OTHER) for c in _classes33()], found.frequencies, OTHER + 1)
    lys, leu, val, ala = classes_of(encode("KLVA"))

    def mixed(counts: list[int], smaller: np.ndarray, prior: float) -> np.ndarray:
        return (np.array(counts) + prior * smaller) / (sum(counts) + prior)

    from_two = mixed([two[leu, val, x] for x in range(21)], unigram, found.two_prior)
    from_four = mixed([four[lys, leu, val, ala, x] for x in range(21)], from_two, found.four_prior)
    for baseline, expected in ((TWO_NEIGHBOURS, from_two), (FOUR_NEIGHBOURS, from_four)):
        (answer,) = found.log_probabilities(baseline, masked_alone)
        np.testing.assert_allclose(np.exp(answer)[4:24], expected[:20], rtol=1e-6)
        assert np.exp(answer).sum() == pytest.approx(1)
    half_seen = mixed([one[leu, x] for x in range(21)], unigram, found.two_prior)  # its right neighbour is masked, too
    answers = found.log_probabilities(TWO_NEIGHBOURS, beside)
    np.testing.assert_allclose(np.exp(answers[0])[4:24], half_seen[:20], rtol=1e-6)
    frequencies = (train.residue_counts() + 1) / (train.residue_counts() + 1).sum()
    np.testing.assert_allclose(np.exp(found.log_probabilities(FREQUENCIES, beside)), [frequencies] * 2)


def _classes33() -> list[int]:
    return [token - 4 if 4 <= token < 24 else OTHER for token in range(33)]


def test_ngrams_are_of_the_visible_neighbours_only(place: Path) -> None:
    counts = NeighbourCounts.of(ProteinStore.open(place / "store").split("train"))
    proteins = [MaskedProtein(0, encode(f"MKLL{hidden}AGVS"), np.array([3, 4])) for hidden in "VW"]
    answers = [counts.log_probabilities(FOUR_NEIGHBOURS, protein)[0] for protein in proteins]
    np.testing.assert_array_equal(*answers)


# --- resume, processes, errors ----------------------------------------------------------------------------------------


def test_stopped_evaluation_continues_with_the_missing_parts(
    place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "PART_PROTEINS", 5)
    whole = run(name="whole")
    evaluate, calls = evaluation.Predictors.evaluate, []

    def stopping(self: Any, part: Any, *rest: Any) -> Any:
        calls.append(part.place)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, part, *rest)

    monkeypatch.setattr(evaluation.Predictors, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(name="stopped")
    assert run(name="stopped") == whole
    assert calls == [0, 1, 1, 2]
    assert "resumed   1 part of an earlier run" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if "stopped" in path.name] == ["stopped.json"]


def test_parts_of_another_job_are_computed_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation.Predictors, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    assert run("masked=0.3")["masked"] == 0.3
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PART_PROTEINS", 4)
    one, two = run(name="one"), run("devices=2", name="two")
    for name, figures in one["predictors"].items():
        assert two["predictors"][name]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert two["differences"].keys() == one["differences"].keys()


@pytest.mark.parametrize(
    ("overrides", "source", "mentions"),
    [
        (("split=validation",), "store", ("split", "has no sequence in validation")),
        (("split=tests",), "store", ("split must be one of train, validation, test",)),
        (("masked=1e-9",), "store", ("no residue", "masked")),
        (("window=4000",), "store", ("window=4000", "510 residues")),
        (("output=e.txt",), "store", ("output", ".json")),
        ((), "none.fasta", ("none.fasta",)),
        (("device=cuda:0", "devices=2"), "store", ("device=cuda",)),
    ],
)
def test_unusable_input_is_refused_in_one_line(
    run: Run, overrides: tuple[str, ...], source: str, mentions: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        run(*overrides, source=source)
    for mention in mentions:
        assert mention in str(caught.value)
    assert "\n" not in str(caught.value)


def test_picture_and_screen_show_every_predictor(
    place: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"reference={place / 'y.nemo'}", "picture=true")
    text = capsys.readouterr().out
    assert all(name in text for name in ("x.nemo", "y.nemo", *BASELINES))
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert max(map(len, text.splitlines())) < 120


# --- the end of a pretraining run -------------------------------------------------------------------------------------


def test_pretraining_ends_with_the_test_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = run_here(tmp_path / "run", "evaluate.test_sequences=20", "data.masking.chosen=0.3")
    figures = json.loads((tmp_path / "run" / "test.json").read_text())
    assert summary["test_sequences"] == 20 == figures["proteins"]
    assert set(figures["predictors"]) == {"model", "averaged", *BASELINES}
    assert summary["test_loss"] == figures["predictors"]["model"]["loss"]
    assert "by_residue" not in summary["test"]["predictors"]["model"]
    assert figures["masked_residues"] / figures["residues"] == pytest.approx(0.3, abs=0.03)
    assert "test perplexity" in capfd.readouterr().out
    assert "Test perplexity" in (tmp_path / "run" / "report.html").read_text()
    with refused("config.type", "evaluate.test_sequences"):
        load_recipe(composed(*SMALL, "evaluate.test_sequences=many"))
