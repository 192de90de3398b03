"""Tests of pretraining batches: independent of loader workers, ranks, micro batches and resumes."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bionemo_esm.alphabet import MASK_ID
from bionemo_esm.data.collate import PackedBatch, SampleReader
from bionemo_esm.data.dataloader import (
    BatchPlan,
    ConsumedSamples,
    RankBatch,
    TrainingBatches,
    ValidationBatches,
    training_loader,
    unigram_perplexity,
    validation_loader,
)
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore, SequenceSplit


class Shown(NamedTuple):
    """One sequence of a batch as the model sees it: tokens, target positions and targets."""

    tokens: tuple[int, ...]
    target_places: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def true_residues(self) -> bytes:
        """Return the protein (or its window) before corruption, without special tokens."""
        tokens = list(self.tokens)
        for place, target in zip(self.target_places, self.targets, strict=True):
            tokens[place] = target
        return bytes(tokens[1:-1])


def shown(batches: RankBatch | list[PackedBatch]) -> list[Shown]:
    """Return all sequences of the batches in order."""
    sequences = []
    for batch in batches.micro_batches if isinstance(batches, RankBatch) else batches:
        for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            assert batch.positions[begin:end].tolist() == list(range(end - begin))
            inside = (batch.target_index >= begin) & (batch.target_index < end)
            places = (batch.target_index[inside] - begin).tolist()
            targets = batch.targets[inside].tolist()
            sequences.append(Shown(tuple(batch.tokens[begin:end].tolist()), tuple(places), tuple(targets)))
    return sequences


def stream(split: SequenceSplit, plan: BatchPlan, seed: int = 1, max_tokens: int = 512) -> TrainingBatches:
    return TrainingBatches(SampleReader(split, max_tokens, MaskingPolicy(), seed), plan)


def evaluation_reader(split: SequenceSplit, max_tokens: int = 512) -> SampleReader:
    return SampleReader(split, max_tokens, MaskingPolicy().for_evaluation(), seed=1)


def first_steps(source: TrainingBatches, steps: int, consumed: int = 0, num_workers: int = 0) -> list[list[Shown]]:
    loader = training_loader(source, consumed, num_workers, pin_memory=False)
    return [shown(share) for share in itertools.islice(loader, steps)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_are_the_same_at_any_number_of_loader_workers(tiny_split: SequenceSplit, num_workers: int) -> None:
    source = stream(tiny_split, BatchPlan(8, 4, rank=1, world_size=2))
    inline = first_steps(source, steps=12)  # reaches the third epoch
    assert first_steps(source, steps=12, num_workers=num_workers) == inline
    assert len({sequence for step in inline for sequence in step}) > 40


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_of_all_ranks_together_are_the_global_batch(tiny_split: SequenceSplit, world_size: int) -> None:
    whole = stream(tiny_split, BatchPlan(12, 12))
    shares = [stream(tiny_split, BatchPlan(12, 2, rank, world_size)) for rank in range(world_size)]
    for consumed in (0, 12, 30, 12_000):
        dealt = [sequence for share in shares for sequence in shown(share[consumed])]
        assert Counter(dealt) == Counter(shown(whole[consumed]))
        assert len(dealt) == 12


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(1, 12), (3, 4), (4, 3), (12, 1)])
def test_micro_batch_size_and_accumulation_do_not_change_the_samples(
    tiny_split: SequenceSplit, micro_batch_size: int, accumulation: int
) -> None:
    ranks = [stream(tiny_split, BatchPlan(24, micro_batch_size, rank, world_size=2)) for rank in (0, 1)]
    assert ranks[0].plan.accumulation == accumulation
    shares = [rank[48] for rank in ranks]
    for share in shares:
        assert [batch.sequences for batch in share.micro_batches] == [micro_batch_size] * accumulation
    both = [sequence for share in shares for sequence in shown(share)]
    assert Counter(both) == Counter(shown(stream(tiny_split, BatchPlan(24, 24))[48]))


def test_resumed_stream_equals_the_unbroken_stream(tiny_split: SequenceSplit) -> None:
    unbroken = first_steps(stream(tiny_split, BatchPlan(8, 8)), steps=15)
    for done in (1, 7, 14):
        resumed = first_steps(stream(tiny_split, BatchPlan(8, 4)), steps=15 - done, consumed=8 * done)
        assert list(map(Counter, resumed)) == list(map(Counter, unbroken[done:]))


def test_resume_at_another_world_size_and_batch_size_sees_the_same_samples(tiny_split: SequenceSplit) -> None:
    unbroken = shown(stream(tiny_split, BatchPlan(64, 64))[0])
    before = [s for rank in range(3) for s in shown(stream(tiny_split, BatchPlan(24, 8, rank, 3))[0])]
    after = [s for rank in range(2) for s in shown(stream(tiny_split, BatchPlan(40, 5, rank, 2))[24])]
    assert Counter(before) == Counter(unbroken[:24])
    assert Counter(after) == Counter(unbroken[24:])


def test_epoch_shows_every_protein_once_with_new_corruption_in_each_epoch(tiny_split: SequenceSplit) -> None:
    """At 1,026 tokens no protein is cropped."""
    size = len(tiny_split)
    epochs = [shown(stream(tiny_split, BatchPlan(size, size), max_tokens=1026)[epoch * size]) for epoch in range(3)]
    stored = sorted(tiny_split[i].tobytes() for i in range(size))
    for epoch in epochs:
        assert sorted(sequence.true_residues for sequence in epoch) == stored
    by_protein = [{s.true_residues: s for s in epoch if len(s.tokens) > 50} for epoch in epochs]
    assert all(by_protein[0][p] != by_protein[1][p] != by_protein[2][p] for p in by_protein[0])


def test_another_seed_gives_another_order_and_corruption(tiny_split: SequenceSplit) -> None:
    first, second = (shown(stream(tiny_split, BatchPlan(37, 37), seed, max_tokens=1026)[0]) for seed in (1, 2))
    assert [s.true_residues for s in first] != [s.true_residues for s in second]
    assert Counter(s.true_residues for s in first) == Counter(s.true_residues for s in second)
    assert len(set(first) & set(second)) < 5  # only the shortest can coincide


def test_long_proteins_show_another_window_in_each_epoch(tiny_split: SequenceSplit) -> None:
    size = len(tiny_split)
    proteins = {protein.tobytes() for protein in (tiny_split[i] for i in range(size)) if len(protein) > 510}
    assert len(proteins) == 4  # of 511, 512, 700 and 1000 residues
    windows: dict[bytes, set[bytes]] = {protein: set() for protein in proteins}
    for epoch in range(6):
        for sequence in shown(stream(tiny_split, BatchPlan(size, size))[epoch * size]):
            for protein in proteins:
                if len(sequence.tokens) == 512 and sequence.true_residues in protein:
                    windows[protein].add(sequence.true_residues)
    assert sorted(map(len, windows.values()))[-2:] == [6, 6]
    assert min(map(len, windows.values())) >= 2


def test_batches_can_be_reassigned_to_another_rank(tiny_split: SequenceSplit) -> None:
    """As in the trainer, which learns its rank later: the same data, another part of each global batch."""
    source = stream(tiny_split, BatchPlan(12, 2, world_size=3))
    for rank in range(3):
        assert shown(source.on_rank(rank)[24]) == shown(stream(tiny_split, BatchPlan(12, 2, rank, 3))[24])
    validation = ValidationBatches(evaluation_reader(tiny_split), 5)
    second = validation.on_rank(1, world_size=3)
    assert (second.reader, second.micro_batch_size, second.rank, second.world_size) == (validation.reader, 5, 1, 3)
    assert shown([second[0]]) == shown([validation[1]])


def test_batch_stream_can_be_pickled_for_spawned_workers(tiny_split: SequenceSplit) -> None:
    source = stream(tiny_split, BatchPlan(8, 4))
    assert shown(pickle.loads(pickle.dumps(source))[16]) == shown(source[16])
    batches = ValidationBatches(evaluation_reader(tiny_split), 5)
    assert shown([pickle.loads(pickle.dumps(batches))[2]]) == shown([batches[2]])


def test_consumed_samples_continue_past_the_end_of_an_epoch(tiny_split: SequenceSplit) -> None:
    source = stream(tiny_split, BatchPlan(53_280, 370, world_size=144))
    assert list(itertools.islice(ConsumedSamples(source, 65_120 * 3), 3)) == [195_360, 248_640, 301_920]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shows_every_protein_once_over_all_ranks(tiny_split: SequenceSplit, world_size: int) -> None:
    """37 proteins in batches of 5 leave a short last batch. Batches are the same at any world size."""
    reader = evaluation_reader(tiny_split, max_tokens=1026)
    ranks = [ValidationBatches(reader, 5, rank, world_size) for rank in range(world_size)]
    assert sum(map(len, ranks)) == 8
    batches = {
        rank + index * world_size: shown([part[index]]) for rank, part in enumerate(ranks) for index in range(len(part))
    }
    assert [len(batches[i]) for i in range(8)] == [5] * 7 + [2]
    in_order = [sequence for i in range(8) for sequence in batches[i]]
    assert [s.true_residues for s in in_order] == [tiny_split[i].tobytes() for i in range(len(tiny_split))]
    alone = ValidationBatches(reader, 5)
    assert in_order == [sequence for i in range(8) for sequence in shown([alone[i]])]
    for part in ranks:
        with pytest.raises(IndexError, match=f"of {len(part)}"):
            part[len(part)]


def test_validation_does_not_depend_on_the_batch_size(tiny_split: SequenceSplit) -> None:
    reader = evaluation_reader(tiny_split)
    whole = shown([ValidationBatches(reader, 37)[0]])
    assert shown([ValidationBatches(reader, 1)[i] for i in range(37)]) == whole
    assert shown([ValidationBatches(reader, 100)[0]]) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_the_same_on_every_pass(tiny_split: SequenceSplit, num_workers: int) -> None:
    batches = ValidationBatches(evaluation_reader(tiny_split), 5, rank=1, world_size=2)
    expected = [shown([batches[i]]) for i in range(len(batches))]
    for _ in range(2):
        assert [shown([batch]) for batch in validation_loader(batches, num_workers, pin_memory=False)] == expected


def test_validation_replaces_every_target_by_mask_and_no_other_residue(sample_store: ProteinStore) -> None:
    batches = ValidationBatches(evaluation_reader(sample_store.split("validation")), 64)
    targets = residues = 0
    for index in range(len(batches)):
        batch = batches[index]
        masked = torch.nonzero(batch.tokens == MASK_ID).flatten()
        assert torch.equal(masked, batch.target_index)
        targets, residues = targets + len(batch.targets), residues + batch.residues
    assert abs(targets / residues - 0.15) < 0.01


def reference_perplexity(train: list[bytes], batches: list[PackedBatch]) -> float:
    """Return the perplexity computed letter by letter in double precision, without NumPy."""
    counts = Counter(itertools.chain.from_iterable(train))
    total = sum(counts.values()) + 33
    losses = [-math.log((counts[t] + 1) / total) for batch in batches for t in batch.targets.tolist()]
    return math.exp(math.fsum(losses) / len(losses))


def test_unigram_perplexity_of_the_sample_is_typical_of_proteins(sample_store: ProteinStore) -> None:
    """Uniform residue frequencies would give 20. The frequencies of proteins give about 18."""
    train = sample_store.split("train")
    batches = ValidationBatches(evaluation_reader(sample_store.split("validation")), 64)
    perplexity = unigram_perplexity(train, batches)
    assert 17.5 < perplexity < 18.5
    proteins = [train[i].tobytes() for i in range(len(train))]
    expected = reference_perplexity(proteins, [batches[i] for i in range(len(batches))])
    assert perplexity == pytest.approx(expected, rel=1e-12)


def test_unigram_perplexity_is_finite_for_letters_absent_from_training(
    sample_store: ProteinStore, tiny_split: SequenceSplit
) -> None:
    """`tiny_split` has X, B, U, Z and O. The train split of the sample has none of them."""
    policy = MaskingPolicy(mlm_probability=1.0).for_evaluation()
    batches = ValidationBatches(SampleReader(tiny_split, 1026, policy, seed=1), 64)
    train = sample_store.split("train")
    assert set(np.flatnonzero(tiny_split.residue_counts())) > set(np.flatnonzero(train.residue_counts()))
    perplexity = unigram_perplexity(train, batches)
    expected = reference_perplexity([train[i].tobytes() for i in range(len(train))], [batches[0]])
    assert perplexity == pytest.approx(expected, rel=1e-12)


def test_validation_refuses_a_reader_with_the_training_masking_policy(tiny_split: SequenceSplit) -> None:
    with pytest.raises(ValueError, match="validation must hide every chosen residue"):
        ValidationBatches(SampleReader(tiny_split, 128, MaskingPolicy(), seed=1), 5)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((0, 1), "global_batch_size must be at least 1"),
        ((4, 0), "micro_batch_size must be at least 1"),
        ((4, 1, 0, 0), "world_size must be at least 1"),
        ((4, 1, 2, 2), "rank 2 is not one of 2"),
    ],
)
def test_invalid_batch_plan_is_refused(plan: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(*plan)
