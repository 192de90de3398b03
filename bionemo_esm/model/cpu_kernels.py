"""Megatron's two linear layers with their products taken by oneDNN on a CPU, forward and backward.

PyTorch takes float32 products on a CPU by MKL, which leaves AMD's AVX512 unused: 212 GFLOP/s on two cores where oneDNN,
which PyTorch brings along, does 467 (`benchmarks/notes.md`). Names and shapes of parameters are Megatron's.

Shape suffixes: T tokens of the row, I inputs and O outputs of a layer.

The draws of dropout: a splitmix64 stream (Steele, Lea and Flood, OOPSLA 2014), each word deciding four times.

Dropout on a CPU, sixty times as fast as PyTorch's, whose generator draws one number after another.

The draws are hashes of a counter (`draws.py`), whose key comes from PyTorch's generator: who seeds that has seeded
this. Shape suffixes: T tokens of the row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from bionemo_esm.data.kernels import compiled
from bionemo_esm.model.parallel import tensor_parallel_size

_U = np.uint64
_INCREMENT, _MULTIPLIER_1, _MULTIPLIER_2 = _U(0x9E3779B97F4A7C15), _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_LOW = _U(2**16 - 1)


@compiled
def fill(bits: Any, key: Any, bound: Any, kept: Any) -> None:
    """bits: integers [4 n], filled: `kept` where a draw is at least `bound` of 65,536, else 0; key, bound: uint64.

    The four draws of a word go to places a quarter of all apart, so that a compiler makes vector instructions of it.
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


_DRAWS = 4  # of 16 bits, in a word
_STEPS = 2**16
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def dropout_scale(shape: Sequence[int], probability: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by, on the CPU: 0 with this probability (to 1/65,536), else 1 / (1 - probability).

    shape: of the result; dtype: float32, bfloat16 or float64. Takes one number from PyTorch's default generator.
    """
    bound = min(round(probability * _STEPS), _STEPS - 1)
    kept = torch.tensor(_STEPS / (_STEPS - bound), dtype=dtype).view(_BITS[dtype])
    size = int(np.prod(shape))
    scales = torch.empty(-(-size // _DRAWS) * _DRAWS, dtype=dtype)
    key = np.uint64(int(torch.randint(2**63 - 1, ())))
    fill(scales.view(_BITS[dtype]).numpy(), key, np.uint64(bound), kept.numpy()[()])
    return scales[:size].view(*shape)


class Dropout(nn.Module):
    """`torch.nn.Dropout` for activations on a CPU."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return activations
        return activations * dropout_scale(activations.shape, self.probability, activations.dtype)


def get_dropout_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """In place of Megatron's `get_bias_dropout_add`: residual + dropout(output + bias) in one pass, [T, 1, H]."""

    def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        if not torch.is_grad_enabled() and not training:
            return output.add_(residual)  # which nobody else holds
        if not training or probability == 0:
            return residual + output
        return torch.addcmul(residual, output, dropout_scale(output.shape, probability, output.dtype))

    return add


def product(input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """input x weight^T + bias, [T, O], in their dtype; no gradients.

    Each matrix is contiguous, or the transpose of one that is: rows with gaps between them are a thousand times slower.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input_TI, weight_OI, bias_O, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(input_TI, weight_OI)
        return product(input_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, weight_OI = ctx.saved_tensors
        gradient_TO = gradient_TO.contiguous()
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient_TO, weight_OI.t()) if of_input else None,
            product(gradient_TO.t(), input_TI.t()) if of_weight else None,
            gradient_TO.sum(dim=0) if of_bias else None,
        )


def linear(input_T1I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """The layer's output with its bias, [T, 1, O], with gradients where they are wanted."""
    flat_TI = input_T1I.flatten(0, 1).contiguous()
    compute: Any = _Linear.apply if torch.is_grad_enabled() else product
    output_T1O: Tensor = compute(flat_TI, weight_OI, bias_O).unflatten(0, input_T1I.shape[:2])
    return output_T1O


def _is_ours(input_T1I: Tensor) -> bool:
    """Megatron's own products serve where weights are split over ranks, and in float64, which oneDNN does not take."""
    return tensor_parallel_size() == 1 and input_T1I.dtype != torch.float64


class ColumnLinear(ColumnParallelLinear):
    """Megatron's layer that is split along its outputs, here whole."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, I] -> [T, 1, O] with the bias added, and None: no bias is left to be added."""
        if not _is_ours(input_):
            parts: tuple[Tensor, Tensor | None] = super().forward(input_, weight, runtime_gather_output)
            return parts
        return linear(input_, self.weight if weight is None else weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Megatron's layer that is split along its inputs, here whole."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if not _is_ours(input_):
            parts: tuple[Tensor, Tensor | None] = super().forward(input_)
            return parts
        return linear(input_, self.weight, self.bias), None
