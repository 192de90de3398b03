"""Row of `starting.py`: time to the first batch of a run that resumes after ten million samples.

An epoch of the data set is longer than that, as an epoch of UniRef50 is. The sequences are short pieces of the shipped
sample, so that the store stays small. Ours computes which samples come next. Hugging Face's `Trainer` lets `accelerate`
draw the order of the whole epoch again and skip the consumed batches (`skip_first_batches`). PyTorch's `DataLoader`
alone, or a loop with `continue`, makes every batch again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler, skip_first_batches
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, EsmTokenizer

from benchmarks.comparison import Row, Setting, Side
from bionemo_esm.alphabet import CLS_ID, EOS_ID, TOKENS
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches, training_loader
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.preprocess import BuildPolicy, build_store_from_splits
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreWriter
from bionemo_esm.pretraining.run_context import SAMPLE_FOLDER

POSITION, EPOCH = 10_000_000, 12_000_000  # samples
QUICK_POSITION, QUICK_EPOCH = 1_000, 1_500
RESIDUES, BATCH, MAX_TOKENS = 16, 8, 512
UNBROKEN_STEPS = 20  # steps to check that an uninterrupted run gives the same batch
PARTLY = 500  # batches that the slowest side makes, instead of all


def resuming(setting: Setting) -> Row:
    """Return the row."""
    position, epoch = (QUICK_POSITION, QUICK_EPOCH) if setting.quick else (POSITION, EPOCH)
    folder = short_store(setting.folder, epoch)
    ours = first_of_ours(folder, position)
    unbroken = list(islice(_loader(folder, position - UNBROKEN_STEPS * BATCH), UNBROKEN_STEPS + 1))[-1]
    for mine, theirs in zip(ours.micro_batches, unbroken.micro_batches, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.targets, theirs.targets)
    peer = HuggingFace(setting.folder, folder)
    error = float(differing(peer.resumed(position), peer.unbroken(position)))
    skipped = position // BATCH
    made = min(PARTLY, skipped)
    batches = peer.batches()
    next(batches)  # draws the order once, so that its cost is not multiplied
    return Row(
        key="resume",
        title=f"First batch of a run that goes on after {position:,} samples of an epoch of {epoch:,}",
        unit="resume",
        precision="-",
        sides=[
            Side("ours", lambda: first_of_ours(folder, position), 1, "which samples come next is computed"),
            Side(
                "Hugging Face, Trainer", lambda: peer.resumed(position), 1,
                "accelerate.skip_first_batches over its SeedableRandomSampler", error, ("transformers", "accelerate"),
            ),
            Side(
                "PyTorch, a loop that skips", lambda: deque(islice(batches, made), maxlen=0), made / skipped,
                f"DataLoader, batches made and thrown away; {made:,} of {skipped:,} timed",
                float(differing(peer.looped(made), peer.unbroken(made * BATCH))), ("torch", "transformers"),
            ),
        ],
        parity="samples of the first batch that are not those of a run without a break",
        tolerance=0,
        turns=3,
        seconds_matter=True,
        note=f"{BATCH} samples a batch, no loader process; the store is opened in each turn. Libraries and compiled "
        "loops are loaded already; in a new process that takes ours 0.4 s more, 4 s the very first time.",
    )  # fmt: skip


def short_store(folder: Path, samples: int) -> ProteinStore:
    """Build a store of `samples` short pieces of the shipped proteins."""
    train, validation, test = (SAMPLE_FOLDER / f"{part}.fasta.gz" for part in SPLITS)
    build_store_from_splits(train, validation, test, folder / "real", BuildPolicy(), licence="CC BY 4.0")
    real = ProteinStore.open(folder / "real").split("train")
    everyone = np.arange(len(real))
    lengths = real.lengths.astype(np.int64)
    residues = real.gather(everyone, np.zeros_like(lengths), lengths)
    residues = residues[: len(residues) // RESIDUES * RESIDUES]
    at_once = len(residues) // RESIDUES
    with StoreWriter(folder / "short") as writer:
        for begin in range(0, samples, at_once):
            count = min(at_once, samples - begin)
            writer.add_many("train", residues[: count * RESIDUES], np.full(count, RESIDUES))
        writer.finish({"source": "benchmarks/rows/resuming.py"})
    return ProteinStore.open(folder / "short")


def _loader(store: ProteinStore, position: int) -> Iterator[Any]:
    opened = ProteinStore.open(store.folder)
    reader = SampleReader(opened.split("train"), MAX_TOKENS, MaskingPolicy(), seed=42)
    stream = TrainingBatches(reader, BatchPlan(global_batch_size=BATCH, micro_batch_size=BATCH))
    return iter(training_loader(stream, position, num_workers=0, pin_memory=False))


def first_of_ours(store: ProteinStore, position: int) -> Any:
    """Return the `RankBatch` after `position` samples."""
    return next(_loader(store, position))


class _Proteins(Dataset[dict[str, list[int]]]):
    """The same store as a map-style data set for Hugging Face's collator."""

    def __init__(self, store: ProteinStore) -> None:
        self._split = ProteinStore.open(store.folder).split("train")

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [CLS_ID, *self._split[index].tolist(), EOS_ID]}


class HuggingFace:
    """The data loader of Hugging Face's `Trainer`, and its procedure to resume."""

    def __init__(self, folder: Path, store: ProteinStore) -> None:
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(TOKENS))
        self._collator = DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=0.15)  # type: ignore[no-untyped-call]
        self._store = store

    def loader(self) -> DataLoader[Any]:
        proteins = _Proteins(self._store)
        generator = torch.Generator().manual_seed(42)
        sampler = SeedableRandomSampler(proteins, generator=generator, data_seed=42)
        return DataLoader(proteins, batch_size=BATCH, sampler=sampler, collate_fn=self._collator)

    def resumed(self, position: int) -> torch.Tensor:
        """Return the first batch after `position` samples, unmasked with its labels: int64 [BATCH, tokens]."""
        return _unmasked(next(iter(skip_first_batches(self.loader(), position // BATCH))))

    def looped(self, batches: int) -> torch.Tensor:
        """Return the batch after `batches` batches, which are made and discarded."""
        return _unmasked(next(islice(self.loader(), batches, None)))

    def batches(self) -> Iterator[Any]:
        """Yield batches endlessly, one epoch after another."""
        return chain.from_iterable(repeat(self.loader()))

    def unbroken(self, position: int) -> torch.Tensor:
        """Return the batch at this position of an uninterrupted run."""
        loader = self.loader()
        assert loader.batch_sampler is not None
        chosen = next(islice(loader.batch_sampler, position // BATCH, None))
        return _unmasked(self._collator([loader.dataset[index] for index in chosen]))


def _unmasked(batch: Any) -> torch.Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the number of differing rows of two batches; all rows if the shapes differ."""
    return int((found != expected).any(-1).sum()) if found.shape == expected.shape else len(expected)
