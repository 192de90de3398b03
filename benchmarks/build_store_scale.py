"""Memory and time of building a store as the number of records grows, and of opening a store of 54 million sequences.

    python benchmarks/build_store_scale.py --millions 1 4 16 54

Records have 16 residues, so that costs per record dominate and disk use stays small. 5,000 and 1,000,000 records are
held out, as in the model card (or a tenth). Each build and each opening runs in its own process. Memory is the peak
resident set size of that process. 54 million records take about 3 minutes and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESIDUES = 16
BLOCK_RECORDS = 1_000_000


def make_fasta(path: Path, records: int) -> None:
    """Write a FASTA file with this number of distinct short records."""
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for begin in range(0, records, BLOCK_RECORDS):
            count = min(BLOCK_RECORDS, records - begin)
            rows = np.empty((count, 20 + RESIDUES + 1), dtype=np.uint8)
            rows[:, :10] = np.frombuffer(b">UniRef50_", dtype=np.uint8)
            numbers = np.arange(begin, begin + count)
            for digit in range(9):
                rows[:, 18 - digit] = ord("0") + numbers // 10**digit % 10
            rows[:, 19] = rows[:, -1] = ord("\n")
            rows[:, 20:-1] = letters[rng.integers(0, 20, (count, RESIDUES))]
            stream.write(rows.tobytes())


def build(fasta: Path, store: Path, records: int) -> str:
    """Return seconds and peak memory of building a store in this process."""
    from bionemo_esm.data.preprocess import BuildPolicy, build_store

    started = time.perf_counter()
    build_store(fasta, store, BuildPolicy(validation_sequences=5_000, test_sequences=min(1_000_000, records // 10)))
    return f"{time.perf_counter() - started} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}"


def use(store: Path) -> str:
    """Return milliseconds to open a store and to gather a batch of 370, and the KiB of memory added by opening."""
    from bionemo_esm.data.dataloader import EpochPermutation
    from bionemo_esm.data.store import ProteinStore

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    train = ProteinStore.open(store).split("train")
    opened = time.perf_counter()
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    _, samples = EpochPermutation(len(train), seed=1).samples(np.arange(370))
    train.gather(samples, np.zeros(370), train.lengths[samples])
    return f"{1e3 * (opened - started)} {1e3 * (time.perf_counter() - opened)} {added}"


def apart(*arguments: object) -> list[float]:
    """Run one of the functions above in its own process and return the numbers that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.splitlines()[-1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 4, 16, 54])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--build", nargs=3)
    parser.add_argument("--use", type=Path)
    options = parser.parse_args()
    if options.build:
        print(build(Path(options.build[0]), Path(options.build[1]), int(options.build[2])))
        return
    if options.use:
        print(use(options.use))
        return
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
    columns = ["records", "seconds", "microseconds a record", "peak memory, MB"]
    columns += ["open, ms", "memory of opening, MB", "first batch of 370, ms"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    peaks = []
    for millions in options.millions:
        records = int(millions * 1e6)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            fasta, store = Path(folder) / "in.fasta", Path(folder) / "store"
            make_fasta(fasta, records)
            seconds, peak = apart("--build", fasta, store, records)
            opened, gathered, added = apart("--use", store)
            peaks.append((records, peak * 1024))
            row = f"| {records:,} | {seconds:.1f} | {1e6 * seconds / records:.2f} | {peak * 1024 / 1e6:,.0f} "
            print(f"{row}| {opened:.1f} | {added * 1024 / 1e6:.1f} | {gathered:.1f} |", flush=True)
    (first, low), (last, high) = peaks[0], peaks[-1]
    print(f"\nMemory grows by {(high - low) / (last - first):.1f} bytes a record from {first:,} to {last:,}.")


if __name__ == "__main__":
    main()
