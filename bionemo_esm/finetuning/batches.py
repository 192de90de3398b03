"""Batches of labelled proteins: packed residues with their targets, and features or an encoder's input.

Shape suffixes: S proteins, R residues of all of them (or S rows, if features are pooled), F features, T tokens of a
packed row, W residues of the row's sequences; more than R if windows overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bionemo_esm.alphabet import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.data.dataloader import BatchPlan, EpochPermutation, assign_micro_batches
from bionemo_esm.finetuning.config import ReadingConfig
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import Prediction, Targets, Task, standardised
from bionemo_esm.inference.batching import batches_by_length, blending_weights, windows
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.parallel import data_parallel_group, data_parallel_size

Numbers = NDArray[np.int64]  # [S], of proteins in their set, from 0


class Features(Protocol):
    """Features of a set's proteins, computed before training: one-hot, or states of a frozen encoder."""

    @property
    def size(self) -> int:
        """F."""
        ...

    def of(self, number: int) -> NDArray[np.float32]:
        """Return one protein's features: float32 [its residues, F], or [1, F] if pooled."""
        ...


@dataclass(frozen=True)
class EncoderRow:
    """The encoder's input, and the positions of its states in the batch."""

    row: PackedBatch
    sources: Tensor  # int64 [W], positions of residues in the row
    places: Tensor  # int64 [W], the residue of the batch for each
    weights: Tensor | None  # float32 [W], blending weights; None if no protein is read in windows

    def to(self, device: torch.device, non_blocking: bool = False) -> EncoderRow:
        weights = None if self.weights is None else self.weights.to(device, non_blocking=non_blocking)
        sources, places = (each.to(device, non_blocking=non_blocking) for each in (self.sources, self.places))
        return EncoderRow(self.row.to(device, non_blocking), sources, places, weights)

    def blended(self, hidden_TH: Tensor, residues: int) -> Tensor:
        """Return the states of the batch's residues, float32 [residues, H], from those of the row's tokens."""
        states_WH = hidden_TH[self.sources].float()
        if self.weights is None:
            return states_WH
        blank = states_WH.new_zeros(residues, states_WH.shape[1])
        return blank.index_add(0, self.places, states_WH * self.weights[:, None])


@dataclass(frozen=True)
class LabelledBatch:
    """Some proteins of a set, with either `features` or `row`; an empty batch has neither."""

    numbers: Numbers
    bounds: Tensor  # int64 [S + 1], 0 to R
    targets: Tensor  # float32 [R], or [S] for a task per protein, standardised; NaN where not known
    features: Tensor | None = None  # float32 [R, F]
    row: EncoderRow | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> LabelledBatch:
        features = None if self.features is None else self.features.to(device, non_blocking=non_blocking)
        row = None if self.row is None else self.row.to(device, non_blocking)
        bounds, targets = (each.to(device, non_blocking=non_blocking) for each in (self.bounds, self.targets))
        return LabelledBatch(self.numbers, bounds, targets, features, row)

    @property
    def rows(self) -> int:
        """R."""
        return int(self.bounds[-1])


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of an optimizer step; a micro batch for each entry of `batches`."""

    batches: list[LabelledBatch]
    weight: float  # of all known targets of the global batch, over all ranks; their number without class weights
    residues: int  # of the global batch
    epoch: int

    def to(self, device: torch.device, non_blocking: bool = False) -> RankBatch:
        return replace(self, batches=[batch.to(device, non_blocking) for batch in self.batches])


class Collator:
    """Collate batches of a set from the numbers of its proteins."""

    def __init__(self, task: Task, labelled: LabelledDataset, source: Features | ReadingConfig) -> None:
        """source: the features; or, if the encoder computes them, how it reads proteins."""
        self.task, self.labelled, self.source = task, labelled, source
        self.targets: Sequence[Targets] = standardised(task, labelled.targets)

    @property
    def costs(self) -> NDArray[np.int64]:
        """Tokens of each protein, int64 [S], for the limit of a batch."""
        return self.labelled.lengths + SPECIAL_TOKENS_PER_SEQUENCE

    def __call__(self, numbers: Numbers) -> LabelledBatch:
        chosen = numbers.tolist()
        targets = [self.targets[number] for number in chosen]
        packed = torch.from_numpy(np.concatenate(targets or [np.zeros(0, dtype=np.float32)]))
        if not chosen:
            return LabelledBatch(numbers, torch.zeros(1, dtype=torch.int64), packed)
        if isinstance(self.source, ReadingConfig):
            proteins = [self.labelled.proteins[number] for number in chosen]
            bounds = _bounds([protein.residues for protein in proteins])
            return LabelledBatch(numbers, bounds, packed, row=encoder_row(proteins, self.source))
        features = [self.source.of(number) for number in chosen]
        bounds = _bounds([len(rows) for rows in features])
        return LabelledBatch(numbers, bounds, packed, features=torch.from_numpy(np.concatenate(features)))


def encoder_row(proteins: Sequence[Protein], reading: ReadingConfig) -> EncoderRow:
    """Pack proteins for the encoder; those longer than a window as overlapping windows."""
    pieces, places, weights = [], [], []
    first, blends = 0, False
    for protein in proteins:
        cover = windows(protein.residues, reading.window, reading.overlap)
        blends = blends or len(cover) > 1
        for (begin, end), share in zip(cover, blending_weights(cover), strict=True):
            pieces.append(protein.tokens[begin:end])
            places.append(np.arange(first + begin, first + end))
            weights.append(share)
        first += protein.residues
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    row = pack(np.concatenate(pieces), lengths)
    shift = SPECIAL_TOKENS_PER_SEQUENCE * np.arange(len(lengths)) + 1  # special tokens before each piece's residues
    sources = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
    return EncoderRow(
        row,
        torch.from_numpy(sources),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(weights)) if blends else None,
    )


class TrainingSteps(IterableDataset[RankBatch]):
    """The endless steps of a training from `first_step` on, as one rank reads them.

    Each epoch contains every protein once, in an order that depends on (seed, epoch) only; its last step may be
    smaller. A step's proteins are assigned to ranks by length; the sum over ranks does not depend on the world size.
    """

    def __init__(
        self,
        collator: Collator,
        plan: BatchPlan,
        seed: int,
        class_weights: NDArray[np.float32] | None = None,
        first_step: int = 0,
    ) -> None:
        """plan: the global batch in sequences, micro batches in tokens. class_weights: float32 [C]."""
        assert plan.global_batch_size is not None and plan.micro_batch_tokens is not None
        self.collator, self.plan, self.class_weights, self.first_step = collator, plan, class_weights, first_step
        self.order = EpochPermutation(len(collator.labelled), seed)
        self.batch = plan.global_batch_size

    def on_rank(self, rank: int, world_size: int) -> TrainingSteps:
        """Return the same steps as this rank of a world of this size reads them."""
        plan = replace(self.plan, rank=rank, world_size=world_size)
        return TrainingSteps(self.collator, plan, self.order.seed, self.class_weights, self.first_step)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.order.size // self.batch)

    def __iter__(self) -> Iterator[RankBatch]:
        step = self.first_step
        while True:
            yield self.share(step)
            step += 1

    def share(self, step: int) -> RankBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        begin = epoch * self.order.size + place * self.batch
        end = min(begin + self.batch, (epoch + 1) * self.order.size)
        _, numbers = self.order.samples(np.arange(begin, end))
        rank_batches = (
            self.plan.micro_batches(self.collator.costs[numbers]) if len(numbers) >= self.plan.world_size else None
        )
        if rank_batches is None:  # a last step of fewer proteins than ranks: the first ranks have one each
            own = np.arange(len(numbers))[self.plan.rank : self.plan.rank + 1]
            rank_batches = [own]
        batches = [self.collator(numbers[hand]) for hand in rank_batches]
        residues = int(self.collator.labelled.lengths[numbers].sum())
        return RankBatch(batches, self._weight(numbers), residues, epoch)

    def _weight(self, numbers: Numbers) -> float:
        known = np.concatenate([self.collator.targets[number] for number in numbers.tolist()])
        known = known[np.isfinite(known)]
        return float(len(known) if self.class_weights is None else self.class_weights[known.astype(np.int64)].sum())


class EvaluationBatches(Dataset[LabelledBatch]):
    """One rank's part of a set, each protein on one rank; at least one batch, which may be empty."""

    def __init__(self, collator: Collator, batch_tokens: int, rank: int = 0, world_size: int = 1) -> None:
        self.collator, self.batch_tokens = collator, batch_tokens
        own = assign_micro_batches(collator.costs, world_size)[rank]
        batches = batches_by_length(collator.labelled.lengths[own], batch_tokens)
        self.parts: list[Numbers] = [own[batch] for batch in batches] or [own]

    def on_rank(self, rank: int, world_size: int) -> EvaluationBatches:
        return EvaluationBatches(self.collator, self.batch_tokens, rank, world_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> LabelledBatch:
        return self.collator(self.parts[index])


def loader(batches: Dataset[Any]) -> DataLoader[Any]:
    """Return a data loader of ready batches."""
    return DataLoader(batches, batch_size=None)


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


# --- predictions of all ranks -----------------------------------------------------------------------------------------


def gather_predictions(
    local: Sequence[tuple[int, Prediction]], count: int, device: torch.device | str = "cpu"
) -> list[Prediction]:
    """Return the predictions of a set of `count` proteins, in its order, on every data-parallel rank; collective.

    local: this rank's predictions, each with its protein's number in the set. A number that several ranks predicted
    counts once. device: the device of the process group's tensors, which is the model's. Nothing is pickled: numbers
    and values travel as tensors, as long as the longest rank's.
    """
    gathered = list(local) if data_parallel_size() == 1 else _gather_arrays(local, device)
    by_number = dict(gathered)
    missing = [number for number in range(count) if number not in by_number]
    assert not missing, f"no rank has predicted {len(missing)} of {count} proteins, as number {missing[0]}"
    return [by_number[number] for number in range(count)]


def _gather_arrays(local: Sequence[tuple[int, Prediction]], device: torch.device | str) -> list[tuple[int, Prediction]]:
    shapes = np.array([(number, *prediction.shape) for number, prediction in local], dtype=np.int64).ravel()
    values = [prediction.astype(np.float32, copy=False).ravel() for _, prediction in local]
    values_of_ranks = _gather_vectors(
        torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *values])), device
    )
    gathered: list[tuple[int, Prediction]] = []
    for shapes_of_rank, vector in zip(_gather_vectors(torch.from_numpy(shapes), device), values_of_ranks, strict=True):
        begin = 0
        for number, rows, columns in shapes_of_rank.reshape(-1, 3).tolist():
            gathered.append((number, vector.numpy()[begin : begin + rows * columns].reshape(rows, columns)))
            begin += rows * columns
    return gathered


def _gather_vectors(own: Tensor, device: torch.device | str) -> list[Tensor]:
    """Return the vectors of all data-parallel ranks, of any lengths, on the CPU."""
    ranks = data_parallel_size()
    if ranks == 1:
        return [own.cpu()]
    group = data_parallel_group()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    distributed.all_gather(lengths, torch.tensor([len(own)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=own.dtype, device=device)
    padded[: len(own)] = own.to(device)
    vectors = [torch.empty_like(padded) for _ in range(ranks)]
    if longest:
        distributed.all_gather(vectors, padded, group=group)
    return [vector[: int(length)].cpu() for vector, length in zip(vectors, lengths, strict=True)]
