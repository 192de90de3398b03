"""Packed, masked sequences a second of one core, as one of 176 ranks of ESM-1nv's phase 1.

    python -m benchmarks.loader --fasta proteins.fasta.gz --sequences 8000000

The store repeats real proteins up to the requested number. It is in the page cache, so the result measures the loader
and not the disk. Each rank reads the lengths of the whole global batch of 65,120 sequences to select its own 370 of
equal work (`data/batch_sampler.py`). The lines `by turns` show the
same for a split in stream order. At the end, loader processes run in parallel, as on a node.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.scaling import MAX_TOKENS, MICRO_BATCH, RANKS, repeated_store
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches, training_loader
from bionemo_esm.data.masking import MaskingPolicy

WANTED = 60_000  # sequences a second for a node of eight devices
RANKS_OF_A_NODE = 8


def per_second(work: Callable[[int], object], steps: int, repeats: int) -> tuple[float, list[float]]:
    """Return steps per second of CPU time of this process: the median of the repeats, and all repeats."""
    rates = []
    for repeat in range(repeats):
        started = time.process_time()
        for step in range(steps):
            work(1 + repeat * steps + step)
        rates.append(steps / (time.process_time() - started))
    return statistics.median(rates), rates


def imbalance(stream: TrainingBatches, steps: int) -> tuple[float, float]:
    """Return tokens of the fullest rank over the mean, averaged over steps: balanced by work, and split in order."""
    dealt, by_turns = [], []
    for step in range(steps):
        _, _, tokens = stream._global_batch(step * RANKS * MICRO_BATCH)
        loads = np.array(
            [sum(int(tokens[own].sum()) for own in stream.plan.micro_batches(tokens, rank)) for rank in range(RANKS)]
        )
        turns = tokens.reshape(RANKS, -1).sum(axis=1)
        dealt.append(loads.max() / loads.mean())
        by_turns.append(turns.max() / turns.mean())
    return statistics.mean(dealt), statistics.mean(by_turns)


def side_by_side(stream: TrainingBatches, workers: int, steps: int) -> float:
    """Return sequences per second of wall time, from parallel loader processes of one rank."""
    loader = iter(training_loader(stream, 0, workers, pin_memory=False))
    for _ in range(4 * workers):
        next(loader)  # processes have started and prefetched
    started = time.perf_counter()
    for _ in itertools.islice(loader, steps):
        pass
    return steps * MICRO_BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="real proteins, plain or gzipped")
    parser.add_argument("--sequences", type=int, default=8_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = repeated_store(options.fasta, Path(folder), options.sequences)
        reader = SampleReader(store.split("train"), MAX_TOKENS, MaskingPolicy(), seed=42)
        stream = TrainingBatches(reader, BatchPlan(RANKS * MICRO_BATCH, MICRO_BATCH, 5, RANKS))
        size = RANKS * MICRO_BATCH

        def packed_by_turns(step: int) -> object:
            places = np.arange(step * size, step * size + MICRO_BATCH, dtype=np.int64)
            return reader.collate(*stream.permutation.samples(places))

        parts: list[tuple[str, Callable[[int], object]]] = [
            ("deal the global batch", lambda step: stream.rank_batches(step * size, 5)),
            ("pack and mask 370, by turns", packed_by_turns),
            ("both: a rank's share", lambda step: stream[step * size]),
        ]
        print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}")
        mean = reader.token_counts(*stream.permutation.samples(np.arange(size))).mean()
        print(f"{options.sequences:,} sequences of {mean:.0f} tokens on average")
        print("\n| work of one process, CPU time | ms a step, median (range) | sequences a second |\n|---|---|---|")
        for name, work in parts:
            work(0)
            rate, rates = per_second(work, options.steps, options.repeats)
            span = f"{1000 / max(rates):.1f}-{1000 / min(rates):.1f}"
            print(f"| {name} | {1000 / rate:.1f} ({span}) | {rate * MICRO_BATCH:,.0f} |")
        print(f"\n{WANTED:,} a second for a node of {RANKS_OF_A_NODE}: {WANTED / (rate * MICRO_BATCH):.1f} cores")
        dealt, turns = imbalance(stream, 10)
        print(f"fullest rank over the mean: {dealt:.4f} as dealt, {turns:.4f} by turns")
        for workers in (1, 2):
            print(f"{workers} loader processes, by the clock: {side_by_side(stream, workers, 300):,.0f} sequences/s")


if __name__ == "__main__":
    main()
