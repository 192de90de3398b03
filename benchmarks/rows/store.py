"""Rows: FASTA to a store, plain and gzip, against commonly used parsers and tokenizers.

The text resembles UniRef50: its headers, 60 residues a line, with the lengths and composition of real proteins. The
residues are random, so that no two sequences are equal and all are kept. Ours does all the work: it reads, hashes the
source, cleans, removes duplicates, splits, writes, hashes, and syncs to disk. Slow sides get the first part of the
same text.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison import Row, Setting, Side
from bionemo_esm.alphabet import ENCODING_TABLE, TOKENS, UNK_ID, VOCABULARY_SIZE
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.preprocess import BuildPolicy, build_store
from bionemo_esm.data.store import SPLITS, ProteinStore

SAMPLE = Path(__file__).parents[2] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
HEADER = b">UniRef50_A%09X Uncharacterized protein n=1 Tax=Escherichia coli TaxID=562 RepID=A%09X_ECOLI\n"
POLICY = BuildPolicy(max_residues=100_000)  # no cropping, so that all residues are counted
BYTES, PART_BYTES = 200_000_000, 3_000_000  # of text: for fast sides, and for sides that need seconds per MB
QUICK_BYTES, QUICK_PART_BYTES = 400_000, 60_000
_SHORTEST = 30  # residues: shorter sequences might be equal by chance
_BLOCK_RECORDS = 10_000
_BATCH = 1_000  # sequences per call of the tokenizer, the default of `datasets`

Counts = NDArray[np.int64]
"""int64 [1 + 33]: number of sequences, then the count of each token id."""


@dataclass(frozen=True)
class Text:
    """A FASTA file and its first part."""

    whole: Path
    part: Path
    megabytes: float  # of decompressed text in `whole`
    part_megabytes: float


def rows(setting: Setting) -> Iterator[Row]:
    size, part = (QUICK_BYTES, QUICK_PART_BYTES) if setting.quick else (BYTES, PART_BYTES)
    plain = setting.folder / "uniref.fasta", setting.folder / "part.fasta"
    proteins = setting.fasta or SAMPLE
    sizes = [make_fasta(path, proteins, wanted) for path, wanted in zip(plain, (size, part), strict=True)]
    megabytes, part_megabytes = (written / 1e6 for written in sizes)
    yield _row("plain", Text(*plain, megabytes, part_megabytes), setting)
    packed = [_packed(path) for path in plain]
    yield _row("gzip", Text(packed[0], packed[1], megabytes, part_megabytes), setting)


def make_fasta(path: Path, proteins: Path, size: int) -> int:
    """Write at least `size` bytes of FASTA with the lengths and composition of `proteins`. Return the bytes written."""
    sequences = [record.sequence.upper() for record in read_fasta(proteins)]
    known = np.array([len(sequence) for sequence in sequences])
    letters = np.frombuffer(b"".join(sequences), dtype=np.uint8)
    letters = letters[ENCODING_TABLE[letters] != UNK_ID]
    known = known[known >= _SHORTEST]
    rng, records, written = np.random.default_rng(0), 0, 0
    with path.open("wb") as stream:
        while written < size:
            lengths = rng.choice(known, _BLOCK_RECORDS)
            residues = letters[rng.integers(0, letters.size, lengths.sum(), dtype=np.int64)].tobytes()
            begin = 0
            for length in lengths.tolist():
                records += 1
                sequence, begin = residues[begin : begin + length], begin + length
                lines = [sequence[at : at + 60] + b"\n" for at in range(0, length, 60)]
                written += stream.write(b"".join([HEADER % (records, records), *lines]))
                if written >= size:
                    break
    return written


def _packed(path: Path) -> Path:
    packed = path.with_suffix(".fasta.gz")
    with path.open("rb") as stream, gzip.open(packed, "wb", compresslevel=6) as sink:
        shutil.copyfileobj(stream, sink, 2**22)
    return packed


def _row(kind: str, text: Text, setting: Setting) -> Row:
    cores = os.cpu_count() or 1
    ours = Ours(setting.folder / "store")
    whole, part = ours.count(text.whole), ours.count(text.part)
    tokenizer = Tokenizer(setting.folder)
    biopython = "transformers", "biopython"
    theirs = (
        Side(
            "pyfastx, merely parsing",
            lambda: parse(text.whole),
            text.megabytes,
            "Fastx, the fastest of its interfaces; nothing is kept",
            error=_error(whole, count_parsed(text.whole)),
            libraries=("pyfastx",),
        ),
        Side(
            "Biopython and EsmTokenizer",
            lambda: tokenizer.work(text.part),
            text.part_megabytes,
            f"SimpleFastaParser, {_BATCH:,} at a time; nothing is kept",
            error=_error(part, tokenizer.count(text.part)),
            libraries=biopython,
        ),
        Side(
            "Biopython, EsmTokenizer and datasets",
            lambda: tokenizer.map(text.part, cores),
            text.part_megabytes,
            f"Dataset.map, {cores} processes, into Arrow files",
            error=_error(part, tokenizer.count_mapped(text.part, cores)),
            libraries=(*biopython, "datasets"),
        ),
    )
    return Row(
        key=f"store-{kind}",
        title=f"FASTA to a store, {kind}",
        unit="MB of text",
        precision="-",
        sides=(Side("ours", lambda: ours.work(text.whole), text.megabytes, f"{cores} cores"), *theirs),
        parity="sequences, and how often each residue occurs: the largest difference of a count, relative",
        tolerance=0.0,
        note="Ours cleans, finds duplicates, splits, writes, hashes and syncs; pyfastx does none of it. Files are in "
        f"memory; {text.megabytes:,.4g} MB of text, {text.part_megabytes:,.2g} MB for the tokenizer.",
    )


def _error(ours: Counts, theirs: Counts) -> float:
    return float((np.abs(ours - theirs) / np.maximum(ours, 1)).max())


# --- ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """`build_store`, repeatedly into the same folder."""

    folder: Path

    def work(self, fasta: Path) -> ProteinStore:
        shutil.rmtree(self.folder, ignore_errors=True)  # of the previous turn; this cost counts for us
        return build_store(fasta, self.folder, POLICY)

    def count(self, fasta: Path) -> Counts:
        store = self.work(fasta)
        splits = [store.split(name) for name in SPLITS]
        residues = np.sum([split.residue_counts() for split in splits], axis=0, dtype=np.int64)
        return np.concatenate([[sum(map(len, splits))], residues])


# --- theirs -----------------------------------------------------------------------------------------------------------


def parse(fasta: Path) -> int:
    """Return the number of records that pyfastx finds."""
    import pyfastx

    records = 0
    for _name, _sequence in pyfastx.Fastx(str(fasta)):
        records += 1
    return records


def count_parsed(fasta: Path) -> Counts:
    import pyfastx

    counts = np.zeros(1 + VOCABULARY_SIZE, dtype=np.int64)
    for _name, sequence in pyfastx.Fastx(str(fasta)):
        counts[0] += 1
        tokens = ENCODING_TABLE[np.frombuffer(sequence.encode(), dtype=np.uint8)]
        counts[1:] += np.bincount(tokens, minlength=VOCABULARY_SIZE)
    return counts


class Tokenizer:
    """Biopython's fastest parser, and Hugging Face's tokenizer of ESM, which is written in Python."""

    def __init__(self, folder: Path) -> None:
        from datasets import disable_caching, disable_progress_bars
        from transformers import EsmTokenizer

        disable_caching()
        disable_progress_bars()
        self.folder = folder / "arrow"
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(TOKENS))
        self.tokenizer = EsmTokenizer(str(vocabulary))  # type: ignore[no-untyped-call]

    def work(self, fasta: Path) -> int:
        """Tokenise everything in batches. Return the number of batches."""
        return sum(1 for _ in self._batches(fasta))

    def count(self, fasta: Path) -> Counts:
        return _counts(sequence for batch in self._batches(fasta) for sequence in batch)

    def map(self, fasta: Path, processes: int) -> object:
        """Return a `datasets.Dataset` of token ids on disk."""
        from datasets import Dataset

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        proteins = Dataset.from_dict({"sequence": [sequence for _, sequence in _parsed(fasta)]})
        return proteins.map(
            tokenised(self.tokenizer),
            batched=True,
            batch_size=_BATCH,
            num_proc=processes,
            remove_columns=["sequence"],
            cache_file_name=str(self.folder / "tokens.arrow"),
        )

    def count_mapped(self, fasta: Path, processes: int) -> Counts:
        dataset = self.map(fasta, processes)
        return _counts(dataset["input_ids"])  # type: ignore[index]

    def _batches(self, fasta: Path) -> Iterator[list[list[int]]]:
        batch: list[str] = []
        for _title, sequence in _parsed(fasta):
            batch.append(sequence)
            if len(batch) == _BATCH:
                yield self.tokenizer(batch, return_attention_mask=False)["input_ids"]
                batch = []
        if batch:
            yield self.tokenizer(batch, return_attention_mask=False)["input_ids"]


def tokenised(tokenizer: object) -> Callable[[dict[str, list[str]]], dict[str, list[list[int]]]]:
    """Return the function for `Dataset.map`."""

    def of(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["sequence"], return_attention_mask=False)["input_ids"]}  # type: ignore[operator]

    return of


def _parsed(fasta: Path) -> Iterator[tuple[str, str]]:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    stream: IO[str]
    with gzip.open(fasta, "rt") if fasta.suffix == ".gz" else fasta.open() as stream:
        yield from SimpleFastaParser(stream)  # type: ignore[no-untyped-call]


def _counts(sequences: Iterator[Sequence[int]]) -> Counts:
    """Return the counts of token ids, without the <cls> and <eos> around each sequence."""
    counts = np.zeros(1 + VOCABULARY_SIZE, dtype=np.int64)
    for sequence in sequences:
        counts[0] += 1
        counts[1:] += np.bincount(np.asarray(sequence)[1:-1], minlength=VOCABULARY_SIZE)
    return counts
