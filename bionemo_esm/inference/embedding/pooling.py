"""What is kept of a packed row's hidden states, taken where they were computed: pooled rows rather than all of them.

Sums over residues are float32, whatever the model computes in. Shape suffixes: T tokens of the row, S sequences, H
hidden size, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.data.packing import PackedBatch
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.reading import representations


class Wanted(Protocol):
    """Of each sequence; an `EmbeddingChoice` whose layers are numbered from 0."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def mean(self) -> bool: ...
    @property
    def cls(self) -> bool: ...
    @property
    def residues(self) -> bool: ...
    @property
    def logits(self) -> bool: ...


@dataclass(frozen=True)
class PooledBatch:
    """What is kept of a row, in memory of the CPU, by name: mean_6, cls_6, residues_6, logits."""

    bounds: NDArray[np.int64]  # [S + 1], of the sequences in the row, <cls> and <eos> counted
    sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [S, H], of residues times their shares
    first: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [S, H], of <cls>
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [T, H] or [T, V]


def pooled(engine: Engine, row: PackedBatch, shares: list[NDArray[np.float32]], wanted: Wanted) -> PooledBatch:
    """One pass over a packed row. `shares`: of each sequence, what each of its residues counts in `sums`."""
    lengths = [len(share) + 2 for share in shares]
    found = PooledBatch(np.concatenate([[0], np.cumsum(lengths)]))
    last = {engine.layers} if wanted.logits else set()
    states = representations(engine.encoder, row, {*wanted.layers, *last})
    shares_T = torch.from_numpy(np.concatenate([np.pad(share, 1) for share in shares])).to(engine.device)
    for layer in wanted.layers:
        state_TH = states[layer]
        if wanted.mean:
            found.sums[f"mean_{layer}"] = _on_cpu(sums_by_sequence(state_TH, shares_T, lengths))
        if wanted.cls:
            found.first[f"cls_{layer}"] = _on_cpu(state_TH[row.cu_seqlens[:-1].long()])
        if wanted.residues:
            found.rows[f"residues_{layer}"] = _on_cpu(state_TH)
    if wanted.logits:
        found.rows["logits"] = _on_cpu(engine.encoder.logits(states[engine.layers]))
    return found


def sums_by_sequence(state_TH: Tensor, shares_T: Tensor, lengths: list[int]) -> Tensor:
    """Of each sequence, the sum of its rows times their shares: float32 [S, H].

    `lengths`: rows of each sequence. Neighbours of one length are summed at once; nothing depends on other neighbours.
    """
    sums = []
    for begin, count, length in _runs(lengths):
        end = begin + count * length
        weighted_NH = state_TH[begin:end].float() * shares_T[begin:end, None]
        sums.append(weighted_NH.unflatten(0, (count, length)).sum(dim=1))
    return torch.cat(sums)


def _runs(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Begin, number and length of neighbours that are equally long."""
    begin = 0
    for length, alike in groupby(lengths):
        count = sum(1 for _ in alike)
        yield begin, count, length
        begin += count * length


def _on_cpu(rows: Tensor) -> NDArray[np.float32]:
    moved: NDArray[np.float32] = rows.cpu().float().numpy()  # in the model's dtype, which may be half as many bytes
    return moved
