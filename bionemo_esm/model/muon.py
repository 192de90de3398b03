"""Muon for the matrices of the blocks, AdamW for embeddings, biases and norms: one optimizer for the whole model.

`torch.optim.Muon` updates a matrix by its momentum, orthogonalized by Newton-Schulz iterations (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). With `match_rms_adamw` an update has the typical size of AdamW's, so that
one learning rate serves both (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from bionemo_esm.model.parallel import gather_shards, is_split, local_shard

MOMENTUM = "momentum"
"""A key that the groups of Muon have, and those of AdamW do not."""


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for the groups with `momentum`, `torch.optim.AdamW(fused=True)` for the others.

    Both keep their state in this optimizer's `state`. `adamw_lr_ratio` of a group of AdamW multiplies its rate.

    A matrix that tensor parallelism splits is gathered before it is orthogonalized, on every rank that holds a part of
    it. Each rank keeps its part of the momentum, and of the update.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float) -> None:
        """`groups`: of 2-dimensional float32 tensors with `momentum`, of any float32 tensors without it."""
        self._muon = Muon([group for group in groups if MOMENTUM in group], lr=lr)
        self._adamw = AdamW([group for group in groups if MOMENTUM not in group], lr=lr, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        matrices = [group for group in self.param_groups if MOMENTUM in group]
        rest = [group for group in self.param_groups if MOMENTUM not in group]
        self._muon.param_groups = [
            {**group, "params": [m for m in group["params"] if not is_split(m)]} for group in matrices
        ]
        self._adamw.param_groups = [{**group, "lr": group["lr"] * group["adamw_lr_ratio"]} for group in rest]
        optimizer: Any
        for optimizer in (self._muon, self._adamw):
            optimizer.state = self.state  # loading a state replaces it
            optimizer.step()
        for group in matrices:
            for master in group["params"]:
                if is_split(master) and master.grad is not None:
                    self._update_split(master, group)

    def _update_split(self, master: Tensor, group: dict[str, Any]) -> None:
        """Update this rank's part of a matrix as `torch.optim.Muon` updates the whole. Collective."""
        assert master.grad is not None
        momentum = self.state[master].setdefault("momentum_buffer", torch.zeros_like(master.grad))
        momentum.lerp_(master.grad, 1 - group["momentum"])
        direction = master.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        gradient = gather_shards(direction, master)
        update = Parameter(torch.zeros_like(gradient))
        update.grad = gradient
        settings = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        whole: Any = Muon([update], weight_decay=0.0, momentum=0.0, nesterov=False, **settings)
        whole.step()
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(local_shard(update, master))
