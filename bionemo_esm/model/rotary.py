"""Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864), as ESM-2 has them, over packed rows.

Shape suffixes: T tokens of the row, N heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BASE = 10_000.0
Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each token's angles, float32 [T, 1, D]."""


def rotary_frequencies(head_size: int) -> Tensor:
    """Radians a position for each pair of numbers of a head: 10000^(-2i / D), float32 [D / 2].

    Computed as fair-esm (`esm/rotary_embedding.py`) and Hugging Face do, to the last bit.
    """
    return 1.0 / (_BASE ** (torch.arange(0, head_size, 2).float() / head_size))


class FixedTensors(nn.Module):
    """Holds tensors that no optimizer changes, in float32 at any precision of the model around it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:  # a cast has rounded it
                self._buffers[name] = buffer.to(moved.device)
        return self


class RotaryEmbedding(FixedTensors):
    """Turns queries and keys by angles that grow with the position.

    The frequencies are kept with the weights: released checkpoints of ESM-2 may hold them rounded to float16, as they
    were in training (transformers, `modeling_esm.py`, `load_hook`), and the formula's would make another model.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", rotary_frequencies(head_size))

    def forward(self, positions_T: Tensor) -> Rotation:
        """The rotation at each position, int64 [T], counted from 0 in each sequence."""
        assert isinstance(self.frequencies, Tensor)
        angles_TD = (positions_T.float()[:, None] * self.frequencies).repeat(1, 2)
        return angles_TD.cos()[:, None], angles_TD.sin()[:, None]


def rotate(heads_TND: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [T, N, D], number i turned together with number i + D/2, in the dtype that they came in."""
    cosine_T1D, sine_T1D = rotation
    first, second = heads_TND.chunk(2, dim=-1)
    turned = heads_TND * cosine_T1D + torch.cat([-second, first], dim=-1) * sine_T1D  # in the angles' float32
    return turned.to(heads_TND.dtype)
