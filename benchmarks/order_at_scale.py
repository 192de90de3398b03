"""Check ESM-1nv's two phases over all of UniRef50, rank by rank: 176 x 370 sequences a step, stopped, then 144 x 370.

    python benchmarks/order_at_scale.py --sequences 51000000 --epochs 3

The script computes the samples that each rank reads in each step, without training. It checks that each sample occurs
once an epoch across the change of world size, that global batches are consecutive slices of one stream, and that ranks
have equal work. It measures memory, and the time to the first batch of a run that resumes late. It takes a few minutes
and 1 GB.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.dataloader import BatchPlan, EpochPermutation, assign_micro_batches

PHASES = (176, 144)
MICRO_BATCH = 370


def made_up_lengths(sequences: int) -> NDArray[np.int16]:
    """Return lengths in tokens, distributed approximately like UniRef50's and cropped to 512."""
    return np.minimum(np.random.default_rng(0).gamma(1.9, 150, sequences) + 20, 512).astype(np.int16)


def steps(
    order: EpochPermutation, lengths: NDArray[np.int16], stop_after: int, until: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the consumed samples before each step, and each rank's positions in the stream: int64 [ranks, 370].

    All ranks are computed at once, and three of them are also computed separately and compared.
    """
    consumed, done = 0, 0
    while consumed < until:
        ranks = PHASES[0] if done < stop_after else PHASES[1]
        plan = BatchPlan(ranks * MICRO_BATCH, MICRO_BATCH, world_size=ranks)
        positions = np.arange(consumed, consumed + ranks * MICRO_BATCH, dtype=np.int64)
        _, samples = order.samples(positions)
        tokens = lengths[samples].astype(np.int64)
        rank_batches = np.stack(assign_micro_batches(tokens, ranks))
        for rank in (0, ranks // 2, ranks - 1):
            np.testing.assert_array_equal(plan.micro_batches(tokens, rank), rank_batches[rank : rank + 1])
        yield consumed, positions[rank_batches]
        consumed += ranks * MICRO_BATCH
        done += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=51_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--stop-after", type=int, default=1_234, help="steps on 176 ranks")
    options = parser.parse_args()
    order, lengths = EpochPermutation(options.sequences, seed=42), made_up_lengths(options.sequences)
    seen = np.zeros((options.epochs + 1, options.sequences), dtype=np.uint8)
    fullest, count, started = [], 0, time.perf_counter()
    for consumed, positions in steps(order, lengths, options.stop_after, options.epochs * options.sequences):
        flat = positions.reshape(-1)
        assert flat.min() == consumed
        assert flat.max() == consumed + len(flat) - 1
        epochs, samples = order.samples(flat)
        np.add.at(seen, (epochs, samples), 1)
        work = lengths[samples].astype(np.int64).reshape(positions.shape).sum(axis=1)
        fullest.append(work.max() / work.mean())
        count += 1
    for epoch in range(options.epochs):
        assert (seen[epoch] == 1).all(), f"epoch {epoch} is not a permutation"
    assert seen[-1].max() <= 1
    took = time.perf_counter() - started
    print(f"{count:,} steps in {took:.0f} s; {options.stop_after:,} of them on 176 ranks, then 144")
    print(f"each of {options.sequences:,} samples exactly once in each of {options.epochs} epochs")
    print(f"fullest rank over the mean: {np.mean(fullest):.5f} on average, {np.max(fullest):.5f} at worst")
    measure_a_late_start(options.sequences, lengths)


def measure_a_late_start(sequences: int, lengths: NDArray[np.int16]) -> None:
    """Print time and memory of the first batch, at the beginning and after 1,000 epochs."""
    plan = BatchPlan(PHASES[0] * MICRO_BATCH, MICRO_BATCH, 17, PHASES[0])
    for consumed in (0, sequences, 1_000 * sequences):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        order = EpochPermutation(sequences, seed=42)
        _, samples = order.samples(np.arange(consumed, consumed + plan.world_size * MICRO_BATCH))
        plan.micro_batches(lengths[samples].astype(np.int64))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        took = 1000 * (time.perf_counter() - started)
        print(f"first share after {consumed:,} samples: {took:.1f} ms, {grown} KiB more memory")


if __name__ == "__main__":
    main()
