"""Contacts from attention maps by logistic regression (Rao et al. 2020, doi:10.1101/2020.12.15.422761).

As `ContactPredictionHead` in fair-esm's `esm/modules.py`. Shape suffixes: N heads, L tokens of a sequence with `<cls>`
and `<eos>`, R residues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bionemo_esm.model.attention import FixedTensors


def average_product_correction(map_NRR: Tensor) -> Tensor:
    """Maps [..., R, R] without what rows and columns explain: a - (row sum x column sum) / sum of all."""
    rows = map_NRR.sum(-1, keepdim=True)
    columns = map_NRR.sum(-2, keepdim=True)
    total = map_NRR.sum((-1, -2), keepdim=True)
    return map_NRR - rows * columns / total.clamp_min(torch.finfo(total.dtype).tiny)  # a map of zeros stays one


def regression_features(maps_NLL: Tensor) -> Tensor:
    """A layer's attention maps as the regression reads them: float32 [N, R, R], symmetric, and corrected."""
    residues_NRR = maps_NLL.float()[:, 1:-1, 1:-1]  # <cls> and <eos> are no residues
    return average_product_correction(residues_NRR + residues_NRR.transpose(-1, -2))


class ContactHead(FixedTensors):
    """The regression's weights, one for each attention head of each layer, and its bias; zeros until they are fitted.

    Maps come layer by layer and are added up at once, so that those of one layer are held and no more.
    """

    def __init__(self, features: int) -> None:
        """`features`: attention heads of all layers."""
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, features))
        self.register_buffer("bias", torch.zeros(1))

    def evidence(self, layer: int, maps_NLL: Tensor) -> Tensor:
        """What one layer (numbered from 1) adds to the log-odds of each pair of residues: float32 [R, R]."""
        assert isinstance(self.weight, Tensor)
        heads = len(maps_NLL)
        weight_N = self.weight[0, (layer - 1) * heads : layer * heads]
        return torch.einsum("n,nij->ij", weight_N, regression_features(maps_NLL))

    def forward(self, evidence_RR: Tensor) -> Tensor:
        """Probability of contact of each pair of residues, float32 [R, R], from the evidence of all layers."""
        assert isinstance(self.bias, Tensor)
        return torch.sigmoid(evidence_RR + self.bias)
