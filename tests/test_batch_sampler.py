"""Dealing a global batch: nothing lost, nothing twice, like amounts of work, and the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches, assign_micro_batches, divisors
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore


@pytest.fixture(scope="module")
def lengths(sample_store: ProteinStore) -> NDArray[np.int64]:
    """Tokens of the shipped training proteins, cropped to 512."""
    return np.minimum(sample_store.split("train").lengths.astype(np.int64) + 2, 512)


@given(
    st.lists(st.integers(3, 1024), min_size=1, max_size=300).map(lambda values: np.array(values, dtype=np.int64)),
    st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_dealt_once_in_like_numbers(tokens: NDArray[np.int64], rank_batches: int) -> None:
    dealt = assign_micro_batches(tokens, rank_batches)
    assert len(dealt) == rank_batches
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(tokens)))
    sizes = [len(hand) for hand in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(hand) > 0).all() for hand in dealt)
    loads = [int(tokens[hand].sum()) for hand in dealt]
    assert max(loads) - min(loads) <= tokens.max()


@pytest.mark.parametrize("rank_batches", [2, 5, 8])
def test_hands_of_real_proteins_hold_the_same_work_within_a_percent(
    lengths: NDArray[np.int64], rank_batches: int
) -> None:
    loads = np.array([lengths[hand].sum() for hand in assign_micro_batches(lengths[: 37 * rank_batches], rank_batches)])
    by_turns = lengths[: 37 * rank_batches].reshape(rank_batches, 37).sum(axis=1)
    assert loads.max() / loads.mean() < 1.01
    assert by_turns.max() / by_turns.mean() > 1.02, "the order of the stream alone would not do"


def test_one_hand_holds_the_stream_as_it_comes(lengths: NDArray[np.int64]) -> None:
    np.testing.assert_array_equal(assign_micro_batches(lengths[:50], 1)[0], np.arange(50))


def test_micro_batches_of_a_token_budget_keep_within_it(lengths: NDArray[np.int64]) -> None:
    plan = BatchPlan(600, world_size=3, micro_batch_tokens=4_096)
    for rank in range(3):
        shares = plan.micro_batches(lengths[:600], rank)
        loads = [int(lengths[:600][hand].sum()) for hand in shares]
        assert max(loads) <= 4_096
        assert min(loads) > 0.9 * max(loads), "and are alike"
        assert len(loads) <= sum(loads) / 4_096 + 2, "and as few as that allows"


def test_a_sequence_of_the_whole_budget_makes_a_micro_batch_of_its_own() -> None:
    tokens = np.array([512, 512, 3, 512], dtype=np.int64)
    shares = BatchPlan(4, micro_batch_tokens=512).micro_batches(tokens)
    assert sorted(hand.tolist() for hand in shares) == [[0], [1], [2], [3]]


def test_a_budget_that_the_fewest_micro_batches_would_break_takes_one_more() -> None:
    tokens = np.array([300, 300, 300], dtype=np.int64)
    assert [hand.tolist() for hand in BatchPlan(3, micro_batch_tokens=512).micro_batches(tokens)] == [[0], [1], [2]]


def test_any_number_of_ranks_will_do_where_micro_batches_are_counted_in_tokens(lengths: NDArray[np.int64]) -> None:
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


def test_lengths_are_those_of_the_row_that_is_packed(sample_store: ProteinStore) -> None:
    reader = SampleReader(sample_store.split("train"), 300, MaskingPolicy(), seed=3)
    samples = np.arange(100)
    row = reader.collate(np.zeros_like(samples), samples)
    np.testing.assert_array_equal(reader.token_counts(np.zeros_like(samples), samples), np.diff(row.cu_seqlens.numpy()))


def test_a_batch_that_comes_to_its_budget_exactly_is_full(sample_store: ProteinStore) -> None:
    probe = token_stream(sample_store, 8_192)
    exactly = int(probe.reader.token_counts(*probe.permutation.samples(np.arange(20))).sum())
    assert token_stream(sample_store, exactly).samples_after(0) == 20
    assert token_stream(sample_store, exactly - 1).samples_after(0) == 19


@pytest.mark.parametrize("max_tokens", [512, 4_096])  # of the second, far more fit than of the longest
def test_a_global_batch_of_tokens_is_the_longest_slice_of_the_stream_that_fits(
    sample_store: ProteinStore, max_tokens: int
) -> None:
    source, consumed = token_stream(sample_store, 8_192, max_tokens=max_tokens), 0
    for _ in range(150):  # into the next epoch: 2,600 sequences
        count = source.samples_after(consumed)
        epochs, samples = source.permutation.samples(np.arange(consumed, consumed + count + 1))
        ends = np.cumsum(source.reader.token_counts(epochs, samples))
        assert ends[count - 1] <= 8_192 < ends[count]
        consumed += count
    assert consumed > source.permutation.size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_global_batch_of_tokens_is_the_same_on_any_number_of_ranks(
    sample_store: ProteinStore, world_size: int
) -> None:
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


def test_a_batch_that_does_not_come_out_even_names_what_would() -> None:
    with pytest.raises(ValueError, match="cannot be dealt evenly to 24 ranks") as error:
        BatchPlan(65_120, 370, world_size=24)
    assert "ranks one of 1, 2, 4, 8, 11, 16, 22, 44, 88, 176" in str(error.value)
    assert "multiple of 8880" in str(error.value)
    with pytest.raises(ValueError, match=r"the micro batch one of 1, 2, 5, 10\. Or set micro_batch_tokens"):
        BatchPlan(20, 3, world_size=2)


def test_sequences_or_tokens_must_be_given_and_not_both() -> None:
    for arguments in ({}, {"global_batch_size": 4}, {"global_batch_size": 4, "global_batch_tokens": 9}):
        with pytest.raises(ValueError, match="must be given, and not both"):
            BatchPlan(**arguments)
    with pytest.raises(ValueError, match="leaves some of 5 ranks idle"):
        BatchPlan(4, world_size=5, micro_batch_tokens=512)


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (49, [1, 7, 49])])
def test_divisors(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected
