"""The order of samples: a shuffle without an index array, independent of the world size."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from bionemo_esm.data.dataloader import BatchPlan, EpochPermutation
from bionemo_esm.data.hashing import mix

UNIREF50 = 52_000_000  # clusters of UniRef50 05/2022, rounded
SEEDS = (0, 1, 2, 1234, 2**62)


def epoch_of(order: EpochPermutation, epoch: int) -> NDArray[np.int64]:
    """Return the samples of one epoch in their order."""
    return order.samples(np.arange(epoch * order.size, (epoch + 1) * order.size))[1]


def chi_square(samples: NDArray[np.int64], buckets: int, expected: float) -> float:
    """Return Pearson's chi-square of bucket numbers 0..buckets - 1, each expected `expected` times."""
    counts = np.bincount(samples, minlength=buckets)
    assert len(counts) == buckets
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_every_epoch_contains_every_sample_once(size: int, seed: int) -> None:
    epochs, samples = EpochPermutation(size, seed).samples(np.arange(3 * size))
    np.testing.assert_array_equal(epochs, np.repeat([0, 1, 2], size))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(samples[epochs == epoch]), np.arange(size))


def test_epochs_and_seeds_give_independent_shuffles() -> None:
    """Two independent shuffles agree at one position on average, whatever the size (Poisson: 10 or more in 1e-7)."""
    orders = [epoch_of(EpochPermutation(1000, seed), epoch) for seed in SEEDS for epoch in (0, 1, 2, 419)]
    orders.append(np.arange(1000))
    agreements = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10
    assert 0.7 < np.mean(agreements) < 1.3


@pytest.mark.parametrize("size", [3, 4])
def test_all_shuffles_of_few_samples_are_equally_likely(size: int) -> None:
    epochs = 12_000
    samples = EpochPermutation(size, seed=1).samples(np.arange(epochs * size))[1].reshape(epochs, size)
    counts = Counter(map(tuple, samples.tolist()))
    shuffles = {3: 6, 4: 24}[size]
    assert len(counts) == shuffles
    expected = epochs / shuffles
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 2.5 * shuffles


def test_slice_may_span_epochs() -> None:
    order = EpochPermutation(1000, seed=1)
    epochs, samples = order.samples(np.arange(990, 2020))
    np.testing.assert_array_equal(epochs, [0] * 10 + [1] * 1000 + [2] * 20)
    joined = np.concatenate([epoch_of(order, 0)[-10:], epoch_of(order, 1), epoch_of(order, 2)[:20]])
    np.testing.assert_array_equal(samples, joined)


def test_stream_does_not_depend_on_how_it_is_sliced() -> None:
    order = EpochPermutation(100, seed=7)
    positions = np.arange(1200)
    epochs, whole = order.samples(positions)
    for step in (1, 7, 370):
        pieces = [order.samples(positions[first : first + step]) for first in range(0, 1200, step)]
        np.testing.assert_array_equal(np.concatenate([piece[0] for piece in pieces]), epochs)
        np.testing.assert_array_equal(np.concatenate([piece[1] for piece in pieces]), whole)
    scattered = np.random.default_rng(0).integers(0, 1200, 2000)  # any order, with repeats
    np.testing.assert_array_equal(order.samples(scattered)[1], whole[scattered])
    assert order.samples(positions[:0])[1].shape == (0,)


@pytest.mark.parametrize("size", [UNIREF50, 2**40, 2**40 + 1, 2**48])
def test_time_and_memory_do_not_grow_with_the_dataset(size: int) -> None:
    order = EpochPermutation(size, seed=1)
    positions = np.concatenate([np.arange(500), np.arange(10**10, 10**10 + 500), [size - 1, size, 3 * size]])
    tracemalloc.start()
    began = time.perf_counter()
    epochs, samples = order.samples(positions)
    seconds, peak_bytes = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak_bytes < 2**20
    np.testing.assert_array_equal(epochs, positions // size)
    assert samples.min() >= 0
    assert samples.max() < size
    assert samples.max() > size // 2  # the upper half of the range is reached
    assert len(set(samples[:500].tolist())) == 500


def test_ten_billionth_position_of_uniref50_is_accessed_directly() -> None:
    order = EpochPermutation(UNIREF50, seed=1)
    epoch, sample = order.samples(np.array([10**10]))
    assert epoch.tolist() == [192]
    assert sample.tolist() == order.samples(np.arange(10**10 - 3, 10**10 + 3))[1][3:4].tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (1, 419), (2, 1019)])
@pytest.mark.parametrize("size", [262_144, 300_007, 524_289])
def test_first_tenth_of_an_epoch_covers_the_dataset_evenly(size: int, seed: int, epoch: int) -> None:
    """Test high and low bits. Samples do not repeat, so chi-square is 0.9 times the usual; 99 degrees: 99+-14."""
    places = np.arange(size // 10)
    samples = EpochPermutation(size, seed).samples(epoch * size + places)[1]
    expected = len(places) / 100
    for bucket in (samples * 100 // size, samples % 100, places * 100 // len(places) + 100 * (samples % 100)):
        buckets = 100 if bucket.max() < 100 else 10_000
        statistic = chi_square(bucket, buckets, expected * 100 / buckets) / (0.9 if buckets == 100 else 1.0)
        assert abs(statistic - buckets) < 5 * np.sqrt(2 * buckets)


@pytest.mark.parametrize("lag", [1, 2, 64, 370, 65_120])
def test_successive_samples_are_uncorrelated(lag: int) -> None:
    for size, seed in ((262_144, 1), (300_007, 2)):
        samples = epoch_of(EpochPermutation(size, seed), 3)
        limit = 4.5 / np.sqrt(size - lag)
        assert abs(np.corrcoef(samples[:-lag], samples[lag:])[0, 1]) < limit
        steps = (samples[lag:] - samples[:-lag]) % size  # a constant or frequent step would show here
        assert abs(chi_square(steps * 64 // size, 64, len(steps) / 64) - 63) < 5 * np.sqrt(2 * 63)


def test_position_of_a_sample_is_independent_between_epochs() -> None:
    order = EpochPermutation(200_003, seed=5)
    first, second = np.argsort(epoch_of(order, 0)), np.argsort(epoch_of(order, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(order.size)


def test_sample_order_is_frozen_across_releases() -> None:
    """A change here breaks every run that resumes. If it is unavoidable, state it in the release notes."""
    order = EpochPermutation(size=1000, seed=1)
    assert order.samples(np.arange(8))[1].tolist() == [103, 325, 610, 110, 38, 354, 606, 128]
    assert order.samples(np.arange(996, 1004))[1].tolist() == [386, 601, 920, 870, 615, 199, 836, 290]
    assert order.samples(np.array([10**10]))[1].tolist() == [323]
    assert EpochPermutation(UNIREF50, seed=42).samples(np.arange(4))[1].tolist() == [
        45437133,
        5046802,
        24568795,
        9567934,
    ]


def test_hash_equals_splitmix64() -> None:
    """Compare with the first outputs of the reference (https://prng.di.unimi.it/splitmix64.c) seeded with 0."""
    counters = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    before = counters.copy()
    assert [hex(word) for word in mix(counters)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    np.testing.assert_array_equal(counters, before)  # the argument is not modified


@pytest.mark.parametrize("size", [0, -1, 2**48 + 1])
def test_zero_samples_or_too_many_are_rejected(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        EpochPermutation(size, seed=1)


def rank_batches(plan: BatchPlan, tokens: NDArray[np.int64], consumed: int) -> NDArray[np.int64]:
    """Return the stream positions of one global batch over all ranks; assert that no position is read twice."""
    places = np.concatenate([hand for rank in range(plan.world_size) for hand in plan.micro_batches(tokens, rank)])
    np.testing.assert_array_equal(np.bincount(places), 1)
    return consumed + np.sort(places)


def test_run_stopped_on_176_gpus_resumes_on_144_with_the_same_samples() -> None:
    """Run the model card's two phases: 176 ranks x 370, then 144 x 370, then 48 ranks with accumulation.

    `benchmarks/order_at_scale.py` does this with all of UniRef50.
    """
    order = EpochPermutation(size=501_517, seed=1)
    lengths = np.random.default_rng(0).integers(13, 513, order.size)
    phases = [  # the first phase stops in the second epoch
        (9, BatchPlan(65_120, 370, world_size=176)),
        (4, BatchPlan(53_280, 370, world_size=144)),
        (16, BatchPlan(53_280, 185, world_size=48)),
    ]
    consumed, steps_seen = 0, []
    for steps, plan in phases:
        for _ in range(steps):
            size = plan.global_batch_size
            _, due = order.samples(np.arange(consumed, consumed + size))
            steps_seen.append(order.samples(rank_batches(plan, lengths[due], consumed)))
            consumed += size
    assert consumed == 9 * 65_120 + 20 * 53_280
    epochs, samples = (np.concatenate(parts) for parts in zip(*steps_seen, strict=True))

    unbroken_epochs, unbroken_samples = order.samples(np.arange(consumed))
    np.testing.assert_array_equal(epochs, unbroken_epochs)
    np.testing.assert_array_equal(samples, unbroken_samples)
    assert consumed > 3 * order.size
    for epoch in range(3):
        np.testing.assert_array_equal(np.bincount(samples[epochs == epoch], minlength=order.size), 1)
    assert np.bincount(samples[epochs == 3]).max() == 1  # the unfinished epoch repeats no sample
