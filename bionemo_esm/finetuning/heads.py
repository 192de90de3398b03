"""What turns the features of residues into predictions, of each residue or of each protein.

Proteins lie end to end in one row, without <cls>, <eos> or padding. Heads compute in float32, whatever the encoder
does. Shape suffixes: R residues of the row, S proteins, F features, H hidden features or channels, C outputs, K kernel
size.

Sums, maxima and neighbourhoods within proteins that lie end to end: no padding, and no loop over proteins.

What a protein is given depends on its own residues alone; its neighbours in the row change no bit of it on a CPU, but
for a matrix product's rounding. Shape suffixes: R residues of all proteins, S proteins, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from bionemo_esm.finetuning.config import ATTENTION, LINEAR, MAX, MEAN, MLP, HeadConfig
from bionemo_esm.finetuning.tasks import Task


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


BUFFERS = ("head.shift", "head.scale")
"""Of every head, by their names in an archive: found out from the features, and not trained."""
SMALLEST_DEVIATION = 1e-6
"""Of a feature that is taken to differ between residues."""


class Head(nn.Module):
    """From features to `Task.outputs` numbers: logits of the classes, or one number, standardised.

    Features are standardised first, by what `standardise` was told: buffers `shift` and `scale`, float32 [F].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(features, dtype=torch.float32))

    def standardise(self, mean_F: Tensor, deviation_F: Tensor) -> None:
        """From now on take features less their mean, over their deviation; those that never differ are only shifted."""
        self.shift.copy_(mean_F)
        self.scale.copy_(torch.where(deviation_F > SMALLEST_DEVIATION, 1 / deviation_F, 1.0))

    def forward(self, features_RF: Tensor, bounds_S1: Tensor) -> Tensor:
        """float32 [R, C] of a task per residue, [S, C] of one per protein.

        features_RF: of any floating dtype; bounds_S1: int64 [S + 1], where proteins, of one or more residues each,
        begin and end; on the same device. What a protein is given does not depend on its neighbours, but for rounding.
        """
        standard_RF = (features_RF.float() - self.shift) * self.scale
        return self.predicted(standard_RF, Segments.of(bounds_S1, len(features_RF)))

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        """`forward`, of float32 features."""
        raise NotImplementedError


def build_head(config: HeadConfig, task: Task, features: int) -> Head:
    """A head for features [R, `features`], its weights drawn from PyTorch's generator. Raises `ConfigError`."""
    config.check_for(task.name, task.is_per_residue)
    per_residue = task.is_per_residue
    if config.kind == LINEAR:
        return LinearHead(config, features, task.outputs, per_residue)
    if config.kind == MLP:
        return MLPHead(config, features, task.outputs, per_residue)
    if config.kind == ATTENTION:
        return AttentionHead(config, features, task.outputs)
    convnet = ResidueConvNet if per_residue else SequenceConvNet
    return convnet(config, features, task.outputs)


def head_shapes(config: HeadConfig, task: Task, features: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer that `build_head` would make; nothing is allocated or drawn."""
    with torch.device("meta"):
        head = build_head(config, task, features)
    return {name: tuple(tensor.shape) for name, tensor in (*head.named_parameters(), *head.named_buffers())}


# --- parts ------------------------------------------------------------------------------------------------------------


class Pooling(nn.Module):
    """From rows of residues to rows of proteins, [R, F] -> [S, F]: their mean, their maximum, or a weighted mean.

    With `attention` a residue's weight is the softmax, over its protein, of a learned linear score: `Attention1d` of
    FLIP's baselines. A score's bias would cancel out, so there is none.
    """

    def __init__(self, kind: str, features: int) -> None:
        super().__init__()
        self.kind = kind
        self.score = nn.Linear(features, 1, bias=False, dtype=torch.float32) if kind == ATTENTION else None

    def forward(self, rows_RF: Tensor, segments: Segments) -> Tensor:
        if self.score is not None:
            scores_R1: Tensor = self.score(rows_RF)
            return segments.attended(rows_RF, scores_R1)
        assert self.kind in (MEAN, MAX)
        return segments.mean(rows_RF) if self.kind == MEAN else segments.maximum(rows_RF)


class PackedConvolution(nn.Conv1d):
    """A convolution along each protein, [R, F] -> [R, H]: what `nn.Conv1d`, padded with zeros, gives each one alone.

    Parameters are those of `nn.Conv1d`. A residue is multiplied by all K slices of the kernel at once, and what a slice
    gives is added to that neighbour for which it counts, if it is of the same protein.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, bias: bool = True) -> None:
        assert kernel_size % 2 == 1, "an even kernel has no middle"
        super().__init__(inputs, outputs, kernel_size, bias=bias, dtype=torch.float32)

    def forward(self, rows_RF: Tensor, segments: Segments) -> Tensor:  # type: ignore[override]
        (size,) = self.kernel_size
        reach = size // 2
        slices_FKH = self.weight.permute(1, 2, 0)
        parts_RKH = (rows_RF @ slices_FKH.flatten(1)).unflatten(1, slices_FKH.shape[1:])
        parts_RH = parts_RKH.unbind(1)
        sum_RH: Tensor = parts_RH[reach] if self.bias is None else parts_RH[reach] + self.bias
        for offset in (*range(-reach, 0), *range(1, reach + 1)):
            neighbours_RH = parts_RH[reach + offset].roll(-offset, 0)
            sum_RH = sum_RH + neighbours_RH.where(segments.has_neighbour(offset)[:, None], 0.0)
        return sum_RH


# --- heads ------------------------------------------------------------------------------------------------------------


class LinearHead(Head):
    """One linear layer, of a residue's features or of a protein's pooled ones; no dropout."""

    def __init__(self, config: HeadConfig, features: int, outputs: int, per_residue: bool) -> None:
        super().__init__(features)
        self.pooling = None if per_residue else Pooling(config.pooling, features)
        self.output = nn.Linear(features, outputs, dtype=torch.float32)

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        pooled: Tensor = features_RF if self.pooling is None else self.pooling(features_RF, segments)
        predicted: Tensor = self.output(pooled)
        return predicted


class MLPHead(Head):
    """Linear, GELU, dropout, linear, of a residue's features or of a protein's pooled ones."""

    def __init__(self, config: HeadConfig, features: int, outputs: int, per_residue: bool) -> None:
        super().__init__(features)
        self.pooling = None if per_residue else Pooling(config.pooling, features)
        self.hidden = nn.Linear(features, config.hidden, dtype=torch.float32)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden, outputs, dtype=torch.float32)

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        pooled: Tensor = features_RF if self.pooling is None else self.pooling(features_RF, segments)
        predicted: Tensor = self.output(self.dropout(gelu(self.hidden(pooled))))
        return predicted


class ResidueConvNet(Head):
    """FLIP's for tasks per residue: convolution, ReLU, dropout, convolution.

    `CNN` in biotrainer's `models/CNN.py`, with which FLIP's authors trained them: 32 channels, kernels of 7.
    """

    def __init__(self, config: HeadConfig, features: int, outputs: int) -> None:
        super().__init__(features)
        self.convolution = PackedConvolution(features, config.hidden, config.kernel_size)
        self.dropout = nn.Dropout(config.dropout)
        self.output = PackedConvolution(config.hidden, outputs, config.kernel_size)

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        hidden_RH = self.dropout(relu(self.convolution(features_RF, segments)))
        predicted_RC: Tensor = self.output(hidden_RH, segments)
        return predicted_RC


class SequenceConvNet(Head):
    """FLIP's for tasks per protein: convolution, ReLU, linear to twice the channels, ReLU, pooling, dropout, linear.

    `FluorescenceModel` in FLIP's `baselines/models.py`, which pools by the maximum, and there over padding, too.
    """

    def __init__(self, config: HeadConfig, features: int, outputs: int) -> None:
        super().__init__(features)
        self.convolution = PackedConvolution(features, config.hidden, config.kernel_size)
        self.widening = nn.Linear(config.hidden, 2 * config.hidden, dtype=torch.float32)
        self.pooling = Pooling(config.pooling, 2 * config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(2 * config.hidden, outputs, dtype=torch.float32)

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        hidden_RH = relu(self.convolution(features_RF, segments))
        pooled_SH = self.pooling(relu(self.widening(hidden_RH)), segments)
        predicted_SC: Tensor = self.output(self.dropout(pooled_SH))
        return predicted_SC


class AttentionHead(Head):
    """Light attention (Stark et al. 2021, doi:10.1093/bioadv/vbab035), simplified.

    Two convolutions give H values and H scores of each residue; values go through dropout. Of each channel the softmax
    of the scores over a protein's residues weighs its values; beside that sum stands their maximum, and a linear layer
    reads both. Theirs has as many channels as features, and an MLP with batch normalisation in place of that layer.
    """

    def __init__(self, config: HeadConfig, features: int, outputs: int) -> None:
        super().__init__(features)
        self.values = PackedConvolution(features, config.hidden, config.kernel_size)
        self.scores = PackedConvolution(features, config.hidden, config.kernel_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(2 * config.hidden, outputs, dtype=torch.float32)

    def predicted(self, features_RF: Tensor, segments: Segments) -> Tensor:
        values_RH = self.dropout(self.values(features_RF, segments))
        attended_SH = segments.attended(values_RH, self.scores(features_RF, segments))
        predicted_SC: Tensor = self.output(torch.cat([attended_SH, segments.maximum(values_RH)], dim=1))
        return predicted_SC
