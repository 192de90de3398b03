"""Recomputation of activations in the backward pass (Chen et al. 2016; Korthikanti et al. 2022, in Megatron's words).

`full`: a block saves its input, and the backward pass computes the whole block again, a third more operations.
`selective`: a block also saves the results of its matrix products and of fused attention; layer norms, GELU, dropout
and sums are computed again, and attention where a CPU would store its probabilities. Both restore the random number
generators, so loss and gradients are those of a run without recomputation, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bionemo_esm.model.config import NO_RECOMPUTE, SELECTIVE_RECOMPUTE

_PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
_FUSED_ATTENTION = ("attention", "varlen_attn")  # parts of the names of PyTorch's fused kernels


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Save the results of large matrix products and of fused attention."""
    name = operator.name().split(".")[0]
    expensive = name in _PRODUCTS or any(part in name for part in _FUSED_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(compute: Callable[[Tensor], Tensor], input_: Tensor, recompute: str) -> Tensor:
    """Return `compute(input_)`; the backward pass calls `compute` again. recompute: a name in `RECOMPUTE`."""
    if recompute == NO_RECOMPUTE or not torch.is_grad_enabled():
        return compute(input_)
    options: dict[str, Any] = {}
    if recompute == SELECTIVE_RECOMPUTE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    output: Tensor = checkpoint(compute, input_, use_reentrant=False, **options)
    return output
