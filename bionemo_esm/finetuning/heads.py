"""Heads: from the features of residues to predictions for residues or proteins.

A head is a class with its settings, registered under the name that `head.kind` selects:

    class GatedConfig(HeadConfig, section="head"):
        gates: int = 4

    @HEADS.register("gated")
    class GatedHead(Head):
        settings = GatedConfig

        def __init__(self, config: GatedConfig, task: Task, features: int) -> None: ...
        def predict(self, features_RF: Tensor, segments: Segments) -> Tensor: ...

An installed package adds one by an entry point in the group `bionemo_esm.heads` (see `registry.py`).

Proteins are packed: one row of residues, end to end, without <cls>, <eos> or padding. No head reads across the border
of two proteins, and none loops over proteins. Heads compute in float32. Shape suffixes: R residues of the row,
S proteins, F features, H hidden features or channels, C outputs, K kernel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import ATTENTION, CONVNET, LINEAR, MAX, MEAN, MLP, HeadConfig
from bionemo_esm.finetuning.tasks import Task, from_archive
from bionemo_esm.registry import Registry


@dataclass(frozen=True)
class Segments:
    """Positions of proteins, of one or more residues each, in a row of R residues."""

    lengths: Tensor  # int64 [S], residues of each protein
    protein: Tensor  # int64 [R], number of each residue's protein
    place: Tensor  # int64 [R], position of each residue in its protein, from 0

    @classmethod
    def of(cls, bounds_S1: Tensor, residues: int) -> Segments:
        """`bounds_S1`: int64 [S + 1], from 0 to `residues`, on the device of the features."""
        lengths_S = bounds_S1.diff()
        proteins_S = torch.arange(len(lengths_S), device=bounds_S1.device)
        protein_R = proteins_S.repeat_interleave(lengths_S, output_size=residues)  # a given size avoids a host sync
        first_R = bounds_S1.index_select(0, protein_R)
        return cls(lengths_S, protein_R, torch.arange(residues, device=bounds_S1.device) - first_R)

    def sums(self, rows_RF: Tensor) -> Tensor:
        """Sum of each protein's rows: float64 [S, F], so that long proteins add up as exactly as short ones."""
        empty_SF = rows_RF.new_zeros(len(self.lengths), rows_RF.shape[1], dtype=torch.float64)
        return empty_SF.index_add(0, self.protein, rows_RF.double())

    def mean(self, rows_RF: Tensor) -> Tensor:
        """Mean of each protein's rows, [S, F] in their dtype."""
        return (self.sums(rows_RF) / self.lengths[:, None]).to(rows_RF.dtype)

    def maximum(self, rows_RF: Tensor) -> Tensor:
        """Maximum of each feature over each protein, [S, F]. Rows that share it share its gradient."""
        empty_SF = rows_RF.new_zeros(len(self.lengths), rows_RF.shape[1])
        places_RF = self.protein[:, None].expand_as(rows_RF)
        return empty_SF.scatter_reduce(0, places_RF, rows_RF, "amax", include_self=False)

    def attended(self, values_RF: Tensor, scores_RF: Tensor) -> Tensor:
        """Sum of each protein's values, weighted by the softmax of its scores over its residues: [S, F].

        `scores_RF`: for each feature, or [R, 1] for all of them. A protein's largest score is subtracted before the
        exponential, to avoid overflow; it cancels out, and has no gradient.
        """
        largest_SF = self.maximum(scores_RF.detach())
        weights_RF = (scores_RF - largest_SF.index_select(0, self.protein)).exp()
        return (self.sums(values_RF * weights_RF) / self.sums(weights_RF)).to(values_RF.dtype)

    def has_neighbour(self, offset: int) -> Tensor:
        """Whether the residue at this offset, positive or negative, belongs to the same protein: bool [R]."""
        there_R = self.place + offset
        return (there_R >= 0) & (there_R < self.lengths.index_select(0, self.protein))


BUFFERS = ("head.shift", "head.scale")
"""Buffers of every head, by their names in an archive: computed from the features, not trained."""
SMALLEST_DEVIATION = 1e-6
"""A feature with a smaller deviation counts as constant."""


class Head(nn.Module):
    """Base of all heads: `Task.outputs` numbers from features; logits of the classes, or one standardised number.

    Features are standardised first, by the buffers `shift` and `scale`, float32 [F]. A subclass declares its `settings`
    and implements `predict`; its constructor calls `super().__init__(features)`.
    """

    settings: ClassVar[type[HeadConfig]] = HeadConfig
    shift: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(features, dtype=torch.float32))

    @classmethod
    def check_task(cls, task: str, per_residue: bool) -> None:
        """Raise `ConfigError` if this head does not fit a task of this name and level; by default every task fits."""

    @classmethod
    def reads_means(cls, config: HeadConfig) -> bool:
        """Whether the head, for a task per protein, depends on nothing but the mean of a protein's features."""
        return False

    def standardise(self, mean_F: Tensor, deviation_F: Tensor) -> None:
        """Standardise features by this mean and deviation from now on; a constant feature is only shifted."""
        self.shift.copy_(mean_F)
        self.scale.copy_(torch.where(deviation_F > SMALLEST_DEVIATION, 1 / deviation_F, 1.0))

    def forward(self, features_RF: Tensor, bounds_S1: Tensor) -> Tensor:
        """Return float32 [R, C] for a task per residue, [S, C] for one per protein.

        features_RF: any floating dtype; bounds_S1: int64 [S + 1], where the proteins, of one or more residues each,
        begin and end; on the same device. The result for a protein does not depend on its neighbours, but for rounding.
        """
        standard_RF = (features_RF.float() - self.shift) * self.scale
        outputs: Tensor = self.predict(standard_RF, Segments.of(bounds_S1, len(features_RF)))
        residues, proteins = len(features_RF), len(bounds_S1) - 1
        if outputs.dim() != 2 or len(outputs) not in (residues, proteins):
            raise ConfigError(
                f"head {type(self).__name__} returns {list(outputs.shape)}: it must return "
                f"[{residues}, outputs] for a task per residue, [{proteins}, outputs] for one per protein",
                code="head.shape",
            )
        return outputs

    def predict(self, features_RF: Tensor, segments: Segments) -> Tensor:
        """Return what `forward` returns, from standardised float32 features."""
        raise NotImplementedError


HEADS: Registry[type[Head]] = Registry("head", "head.kind", "heads", Head)


def head_config(values: Mapping[str, Any]) -> HeadConfig:
    """Return the settings of a head of the given `kind`. Raises `ConfigError`, naming the key."""
    return HEADS.get(str(values["kind"])).settings.from_config(values)


def archived_head_config(values: Mapping[str, Any]) -> HeadConfig:
    """Return the settings that an archive holds. Raises `ConfigError`, also for a head that is not installed."""
    kind = str(values.get("kind"))
    if kind not in HEADS:
        raise ConfigError(
            f"head.kind must be one of {', '.join(HEADS)}, not {kind[:40]!r}; if another package adds this head, "
            "install that package",
            code="registry.unknown-name",
        )
    return from_archive(HEADS.get(kind).settings, "head", values)


def build_head(config: HeadConfig, task: Task, features: int) -> Head:
    """Return a head for features [R, `features`], its weights drawn from PyTorch's generator. Raises `ConfigError`."""
    kind: Any = HEADS.get(config.kind)  # the constructor of a subclass takes (config, task, features)
    kind.check_task(task.name, task.is_per_residue)
    head: Head = kind(config, task, features)
    return head


def head_shapes(config: HeadConfig, task: Task, features: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter and buffer that `build_head` makes; nothing is allocated or drawn."""
    with torch.device("meta"):
        head = build_head(config, task, features)
    return {name: tuple(tensor.shape) for name, tensor in (*head.named_parameters(), *head.named_buffers())}


# --- parts ------------------------------------------------------------------------------------------------------------


class Pooling(nn.Module):
    """From residues to proteins, [R, F] -> [S, F]: the mean, the maximum, or a weighted mean over residues.

    With `attention` a residue's weight is the softmax, over its protein, of a learned linear score: `Attention1d` of
    FLIP's baselines. The score has no bias, which would cancel out.
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
    """A convolution along each protein, [R, F] -> [R, H]: equal to `nn.Conv1d`, padded with zeros, on each one alone.

    Parameters are those of `nn.Conv1d`. Each residue is multiplied by all K slices of the kernel at once; the product
    with a slice is added to the neighbour at that offset, if it belongs to the same protein.
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


class _PooledHead(Head):
    """A head that is applied to each residue's features, or to the pooled features of a protein."""

    def __init__(self, config: HeadConfig, task: Task, features: int) -> None:
        super().__init__(features)
        self.pooling = None if task.is_per_residue else Pooling(config.pooling, features)

    @classmethod
    def reads_means(cls, config: HeadConfig) -> bool:
        return config.pooling == MEAN

    def pooled(self, features_RF: Tensor, segments: Segments) -> Tensor:
        """[R, F] per residue, [S, F] per protein."""
        pooled: Tensor = features_RF if self.pooling is None else self.pooling(features_RF, segments)
        return pooled


@HEADS.register(LINEAR)
class LinearHead(_PooledHead):
    """One linear layer, without dropout."""

    def __init__(self, config: HeadConfig, task: Task, features: int) -> None:
        super().__init__(config, task, features)
        self.output = nn.Linear(features, task.outputs, dtype=torch.float32)

    def predict(self, features_RF: Tensor, segments: Segments) -> Tensor:
        predicted: Tensor = self.output(self.pooled(features_RF, segments))
        return predicted


@HEADS.register(MLP)
class MLPHead(_PooledHead):
    """Linear, GELU, dropout, linear."""

    def __init__(self, config: HeadConfig, task: Task, features: int) -> None:
        super().__init__(config, task, features)
        self.hidden = nn.Linear(features, config.hidden, dtype=torch.float32)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden, task.outputs, dtype=torch.float32)

    def predict(self, features_RF: Tensor, segments: Segments) -> Tensor:
        predicted: Tensor = self.output(self.dropout(gelu(self.hidden(self.pooled(features_RF, segments)))))
        return predicted


@HEADS.register(CONVNET)
class ConvNetHead(Head):
    """FLIP's convolutional networks.

    Per residue: convolution, ReLU, dropout, convolution; `CNN` in biotrainer's `models/CNN.py`, by which FLIP's authors
    trained, with 32 channels and kernels of 7. Per protein: convolution, ReLU, linear to twice the channels, ReLU,
    pooling, dropout, linear; `FluorescenceModel` in FLIP's `baselines/models.py`, which pools by the maximum, and there
    over padding, too.
    """

    def __init__(self, config: HeadConfig, task: Task, features: int) -> None:
        super().__init__(features)
        self.convolution = PackedConvolution(features, config.hidden, config.kernel_size)
        self.dropout = nn.Dropout(config.dropout)
        self.pooling: Pooling | None = None
        if task.is_per_residue:
            self.output: nn.Module = PackedConvolution(config.hidden, task.outputs, config.kernel_size)
            return
        self.widening = nn.Linear(config.hidden, 2 * config.hidden, dtype=torch.float32)
        self.pooling = Pooling(config.pooling, 2 * config.hidden)
        self.output = nn.Linear(2 * config.hidden, task.outputs, dtype=torch.float32)

    def predict(self, features_RF: Tensor, segments: Segments) -> Tensor:
        hidden_RH = relu(self.convolution(features_RF, segments))
        if self.pooling is None:
            predicted_RC: Tensor = self.output(self.dropout(hidden_RH), segments)
            return predicted_RC
        pooled_SH = self.pooling(relu(self.widening(hidden_RH)), segments)
        predicted_SC: Tensor = self.output(self.dropout(pooled_SH))
        return predicted_SC


@HEADS.register(ATTENTION)
class AttentionHead(Head):
    """Light attention (Stark et al. 2021, doi:10.1093/bioadv/vbab035), simplified; for tasks per protein.

    Two convolutions give H values and H scores for each residue; values go through dropout. For each channel, the
    softmax of the scores over a protein's residues weights its values; a linear layer reads that sum and the maximum of
    the values. The original has as many channels as features, and an MLP with batch normalisation for the last layer.
    """

    def __init__(self, config: HeadConfig, task: Task, features: int) -> None:
        super().__init__(features)
        self.values = PackedConvolution(features, config.hidden, config.kernel_size)
        self.scores = PackedConvolution(features, config.hidden, config.kernel_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(2 * config.hidden, task.outputs, dtype=torch.float32)

    @classmethod
    def check_task(cls, task: str, per_residue: bool) -> None:
        if per_residue:
            raise ConfigError(
                f"head.kind {ATTENTION} weighs the residues of a protein, and {task} asks about each of them; "
                f"take {LINEAR}, {MLP} or {CONVNET}",
                code="head.task",
            )

    def predict(self, features_RF: Tensor, segments: Segments) -> Tensor:
        values_RH = self.dropout(self.values(features_RF, segments))
        attended_SH = segments.attended(values_RH, self.scores(features_RF, segments))
        predicted_SC: Tensor = self.output(torch.cat([attended_SH, segments.maximum(values_RH)], dim=1))
        return predicted_SC
