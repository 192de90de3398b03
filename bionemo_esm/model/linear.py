"""Megatron's two linear layers with their products taken by oneDNN on a CPU, forward and backward.

PyTorch takes float32 products on a CPU by MKL, which leaves AMD's AVX512 unused: 212 GFLOP/s on two cores where oneDNN,
which PyTorch brings along, does 467 (`benchmarks/notes.md`). Names and shapes of parameters are Megatron's.

Shape suffixes: T tokens of the row, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from bionemo_esm.model.parallel import tensor_parallel_size


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
