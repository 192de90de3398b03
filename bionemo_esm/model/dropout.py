"""Dropout on a CPU, sixty times as fast as PyTorch's, whose generator draws one number after another.

The draws are hashes of a counter (`draws.py`), whose key comes from PyTorch's generator: who seeds that has seeded
this. Shape suffixes: T tokens of the row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_DRAWS = 4  # of 16 bits, in a word
_STEPS = 2**16
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def keep_scale(shape: Sequence[int], probability: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by, on the CPU: 0 with this probability (to 1/65,536), else 1 / (1 - probability).

    shape: of the result; dtype: float32, bfloat16 or float64. Takes one number from PyTorch's default generator.
    """
    from bionemo_esm.model.draws import fill  # Numba, half a second, for who trains

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
        return activations * keep_scale(activations.shape, self.probability, activations.dtype)


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
        return torch.addcmul(residual, output, keep_scale(output.shape, probability, output.dtype))

    return add
