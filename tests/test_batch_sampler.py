"""Tests of the batch sampler: each sequence once, balanced load, the same global batch at any world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, BatchWarmup, TrainingBatches, assign_micro_batches, divisors
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore


@pytest.fixture(scope="module")
def lengths(sample_store: ProteinStore) -> NDArray[np.int64]:
    """Token counts of the shipped training proteins, cropped to 512."""
    return np.minimum(sample_store.split("train").lengths.astype(np.int64) + 2, 512)


@given(
    st.lists(st.integers(3, 1024), min_size=1, max_size=300).map(lambda values: np.array(values, dtype=np.int64)),
    st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_assigned_once_and_counts_differ_by_at_most_one(
    tokens: NDArray[np.int64], rank_batches: int
) -> None:
    dealt = assign_micro_batches(tokens, rank_batches)
    assert len(dealt) == rank_batches
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(tokens)))
    sizes = [len(hand) for hand in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(hand) > 0).all() for hand in dealt)
    loads = [int(tokens[hand].sum()) for hand in dealt]
    assert max(loads) - min(loads) <= tokens.max()


@pytest.mark.parametrize("rank_batches", [2, 5, 8])
def test_rank_batches_of_real_proteins_have_equal_load_within_one_percent(
    lengths: NDArray[np.int64], rank_batches: int
) -> None:
    loads = np.array([lengths[hand].sum() for hand in assign_micro_batches(lengths[: 37 * rank_batches], rank_batches)])
    by_turns = lengths[: 37 * rank_batches].reshape(rank_batches, 37).sum(axis=1)
    assert loads.max() / loads.mean() < 1.01
    assert by_turns.max() / by_turns.mean() > 1.02, "the order of the stream alone would not do"


def test_single_rank_batch_keeps_the_order_of_the_stream(lengths: NDArray[np.int64]) -> None:
    np.testing.assert_array_equal(assign_micro_batches(lengths[:50], 1)[0], np.arange(50))


def test_micro_batches_stay_within_the_token_budget(lengths: NDArray[np.int64]) -> None:
    plan = BatchPlan(600, world_size=3, micro_batch_tokens=4_096)
    for rank in range(3):
        shares = plan.micro_batches(lengths[:600], rank)
        loads = [int(lengths[:600][hand].sum()) for hand in shares]
        assert max(loads) <= 4_096
        assert min(loads) > 0.9 * max(loads), "and are alike"
        assert len(loads) <= sum(loads) / 4_096 + 2, "and as few as that allows"


def test_sequence_as_long_as_the_budget_gets_its_own_micro_batch() -> None:
    tokens = np.array([512, 512, 3, 512], dtype=np.int64)
    shares = BatchPlan(4, micro_batch_tokens=512).micro_batches(tokens)
    assert sorted(hand.tolist() for hand in shares) == [[0], [1], [2], [3]]


def test_one_more_micro_batch_is_used_where_the_fewest_would_exceed_the_budget() -> None:
    tokens = np.array([300, 300, 300], dtype=np.int64)
    assert [hand.tolist() for hand in BatchPlan(3, micro_batch_tokens=512).micro_batches(tokens)] == [[0], [1], [2]]


def test_any_world_size_works_with_micro_batches_in_tokens(lengths: NDArray[np.int64]) -> None:
    for world_size in (1, 7, 24, 100):
        plan = BatchPlan(100, world_size=world_size, micro_batch_tokens=1_024)
        dealt = np.concatenate([hand for rank in range(world_size) for hand in plan.micro_batches(lengths[:100], rank)])
        assert sorted(dealt.tolist()) == list(range(100))


def token_stream(
    store: ProteinStore, budget: int, world_size: int = 1, rank: int = 0, max_tokens: int = 512
) -> TrainingBatches:
    reader = SampleReader(store.split("train"), max_tokens, MaskingPolicy(), seed=3)
    plan = BatchPlan(rank=rank, world_size=world_size, global_batch_tokens=budget, micro_batch_tokens=2_048)
    return TrainingBatches(reader, plan)


def test_token_counts_equal_the_lengths_in_the_packed_row(sample_store: ProteinStore) -> None:
    reader = SampleReader(sample_store.split("train"), 300, MaskingPolicy(), seed=3)
    samples = np.arange(100)
    row = reader.collate(np.zeros_like(samples), samples)
    np.testing.assert_array_equal(reader.token_counts(np.zeros_like(samples), samples), np.diff(row.cu_seqlens.numpy()))


def test_batch_that_reaches_the_token_budget_exactly_is_full(sample_store: ProteinStore) -> None:
    probe = token_stream(sample_store, 8_192)
    exactly = int(probe.reader.token_counts(*probe.permutation.samples(np.arange(20))).sum())
    assert token_stream(sample_store, exactly).samples_after(0) == 20
    assert token_stream(sample_store, exactly - 1).samples_after(0) == 19


@pytest.mark.parametrize("max_tokens", [512, 4_096])  # at 4,096 many more sequences fit than of the longest length
def test_global_batch_in_tokens_is_the_longest_slice_of_the_stream_that_fits(
    sample_store: ProteinStore, max_tokens: int
) -> None:
    source, consumed = token_stream(sample_store, 8_192, max_tokens=max_tokens), 0
    for _ in range(150):  # reaches the next epoch: 2,600 sequences
        count = source.samples_after(consumed)
        epochs, samples = source.permutation.samples(np.arange(consumed, consumed + count + 1))
        ends = np.cumsum(source.reader.token_counts(epochs, samples))
        assert ends[count - 1] <= 8_192 < ends[count]
        consumed += count
    assert consumed > source.permutation.size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_global_batch_in_tokens_is_the_same_at_any_world_size(sample_store: ProteinStore, world_size: int) -> None:
    alone = token_stream(sample_store, 8_192)
    ranks = [token_stream(sample_store, 8_192, world_size, rank) for rank in range(world_size)]
    consumed = 0
    for _ in range(5):
        shares = [rank[consumed] for rank in ranks]
        seen = sorted(target for share in shares for batch in share.micro_batches for target in batch.targets.tolist())
        whole = sorted(target for batch in alone[consumed].micro_batches for target in batch.targets.tolist())
        assert seen == whole
        assert {share.samples for share in shares} == {alone.samples_after(consumed)}
        assert sum(batch.sequences for share in shares for batch in share.micro_batches) == shares[0].samples
        consumed += shares[0].samples


@pytest.mark.parametrize(
    ("size", "micro", "ranks"), [(8, 8, 2), (8, 8, 3), (20, 3, 2), (7, 1, 3), (4, 1, 3), (65_121, 370, 176)]
)
def test_a_micro_batch_is_a_ceiling_and_any_number_of_ranks_divides_a_batch(size: int, micro: int, ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(20, 512, size)
    plans = [BatchPlan(size, micro, rank=rank, world_size=ranks) for rank in range(ranks)]
    batches = [plan.micro_batches(lengths) for plan in plans]
    assert all(1 <= len(batch) <= micro for of_rank in batches for batch in of_rank)
    assert sorted(np.concatenate([index for of_rank in batches for index in of_rank]).tolist()) == list(range(size))
    shares = [sum(map(len, of_rank)) for of_rank in batches]
    assert max(shares) - min(shares) <= 1
    fewest = -(-max(shares) // micro)
    assert {len(of_rank) for of_rank in batches} <= {fewest, fewest - 1}


def test_a_batch_with_a_sequence_for_each_rank_is_needed() -> None:
    with pytest.raises(ValueError, match="leaves some of 5 ranks idle; make it at least 5, or use fewer ranks"):
        BatchPlan(4, 1, world_size=5)


def test_exactly_one_of_sequences_and_tokens_must_be_given() -> None:
    for arguments in ({}, {"global_batch_size": 4}, {"global_batch_size": 4, "global_batch_tokens": 9}):
        with pytest.raises(ValueError, match="must be given, and not both"):
            BatchPlan(**arguments)
    with pytest.raises(ValueError, match="leaves some of 5 ranks idle"):
        BatchPlan(4, world_size=5, micro_batch_tokens=512)


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (49, [1, 7, 49])])
def test_divisors_are_listed_in_order(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected


# --- global batches that grow -----------------------------------------------------------------------------------------


def test_batch_warmup_changes_the_sizes_and_keeps_the_order_of_samples(sample_store: ProteinStore) -> None:
    reader = SampleReader(sample_store.split("train"), 128, MaskingPolicy(), 0)
    growing = TrainingBatches(reader, BatchPlan(32, 4, world_size=2, warmup=BatchWarmup(8, 8, 90)))
    whole = TrainingBatches(reader, BatchPlan(32, 4, world_size=2))
    consumed, sizes, seen = 0, [], []
    while consumed < 200:
        shares = [growing.rank_batches(consumed, rank) for rank in range(2)]
        sizes.append(shares[0][1])
        assert growing.samples_after(consumed) == sizes[-1]
        assert [len(share[0]) for share in shares] == [sizes[-1] // 8] * 2, "micro batches of four"
        seen.append({int(n) for share, _ in shares for _, samples in share for n in samples})
        consumed += sizes[-1]
    assert sizes == [8, 8, 8, 8, 16, 16, 24, 24, 32, 32, 32]
    straight = whole.permutation.samples(np.arange(consumed))[1]
    at = 0
    for size, samples in zip(sizes, seen, strict=True):
        assert samples == set(straight[at : at + size].tolist())
        at += size


def test_batch_warmup_in_tokens_keeps_within_each_stage(sample_store: ProteinStore) -> None:
    reader = SampleReader(sample_store.split("train"), 128, MaskingPolicy(), 0)
    plan = BatchPlan(global_batch_tokens=2000, micro_batch_tokens=500, warmup=BatchWarmup(500, 500, 40))
    batches = TrainingBatches(reader, plan)
    for consumed, most in ((0, 500), (14, 1000), (27, 1500), (40, 2000), (1000, 2000)):
        (epochs, samples, tokens) = batches._global_batch(consumed)
        assert most - 128 < tokens.sum() <= most
        assert len(epochs) == len(samples) == batches.samples_after(consumed)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 500), st.integers(0, 60), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_planned_samples_of_a_warmup_equal_those_of_its_steps(
    start: int, increment: int, samples: int, steps: int, first: int
) -> None:
    warmup, consumed = BatchWarmup(start, increment, samples), first
    for _ in range(steps):
        consumed += warmup.size(50, consumed)
    planned = warmup.samples_of(steps, 50, 50.0, first)
    assert planned == pytest.approx(consumed - first, abs=1e-6)


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (BatchWarmup(32, 8, 10), "must be under the 32"),
        (BatchWarmup(1, 4, 10), "1 sequences leaves some of 2 ranks idle"),
    ],
)
def test_impossible_batch_warmup_is_refused(warmup: BatchWarmup, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(32, 4, world_size=2, warmup=warmup)
