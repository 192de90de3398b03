"""One optimizer step of ours and of Hugging Face, with the same weights, proteins and masked positions.

Shape suffixes: B proteins, T tokens of the row or of the longest protein, V tokens of the alphabet, R residues.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import EsmForMaskedLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bionemo_esm.alphabet import PAD_ID, SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.collate import PackedBatch, pack, unpack
from bionemo_esm.data.dataloader import RankBatch
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.data.masking import MaskedResidues, MaskingPolicy, mask_sequences
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import load_weights
from theirs import Shape, hugging_face_model  # type: ignore[import-not-found]

WIDTH = 512  # tokens to which ESM-1nv's original training padded every protein; longer proteins are cropped
DROPOUT = 0.1  # of the recipes
FLOAT32, AUTOCAST, BF16 = "float32", "bf16 autocast over float32 weights", "pure bf16, no float32 masters"
"""Precisions of Hugging Face's models; the second is what its Trainer calls bf16."""
OPTIM = OptimConfig()
IGNORED = -100  # label of a position without a target


# --- proteins ---------------------------------------------------------------------------------------------------------


class MaskedProtein(NamedTuple):
    """A protein cropped to `WIDTH` tokens, and its masked input."""

    residues: NDArray[np.uint8]  # [R]
    shown: NDArray[np.uint8]  # [R], <mask> or another residue at some of the selected positions
    chosen: NDArray[np.bool_]  # [R]

    @property
    def tokens(self) -> int:
        return len(self.residues) + SPECIAL_TOKENS_PER_SEQUENCE


class PaddedBatch(NamedTuple):
    """int64 [B, T] each: tokens with <pad> on the right, attention mask, and labels (`IGNORED` without a target)."""

    tokens: Tensor
    real: Tensor
    labels: Tensor

    def to(self, device: str) -> PaddedBatch:
        return PaddedBatch(*(tensor.to(device) for tensor in self))


def masked_proteins(proteins: Sequence[Protein]) -> list[MaskedProtein]:
    """Return proteins cropped to `WIDTH` and masked by the recipes' policy, each by its place in the file."""
    masked = []
    for protein in proteins:
        residues = np.asarray(protein.tokens[: WIDTH - SPECIAL_TOKENS_PER_SEQUENCE], dtype=np.uint8)
        keys = derive_key(0, 0, protein.number)
        masked.append(
            MaskedProtein(residues, *mask_sequences(residues, np.array([len(residues)]), keys, MaskingPolicy()))
        )
    return masked


def alike(proteins: Sequence[MaskedProtein], count: int) -> list[MaskedProtein]:
    """Return `count` proteins in their order: one from each length quantile, with about the mean length of all."""
    if count >= len(proteins):
        return list(proteins)
    order = sorted(range(len(proteins)), key=lambda place: proteins[place].tokens)
    classes = [list(map(int, chunk)) for chunk in np.array_split(order, count)]
    chosen = [chunk[len(chunk) // 2] for chunk in classes]
    missing = tokens_of(proteins) * count / len(proteins) - sum(proteins[place].tokens for place in chosen)
    for index, chunk in enumerate(classes):  # each choice compensates for the error so far
        wanted = proteins[chosen[index]].tokens + missing
        chosen[index] = min(chunk, key=lambda place: abs(proteins[place].tokens - wanted))
        missing = wanted - proteins[chosen[index]].tokens
    return [proteins[place] for place in sorted(chosen)]


def tokens_of(proteins: Sequence[MaskedProtein]) -> int:
    """Return the number of tokens with <cls> and <eos>, without padding."""
    return sum(protein.tokens for protein in proteins)


def in_groups(proteins: Sequence[MaskedProtein], size: int) -> Iterator[Sequence[MaskedProtein]]:
    """Yield consecutive groups of `size` proteins."""
    return (proteins[begin : begin + size] for begin in range(0, len(proteins), size))


def packed(proteins: Sequence[MaskedProtein]) -> PackedBatch:
    """Return the proteins as one packed row, the input of our model."""
    residues, shown, chosen = (np.concatenate(parts) for parts in zip(*proteins, strict=True))
    lengths = np.array([len(protein.residues) for protein in proteins], dtype=np.int64)
    return pack(residues, lengths, MaskedResidues(shown, chosen))


def padded(proteins: Sequence[MaskedProtein], width: int | None) -> PaddedBatch:
    """Return the proteins padded to the longest, or to `width`, the input of Hugging Face's model."""
    row = packed(proteins)
    labels = torch.full_like(row.tokens, IGNORED)
    labels[row.target_index] = row.targets
    missing = 0 if width is None else width - row.max_seqlen

    def rows(row_T: Tensor, filling: int) -> Tensor:
        return pad(unpack(row_T, row.cu_seqlens, filling), (0, missing), value=filling)

    return PaddedBatch(rows(row.tokens, PAD_ID), rows(torch.ones_like(row.tokens), 0), rows(labels, IGNORED))


# --- both sides -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Loss and gradient norm of a step, before the weights change."""

    loss: float  # nats per masked position
    norm: float  # of all gradients, before clipping


class _WithoutLightning(ESM1nvModel):
    """Our model with the parts of Lightning that `training_step` calls: optimizer, schedule, backward, and log."""

    epoch = 0.0  # only for the log, which is discarded

    def prepare(self) -> None:
        (self._optimizer,), (schedule,) = self.configure_optimizers()
        self._schedule = schedule["scheduler"]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self._optimizer

    def lr_schedulers(self) -> Any:
        return self._schedule

    def manual_backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        loss.backward()

    def log_dict(self, *_: Any, **__: Any) -> None: ...


class Ours:
    """Our side: `ESM1nvModel.training_step` with its model, float32 masters and optimizer."""

    def __init__(self, archive: Path, precision: str, device: str) -> None:
        """Load the weights of one of our archives. `precision` of the computation: "32" or "bf16"."""
        if device == "cpu" and torch.cuda.is_available():
            raise ConfigError("device=cpu where there is a GPU: hide it, with CUDA_VISIBLE_DEVICES= before the command")
        self.device = device
        whole = read_archive(archive)
        rates = {"hidden_dropout": DROPOUT, "attention_dropout": DROPOUT}
        encoder = {**whole.config["encoder"], **rates}
        model = _WithoutLightning(OmegaConf.create({"encoder": encoder, "precision": precision}))
        weights = dict(whole.weights)
        load_weights(model, weights, str(archive))
        self.model = model.to(device).train()
        self.model.prepare()
        assert model.masters is not None
        assert model.backends is not None
        model.masters.load_state_dict({name: weights[name] for name in model.masters.masters})
        self.backends = model.backends.describe()

    def batches(self, proteins: Sequence[MaskedProtein], size: int) -> list[PackedBatch]:
        return [packed(some).to(self.device) for some in in_groups(proteins, size)]

    def step(self, batches: Sequence[PackedBatch]) -> Found:
        """Run one optimizer step to completion."""
        samples = sum(batch.sequences for batch in batches)
        self.model.training_step(RankBatch(list(batches), samples), 0)
        wait(self.device)
        report = self.model.last_step
        assert report is not None
        assert report.skipped is None
        return Found(report.loss, report.gradient_norm)

    def found(self, batches: Sequence[PackedBatch]) -> Found:
        """Return loss and gradient norm without changing the weights."""
        optimizer = self.model.optimizers()
        step, optimizer.step = optimizer.step, lambda: None
        try:
            return self.step(batches)
        finally:
            optimizer.step = step


class Theirs:
    """Hugging Face's `EsmForMaskedLM` in its usual training setup."""

    def __init__(
        self, family: str, shape: Shape, precision: str, device: str, attention: str = "sdpa", compiled: bool = False
    ) -> None:
        """Build the model; `precision`: FLOAT32, AUTOCAST or BF16; `attention`: "sdpa" or "eager".

        `compiled`: use torch.compile.
        """
        self.device, self.precision, self.attention, self.compiled = device, precision, attention, compiled
        model: Any = peer_model(family, shape, attention)
        assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == DROPOUT
        assert model.config._attn_implementation == attention
        self.model = model.to(device, torch.bfloat16 if precision == BF16 else torch.float32).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {
            "lr": OPTIM.lr,
            "betas": OPTIM.betas,
            "eps": OPTIM.eps,
            "weight_decay": OPTIM.weight_decay,
        }
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)

    def use(self, attention: str) -> None:
        """Switch the attention implementation."""
        if attention != self.attention:
            self.model.set_attn_implementation(attention)
            assert self.model.config._attn_implementation == attention
            self.attention = attention

    def batches(self, proteins: Sequence[MaskedProtein], size: int, width: int | None) -> list[PaddedBatch]:
        return [padded(some, width).to(self.device) for some in in_groups(proteins, size)]

    def _rounding(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.precision == AUTOCAST else nullcontext()

    def backward(self, batches: Sequence[PaddedBatch]) -> float:
        """Run forward and backward over all micro batches. Return the loss."""
        places = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self._rounding():
                logits_BTV = self.forward(batch.tokens, attention_mask=batch.real).logits
            scores, labels = logits_BTV.float().flatten(0, 1), batch.labels.flatten()
            part = cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum") / places
            part.backward()
            total += part.detach()
        return float(total)

    def gradients(self, batches: Sequence[PaddedBatch]) -> Found:
        """Run forward and backward over all micro batches, and clip the gradients."""
        loss = self.backward(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, OPTIM.gradient_clip_val)
        return Found(loss, float(norm))

    def found(self, batches: Sequence[PaddedBatch]) -> Found:
        """Return loss and gradient norm, the norm in float64: PyTorch's own is off by up to 1e-4 on a CPU."""
        loss = self.backward(batches)
        gradients = (parameter.grad for parameter in self.parameters if parameter.grad is not None)
        return Found(loss, math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))

    def step(self, batches: Sequence[PaddedBatch]) -> Found:
        """Run one optimizer step to completion."""
        found = self.gradients(batches)
        self.optimizer.step()
        wait(self.device)
        return found


def peer_model(family: str, shape: Shape, attention: str = "sdpa") -> EsmForMaskedLM:
    """Return Hugging Face's model of a family, with fixed random weights and the recipes' dropout."""
    rates = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    model: EsmForMaskedLM = hugging_face_model(family, shape, tokens=WIDTH, attn_implementation=attention, **rates)
    return model


def wait(device: str) -> None:
    """Wait for all work of the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_evaluation(side: Ours | Theirs, batches: Sequence[Any]) -> Found:
    """Return loss and gradient norm without dropout; the weights do not change."""
    side.model.eval()
    found = side.found(batches)
    side.model.train()
    return found


def apart(one: Found, other: Found) -> Found:
    """Return the error of the first relative to the second."""
    return Found(*(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(one, other, strict=True)))
