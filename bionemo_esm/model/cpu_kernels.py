"""Kernels for a CPU: matrix products by oneDNN, dropout, and attention with dropout.

The rest of the package calls these three functions where `FusedBackends.linear` is "oneDNN" and tensors are on a CPU:

- `linear`: PyTorch multiplies float32 with MKL, which leaves AVX512 of AMD CPUs unused: 212 GFLOP/s on two cores, where
  oneDNN, which PyTorch contains, reaches 467 (`benchmarks/notes.md`).
- `dropout_scale`: 60 times as fast as PyTorch's dropout, which draws numbers one after another. A splitmix64 stream
  (Steele, Lea and Flood, OOPSLA 2014) hashes a counter; each word decides four times. The key is drawn from PyTorch's
  generator, so its seed determines the result.
- `attention`: no fused CPU kernel takes dropout, and the one for bfloat16 computes in float32.

Shape suffixes: T tokens of the row, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bionemo_esm.compat import onednn_linear, softmax_backward
from bionemo_esm.data.kernels import compiled

# --- matrix products --------------------------------------------------------------------------------------------------


def product(input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return input x weight^T + bias, [T, O], in their dtype, without gradients.

    Each matrix must be contiguous, or the transpose of a contiguous one: oneDNN is a thousand times slower on rows with
    gaps.
    """
    return onednn_linear(input_TI, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(input_TI, weight_OI)
        return product(input_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, weight_OI = ctx.saved_tensors
        gradient_TO = gradient_TO.contiguous()
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient_TO, weight_OI.t()) if needs_input else None,
            product(gradient_TO.t(), input_TI.t()) if needs_weight else None,
            gradient_TO.sum(dim=0) if needs_bias else None,
        )


def linear(input_T1I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """Return the layer's output with its bias, [T, 1, O], float32 or bfloat16, differentiable."""
    flat_TI = input_T1I.flatten(0, 1).contiguous()
    compute: Any = _Linear.apply if torch.is_grad_enabled() else product
    output_T1O: Tensor = compute(flat_TI, weight_OI, bias_O).unflatten(0, input_T1I.shape[:2])
    return output_T1O


# --- dropout ----------------------------------------------------------------------------------------------------------

_U = np.uint64
_INCREMENT, _MULTIPLIER_1, _MULTIPLIER_2 = _U(0x9E3779B97F4A7C15), _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_LOW = _U(2**16 - 1)
_DRAWS = 4  # draws of 16 bits in a word
_STEPS = 2**16
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


@compiled
def fill(bits: Any, key: Any, bound: Any, kept: Any) -> None:
    """Fill integers [4 n] with `kept` where a draw is at least `bound` of 65,536, else 0; key, bound: uint64.

    The four draws of a word fill places a quarter of the array apart, so that the compiler vectorises the loop.
    """
    quarter = _U(bits.size // 4)
    first, second = bits[:quarter], bits[quarter : 2 * quarter]
    third, fourth = bits[2 * quarter : 3 * quarter], bits[3 * quarter :]
    dropped = kept ^ kept
    for place in range(quarter):
        word = key + _U(place) * _INCREMENT
        word ^= word >> _U(30)
        word *= _MULTIPLIER_1
        word ^= word >> _U(27)
        word *= _MULTIPLIER_2
        word ^= word >> _U(31)
        first[place] = kept if word & _LOW >= bound else dropped
        second[place] = kept if (word >> _U(16)) & _LOW >= bound else dropped
        third[place] = kept if (word >> _U(32)) & _LOW >= bound else dropped
        fourth[place] = kept if word >> _U(48) >= bound else dropped


def dropout_scale(shape: Sequence[int], probability: float, dtype: torch.dtype) -> Tensor:
    """Return dropout's factors: 0 with this probability (to 1/65,536), else 1 / (1 - probability).

    shape: of the result; dtype: float32, bfloat16 or float64. Draws one number from PyTorch's default generator.
    """
    bound = min(round(probability * _STEPS), _STEPS - 1)
    kept = torch.tensor(_STEPS / (_STEPS - bound), dtype=dtype, device="cpu").view(_BITS[dtype])
    size = int(np.prod(shape))
    scales = torch.empty(-(-size // _DRAWS) * _DRAWS, dtype=dtype, device="cpu")
    key = np.uint64(int(torch.randint(2**63 - 1, (), device="cpu")))
    fill(scales.view(_BITS[dtype]).numpy(), key, np.uint64(bound), kept.numpy()[()])
    return scales[:size].view(*shape)


# --- attention --------------------------------------------------------------------------------------------------------


_LENGTH_BUCKET = 32  # tokens


class _Attention(torch.autograd.Function):
    """oneDNN compiles a kernel for each new shape of a bfloat16 product. Numbers of queries and keys are therefore
    padded to multiples of `_LENGTH_BUCKET`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        ctx.scale, ctx.queries, ctx.keys = query.shape[-1] ** -0.5, query.shape[1], key.shape[1]
        if query.dtype == torch.bfloat16:
            query, key, value = _pad_length(query), _pad_length(key), _pad_length(value)
        scores = torch.bmm(_at_least_float32(query) * ctx.scale, _at_least_float32(key).transpose(1, 2))
        if key.shape[1] > ctx.keys:
            scores[:, :, ctx.keys :] = -torch.inf
        weights = scores.softmax(dim=-1).to(query.dtype)
        kept = dropout_scale(weights.shape, dropout, weights.dtype) if dropout else None
        ctx.save_for_backward(query, key, value, weights, kept)
        return torch.bmm(weights if kept is None else weights * kept, value)[:, : ctx.queries]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept = ctx.saved_tensors
        if query.shape[1] > ctx.queries:
            gradient = _pad_length(gradient)
        of_value = torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        if kept is not None:
            of_weights.mul_(kept)
        of_scores = softmax_backward(of_weights, weights)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        return of_query[:, : ctx.queries], of_key[:, : ctx.keys], of_value[:, : ctx.keys], None


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _pad_length(rows: Tensor) -> Tensor:
    """Pad [B, L, D] with zeros to the next multiple of `_LENGTH_BUCKET` in L."""
    missing = -rows.shape[1] % _LENGTH_BUCKET
    return pad(rows, (0, 0, 0, missing)) if missing else rows


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D)), dropped out, times v: query [B, Q, D], key and value [B, L, D] -> [B, Q, D].

    Scores are at least float32. Attention probabilities have the dtype of the arguments and are kept for the backward
    pass.
    """
    context: Tensor = _Attention.apply(query, key, value, dropout)  # type: ignore[no-untyped-call]
    return context
