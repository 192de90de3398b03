"""Batches of labelled proteins: packing without padding, distribution to ranks, and window blending."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bionemo_esm.alphabet import encode
from bionemo_esm.data.dataloader import BatchPlan
from bionemo_esm.finetuning.batches import Collator, EvaluationBatches, TrainingSteps, encoder_row
from bionemo_esm.finetuning.config import ReadingConfig
from bionemo_esm.finetuning.features import OneHot
from bionemo_esm.finetuning.model import class_weights
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import Task
from bionemo_esm.inference.batching import blending_weights, windows
from bionemo_esm.inference.inputs import Protein
from finetuning_runs import neighbours, proteins

TASK = Task(name="neighbours", level="residue", kind="classification", metric="accuracy", classes=("N", "O", "B"))
READING = ReadingConfig(layer=2, window=110, overlap=50)


@pytest.fixture(scope="module")
def labelled() -> LabelledDataset:
    """Return 37 real proteins (a prime number) with some unknown residue labels."""
    found, targets = [], []
    for number, (name, sequence) in enumerate(proteins(37).items(), start=1):
        found.append(Protein(name, encode(sequence), number))
        target = np.array(["NOB".index(letter) for letter in neighbours(sequence)], dtype=np.float32)
        target[::7] = np.nan
        targets.append(target)
    return LabelledDataset(found, targets)


def plan(rank: int = 0, world_size: int = 1, tokens: int = 300) -> BatchPlan:
    return BatchPlan(global_batch_size=5, micro_batch_tokens=tokens, rank=rank, world_size=world_size)


def test_each_epoch_has_every_protein_once_in_a_new_order(labelled: LabelledDataset) -> None:
    steps = TrainingSteps(Collator(TASK, labelled, OneHot(labelled.proteins)), plan(), seed=3)
    assert steps.steps_per_epoch == 8
    epochs = []
    for epoch in range(2):
        shares = [steps.share(epoch * 8 + step) for step in range(8)]
        assert {share.epoch for share in shares} == {epoch}
        numbers = np.concatenate([batch.numbers for share in shares for batch in share.batches])
        assert sorted(numbers) == list(range(37))
        epochs.append([frozenset(np.concatenate([b.numbers for b in share.batches]).tolist()) for share in shares])
    assert epochs[0] != epochs[1]
    other_seed = TrainingSteps(steps.collator, plan(), seed=4)
    assert frozenset(np.concatenate([b.numbers for b in other_seed.share(0).batches]).tolist()) != epochs[0][0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_a_step_completely(labelled: LabelledDataset, world_size: int) -> None:
    steps = TrainingSteps(Collator(TASK, labelled, OneHot(labelled.proteins)), plan(), seed=3)
    for step in range(8):  # the last step has two proteins, fewer than three ranks
        alone = steps.share(step)
        together = [steps.on_rank(rank, world_size).share(step) for rank in range(world_size)]
        assert {share.weight for share in together} == {alone.weight}
        assert {share.residues for share in together} == {alone.residues}
        numbers = [number for share in together for batch in share.batches for number in batch.numbers.tolist()]
        assert sorted(numbers) == sorted(number for batch in alone.batches for number in batch.numbers.tolist())


def test_the_weight_of_a_step_counts_its_known_targets(labelled: LabelledDataset) -> None:
    collator = Collator(TASK, labelled, OneHot(labelled.proteins))
    share = TrainingSteps(collator, plan(), seed=3).share(0)
    known = torch.cat([batch.targets for batch in share.batches])
    known = known[known.isfinite()]
    assert share.weight == len(known)
    weights = class_weights(TASK, labelled.targets)
    weighed = TrainingSteps(collator, plan(), seed=3, class_weights=weights).share(0)
    assert weighed.weight == pytest.approx(sum(weights[int(target)] for target in known), rel=1e-5)


def test_class_weights_balance_the_classes(labelled: LabelledDataset) -> None:
    weights = class_weights(TASK, labelled.targets)
    known = np.concatenate(labelled.targets)
    counts = np.array([(known == number).sum() for number in range(3)])
    np.testing.assert_allclose(weights * counts, np.full(3, counts.sum() / 3), rtol=1e-5)


def test_an_absent_class_has_weight_zero(labelled: LabelledDataset) -> None:
    larger = Task(
        name="neighbours", level="residue", kind="classification", metric="accuracy", classes=("N", "O", "B", "never")
    )
    assert class_weights(larger, labelled.targets)[3] == 0


@pytest.mark.parametrize("world_size", [1, 2, 40])
def test_evaluation_gives_each_protein_to_one_rank_and_each_rank_a_batch(
    labelled: LabelledDataset, world_size: int
) -> None:
    batches = EvaluationBatches(Collator(TASK, labelled, READING), 300)
    ranks = [batches.on_rank(rank, world_size) for rank in range(world_size)]
    assert all(len(own) >= 1 for own in ranks)
    seen = [number for own in ranks for index in range(len(own)) for number in own[index].numbers.tolist()]
    assert sorted(seen) == list(range(37))


def test_micro_batches_stay_within_the_token_limit(labelled: LabelledDataset) -> None:
    collator = Collator(TASK, labelled, READING)
    for step in range(8):
        for batch in TrainingSteps(collator, plan(tokens=160), seed=1).share(step).batches:
            assert collator.costs[batch.numbers].sum() <= 160 or len(batch.numbers) == 1
    own = EvaluationBatches(collator, 200)
    assert all(collator.costs[part].sum() <= 200 or len(part) == 1 for part in own.parts)


def test_windows_of_long_proteins_are_blended_to_one_state_per_residue(labelled: LabelledDataset) -> None:
    some = [labelled.proteins[number] for number in (3, 8, 11)]
    assert min(protein.residues for protein in some) < READING.window < max(protein.residues for protein in some)
    row = encoder_row(some, READING)
    tokens = row.row.tokens[row.sources]
    whole = torch.from_numpy(np.concatenate([protein.tokens for protein in some]).astype(np.int64))
    assert torch.equal(tokens, whole[row.places])  # each state belongs to the residue at its place
    hidden = torch.randn(len(row.row.tokens), 4, generator=torch.Generator().manual_seed(1))
    blended = row.blended(hidden, len(whole))
    first = at = 0
    expected = torch.zeros(len(whole), 4)
    for protein in some:
        cover = windows(protein.residues, READING.window, READING.overlap)
        for (begin, end), weights in zip(cover, blending_weights(cover), strict=True):
            states = hidden[at + 1 : at + 1 + end - begin]  # skip <cls>
            expected[first + begin : first + end] += states * torch.from_numpy(weights)[:, None]
            at += end - begin + 2
        first += protein.residues
    torch.testing.assert_close(blended, expected)


def test_proteins_within_the_window_are_read_whole_without_weights(labelled: LabelledDataset) -> None:
    row = encoder_row(labelled.proteins[:3], ReadingConfig(layer=2, window=510, overlap=255))
    assert row.weights is None
    assert row.row.sequences == 3


def test_unknown_letters_have_no_one_hot_feature() -> None:
    features = OneHot([Protein("x", encode("LAXB"), 1)])
    np.testing.assert_array_equal(features.of(0).sum(axis=1), [1, 1, 0, 0])
    np.testing.assert_allclose(OneHot(features.proteins, pooled=True).of(0), features.of(0).mean(0, keepdims=True))
