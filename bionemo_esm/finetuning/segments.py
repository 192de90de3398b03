"""Sums, maxima and neighbourhoods within proteins that lie end to end: no padding, and no loop over proteins.

What a protein is given depends on its own residues alone; its neighbours in the row change no bit of it on a CPU, but
for a matrix product's rounding. Shape suffixes: R residues of all proteins, S proteins, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where proteins of one or more residues each lie in a row of R residues."""

    lengths: Tensor  # int64 [S], residues of each protein
    protein: Tensor  # int64 [R], to which protein a residue belongs
    place: Tensor  # int64 [R], its place in that protein, from 0

    @classmethod
    def of(cls, bounds_S1: Tensor, residues: int) -> Segments:
        """`bounds_S1`: int64 [S + 1], from 0 to `residues`, on the device of what is to be computed."""
        lengths_S = bounds_S1.diff()
        proteins_S = torch.arange(len(lengths_S), device=bounds_S1.device)
        protein_R = proteins_S.repeat_interleave(lengths_S, output_size=residues)  # the size spares a GPU a wait
        first_R = bounds_S1.index_select(0, protein_R)
        return cls(lengths_S, protein_R, torch.arange(residues, device=bounds_S1.device) - first_R)

    def sums(self, rows_RF: Tensor) -> Tensor:
        """Of each protein, the sum of its rows: float64 [S, F], so that 30,000 residues add up as well as one."""
        empty_SF = rows_RF.new_zeros(len(self.lengths), rows_RF.shape[1], dtype=torch.float64)
        return empty_SF.index_add(0, self.protein, rows_RF.double())

    def mean(self, rows_RF: Tensor) -> Tensor:
        """Of each protein, the mean of its rows, [S, F] in their dtype."""
        return (self.sums(rows_RF) / self.lengths[:, None]).to(rows_RF.dtype)

    def maximum(self, rows_RF: Tensor) -> Tensor:
        """Of each protein, the largest of each feature, [S, F]. Rows that share it share its gradient."""
        empty_SF = rows_RF.new_zeros(len(self.lengths), rows_RF.shape[1])
        places_RF = self.protein[:, None].expand_as(rows_RF)
        return empty_SF.scatter_reduce(0, places_RF, rows_RF, "amax", include_self=False)

    def attended(self, values_RF: Tensor, scores_RF: Tensor) -> Tensor:
        """Of each protein, the sum of its values times the softmax of its scores over its residues: [S, F].

        `scores_RF`: of each feature, or [R, 1] for all of them. The largest score of a protein is taken off before the
        exponential, so that no score is too large; it cancels out, and so has no gradient.
        """
        largest_SF = self.maximum(scores_RF.detach())
        weights_RF = (scores_RF - largest_SF.index_select(0, self.protein)).exp()
        return (self.sums(values_RF * weights_RF) / self.sums(weights_RF)).to(values_RF.dtype)

    def has_neighbour(self, offset: int) -> Tensor:
        """Whether a residue's own protein goes on for `offset` residues after it, or -`offset` before: bool [R]."""
        there_R = self.place + offset
        return (there_R >= 0) & (there_R < self.lengths.index_select(0, self.protein))
