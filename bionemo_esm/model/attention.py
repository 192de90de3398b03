"""Core attention over a packed row, and rotary positions.

A row holds several sequences one after another, without padding; every sequence attends to itself only. Rotary position
embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864) are those of ESM-2.

Shape suffixes: T tokens of the row, Q query tokens (all T, or some), N heads, D head size, S sequences, L tokens of one
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from bionemo_esm.model import cpu_kernels
from bionemo_esm.model.parallel import tensor_parallel_rng
from bionemo_esm.registry import Registry

_BASE = 10_000.0
_LONGEST_HEAD, _FLASH_CAPABILITY = 256, (8, 0)  # of the flash kernels
Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each token's angles, float32 [T, 1, D]."""


# --- rotary positions -------------------------------------------------------------------------------------------------


def rotary_frequencies(head_size: int) -> Tensor:
    """Return radians per position for each pair of a head's numbers: 10000^(-2i / D), float32 [D / 2].

    Bit for bit as in fair-esm (`esm/rotary_embedding.py`) and Hugging Face.
    """
    return 1.0 / (_BASE ** (torch.arange(0, head_size, 2, device="cpu").float() / head_size))


class FixedTensors(nn.Module):
    """A module whose buffers stay float32, whatever dtype the model around it is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:  # the cast has rounded it
                self._buffers[name] = buffer.to(moved.device)
        return self


class RotaryEmbedding(FixedTensors):
    """Angles that grow with the position, for rotating queries and keys.

    The frequencies are stored with the weights. Released ESM-2 checkpoints may hold them rounded to float16, as in
    training (transformers, `modeling_esm.py`, `load_hook`); recomputing them would change the model.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", rotary_frequencies(head_size))

    def forward(self, positions_T: Tensor) -> Rotation:
        """Return the rotation at each position, int64 [T], counted from 0 in each sequence."""
        assert isinstance(self.frequencies, Tensor)
        angles_TD = (positions_T.float()[:, None] * self.frequencies).repeat(1, 2)
        return angles_TD.cos()[:, None], angles_TD.sin()[:, None]


def rotate(heads_TND: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys [T, N, D] in their dtype. Number i forms a pair with number i + D/2."""
    cosine_T1D, sine_T1D = rotation
    first, second = heads_TND.chunk(2, dim=-1)
    rotated = heads_TND * cosine_T1D + torch.cat([-second, first], dim=-1) * sine_T1D  # in the angles' float32
    return rotated.to(heads_TND.dtype)


# --- the row ----------------------------------------------------------------------------------------------------------

MapObserver = Callable[[int, list[Tensor]], None]
"""Called with the number of a layer, from 1, and its attention maps: float32 [N, L, L] of each sequence."""


@dataclass
class PackedRow(PackedSeqParams):
    """Sequence bounds of a row, and further inputs of attention."""

    rotation: Rotation | None = None  # of queries and keys; None: learned positions
    observer: MapObserver | None = None
    queries: Tensor | None = None  # int64 [Q], ascending places in the row; None: all tokens are queries
    context_rows: int = 0  # minimum rows of the context; zeros follow those of the queries

    def query_index(self, places_Q: Tensor, context_rows: int = 0) -> PackedRow:
        """Return the same row with queries at these places only, and a context padded to `context_rows`."""
        bounds = torch.searchsorted(places_Q, self.cu_seqlens_kv.long()).to(self.cu_seqlens_kv.dtype)
        row = copy(self)
        row.queries, row.cu_seqlens_q, row.context_rows = places_Q, bounds, context_rows
        return row


# --- backends ---------------------------------------------------------------------------------------------------------

AttentionFunction = Callable[[Tensor, Tensor, Tensor, PackedSeqParams, float], Tensor]
"""(query [Q, N, D], key [T, N, D], value [T, N, D], row, dropout) -> context [Q, N, D]."""


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation of core attention. The supported one with the highest priority is used."""

    attend: AttentionFunction
    supports: Callable[[str, torch.dtype, float, int], bool]  # device type, dtype, dropout, head size
    priority: int = 0


ATTENTION: Registry[AttentionBackend] = Registry(
    "attention backend", "attention backend", "attention", AttentionBackend
)


def choose_attention(
    device_type: str, dtype: torch.dtype, dropout: float, head_size: int, without: frozenset[str] = frozenset()
) -> str:
    """Return the name of the best backend in `ATTENTION` for a device ("cpu" or "cuda"), `without` some names."""
    allowed = [name for name in ATTENTION if name not in without]  # in one order on all ranks
    supported = [name for name in allowed if ATTENTION.get(name).supports(device_type, dtype, dropout, head_size)]
    return max(supported, key=lambda name: ATTENTION.get(name).priority)


def attention_by_sequence(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """Call PyTorch's scaled dot product attention once for each run of sequences with one length; on any device."""
    query_lengths, key_lengths = torch.diff(layout.cu_seqlens_q), torch.diff(layout.cu_seqlens_kv)
    lengths, counts = torch.stack([query_lengths, key_lengths]).unique_consecutive(dim=1, return_counts=True)
    rows = [(counts * length).tolist() for length in (*lengths, lengths[1])]
    tensors = (query_QND, key_TND, value_TND)
    pieces = zip(*(tensor.split(sizes) for tensor, sizes in zip(tensors, rows, strict=True)), strict=True)
    outputs = []
    for count, piece in zip(counts.tolist(), pieces, strict=True):
        query, key, value = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in piece)
        if query.device.type != "cpu":
            attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        elif dropout or (torch.is_grad_enabled() and query.dtype == torch.bfloat16):
            flat = [part.flatten(0, 1) for part in (query, key, value)]
            attended = cpu_kernels.attention(flat[0], flat[1], flat[2], dropout).unflatten(0, query.shape[:2])
        else:
            attended = scaled_dot_product_attention(query, key, value)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def varlen_flash_attention(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """Call one variable-length flash kernel for the whole row (`torch.nn.attention.varlen`); without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0
    bounds = layout.cu_seqlens_q, layout.cu_seqlens_kv
    context_QND = varlen_attn(query_QND, key_TND, value_TND, *bounds, layout.max_seqlen_q, layout.max_seqlen_kv)
    assert isinstance(context_QND, Tensor)
    return context_QND


def nested_attention(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """Call the fused kernels behind jagged nested tensors, which support dropout and float32."""

    def nested(row_TND: Tensor, bounds: Tensor, longest: int) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(row_TND, bounds.long(), min_seqlen=1, max_seqlen=longest)
        return jagged.transpose(1, 2)

    query = nested(query_QND, layout.cu_seqlens_q, layout.max_seqlen_q)
    key, value = (nested(row, layout.cu_seqlens_kv, layout.max_seqlen_kv) for row in (key_TND, value_TND))
    output = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    context_QND: Tensor = output.transpose(1, 2).values()
    return context_QND


def _has_flash(device: str, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch's flash kernels run here: sm80 and later, heads of a multiple of 8 up to 256, 16-bit numbers
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13.0).
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= _LONGEST_HEAD
    return fits and device == "cuda" and torch.cuda.get_device_capability() >= _FLASH_CAPABILITY


ATTENTION.register("varlen-flash")(
    AttentionBackend(
        varlen_flash_attention,
        lambda device, dtype, dropout, head_size: dropout == 0 and _has_flash(device, dtype, head_size),
        priority=2,
    )
)
ATTENTION.register("nested")(
    AttentionBackend(
        nested_attention,
        lambda device, dtype, dropout, head_size: device == "cuda" and head_size % 8 == 0,
        priority=1,
    )
)
ATTENTION.register("sdpa-by-sequence")(
    AttentionBackend(attention_by_sequence, lambda device, dtype, dropout, head_size: True)
)


def attention_maps(query_TND: Tensor, key_TND: Tensor, layout: PackedSeqParams) -> list[Tensor]:
    """Return attention probabilities, which fused kernels do not return: float32 [N, L, L] of each sequence."""
    lengths = torch.diff(layout.cu_seqlens_q).tolist()
    scale = query_TND.shape[-1] ** -0.5
    pieces = zip(query_TND.float().split(lengths), key_TND.float().split(lengths), strict=True)
    scores = (torch.einsum("qnd,knd->nqk", query * scale, key) for query, key in pieces)
    return [score_NLL.softmax(dim=-1) for score_NLL in scores]


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the tensor with zeros after its rows, [rows, ...]; itself, not a copy, if it has as many."""
    missing = rows - len(tensor)
    return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing > 0 else tensor


class PackedAttention(MegatronModule):
    """The `core_attention` of a Megatron layer spec, over packed rows. Megatron's own calls CUDA even on a CPU."""

    def __init__(self, config: TransformerConfig, layer_number: int, backend: str, **_: Any) -> None:
        """`backend` is a name in `ATTENTION`. Megatron passes further arguments, which packing does not need."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.use(backend)

    def use(self, backend: str) -> None:
        self.attend = ATTENTION.get(backend).attend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        """query, key, value [T, N, D] -> context [Q, N, D]. `packed_seq_params` replaces the mask."""
        if (rotation := packed_seq_params.rotation) is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if packed_seq_params.observer is not None:
            packed_seq_params.observer(self.layer_number, attention_maps(query, key, packed_seq_params))
        if packed_seq_params.queries is not None:
            query = query[packed_seq_params.queries]
        dropout = self.config.attention_dropout if self.training else 0.0
        if dropout == 0:
            context = self.attend(query, key, value, packed_seq_params, dropout)
        else:
            with tensor_parallel_rng(query.device):  # tensor-parallel ranks have different heads
                context = self.attend(query, key, value, packed_seq_params, dropout)
        return pad_rows(context, packed_seq_params.context_rows)
