"""Packing: sequences of any length laid end to end in one row, with their boundaries. The model never sees padding.

Shape suffixes: T tokens of the row, S sequences, M chosen (masked) positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.alphabet import CLS_ID, EOS_ID, PAD_ID
from bionemo_esm.data.masking import Corruption

SPECIAL_TOKENS_PER_SEQUENCE = 2  # <cls> before, <eos> after


@dataclass(frozen=True)
class PackedBatch:
    """One micro batch: a row of tokens and where in it the model has to answer.

    `cu_seqlens` are cumulative lengths, from 0 to T: sequence i is `tokens[cu_seqlens[i]:cu_seqlens[i + 1]]`.
    """

    tokens: Tensor  # int64 [T], <cls> residues <eos>, sequence after sequence
    positions: Tensor  # int64 [T], 0 at every <cls>
    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int  # tokens of the longest sequence
    target_index: Tensor  # int64 [M], places in `tokens`
    targets: Tensor  # int64 [M], the true residues there

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def residues(self) -> int:
        return len(self.tokens) - SPECIAL_TOKENS_PER_SEQUENCE * self.sequences

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, tuple[bytes, ...]]:
        """Between processes: what the rest follows from, in two bytes a token instead of twenty."""
        narrow = (self.tokens.byte(), self.cu_seqlens, self.target_index.int(), self.targets.byte())
        return _widened, tuple(tensor.numpy().tobytes() for tensor in narrow)

    def _map(self, function: Any) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedBatch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(residues: NDArray[np.uint8], lengths: NDArray[np.int64], corruption: Corruption | None = None) -> PackedBatch:
    """Pack concatenated sequences, adding `<cls>` and `<eos>` to each.

    residues: uint8 [residues], the true ones; lengths: int64 [S], residues of each sequence. With a corruption the row
    shows its tokens, and `targets` are the true residues where it chose; without one there are no targets.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    boundaries = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths + SPECIAL_TOKENS_PER_SEQUENCE, out=boundaries[1:])
    # A residue moves right by the specials before it: one <cls>, and two for each earlier sequence.
    shift = SPECIAL_TOKENS_PER_SEQUENCE * np.arange(len(lengths)) + 1
    places = np.arange(len(residues)) + np.repeat(shift, lengths)

    tokens = np.empty(boundaries[-1], dtype=np.int64)
    tokens[boundaries[:-1]] = CLS_ID
    tokens[boundaries[1:] - 1] = EOS_ID
    tokens[places] = residues if corruption is None else corruption.tokens
    chosen = np.zeros(0, dtype=np.int64) if corruption is None else np.flatnonzero(corruption.chosen)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(boundaries[:-1], np.diff(boundaries))),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int(np.diff(boundaries).max(initial=0)),
        target_index=torch.from_numpy(places[chosen]),
        targets=torch.from_numpy(residues[chosen].astype(np.int64)),
    )


def _widened(tokens: bytes, cu_seqlens: bytes, target_index: bytes, targets: bytes) -> PackedBatch:
    """The batch of which `PackedBatch.__reduce__` gave these."""
    boundaries = np.frombuffer(cu_seqlens, dtype=np.int32).copy()
    lengths = np.diff(boundaries)
    return PackedBatch(
        tokens=torch.from_numpy(np.frombuffer(tokens, dtype=np.uint8).astype(np.int64)),
        positions=torch.from_numpy(np.arange(boundaries[-1]) - np.repeat(boundaries[:-1].astype(np.int64), lengths)),
        cu_seqlens=torch.from_numpy(boundaries),
        max_seqlen=int(lengths.max(initial=0)),
        target_index=torch.from_numpy(np.frombuffer(target_index, dtype=np.int32).astype(np.int64)),
        targets=torch.from_numpy(np.frombuffer(targets, dtype=np.uint8).astype(np.int64)),
    )


def unpack(row_T: Tensor, cu_seqlens: Tensor, padding: float = PAD_ID) -> Tensor:
    """A padded batch [S, longest, ...] from a packed row [T, ...]: to inspect, and to compare with padded models."""
    pieces = row_T.split(torch.diff(cu_seqlens).tolist())
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=padding)
