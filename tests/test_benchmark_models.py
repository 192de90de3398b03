"""Tests of the training and inference rows: all sides do the same work and agree, or their result does not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.esm import modeling_esm

from benchmarks import profile_step, steps
from benchmarks.comparison import Inputs, Result, Row, Setting, Side, measure
from benchmarks.proteins import TUNING, sources
from benchmarks.rows import embeddings, training
from benchmarks.rows.training import ESM1B, ESM1NV, TINY
from benchmarks.steps import (
    AUTOCAST,
    BF16,
    FLOAT32,
    IGNORED,
    MaskedProtein,
    Ours,
    PaddedBatch,
    Theirs,
    alike,
    apart,
    in_evaluation,
    masked_proteins,
    padded,
    peer_model,
    tokens_of,
)
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.interchange.convert import import_model
from theirs import saved

SAMPLE = Path(__file__).resolve().parent.parent / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
PRECISIONS = {FLOAT32: "32", AUTOCAST: "bf16", BF16: "bf16"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Return every row at tiny size after one turn of each side."""
    setting = Setting(tmp_path_factory.mktemp("rows"), quick=True)
    rows = [*training.rows(setting), *embeddings.rows(setting)]
    return {row.key: measure(replace(row, turns=1)) for row in rows}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import a tiny ESM-1nv of Hugging Face and return its archive."""
    folder = tmp_path_factory.mktemp("model")
    import_model(str(saved(peer_model("ESM-1nv", TINY), folder / "theirs")), folder / "ours.nemo")
    return folder / "ours.nemo"


def lengths_of_the_sample(count: int) -> list[int]:
    """Return the lengths in residues of the first proteins of the sample, read without the benchmark code."""
    return [len(record.sequence) for record, _ in zip(read_fasta(SAMPLE), range(count), strict=False)]


def some_proteins(count: int) -> list[MaskedProtein]:
    return masked_proteins(sources(None)[0].draw(TUNING, count))


def drawn(side: Side, turn: int) -> Inputs:
    assert side.draw is not None
    return side.draw(turn)


def text_of(inputs: Any) -> str:
    """Return the tokens of batches, of proteins or of one protein as text."""
    return str(inputs.tolist() if isinstance(inputs, np.ndarray) else [one.tokens.tolist() for one in inputs])


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_row_runs_and_all_other_sides_agree_with_ours(results: dict[str, Result]) -> None:
    works = [
        *("train-esm1nv-float32", "train-esm1nv-bf16", "train-esm1b-float32", "train-esm1b-bf16"),
        *("embed-esm2-8m-float32", "embed-esm2-8m-bf16", "embed-esm1nv-float32", "embed-esm1nv-bf16"),
    ]
    assert list(results) == [f"{work}{source}" for work in works for source in ("", "-uniref50")] + [
        "marginals-esm2-8m"
    ]
    for result in results.values():
        ours, *theirs = result.sides
        assert ours.error is None
        assert theirs
        for side in theirs:
            assert side.counts, f"{result.row.key}, {side.name}: off by {side.error}"
            assert side.error, "two libraries never round alike"
            assert side.libraries


def test_sides_are_compared_on_as_many_proteins_as_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many proteins are cropped to one length. Sides that time a subset must be compared on that subset."""
    monkeypatch.setitem(training.SCALES, "quick", replace(training.SCALES["cpu"], sizes=(1, 4)))
    row = next(training.rows(Setting(tmp_path, quick=True)))
    for side in row.sides[1:]:
        assert side.error
        assert side.error <= row.tolerance, side.name


def test_rows_labelled_bf16_are_computed_in_bf16(results: dict[str, Result]) -> None:
    for result in results.values():
        for side in result.sides[1:]:
            assert side.error
            assert (side.error > 1e-5) == (result.row.precision == "bf16"), f"{result.row.key}, {side.name}"


def test_targets_refer_to_existing_sides(results: dict[str, Result]) -> None:
    for result in results.values():
        names = [side.name for side in result.sides]
        assert len(set(names)) == len(names)
        assert result.row.targets
        for target in result.row.targets:
            assert target.side in names
            result.met(target)


def test_step_counts_real_tokens_and_no_padding(results: dict[str, Result]) -> None:
    lengths = [min(residues, 510) + 2 for residues in lengths_of_the_sample(9)]
    for key in ("train-esm1nv-float32", "train-esm1b-bf16"):
        for turn, cropped in ((TUNING, lengths[:3]), (0, lengths[3:6]), (1, lengths[6:])):
            ours, *others = (drawn(side, turn).amount for side in results[key].row.sides)
            fixed, *whole = others if key.endswith("float32") else (others[0], others[-1])
            assert ours == sum(cropped)
            assert fixed in [sum(cropped) - one for one in cropped]  # the fixed-length side takes two of them
            assert set(whole) == {sum(cropped)}


def test_each_turn_has_other_proteins_on_all_sides_alike(results: dict[str, Result]) -> None:
    for result in results.values():
        for side in result.row.sides:
            turns = [text_of(drawn(side, turn).value) for turn in (TUNING, 0, 1)]
            assert len(set(turns)) == 3, f"{result.row.key}, {side.name}"
            assert text_of(drawn(side, 0).value) == turns[1], "the same turn has the same proteins"


def test_uniref50_rows_have_its_lengths() -> None:
    sample, uniref50 = sources(None)
    lengths = [protein.residues for protein in uniref50.draw(0, 500)]
    assert abs(np.median(lengths) - 205) < 25
    assert abs(np.mean(np.minimum(lengths, 510)) + 2 - 248) < 12
    whole = b"".join(bytes(protein.tokens) for protein in sample.draw(TUNING, 1000))
    assert bytes(uniref50.draw(TUNING, 1)[0].tokens) in whole, "real residues, cut anew"


def test_warm_up_and_memory_are_measured(results: dict[str, Result]) -> None:
    for result in results.values():
        for side in result.sides:
            assert side.first is not None
            assert side.compiling is not None
            assert 0 <= side.compiling <= side.first
            assert side.memory is None or side.memory >= 0  # only Linux says


def test_padded_steps_have_the_stated_padding(results: dict[str, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PaddedBatch] = []
    monkeypatch.setattr(Theirs, "step", lambda theirs, batches: seen.extend(batches))
    for side in results["train-esm1nv-bf16"].row.sides[1:]:
        seen.clear()
        inputs = drawn(side, 1)
        side.work(inputs.value)
        longest = [int(batch.real.sum(1).max()) for batch in seen]
        assert [batch.tokens.shape[1] for batch in seen] == ([512] * len(seen) if "512" in side.name else longest)
        assert sum(int(batch.real.sum()) for batch in seen) == inputs.amount
        if "sorted" in side.name:
            assert longest == sorted(longest, reverse=True)


def test_embeddings_are_requested_in_the_stated_order(
    results: dict[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sources(None)[0].draw(1, 5, 1022)
    by_length = sorted(first, key=lambda protein: protein.residues, reverse=True)
    for side in results["embed-esm2-8m-float32"].row.sides[1:]:
        asked: list[str] = []
        monkeypatch.setattr(
            embeddings, "padded", lambda some, asked=asked: asked.extend(map(bytes, some)) or _padded(some)
        )
        side.work(drawn(side, 1).value)
        expected = by_length if "sorted" in side.name else first[:4]
        assert asked == [bytes(protein.tokens) for protein in expected]


_padded = embeddings.padded


def test_embeddings_count_only_residues(results: dict[str, Result]) -> None:
    residues = [length for length in lengths_of_the_sample(30) if length <= 1022][5:10]  # of turn 0
    amounts = {side.name: drawn(side, 0).amount for side in results["embed-esm2-8m-float32"].row.sides}
    whole = {amount for name, amount in amounts.items() if "arrival" not in name}
    assert whole == {sum(residues)}
    assert {amount for name, amount in amounts.items() if "arrival" in name} == {sum(residues[:4])}


# --- training steps ---------------------------------------------------------------------------------------------------


def test_micro_batches_of_any_size_and_padding_contain_the_same_proteins() -> None:
    proteins = some_proteins(3)
    row = steps.packed(proteins)
    for width in (None, 512):
        batch = padded(proteins, width)
        assert batch.tokens.shape[1] == (width or row.max_seqlen)
        assert torch.equal(batch.tokens[batch.real.bool()], row.tokens)
        assert torch.equal(batch.labels[batch.labels != IGNORED], row.targets)
        assert int(batch.real.sum()) == tokens_of(proteins) == len(row.tokens)


def test_our_batches_contain_every_token_once_and_no_padding(archive: Path) -> None:
    proteins = some_proteins(5)
    batches = Ours(archive, "32", "cpu").batches(proteins, 2)
    assert [batch.sequences for batch in batches] == [2, 2, 1]
    assert sum(len(batch.tokens) for batch in batches) == tokens_of(proteins)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dropout_is_active_in_timed_steps_and_inactive_in_comparisons(archive: Path, precision: str) -> None:
    proteins = some_proteins(2)
    ours, theirs = Ours(archive, PRECISIONS[precision], "cpu"), Theirs("ESM-1nv", TINY, precision, "cpu")
    batches = {ours: ours.batches(proteins, 2), theirs: theirs.batches(proteins, 2, None)}
    assert ours.model.training
    assert theirs.model.training, "the best size is found before anything is compared"
    compared = {side: in_evaluation(side, batches[side]) for side in batches}
    for side in (ours, theirs):
        assert in_evaluation(side, batches[side]) == compared[side]
        found = {side.found(batches[side]).loss for _ in range(3)}
        assert len(found) > 1, "dropout draws anew each time"
        assert in_evaluation(side, batches[side]) == compared[side], "the weights have changed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_timed_step_changes_the_weights(archive: Path, precision: str) -> None:
    proteins = some_proteins(2)
    ours, theirs = Ours(archive, PRECISIONS[precision], "cpu"), Theirs("ESM-1nv", TINY, precision, "cpu")
    for side, batches in ((ours, ours.batches(proteins, 2)), (theirs, theirs.batches(proteins, 2, None))):
        before = in_evaluation(side, batches).loss
        for _ in range(10):
            side.step(batches)
        assert in_evaluation(side, batches).loss < before, "two proteins are soon learnt by heart"


def test_requested_attention_of_hugging_face_is_used_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    eager = modeling_esm.eager_attention_forward
    monkeypatch.setattr(modeling_esm, "eager_attention_forward", lambda *a, **b: calls.append(1) or eager(*a, **b))
    theirs = Theirs("ESM-1nv", TINY, FLOAT32, "cpu")
    batches = theirs.batches(some_proteins(3), 2, 512)
    fused = in_evaluation(theirs, batches)
    assert not calls
    theirs.use("eager")
    assert max(apart(in_evaluation(theirs, batches), fused)) < 1e-5
    assert len(calls) == TINY.layers * len(batches)
    theirs.use("sdpa")
    in_evaluation(theirs, batches)
    assert len(calls) == TINY.layers * len(batches)


def test_gradients_do_not_depend_on_the_micro_batch_size() -> None:
    """The sum of losses is divided by the number of masked positions of all micro batches."""
    proteins = some_proteins(5)
    theirs = Theirs("ESM-1nv", TINY, FLOAT32, "cpu")
    whole = in_evaluation(theirs, theirs.batches(proteins, 5, 512))
    for size, width in ((1, None), (2, 512), (3, None)):
        assert max(apart(in_evaluation(theirs, theirs.batches(proteins, size, width)), whole)) < 1e-5


def test_subset_of_proteins_keeps_the_mean_length_and_the_order() -> None:
    proteins = some_proteins(64)
    mean = tokens_of(proteins) / 64
    for count in (2, 4, 8, 32):
        few = alike(proteins, count)
        assert len(few) == count
        assert tokens_of(few) / count == pytest.approx(mean, rel=0.02)
        places = [next(place for place, protein in enumerate(proteins) if protein is one) for one in few]
        assert places == sorted(places)


# --- errors that must be detected -------------------------------------------------------------------------------------


def padding_is_seen(proteins: Sequence[Any], width: int | None) -> PaddedBatch:
    batch = padded(proteins, width)
    return batch._replace(real=torch.ones_like(batch.real))


def one_label_is_forgotten(proteins: Sequence[Any], width: int | None) -> PaddedBatch:
    batch = padded(proteins, width)
    labels = batch.labels.clone()
    labels[tuple(labels.ne(IGNORED).nonzero()[0])] = IGNORED
    return batch._replace(labels=labels)


@pytest.mark.parametrize("wrong", [padding_is_seen, one_label_is_forgotten])
def test_peer_that_does_other_work_does_not_count(
    wrong: Callable[..., PaddedBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "padded", wrong)
    row = next(training.rows(Setting(tmp_path, quick=True)))
    result = measure(replace(row, turns=1))
    fixed = next(side for side in result.sides if "512" in side.name)
    assert not fixed.counts
    assert not result.met(row.targets[0])


def test_peer_with_other_weights_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(*arguments: Any) -> Any:
        model = peer_model(*arguments)
        with torch.no_grad():
            model.esm.encoder.layer[1].output.dense.weight *= 1.01
        return model

    monkeypatch.setattr(steps, "peer_model", slightly_off)
    row = next(training.rows(Setting(tmp_path, quick=True)))
    assert all(side.error and side.error > row.tolerance for side in row.sides[1:])


def embeddings_that(wrong: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, patch: pytest.MonkeyPatch) -> Row:
    states = embeddings.Peer.states
    patch.setattr(embeddings.Peer, "states", lambda peer, tokens: wrong(states(peer, tokens), tokens))
    return next(embeddings.rows(Setting(tmp_path, quick=True)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda states, tokens: states.roll(1, dims=1),  # states shifted by one token
        lambda states, tokens: (
            states.roll(1, dims=0) if len(tokens) > 1 else states * 1.001
        ),  # states of another protein
        lambda states, tokens: states.bfloat16().float(),  # rounded to bfloat16 in a float32 row
    ],
)
def test_peer_with_other_embeddings_does_not_count(
    wrong: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = embeddings_that(wrong, tmp_path, monkeypatch)
    assert all(side.error and side.error > row.tolerance for side in row.sides[1:])


def test_peer_that_uses_another_mask_token_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MASK_ID", 3)
    *_, row = embeddings.rows(Setting(tmp_path, quick=True))
    assert all(side.error and side.error > row.tolerance for side in row.sides[1:])


def test_results_of_different_work_are_not_compared(archive: Path) -> None:
    ours = embeddings.our_embeddings(Engine.load(archive, "cpu"), sources(None)[0].draw(TUNING, 3, 510))
    with pytest.raises(ValueError, match="are of different work"):
        embeddings.farthest(ours[:2], ours)


# --- input and profile ------------------------------------------------------------------------------------------------


def test_file_with_too_few_proteins_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "few.fasta"
    path.write_text(">one\nMKTAYIAKQR\n>two\nMKV\n")
    setting = Setting(tmp_path, quick=True, fasta=path)
    with pytest.raises(ConfigError, match=r"few\.fasta: holds 2 proteins, and 3 are needed"):
        next(training.rows(setting))
    with pytest.raises(ConfigError, match=r"few\.fasta: holds 2 proteins of up to 1022 residues, and 5 are needed"):
        next(embeddings.rows(setting))


def test_real_sizes_equal_those_of_the_published_models() -> None:
    nv, b, whole = ESM1NV.shape, ESM1B.shape, training.WHOLE_ESM1B.shape
    assert (nv.layers, nv.hidden, nv.heads) == (6, 768, 12)
    assert (b.hidden, b.heads) == (whole.hidden, whole.heads) == (1280, 20)
    assert whole.layers == 33


def test_profile_lists_the_longest_operators_with_their_shares(capsys: pytest.CaptureFixture[str]) -> None:
    profile_step.main(["--quick", "--most", "5"])
    told, _, heading, _, *lines = capsys.readouterr().out.splitlines()
    assert "983 tokens" in told
    assert heading == "| operator | calls | ms | share |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    *shown, others, total = cells
    assert len(shown) == 5
    milliseconds = [float(cell[2].replace(",", "")) for cell in shown]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(float(cell[3].rstrip("%")) for cell in [*shown, others]) == pytest.approx(100, abs=0.5)
    assert int(total[1].replace(",", "")) == sum(int(cell[1].replace(",", "")) for cell in [*shown, others])


@pytest.mark.parametrize("arguments", [["--most", "0"], ["--precision", "fp8"]])
def test_invalid_profile_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        profile_step.main(arguments)
    assert stop.value.code == 2
