"""Other lengths for a model: its table of learned positions cut, or stretched where that was asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import ROTARY, EncoderConfig
from bionemo_esm.model.interchange.translation import Taken
from bionemo_esm.model.tensors import LazyTensors

_POSITIONS = "encoder.embedding.position_embeddings.weight"


def resized(taken: Taken, seq_length: int | None, stretch_positions: bool) -> Taken:
    """The model for sequences of up to `seq_length` tokens; None: as it is.

    A learned table is cut to fewer rows; to more it is stretched only if `stretch_positions` says so. Rotary positions
    have no table, and any length. Raises `ConfigError` for a length that cannot be, or a stretch of nothing.
    """
    old = taken.config
    if seq_length is None or seq_length == old.seq_length:
        if stretch_positions:
            raise ConfigError(
                f"stretch_positions: there is nothing to stretch; give a seq_length over the model's {old.seq_length:,}"
            )
        return taken
    new = replace(old, seq_length=seq_length)
    if old.position_embedding == ROTARY:
        if stretch_positions:
            raise ConfigError("stretch_positions: the model has rotary positions, and no table to be stretched")
        return replace(
            taken,
            config=new,
            notes=(*taken.notes, f"longest sequence set from {old.seq_length:,} to {seq_length:,} tokens"),
        )
    _check_direction(old, seq_length, stretch_positions)
    did = "stretched by linear interpolation" if stretch_positions else "cut"
    note = f"position table {did} from {old.seq_length:,} to {seq_length:,} tokens"
    weights = taken.weights

    def make(name: str) -> Tensor:
        tensor = weights[name]
        if name != _POSITIONS:
            return tensor
        used = tensor[old.position_offset :]
        rows = stretched(used, seq_length) if stretch_positions else used[:seq_length]
        return torch.cat([tensor[: old.position_offset], rows])

    dtype, shape = weights.outline[_POSITIONS].dtype, (new.position_rows, new.hidden_size)
    outline = {**weights.outline, _POSITIONS: torch.empty(shape, dtype=dtype, device="meta")}
    return replace(taken, config=new, weights=LazyTensors(outline, make), notes=(*taken.notes, note))


def _check_direction(old: EncoderConfig, seq_length: int, stretch_positions: bool) -> None:
    if seq_length > old.seq_length and not stretch_positions:
        raise ConfigError(
            f"seq_length: the model has positions for {old.seq_length:,} tokens, not for {seq_length:,}; give at most "
            "that many, or stretch_positions=true to interpolate its table (and train it further)"
        )
    if seq_length < old.seq_length and stretch_positions:
        raise ConfigError(
            f"stretch_positions: {seq_length:,} tokens are fewer than the model's {old.seq_length:,}; leave it out, "
            "and the table is cut"
        )


def stretched(table_RH: Tensor, rows: int) -> Tensor:
    """A table of R rows on a finer grid [rows, H], first row on first and last on last, in its own dtype.

    Row i is the table at i (R - 1) / (rows - 1), linear between neighbours; computed in float64, rounded once.
    """
    last = len(table_RH) - 1
    places = torch.arange(rows, dtype=torch.float64) * last / (rows - 1)
    below = places.long().clamp(max=last - 1)
    share = (places - below)[:, None]
    table = table_RH.double()
    return (table[below] * (1 - share) + table[below + 1] * share).to(table_RH.dtype)
