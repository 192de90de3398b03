"""FASTA to a finished store, against the tools people use: how many times as fast, plain and gzip.

    pip install pyfastx biopython transformers
    python benchmarks/build_store.py --gigabytes 1

Makes a UniRef-like FASTA file with the shipped sample's lengths and composition, and measures in alternated repeats,
each in a process of its own, the median and range of

- ours: `build_store`, from the file to the renamed store with hashes, synced to disk;
- pyfastx merely parsing: `for name, sequence in pyfastx.Fastx(file)`, the fastest of its interfaces;
- decompression alone, by isal, which no reader of gzip can beat: `igzip.open(file).readinto(buffer)`;
- Biopython's `SimpleFastaParser`, the fastest of its parsers, and Hugging Face's `EsmTokenizer` in batches of 1,000: on
  the first 20 MB, as the whole would take an hour; the rate is what is compared.

The file has been read before, so it comes from memory. Nothing else should run meanwhile. Takes some 5 minutes.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPEATS = 5
TOKENIZER_BYTES = 20_000_000
SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
HEADER = b">UniRef50_A%09X Uncharacterized protein n=1 Tax=Escherichia coli TaxID=562 RepID=A%09X_ECOLI\n"


def make_fasta(path: Path, size: int) -> int:
    """Write a FASTA file of at least so many bytes, 60 residues a line; the number of records."""
    from bionemo_esm.data.fasta import read_fasta

    sequences = [record.sequence for record in read_fasta(SAMPLE)]
    sample_lengths = np.array([len(sequence) for sequence in sequences])
    letters = np.frombuffer(b"".join(sequences), dtype=np.uint8)
    rng, records, written = np.random.default_rng(0), 0, 0
    with path.open("wb") as stream:
        while written < size:
            lengths = rng.choice(sample_lengths, 10_000)
            residues = letters[rng.integers(0, letters.size, lengths.sum(), dtype=np.int32)].tobytes()
            parts, begin = [], 0
            for length in lengths.tolist():
                records += 1
                sequence, begin = residues[begin : begin + length], begin + length
                parts.append(HEADER % (records, records))
                parts += [sequence[at : at + 60] + b"\n" for at in range(0, length, 60)]
            written += stream.write(b"".join(parts))
    return records


def ours(path: Path) -> int:
    from bionemo_esm.data.uniref50 import BuildPolicy, build_store

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        policy = BuildPolicy(validation_sequences=5_000, test_sequences=40_000)
        started = time.perf_counter()
        build_store(path, Path(folder) / "store", policy)
        report(started)
    return path.stat().st_size


def pyfastx_parse(path: Path) -> int:
    import pyfastx

    started = time.perf_counter()
    for _name, _sequence in pyfastx.Fastx(str(path)):
        pass
    report(started)
    return path.stat().st_size


def decompress(path: Path) -> int:
    from isal import igzip

    buffer, started = bytearray(2**20), time.perf_counter()
    with igzip.open(path, "rb") as stream:
        while stream.readinto(buffer):
            pass
    report(started)
    return path.stat().st_size


def biopython_and_tokenizer(path: Path) -> int:
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from transformers import EsmTokenizer

    from bionemo_esm.alphabet import TOKENS

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(TOKENS))
        tokenizer = EsmTokenizer(str(vocabulary))
    started, batch, size = time.perf_counter(), [], 0
    with path.open() as stream:
        for header, sequence in SimpleFastaParser(stream):
            batch.append(sequence)
            size += len(header) + 2 + len(sequence) + -(-len(sequence) // 60)
            if len(batch) == 1_000:
                tokenizer(batch)
                batch = []
                if size > TOKENIZER_BYTES:
                    break
    report(started)
    return size


SIDES: dict[str, Callable[[Path], int]] = {
    "ours": ours,
    "pyfastx": pyfastx_parse,
    "isal": decompress,
    "biopython": biopython_and_tokenizer,
}


def report(started: float) -> None:
    """The seconds since, for the parent."""
    print(time.perf_counter() - started)


def measure(side: str, path: Path) -> tuple[float, int]:
    """Seconds and bytes of one side, in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--file", str(path)], capture_output=True, text=True, check=True
    )
    seconds, size = done.stdout.splitlines()[-2:]
    return float(seconds), int(size)


def compare(path: Path, sides: list[str], uncompressed: int) -> dict[str, list[float]]:
    """Megabytes of text a second of each side, in alternated repeats."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    path.read_bytes()
    for repeat in range(REPEATS):
        for side in sides:
            if side == "biopython" and repeat:
                continue  # minutes a time, and far from the others
            seconds, size = measure(side, path)
            text = size if side == "biopython" else uncompressed
            rates[side].append(text / seconds / 1e6)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    if options.side:
        print(SIDES[options.side](options.file))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plain = Path(folder) / "uniref.fasta"
        records = make_fasta(plain, int(options.gigabytes * 1e9))
        packed = plain.with_suffix(".fasta.gz")
        with plain.open("rb") as stream, gzip.open(packed, "wb", compresslevel=6) as sink:
            while block := stream.read(2**22):
                sink.write(block)
        size = plain.stat().st_size
        measure("ours", plain)  # compiles
        print(
            f"{os.cpu_count()} cores, Python {platform.python_version()}; {records:,} records, {size / 1e9:.2f} GB, ",
            end="",
        )
        print(f"gzip {packed.stat().st_size / 1e9:.2f} GB\n")
        print(
            "| input | side | MB of text a second, median (range) | ours is so many times as fast |\n|---|---|---|---|"
        )
        for name, path, sides in (
            ("plain", plain, ["ours", "pyfastx", "biopython"]),
            ("gzip", packed, ["ours", "pyfastx", "isal"]),
        ):
            rates = compare(path, sides, size)
            for side, values in rates.items():
                ratio = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=False))
                middle = statistics.median(values)
                spread = f"{middle:,.1f} ({min(values):,.1f}-{max(values):,.1f})"
                print(f"| {name} | {side} | {spread} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
