"""One optimizer step, ours and Hugging Face's, at the same weights, on the same proteins and masked places.

Shape suffixes: B proteins, T tokens of the row or of the longest protein, V tokens of the alphabet, R residues.
"""

from __future__ import annotations

import itertools
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
from bionemo_esm.inference.inputs import read_proteins
from bionemo_esm.model.archive import read_archive
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import load_weights
from theirs import Shape, hugging_face_model  # type: ignore[import-not-found]

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
WIDTH = 512  # tokens to which ESM-1nv's own training padded every protein; longer ones are cropped to it
DROPOUT = 0.1  # the recipes'
FLOAT32, AUTOCAST, BF16 = "float32", "bf16 autocast over float32 weights", "pure bf16, no float32 masters"
"""Precisions of Hugging Face's: the second is what its Trainer calls bf16."""
OPTIM = OptimConfig()
IGNORED = -100  # the label of a place that is not asked about


# --- proteins ---------------------------------------------------------------------------------------------------------


class MaskedProtein(NamedTuple):
    """A protein cropped to `WIDTH` tokens, and what the models are shown of it."""

    residues: NDArray[np.uint8]  # [R]
    shown: NDArray[np.uint8]  # [R], <mask> or another residue at some of the chosen places
    chosen: NDArray[np.bool_]  # [R]

    @property
    def tokens(self) -> int:
        return len(self.residues) + SPECIAL_TOKENS_PER_SEQUENCE


class PaddedBatch(NamedTuple):
    """int64 [B, T] each: tokens with <pad> behind, 1 where there is a token, and labels, `IGNORED` where none is."""

    tokens: Tensor
    real: Tensor
    labels: Tensor

    def to(self, device: str) -> PaddedBatch:
        return PaddedBatch(*(tensor.to(device) for tensor in self))


def masked_proteins(path: Path | None, count: int) -> list[MaskedProtein]:
    """The first `count` proteins of a FASTA file (None: the sample's), corrupted by the recipes' policy.

    Raises `ConfigError` for a file with fewer.
    """
    found = []
    for place, protein in enumerate(itertools.islice(read_proteins(path or SAMPLE), count)):
        residues = np.asarray(protein.tokens[: WIDTH - SPECIAL_TOKENS_PER_SEQUENCE], dtype=np.uint8)
        keys = derive_key(0, 0, place)
        found.append(
            MaskedProtein(residues, *mask_sequences(residues, np.array([len(residues)]), keys, MaskingPolicy()))
        )
    if len(found) < count:
        raise ConfigError(f"{path or SAMPLE}: holds {len(found)} proteins, and {count} are needed; give a larger file")
    return found


def alike(proteins: Sequence[MaskedProtein], count: int) -> list[MaskedProtein]:
    """`count` of them, in their order: one of each class of length, and as long on average as all are."""
    if count >= len(proteins):
        return list(proteins)
    order = sorted(range(len(proteins)), key=lambda place: proteins[place].tokens)
    classes = [list(map(int, chunk)) for chunk in np.array_split(order, count)]
    chosen = [chunk[len(chunk) // 2] for chunk in classes]
    missing = tokens_of(proteins) * count / len(proteins) - sum(proteins[place].tokens for place in chosen)
    for index, chunk in enumerate(classes):  # each makes up for what is missing still, as far as it can
        wanted = proteins[chosen[index]].tokens + missing
        chosen[index] = min(chunk, key=lambda place: abs(proteins[place].tokens - wanted))
        missing = wanted - proteins[chosen[index]].tokens
    return [proteins[place] for place in sorted(chosen)]


def tokens_of(proteins: Sequence[MaskedProtein]) -> int:
    """<cls> and <eos> counted; there is no padding."""
    return sum(protein.tokens for protein in proteins)


def in_groups(proteins: Sequence[MaskedProtein], size: int) -> Iterator[Sequence[MaskedProtein]]:
    """Neighbours together, `size` at a time."""
    return (proteins[begin : begin + size] for begin in range(0, len(proteins), size))


def packed(proteins: Sequence[MaskedProtein]) -> PackedBatch:
    """As our model takes them: one row."""
    residues, shown, chosen = (np.concatenate(parts) for parts in zip(*proteins, strict=True))
    lengths = np.array([len(protein.residues) for protein in proteins], dtype=np.int64)
    return pack(residues, lengths, MaskedResidues(shown, chosen))


def padded(proteins: Sequence[MaskedProtein], width: int | None) -> PaddedBatch:
    """As theirs takes them: to the longest, or to `width`."""
    row = packed(proteins)
    labels = torch.full_like(row.tokens, IGNORED)
    labels[row.target_index] = row.targets
    missing = 0 if width is None else width - row.max_seqlen

    def rows(row_T: Tensor, filling: int) -> Tensor:
        return pad(unpack(row_T, row.cu_seqlens, filling), (0, missing), value=filling)

    return PaddedBatch(rows(row.tokens, PAD_ID), rows(torch.ones_like(row.tokens), 0), rows(labels, IGNORED))


# --- both sides -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a step finds, before it changes any weight."""

    loss: float  # nats a masked place
    norm: float  # of all gradients, before clipping


class _WithoutLightning(ESM1nvModel):
    """Our model with what `training_step` asks of Lightning: its optimizer and schedule, backward, and a log."""

    epoch = 0.0  # of a log that nobody reads

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
    """`ESM1nvModel.training_step` itself: its model, its float32 masters, its optimizer."""

    def __init__(self, archive: Path, precision: str, device: str) -> None:
        """The weights of an archive of ours, computed with in `precision`, "32" or "bf16"."""
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
        """One optimizer step, done when this returns."""
        samples = sum(batch.sequences for batch in batches)
        self.model.training_step(RankBatch(list(batches), samples), 0)
        wait(self.device)
        report = self.model.last_step
        assert report is not None
        assert report.skipped is None
        return Found(report.loss, report.gradient_norm)

    def found(self, batches: Sequence[PackedBatch]) -> Found:
        """The same, but the weights stay."""
        optimizer = self.model.optimizers()
        step, optimizer.step = optimizer.step, lambda: None
        try:
            return self.step(batches)
        finally:
            optimizer.step = step


class Theirs:
    """Hugging Face's `EsmForMaskedLM`, trained as its users do."""

    def __init__(
        self, family: str, shape: Shape, precision: str, device: str, attention: str = "sdpa", compiled: bool = False
    ) -> None:
        """`precision`: one of those above; `attention`: "sdpa" or "eager"; `compiled`: by torch.compile."""
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
        """Compute attention in this way from now on."""
        if attention != self.attention:
            self.model.set_attn_implementation(attention)
            assert self.model.config._attn_implementation == attention
            self.attention = attention

    def batches(self, proteins: Sequence[MaskedProtein], size: int, width: int | None) -> list[PaddedBatch]:
        return [padded(some, width).to(self.device) for some in in_groups(proteins, size)]

    def _rounding(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.precision == AUTOCAST else nullcontext()

    def backward(self, batches: Sequence[PaddedBatch]) -> float:
        """Forward and backward over all micro batches; the loss."""
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
        """Forward and backward over all micro batches, and clipping."""
        loss = self.backward(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, OPTIM.gradient_clip_val)
        return Found(loss, float(norm))

    def found(self, batches: Sequence[PaddedBatch]) -> Found:
        """Loss and gradient norm, the latter in float64: PyTorch's own is off by up to 1e-4 on a CPU."""
        loss = self.backward(batches)
        gradients = (parameter.grad for parameter in self.parameters if parameter.grad is not None)
        return Found(loss, math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))

    def step(self, batches: Sequence[PaddedBatch]) -> Found:
        """One optimizer step, done when this returns."""
        found = self.gradients(batches)
        self.optimizer.step()
        wait(self.device)
        return found


def peer_model(family: str, shape: Shape, attention: str = "sdpa") -> EsmForMaskedLM:
    """Hugging Face's model of a family, with the same random weights each time and the recipes' dropout."""
    rates = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    model: EsmForMaskedLM = hugging_face_model(family, shape, tokens=WIDTH, attn_implementation=attention, **rates)
    return model


def wait(device: str) -> None:
    """Until everything is done that was asked of the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_evaluation(side: Ours | Theirs, batches: Sequence[Any]) -> Found:
    """What a step finds without dropout, the weights left alone."""
    side.model.eval()
    found = side.found(batches)
    side.model.train()
    return found


def apart(one: Found, other: Found) -> Found:
    """By how much the first is off, relative to the second."""
    return Found(*(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(one, other, strict=True)))
