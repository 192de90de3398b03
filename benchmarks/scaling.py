"""Cost of a batch as the store and the run grow, which should be constant.

    python -m benchmarks.scaling --fasta proteins.fasta.gz --sequences 1000 10000 100000 1000000 16000000

The stores repeat real proteins up to these numbers. They are in the page cache, so the result measures the loader and
not the disk. For each store and each step of the order, the script measures CPU time of this process per token, from
the number of consumed samples to the masked, packed batch of 370 proteins, and the growth of the process's own memory.
At the end it measures one of 176 ranks, which reads the lengths of the whole global batch of 65,120 to select its own
370 of equal work.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.preprocess import BuildPolicy, build_store
from bionemo_esm.data.store import ProteinStore, StoreWriter

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
RANKS, MICRO_BATCH, MAX_TOKENS = 176, 370, 512
SEQUENCES = (1_000, 10_000, 100_000, 1_000_000)
STEPS = (1, 1_000, 1_000_000)


@dataclass(frozen=True)
class Cost:
    """Cost of making batches at one position of one store's order."""

    sequences: int
    step: int  # the first one measured
    ranks: int
    nanoseconds_per_token: tuple[float, float, float]  # CPU time: median, minimum, maximum of the repeats
    grown_bytes: int  # growth of the process's own memory, without mapped files


def repeated_store(fasta: Path, folder: Path, sequences: int) -> ProteinStore:
    """Build a store that repeats the proteins of a FASTA file up to this number."""
    policy = BuildPolicy(validation_sequences=1, test_sequences=1)
    real = build_store(fasta, folder / "real", policy).split("train")
    lengths = real.lengths.astype(np.int64)
    with StoreWriter(folder / "repeated") as writer:
        for begin in range(0, sequences, len(real)):
            count = min(len(real), sequences - begin)
            writer.add_many("train", real.tokens[: lengths[:count].sum()], lengths[:count])
        writer.finish({"source": "benchmarks/scaling.py"})
    return ProteinStore.open(folder / "repeated")


def stream_of(store: ProteinStore, ranks: int) -> TrainingBatches:
    """Return the stream of a middle rank of ESM-1nv's global batch, or of a batch of 370 on one rank."""
    reader = SampleReader(store.split("train"), MAX_TOKENS, MaskingPolicy(), seed=42)
    return TrainingBatches(reader, BatchPlan(ranks * MICRO_BATCH, MICRO_BATCH, ranks // 2, ranks))


def cost(stream: TrainingBatches, step: int, steps: int, repeats: int) -> Cost:
    """Measure `steps` batches from step `step` on, `repeats` times; each repeat continues after the one before."""
    size = stream.plan.world_size * MICRO_BATCH
    stream[step * size]  # compiles the kernels
    before, nanoseconds = own_memory(), []
    for repeat in range(repeats):
        first, tokens, started = step + repeat * steps, 0, time.process_time_ns()
        for at in range(first, first + steps):
            tokens += sum(len(batch.tokens) for batch in stream[at * size].micro_batches)
        nanoseconds.append((time.process_time_ns() - started) / tokens)
    spread = statistics.median(nanoseconds), min(nanoseconds), max(nanoseconds)
    return Cost(stream.reader.num_samples, step, stream.plan.world_size, spread, own_memory() - before)


def own_memory() -> int:
    """Return the bytes of this process's resident anonymous memory (Linux: RssAnon)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def costs(
    fasta: Path, sequences: Sequence[int], steps: Sequence[int], batches: int = 40, repeats: int = 5
) -> Iterator[Cost]:
    """Yield the cost of each store at each step on one rank, and at the last step as one of 176."""
    for number in sequences:
        with tempfile.TemporaryDirectory() as folder:
            store = repeated_store(fasta, Path(folder), number)
            for step in steps:
                yield cost(stream_of(store, 1), step, batches, repeats)
            yield cost(stream_of(store, RANKS), steps[-1], max(batches // 10, 1), repeats)


def show(fasta: Path, sequences: Sequence[int], say: Callable[[str], None]) -> list[Cost]:
    """Measure, and pass the result to `say` as a Markdown table."""
    say(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread, NumPy {np.__version__}")
    say(f"batches of {MICRO_BATCH} proteins of at most {MAX_TOKENS} tokens, from {fasta.name}\n")
    say("| sequences in the store | step | ranks | CPU ns a token, median (range) | memory grown |")
    say("|---|---|---|---|---|")
    found = []
    for one in costs(fasta, sequences, STEPS):
        median, least, most = one.nanoseconds_per_token
        span, grown = f"{median:.2f} ({least:.2f}-{most:.2f})", f"{one.grown_bytes / 2**20:.1f} MiB"
        say(f"| {one.sequences:,} | {one.step:,} | {one.ranks} | {span} | {grown} |")
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, default=SAMPLE, help="real proteins, plain or gzipped")
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    show(options.fasta, options.sequences, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
