"""From the number of consumed samples to this rank's batch of the next optimizer step.

`TrainingBatches[n]` is a pure function of n, the samples consumed before the step. So any number of loader workers
gives the same batches, a resume starts at another n, and another world size splits the same global batches.

Order: a keyed permutation instead of a shuffled index array. Position p of the endless sequence of samples belongs to
epoch p // size, and a permutation computed on the fly maps it to a sample: O(1) time and memory at any data-set size.
The order depends on the seed alone. The permutation is a Feistel network over the next power of two, repeated until the
value lies inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

Balance: a step takes as long as its slowest rank. Each rank looks up the lengths of the whole global batch (not its
residues), and all ranks compute the same assignment of equal work without communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.data.collate import IntArray, PackedBatch, SampleReader
from bionemo_esm.data.hashing import UInt64Array, derive_key, derived, mixed
from bionemo_esm.data.kernels import compiled
from bionemo_esm.data.store import SequenceSplit

_ROUNDS = 8  # even, so that unequal halves end in their own places
_PERMUTATION_STREAM = 1  # keeps the keys of the order apart from those of crop and masking
_U = np.uint64


@dataclass(frozen=True)
class EpochPermutation:
    """The order of samples: epoch after epoch, each a permutation of `size` samples that depends on the seed.

    Raises `ValueError` for an empty data set or one over 2**48 samples.
    """

    size: int
    seed: int
    _root: UInt64Array = field(init=False, repr=False, compare=False)  # [1], the key of all epochs

    def __post_init__(self) -> None:
        if not 0 < self.size <= 2**48:
            raise ValueError(f"a permutation needs between 1 and 2**48 samples, not {self.size}")
        object.__setattr__(self, "_root", derive_key(self.seed, _PERMUTATION_STREAM))

    def samples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return epoch and sample at each position: positions int64 [n] -> (int64 [n], int64 [n])."""
        epochs, samples = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        _permute(samples, epochs, self._root, self.size, max(2, (self.size - 1).bit_length()))
        return epochs, samples


@compiled
def _half_round(changed: Any, other: Any, keys: Any, bits: Any, number: Any) -> None:
    """XOR one half, of `bits` bits, with the hash of the other; both halves and the keys are uint64 [n]."""
    mask, salt = (_U(1) << bits) - _U(1), _U(number) << _U(56)
    for at in range(changed.size):
        changed[at] ^= mixed(keys[at] ^ mixed(other[at] + salt)) & mask


@compiled
def _feistel(values: Any, keys: Any, bits: Any) -> None:
    """Apply a keyed permutation of [0, 2**bits) to each element: values uint64 [n], changed; keys uint64 [n]."""
    left_bits = bits // _U(2)
    right_bits = bits - left_bits
    left, right = values >> right_bits, values & ((_U(1) << right_bits) - _U(1))
    for number in range(0, _ROUNDS, 2):  # all elements per round, which vectorises
        _half_round(left, right, keys, left_bits, number)
        _half_round(right, left, keys, right_bits, number + 1)
    values[:] = (left << right_bits) | right


@compiled
def _permute(places: Any, epochs: Any, root: Any, size: Any, bits: Any) -> None:
    """Map positions in epochs to samples; cycle-walking takes under two rounds on average.

    places int64 [n], replaced by samples; epochs int64 [n]; root uint64 [1], the key of all epochs; 2**bits >= size.
    """
    end = _U(size)
    keys, values, where, left = np.empty(places.size, _U), places.astype(_U), np.arange(places.size), places.size
    for at in range(left):
        keys[at] = derived(root[0], epochs[at])
    while left > 0:
        _feistel(values[:left], keys[:left], _U(bits))
        outside = 0
        for at in range(left):
            if values[at] < end:
                places[where[at]] = np.int64(values[at])
            else:
                values[outside], keys[outside], where[outside] = values[at], keys[at], where[at]
                outside += 1
        left = outside


@dataclass(frozen=True)
class BatchWarmup:
    """Global batches that begin small and grow in equal stages; the order of samples is unchanged.

    The size depends on the consumed samples alone, so a resumed run continues with the batch that was next.
    """

    start: int  # of the first global batches, in the unit of the whole one: sequences or tokens
    increment: int  # from stage to stage, in the same unit
    samples: int  # consumed samples from which on the global batch is whole

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("increment", self.increment), ("samples", self.samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def sizes(self, whole: int) -> range:
        """Return the sizes of the stages before the whole batch."""
        return range(self.start, whole, self.increment)

    def stage(self, whole: int, consumed: int) -> int:
        """Return the number of the stage, from 0, of the global batch that begins after `consumed` samples."""
        stages = len(self.sizes(whole))
        return min(consumed * stages // self.samples, stages)

    def size(self, whole: int, consumed: int) -> int:
        """Return the size of the global batch that begins after `consumed` samples, at most `whole`."""
        return min(whole, self.start + self.increment * self.stage(whole, consumed))

    def samples_of(self, steps: int, whole: int, mean_size: float, consumed: float = 0) -> float:
        """Return the samples of `steps` global batches after `consumed` samples.

        mean_size: sequences of a whole batch; below 1 stages have their part of it.
        """
        total, stages = 0.0, len(self.sizes(whole))
        for number, size in enumerate(self.sizes(whole), start=1):
            of_step = mean_size * size / whole
            left = math.ceil(max(self.samples * number / stages - consumed - total, 0) / of_step)
            taken = min(left, steps)
            total, steps = total + taken * of_step, steps - taken
        return total + steps * mean_size


@dataclass(frozen=True)
class BatchPlan:
    """The size of a global batch, and how ranks and micro batches share it.

    The global batch is `global_batch_size` sequences, or as many as hold at most `global_batch_tokens` tokens. A micro
    batch is at most `micro_batch_size` sequences, or any number of at most `micro_batch_tokens` tokens. Nothing needs
    to divide evenly. Raises `ValueError` where a rank would have no sequence.
    """

    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1
    global_batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    warmup: BatchWarmup | None = None

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self) if item.name not in ("rank", "warmup")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        for whole in ("global_batch", "micro_batch"):
            if (getattr(self, f"{whole}_size") is None) == (getattr(self, f"{whole}_tokens") is None):
                raise ValueError(f"{whole}_size (sequences) or {whole}_tokens must be given, and not both")
        self._check_no_rank_is_idle()
        self._check_warmup()

    def _check_warmup(self) -> None:
        if self.warmup is None:
            return
        whole = self.global_batch
        if self.warmup.start >= whole:
            raise ValueError(f"the warm-up starts at {self.warmup.start}, which must be under the {whole} of a batch")
        for size in self.warmup.sizes(whole):
            self._of_size(size)  # raises if it leaves a rank idle

    @property
    def global_batch(self) -> int:
        """The size of the whole global batch: sequences, or tokens."""
        size = self.global_batch_size or self.global_batch_tokens
        assert size is not None
        return size

    def _of_size(self, size: int) -> BatchPlan:
        unit = "global_batch_size" if self.global_batch_size is not None else "global_batch_tokens"
        return replace(self, warmup=None, **{unit: size})

    def after(self, consumed: int) -> BatchPlan:
        """Return the plan of the global batch that begins after `consumed` samples, its warm-up resolved."""
        if self.warmup is None:
            return self
        return self._of_size(self.warmup.size(self.global_batch, consumed))

    def _check_no_rank_is_idle(self) -> None:
        size = self.global_batch_size
        if size is not None and size < self.world_size:
            raise ValueError(
                f"a global batch of {size} sequences leaves some of {self.world_size} ranks idle; make it at least "
                f"{self.world_size}, or use fewer ranks"
            )

    @property
    def accumulation(self) -> int | None:
        """Micro batches of a rank per step, all of `micro_batch_size`; None where ranks or micro batches differ."""
        if self.global_batch_size is None or self.micro_batch_size is None:
            return None
        number, left = divmod(self.global_batch_size, self.micro_batch_size * self.world_size)
        return number if left == 0 else None

    def micro_batches(self, tokens: IntArray, rank: int | None = None) -> list[IntArray]:
        """Return the micro batches of a rank (None: of this plan's rank) of a global batch of these sequences.

        tokens: int64 [n], the lengths of the sequences. Each micro batch is int64 [k], ascending indices into `tokens`.
        """
        rank = self.rank if rank is None else rank
        if self.accumulation is not None:
            everything = assign_micro_batches(tokens, self.world_size * self.accumulation)
            return everything[rank * self.accumulation : (rank + 1) * self.accumulation]
        own = assign_micro_batches(tokens, self.world_size)[rank]
        return [own[batch] for batch in self._split(tokens[own])]

    def _split(self, tokens: IntArray) -> list[IntArray]:
        """Split a rank's sequences into as few balanced micro batches as keep within the limit."""
        if self.micro_batch_size is not None:
            return assign_micro_batches(tokens, -(-len(tokens) // self.micro_batch_size))
        limit = self.micro_batch_tokens
        assert limit is not None
        number = max(-(-int(tokens.sum()) // limit), 1)
        while True:
            batches = assign_micro_batches(tokens, number)
            if number >= len(tokens) or max(int(tokens[batch].sum()) for batch in batches) <= limit:
                return batches
            number += 1


def assign_micro_batches(tokens: IntArray, count: int) -> list[IntArray]:
    """Assign sequences of these lengths (int64 [n]) to `count` batches of similar numbers of sequences and tokens.

    Longest first, in alternating direction. Each batch is int64 [k], ascending indices; the numbers of sequences differ
    by one at most.
    """
    if count == 1:
        return [np.arange(len(tokens), dtype=np.int64)]
    longest_first = np.argsort(_descending_key(tokens), kind="stable")
    turn, place = np.divmod(np.arange(len(tokens), dtype=np.int64), count)
    batch = np.empty(len(tokens), dtype=np.int32)
    batch[longest_first] = np.where(turn % 2, count - 1 - place, place)
    by_batch = np.argsort(batch, kind="stable").astype(np.int64)
    return np.split(by_batch, np.cumsum(np.bincount(batch, minlength=count))[:-1])


def _descending_key(tokens: IntArray) -> NDArray[np.uint16] | IntArray:
    """A key that sorts long sequences first; of 16 bits where it fits, which sorts ten times as fast."""
    longest = int(tokens.max(initial=0))
    return (longest - tokens).astype(np.uint16) if longest < 2**16 else longest - tokens


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


@dataclass(frozen=True)
class RankBatch:
    """The micro batches of one rank for one optimizer step."""

    micro_batches: list[PackedBatch]
    samples: int  # of the global batch, all ranks together

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RankBatch:
        return replace(self, micro_batches=[batch.to(device, non_blocking) for batch in self.micro_batches])

    def pin_memory(self) -> RankBatch:
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(frozen=True)
class TrainingBatches(Dataset[RankBatch]):
    """Item n: the rank's micro batches of the step that begins after n consumed samples.

    The global batch of a step is the next slice of the order of samples, whatever the world size.
    """

    reader: SampleReader
    plan: BatchPlan
    permutation: EpochPermutation = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutation", EpochPermutation(self.reader.num_samples, self.reader.seed))

    def on_rank(self, rank: int) -> TrainingBatches:
        """Return the same global batches as another rank sees them."""
        return TrainingBatches(self.reader, replace(self.plan, rank=rank))

    def __getitem__(self, consumed: int) -> RankBatch:
        micro_batches, samples = self.rank_batches(consumed, self.plan.rank)
        return RankBatch([self.reader.collate(*indices) for indices in micro_batches], samples)

    def rank_batches(self, consumed: int, rank: int) -> tuple[list[tuple[IntArray, IntArray]], int]:
        """Return a rank's micro batches of the step after `consumed` samples, as indices.

        Each micro batch is (epochs, samples), int64 [k]. The number beside them is the samples of the global batch.
        """
        epochs, samples, tokens = self._global_batch(consumed)
        batches = self.plan.after(consumed).micro_batches(tokens, rank)
        return [(epochs[batch], samples[batch]) for batch in batches], len(samples)

    def samples_after(self, consumed: int) -> int:
        """Return the number of samples of the global batch that begins after `consumed`."""
        return self.plan.after(consumed).global_batch_size or len(self._global_batch(consumed)[1])

    def _global_batch(self, consumed: int) -> tuple[IntArray, IntArray, IntArray]:
        """Epochs, samples and their lengths in tokens, int64 [samples of the global batch] each."""
        plan = self.plan.after(consumed)
        if plan.global_batch_size is not None:
            return self._look_up(consumed, plan.global_batch_size)
        most = plan.global_batch_tokens
        assert most is not None
        count = 2 * max(most // self.reader.max_tokens, 1)
        while True:
            epochs, samples, tokens = self._look_up(consumed, count)
            fitting = int(np.searchsorted(np.cumsum(tokens), most, side="right"))
            if fitting < count:
                fitting = max(fitting, 1)
                return epochs[:fitting], samples[:fitting], tokens[:fitting]
            count *= 2

    def _look_up(self, consumed: int, count: int) -> tuple[IntArray, IntArray, IntArray]:
        epochs, samples = self.permutation.samples(np.arange(consumed, consumed + count, dtype=np.int64))
        return epochs, samples, self.reader.token_counts(epochs, samples)


@dataclass(frozen=True)
class ValidationBatches(Dataset[PackedBatch]):
    """A split in its stored order, with the same crop and mask each time; ranks take batches in turn.

    Raises `ValueError` for a reader whose masking policy shows some of the true residues.
    """

    reader: SampleReader
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.reader.policy.mask_fraction != 1:
            raise ValueError("validation must hide every chosen residue: give the reader policy.for_evaluation()")

    def on_rank(self, rank: int, world_size: int) -> ValidationBatches:
        """Return the batches of one of several ranks."""
        return replace(self, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        batches = -(-self.reader.num_samples // self.micro_batch_size)
        return len(range(self.rank, batches, self.world_size))

    def __getitem__(self, index: int) -> PackedBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        first = (self.rank + index * self.world_size) * self.micro_batch_size
        samples = np.arange(first, min(first + self.micro_batch_size, self.reader.num_samples), dtype=np.int64)
        return self.reader.collate(np.zeros_like(samples), samples)


@dataclass(frozen=True)
class ConsumedSamples(Sampler[int]):
    """The endless sequence of keys of `TrainingBatches`: consumed samples before each step."""

    batches: TrainingBatches
    consumed: int

    def __iter__(self) -> Iterator[int]:
        consumed = self.consumed
        while True:
            yield consumed
            consumed += self.batches.samples_after(consumed)


def training_loader(
    batches: TrainingBatches, consumed: int, num_workers: int, pin_memory: bool
) -> DataLoader[RankBatch]:
    """Load batches from `consumed` samples on, endlessly, in the same order with any number of workers."""
    return DataLoader(
        batches,
        sampler=ConsumedSamples(batches, consumed),
        batch_size=None,  # an item is a batch already
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def validation_loader(batches: Dataset[PackedBatch], num_workers: int, pin_memory: bool) -> DataLoader[PackedBatch]:
    """Load the validation batches of this rank once."""
    return DataLoader(batches, batch_size=None, shuffle=False, num_workers=num_workers, pin_memory=pin_memory)


def unigram_perplexity(train: SequenceSplit, validation: ValidationBatches) -> float:
    """Return the perplexity of the validation targets under the residue frequencies of the training split.

    It is the reference for a model that knows residue frequencies alone. One is added to every count, so that a letter
    that training never shows does not make it infinite. NaN where nothing is masked.
    """
    counts = train.residue_counts().astype(np.float64) + 1.0
    log_frequency = np.log(counts / counts.sum())
    targets = np.zeros(VOCABULARY_SIZE)
    for index in range(len(validation)):
        targets += np.bincount(validation[index].targets.numpy(), minlength=VOCABULARY_SIZE)
    if not targets.any():
        return math.nan
    return float(np.exp(-(targets * log_frequency).sum() / targets.sum()))
