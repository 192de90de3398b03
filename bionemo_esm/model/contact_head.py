"""Contacts from attention maps by logistic regression (Rao et al. 2020, doi:10.1101/2020.12.15.422761).

As `ContactPredictionHead` in fair-esm's `esm/modules.py`. Shape suffixes: N heads, L tokens of a sequence with `<cls>`
and `<eos>`, R residues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bionemo_esm.model.attention import FixedTensors


def average_product_correction(map_NRR: Tensor) -> Tensor:
    """Return maps [..., R, R] minus the product of row and column sums over the total sum."""
    rows = map_NRR.sum(-1, keepdim=True)
    columns = map_NRR.sum(-2, keepdim=True)
    total = map_NRR.sum((-1, -2), keepdim=True)
    return map_NRR - rows * columns / total.clamp_min(torch.finfo(total.dtype).tiny)  # a map of zeros stays zero


def regression_features(maps_NLL: Tensor) -> Tensor:
    """Return a layer's attention maps as features of the regression: float32 [N, R, R], symmetric and corrected."""
    residues_NRR = maps_NLL.float()[:, 1:-1, 1:-1]  # without <cls> and <eos>
    return average_product_correction(residues_NRR + residues_NRR.transpose(-1, -2))


class ContactHead(FixedTensors):
    """One weight for each attention head of each layer, and a bias; zeros until they are fitted.

    The maps of one layer at a time are added up, so that only one layer's are in memory.
    """

    def __init__(self, features: int) -> None:
        """`features`: attention heads of all layers."""
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, features))
        self.register_buffer("bias", torch.zeros(1))

    def evidence(self, layer: int, maps_NLL: Tensor) -> Tensor:
        """Return one layer's (numbered from 1) summand of each pair's log-odds: float32 [R, R]."""
        assert isinstance(self.weight, Tensor)
        heads = len(maps_NLL)
        weight_N = self.weight[0, (layer - 1) * heads : layer * heads]
        return torch.einsum("n,nij->ij", weight_N, regression_features(maps_NLL))

    def forward(self, evidence_RR: Tensor) -> Tensor:
        """Return the contact probability of each pair of residues, float32 [R, R], from the sum over all layers."""
        assert isinstance(self.bias, Tensor)
        return torch.sigmoid(evidence_RR + self.bias)
