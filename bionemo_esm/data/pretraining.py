"""Batches for pretraining: from the number of consumed samples to this rank's share of the next optimizer step.

`TrainingStream[n]` is a pure function of n, the samples consumed before the step. So any number of loader workers
gives the same batches, a resume starts at another n, and another number of ranks deals the same global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.data.masking import MaskingPolicy, corrupt, crop_windows, sample_keys
from bionemo_esm.data.order import EpochOrder, member_words
from bionemo_esm.data.packing import SPECIAL_TOKENS_PER_SEQUENCE, PackedBatch, pack
from bionemo_esm.data.store import SequenceSplit

StepShare = list[PackedBatch]
"""The micro batches that one rank contributes to one optimizer step."""


@dataclass(frozen=True)
class SampleReader:
    """Samples of one split, cropped to `max_tokens` (specials counted), corrupted and packed.

    A sample is a sequence, or in a clustered split a cluster, of which each epoch shows one member, drawn at random.
    """

    split: SequenceSplit
    max_tokens: int
    policy: MaskingPolicy
    seed: int

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.split.num_clusters

    def packed(self, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> PackedBatch:
        """One micro batch of the given samples (int64 [n]) as they appear in the given epochs (int64 [n])."""
        keys = sample_keys(self.seed, epochs, samples)
        sequences = self.split.draw_members(samples, member_words(keys))
        lengths = self.split.lengths[sequences].astype(np.int64)
        starts, kept = crop_windows(lengths, self.max_tokens - SPECIAL_TOKENS_PER_SEQUENCE, keys)
        residues = self.split.gather(sequences, starts, kept)
        return pack(residues, kept, corrupt(residues, kept, keys, self.policy))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt: `global_batch_size` sequences over ranks, then into micro batches.

    Raises `ValueError` when the shares do not come out even.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise ValueError(
                f"a global batch of {self.global_batch_size} sequences cannot be dealt evenly to {self.world_size} "
                f"ranks in micro batches of {self.micro_batch_size}; make it a multiple of "
                f"{self.micro_batch_size * self.world_size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro batches that a rank runs before each optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, consumed: int) -> list[NDArray[np.int64]]:
        """Stream positions of this rank's micro batches, each int64 [micro_batch_size]."""
        share = self.micro_batch_size * self.accumulation
        first = consumed + self.rank * share
        return np.split(np.arange(first, first + share, dtype=np.int64), self.accumulation)


@dataclass(frozen=True)
class TrainingStream(Dataset[StepShare]):
    """Item n: the rank's micro batches of the step that begins after n consumed samples."""

    reader: SampleReader
    plan: BatchPlan
    order: EpochOrder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", EpochOrder(self.reader.num_samples, self.reader.seed))

    def on_rank(self, rank: int) -> TrainingStream:
        """The same stream, dealt to another rank."""
        return TrainingStream(self.reader, replace(self.plan, rank=rank))

    def __getitem__(self, consumed: int) -> StepShare:
        return [self.reader.packed(*self.order.samples(positions)) for positions in self.plan.positions(consumed)]


@dataclass(frozen=True)
class ValidationBatches(Dataset[PackedBatch]):
    """A split in its stored order, the same crop and mask each time; ranks take batches in turn.

    Raises `ValueError` for a reader that would show some of the answers: every chosen residue must be `<mask>`.
    """

    reader: SampleReader
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.reader.policy.masked != 1:
            raise ValueError("validation must hide every chosen residue: give the reader policy.for_evaluation()")

    def on_rank(self, rank: int, world_size: int) -> ValidationBatches:
        """The same batches, dealt to one of several ranks."""
        return replace(self, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        batches = -(-self.reader.num_samples // self.micro_batch_size)
        return len(range(self.rank, batches, self.world_size))

    def __getitem__(self, index: int) -> PackedBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        first = (self.rank + index * self.world_size) * self.micro_batch_size
        samples = np.arange(first, min(first + self.micro_batch_size, self.reader.num_samples), dtype=np.int64)
        return self.reader.packed(np.zeros_like(samples), samples)


@dataclass(frozen=True)
class ConsumedSamples(Sampler[int]):
    """The endless series consumed, consumed + global batch, ...: the keys of a `TrainingStream`."""

    consumed: int
    global_batch_size: int

    def __iter__(self) -> Iterator[int]:
        position = self.consumed
        while True:
            yield position
            position += self.global_batch_size


def training_loader(stream: TrainingStream, consumed: int, num_workers: int, pin_memory: bool) -> DataLoader[StepShare]:
    """Batches from `consumed` on, without end, in order at any number of workers."""
    return DataLoader(
        stream,
        sampler=ConsumedSamples(consumed, stream.plan.global_batch_size),
        batch_size=None,  # an item is a batch already
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def validation_loader(batches: ValidationBatches, num_workers: int, pin_memory: bool) -> DataLoader[PackedBatch]:
    """The validation batches of this rank, once through."""
    return DataLoader(batches, batch_size=None, shuffle=False, num_workers=num_workers, pin_memory=pin_memory)


def unigram_perplexity(train: SequenceSplit, validation: ValidationBatches) -> float:
    """Perplexity of the validation targets under the residue frequencies of the training split.

    What a model reaches that knows how common each residue is and nothing else. One is added to every count, so that
    a letter that training never shows does not make it infinite. NaN where nothing is masked.
    """
    counts = train.residue_counts().astype(np.float64) + 1.0
    log_frequency = np.log(counts / counts.sum())
    targets = np.zeros(VOCABULARY_SIZE)
    for index in range(len(validation)):
        targets += np.bincount(validation[index].targets.numpy(), minlength=VOCABULARY_SIZE)
    if not targets.any():
        return math.nan
    return float(np.exp(-(targets * log_frequency).sum() / targets.sum()))
