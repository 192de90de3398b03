"""Batches for pretraining: from the number of consumed samples to this rank's share of the next optimizer step.

`TrainingStream[n]` is a pure function of n, the samples consumed before the step. So any number of loader workers
gives the same batches, a resume starts at another n, and another number of ranks deals the same global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.data import collate as batching
from bionemo_esm.data.batch_sampler import BatchPlan, EpochOrder, IntArray, member_words
from bionemo_esm.data.hashing import UInt64Array, derive_key, threshold
from bionemo_esm.data.masking import MaskingPolicy, crop_windows, sample_keys
from bionemo_esm.data.packing import SPECIAL_TOKENS_PER_SEQUENCE, PackedBatch
from bionemo_esm.data.store import SequenceSplit


@dataclass(frozen=True)
class RankBatch:
    """What one rank contributes to one optimizer step."""

    micro_batches: list[PackedBatch]
    samples: int  # of the whole global batch, all ranks together

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RankBatch:
        return replace(self, micro_batches=[batch.to(device, non_blocking) for batch in self.micro_batches])

    def pin_memory(self) -> RankBatch:
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(frozen=True)
class SampleReader:
    """Samples of one split, cropped to `max_tokens` (specials counted), corrupted and packed.

    A sample is a sequence, or in a clustered split a cluster, of which each epoch shows one member, drawn at random.
    """

    split: SequenceSplit
    max_tokens: int
    policy: MaskingPolicy
    seed: int
    _root: UInt64Array = field(init=False, repr=False, compare=False)  # [1], the key of the seed
    _bounds: UInt64Array = field(init=False, repr=False, compare=False)  # [3], the policy's

    def __post_init__(self) -> None:
        fractions = self.policy.chosen, self.policy.masked, self.policy.masked + self.policy.replaced
        object.__setattr__(self, "_root", derive_key(self.seed))
        object.__setattr__(self, "_bounds", np.array(list(map(threshold, fractions))))

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.split.num_clusters

    def packed(self, epochs: IntArray, samples: IntArray) -> PackedBatch:
        """One micro batch of the given samples (int64 [n]) as they appear in the given epochs (int64 [n]).

        Crop, corruption and packing are those of `masking.py` and `packing.py`, in one compiled pass. Raises
        `IndexError` for a sample outside the split, `StoreError` for what its files must not hold.
        """
        epochs, samples = _plain(epochs), _plain(samples)
        begins, keys = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.uint64)
        cu_seqlens = np.empty(len(samples) + 1, dtype=np.int32)
        files = self.split.lengths, self.split.offsets, self.split.cluster_starts, self.split.residues
        most = self.max_tokens - SPECIAL_TOKENS_PER_SEQUENCE
        longest = batching.draw(*files, self._root, epochs, samples, most, begins, keys, cu_seqlens)
        if longest < 0:
            self._judge(epochs[-1 - longest], samples[-1 - longest])
        assert longest >= 0, "a sample that one reader refuses and the other does not"
        room = batching.room_for_chosen(int(cu_seqlens[-1]), longest, self.policy.chosen)
        drawn = self.split.tokens, begins, keys, cu_seqlens, self._bounds
        while True:
            # One piece of memory for all: allocated once, and handed over by a loader's worker as one.
            size = int(cu_seqlens[-1])
            row = np.empty(2 * (size + room), dtype=np.int64)
            parts = row[:size], row[size : 2 * size], row[2 * size : 2 * size + room], row[2 * size + room :]
            chosen = batching.fill(*drawn, *parts)
            if chosen >= 0:
                break
            if chosen == batching.NO_LETTER:
                for epoch, sample in zip(epochs, samples, strict=True):
                    self._judge(epoch, sample)
            assert chosen == batching.NO_ROOM
            room = size
        tokens, positions, target_index, targets = torch.from_numpy(row).split([size, size, room, room])
        boundaries = torch.from_numpy(cu_seqlens)
        return PackedBatch(tokens, positions, boundaries, longest, target_index[:chosen], targets[:chosen])

    def tokens(self, epochs: IntArray, samples: IntArray) -> IntArray:
        """Length of each sample as it appears in its epoch, cropped, specials counted: int64 [n]."""
        epochs, samples, tokens = _plain(epochs), _plain(samples), np.empty(len(samples), dtype=np.int64)
        lengths, clusters = self.split.lengths, self.split.cluster_starts
        unknown = batching.measure(lengths, clusters, self._root, epochs, samples, self.max_tokens, tokens)
        if unknown >= 0:
            self._judge(epochs[unknown], samples[unknown])
        assert unknown < 0, "a sample that one reader refuses and the other does not"
        return tokens

    def _judge(self, epoch: np.int64, sample: np.int64) -> None:
        """Look at a sample slowly, and raise what is wrong with it."""
        epochs, samples = np.array([epoch]), np.array([sample])
        keys = sample_keys(self.seed, epochs, samples)
        sequences = self.split.draw_members(samples, member_words(keys))
        self.split.gather(sequences, [0], [0])  # refuses one that is not in the split
        lengths = self.split.lengths[sequences].astype(np.int64)
        starts, kept = crop_windows(lengths, self.max_tokens - SPECIAL_TOKENS_PER_SEQUENCE, keys)
        self.split.gather(sequences, starts, kept)


def _plain(numbers: IntArray) -> IntArray:
    """As compiled loops take them."""
    return np.ascontiguousarray(numbers, dtype=np.int64)


@dataclass(frozen=True)
class TrainingStream(Dataset[RankBatch]):
    """Item n: the rank's micro batches of the step that begins after n consumed samples.

    The step's global batch is the next slice of the stream, the same whatever the ranks.
    """

    reader: SampleReader
    plan: BatchPlan
    order: EpochOrder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", EpochOrder(self.reader.num_samples, self.reader.seed))

    def on_rank(self, rank: int) -> TrainingStream:
        """The same stream, dealt to another rank."""
        return TrainingStream(self.reader, replace(self.plan, rank=rank))

    def __getitem__(self, consumed: int) -> RankBatch:
        micro_batches, samples = self.rank_batches(consumed, self.plan.rank)
        return RankBatch([self.reader.packed(*chosen) for chosen in micro_batches], samples)

    def rank_batches(self, consumed: int, rank: int) -> tuple[list[tuple[IntArray, IntArray]], int]:
        """What a rank gets of the step after `consumed` samples: the (epochs, samples), each int64 [k], of its micro
        batches; and the samples of the whole global batch.
        """
        epochs, samples, tokens = self._slice(consumed)
        rank_batches = self.plan.share(tokens, rank)
        return [(epochs[hand], samples[hand]) for hand in rank_batches], len(samples)

    def samples_after(self, consumed: int) -> int:
        """Samples of the global batch that begins after `consumed`."""
        return self.plan.global_batch_size or len(self._slice(consumed)[1])

    def _slice(self, consumed: int) -> tuple[IntArray, IntArray, IntArray]:
        """Epochs, samples and their lengths in tokens, int64 [samples of the global batch] each."""
        if self.plan.global_batch_size is not None:
            return self._look_up(consumed, self.plan.global_batch_size)
        most = self.plan.global_batch_tokens
        assert most is not None
        asked = 2 * max(most // self.reader.max_tokens, 1)
        while True:
            epochs, samples, tokens = self._look_up(consumed, asked)
            fitting = int(np.searchsorted(np.cumsum(tokens), most, side="right"))
            if fitting < asked:
                fitting = max(fitting, 1)
                return epochs[:fitting], samples[:fitting], tokens[:fitting]
            asked *= 2

    def _look_up(self, consumed: int, count: int) -> tuple[IntArray, IntArray, IntArray]:
        epochs, samples = self.order.samples(np.arange(consumed, consumed + count, dtype=np.int64))
        return epochs, samples, self.reader.tokens(epochs, samples)


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
    """The endless series of keys of a `TrainingStream`, each further by the samples of a global batch."""

    stream: TrainingStream
    consumed: int

    def __iter__(self) -> Iterator[int]:
        position = self.consumed
        while True:
            yield position
            position += self.stream.samples_after(position)


def training_loader(stream: TrainingStream, consumed: int, num_workers: int, pin_memory: bool) -> DataLoader[RankBatch]:
    """Batches from `consumed` on, without end, in order at any number of workers."""
    return DataLoader(
        stream,
        sampler=ConsumedSamples(stream, consumed),
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
