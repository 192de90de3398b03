"""Core attention over a packed row: every sequence attends to itself, and no position is padding.

Shape suffixes: T tokens of the row, Q tokens that ask (all T, or some), N heads, D size of a head, S sequences.

Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864), as ESM-2 has them, over packed rows.

Shape suffixes: T tokens of the row, N heads, D size of a head.
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

from bionemo_esm.model.cpu_kernels import dropout_scale
from bionemo_esm.model.parallel import tensor_parallel_rng

_BASE = 10_000.0
_LENGTH_BUCKET = 32  # tokens
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


MapObserver = Callable[[int, list[Tensor]], None]
"""Called with the number of a layer, from 1, and its attention maps: float32 [N, L, L] of each sequence's L tokens."""


@dataclass
class PackedRow(PackedSeqParams):
    """Where the sequences of a row begin and end, and what else attention is told of it."""

    rotation: Rotation | None = None  # of queries and keys; None: positions are in the embeddings
    observer: MapObserver | None = None
    queries: Tensor | None = None  # int64 [Q], places in the row, ascending: they alone ask; None: all do
    context_rows: int = 0  # the least rows of the context; zeros after those of the queries

    def query_index(self, places_Q: Tensor, context_rows: int = 0) -> PackedRow:
        """The same row with queries at some places only, and a context padded to so many rows."""
        bounds = torch.searchsorted(places_Q, self.cu_seqlens_kv.long()).to(self.cu_seqlens_kv.dtype)
        row = copy(self)
        row.queries, row.cu_seqlens_q, row.context_rows = places_Q, bounds, context_rows
        return row


AttentionFunction = Callable[[Tensor, Tensor, Tensor, PackedSeqParams, float], Tensor]


def attention_by_sequence(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """PyTorch's scaled dot product attention, sequence after sequence, neighbours of one length at once: anywhere."""
    asking, answering = torch.diff(layout.cu_seqlens_q), torch.diff(layout.cu_seqlens_kv)
    alike, counts = torch.stack([asking, answering]).unique_consecutive(dim=1, return_counts=True)
    rows = [(counts * lengths).tolist() for lengths in (*alike, alike[1])]
    tensors = (query_QND, key_TND, value_TND)
    pieces = zip(*(tensor.split(sizes) for tensor, sizes in zip(tensors, rows, strict=True)), strict=True)
    outputs = []
    for count, piece in zip(counts.tolist(), pieces, strict=True):
        query, key, value = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in piece)
        if dropout or (torch.is_grad_enabled() and query.dtype == torch.bfloat16):
            flat = (part.flatten(0, 1) for part in (query, key, value))
            attended = _WrittenOutAttention.apply(*flat, dropout).unflatten(0, query.shape[:2])  # type: ignore[no-untyped-call]
        else:
            attended = scaled_dot_product_attention(query, key, value)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


class _WrittenOutAttention(torch.autograd.Function):
    """Attention as matrix products and a softmax, for training on a CPU.

    No fused CPU kernel takes dropout, and the one for bfloat16 computes in float32. Here scores are float32, and
    probabilities have the dtype of the inputs. query [S N, Q, D], key and value [S N, L, D].

    oneDNN compiles a kernel for each new shape of a bfloat16 product. Lengths are therefore padded to multiples of
    `_LENGTH_BUCKET`; the last block, whose number of queries varies freely, computes its few products in float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        ctx.scale, ctx.dtype = query.shape[-1] ** -0.5, query.dtype
        ctx.queries, ctx.keys = query.shape[1], key.shape[1]
        if query.dtype == torch.bfloat16:
            convert = _pad_length if ctx.queries == ctx.keys else Tensor.float
            query, key, value = convert(query), convert(key), convert(value)
        scores = torch.bmm(_at_least_float32(query) * ctx.scale, _at_least_float32(key).transpose(1, 2))
        scores[:, :, ctx.keys :] = -torch.inf
        weights = scores.softmax(dim=-1).to(query.dtype)
        kept = dropout_scale(weights.shape, dropout, weights.dtype) if dropout else None
        ctx.save_for_backward(query, key, value, weights, kept)
        context = torch.bmm(weights if kept is None else weights * kept, value)
        return context[:, : ctx.queries].to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept = ctx.saved_tensors
        gradient = gradient.to(query.dtype)
        if query.shape[1] > ctx.queries:
            gradient = _pad_length(gradient)
        of_value = torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        if kept is not None:
            of_weights.mul_(kept)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        of_query, of_key, of_value = of_query[:, : ctx.queries], of_key[:, : ctx.keys], of_value[:, : ctx.keys]
        return of_query.to(ctx.dtype), of_key.to(ctx.dtype), of_value.to(ctx.dtype), None


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _pad_length(rows: Tensor) -> Tensor:
    """[B, L, D] with zeros up to the next multiple of `_LENGTH_BUCKET` in L."""
    return pad(rows, (0, 0, 0, -rows.shape[1] % _LENGTH_BUCKET))


def varlen_flash_attention(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """One variable-length flash kernel for the whole row (`torch.nn.attention.varlen`); it knows no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0
    bounds = layout.cu_seqlens_q, layout.cu_seqlens_kv
    context_QND = varlen_attn(query_QND, key_TND, value_TND, *bounds, layout.max_seqlen_q, layout.max_seqlen_kv)
    assert isinstance(context_QND, Tensor)
    return context_QND


def nested_attention(
    query_QND: Tensor, key_TND: Tensor, value_TND: Tensor, layout: PackedSeqParams, dropout: float
) -> Tensor:
    """The fused kernels behind jagged nested tensors, which take dropout and float32."""

    def nested(row_TND: Tensor, bounds: Tensor, longest: int) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(row_TND, bounds.long(), min_seqlen=1, max_seqlen=longest)
        return jagged.transpose(1, 2)

    query = nested(query_QND, layout.cu_seqlens_q, layout.max_seqlen_q)
    key, value = (nested(row, layout.cu_seqlens_kv, layout.max_seqlen_kv) for row in (key_TND, value_TND))
    output = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    context_QND: Tensor = output.transpose(1, 2).values()
    return context_QND


def attention_maps(query_TND: Tensor, key_TND: Tensor, layout: PackedSeqParams) -> list[Tensor]:
    """What the kernels above never write down: each query's weights over the keys, float32 [N, L, L] a sequence."""
    lengths = torch.diff(layout.cu_seqlens_q).tolist()
    scale = query_TND.shape[-1] ** -0.5
    pieces = zip(query_TND.float().split(lengths), key_TND.float().split(lengths), strict=True)
    scores = (torch.einsum("qnd,knd->nqk", query * scale, key) for query, key in pieces)
    return [score_NLL.softmax(dim=-1) for score_NLL in scores]


ATTENTION: dict[str, AttentionFunction] = {
    "sdpa-by-sequence": attention_by_sequence,
    "varlen-flash": varlen_flash_attention,
    "nested": nested_attention,
}


class PackedAttention(MegatronModule):
    """The `core_attention` of a Megatron layer spec, over packed rows; Megatron's own calls CUDA even on a CPU."""

    def __init__(self, config: TransformerConfig, layer_number: int, backend: str, **_: Any) -> None:
        """`backend` is a key of `ATTENTION`; Megatron passes more that packing has no use for."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.attend = ATTENTION[backend]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        """query, key, value [T, N, D] -> context [Q, N, D]; who sees whom is in `packed_seq_params`, not in a mask."""
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
        return pad(context, (0, 0, 0, 0, 0, max(packed_seq_params.context_rows - len(context), 0)))
