"""Rows: one optimizer step against Hugging Face: forward, loss at the masked positions, backward, clipping, AdamW.

Weights, proteins, masked positions and dropout are identical on all sides: 0.1 after attention and MLP, 0.1 on
attention probabilities. Ours is `ESM1nvModel.training_step` without Lightning. Hugging Face's is `EsmForMaskedLM` with
PyTorch's fused AdamW. It sums the losses of micro batches and divides them by the masked positions of all, so that
every side computes the same gradients. Each turn has other proteins, as a real run has: of the sample, and with
UniRef50's lengths. Batches are made before the clock starts; another row measures that.

Parity is measured without dropout by the timed functions themselves, on the loss and the gradient norm.

Hugging Face's code has no dropout after the embeddings; ours has. Not run on CUDA.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.comparison import Inputs, Row, Setting, Side, Target, best_of
from benchmarks.proteins import TUNING, Source, sources
from benchmarks.steps import (
    AUTOCAST,
    BF16,
    DROPOUT,
    FLOAT32,
    WIDTH,
    Found,
    MaskedProtein,
    Ours,
    PaddedBatch,
    Theirs,
    alike,
    apart,
    in_evaluation,
    masked_proteins,
    peer_model,
    tokens_of,
)
from bionemo_esm.model.interchange.convert import import_model
from theirs import Shape, saved  # type: ignore[import-not-found]

LIBRARIES = ("torch", "transformers")
TOLERANCE = {"32": 1e-5, "bf16": 2e-2}
ATTENTIONS = ("sdpa", "eager")
_TRIED_BATCHES = 3
WAYS = FIXED, ARRIVAL, BY_LENGTH = "padded to 512", "padded to the longest", "sorted by length"
TURNS = 3


@dataclass(frozen=True)
class Form:
    """A model to train."""

    key: str
    title: str
    family: str  # a key of `theirs.FAMILIES`
    shape: Shape


ESM1NV = Form("train-esm1nv", "Training step, ESM-1nv", "ESM-1nv", Shape(6, 768, 12, 0.02))
ESM1B = Form("train-esm1b", "Training step, ESM-1b's form with 2 layers", "ESM-1b", Shape(2, 1280, 20, 0.02))
WHOLE_ESM1B = Form("train-esm1b-650m", "Training step, ESM-1b, 33 layers", "ESM-1b", Shape(33, 1280, 20, 0.02))
TINY = Shape(2, 32, 4, 0.2, ffn=64)  # for any form, to check that a row runs


@dataclass(frozen=True)
class Scale:
    """Proteins in a step of ours, and in a turn of slower sides, with about the same mean length."""

    proteins: int
    at_once: int  # proteins in a packed row of ours
    sizes: tuple[int, ...]  # micro batch sizes to try for the other sides, up to the number of proteins
    fixed: int  # proteins of a turn, padded to `WIDTH`
    others: int  # proteins of a turn, padded to the longest


SCALES = {
    "quick": Scale(3, 2, (1, 2), 2, 3),
    "cpu": Scale(16, 8, (1, 2, 4), 4, 8),
    "cuda": Scale(2048, 256, (16, 32, 64, 128), 512, 1024),
    "cuda, large": Scale(256, 64, (4, 8, 16, 32), 64, 128),  # for the whole ESM-1b
}


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the steps of ESM-1nv and of ESM-1b's form, in float32 and in bf16, on each source of proteins."""
    forms = [ESM1NV, ESM1B]
    if setting.device == "cuda" and not setting.quick:
        forms.append(WHOLE_ESM1B)
    for form in forms:
        for precision, source in product(("bf16",) if form is WHOLE_ESM1B else ("32", "bf16"), sources(setting.fasta)):
            yield _Comparison(setting, form, precision, source).row()
            gc.collect()  # frees the models of the row, which have reference cycles


class _Comparison:
    """The sides of one row, on the same proteins and weights. What is tuned and compared is the turn `TUNING`."""

    def __init__(self, setting: Setting, form: Form, precision: str, source: Source) -> None:
        self.form, self.precision, self.device, self.source = form, precision, setting.device, source
        self.shape = TINY if setting.quick else form.shape
        size = "quick" if setting.quick else setting.device
        self.scale = SCALES["cuda, large" if form is WHOLE_ESM1B else size]
        self.proteins = self._drawn(TUNING)
        self._drawn(TURNS)  # refuses a file that is too small before any work
        self.archive = setting.folder / f"{form.key}.nemo"
        if not self.archive.exists():
            folder = saved(peer_model(form.family, self.shape), setting.folder / form.key)
            import_model(str(folder), self.archive)
        self.reference = Ours(self.archive, "32", self.device)  # float32 reference for the parity of every side
        self._found: dict[frozenset[int], Found] = {}  # by the ids of the proteins

    def row(self) -> Row:
        ours = self._ours()
        sides = [ours, *self._theirs()]
        del self.reference
        name = "float32" if self.precision == "32" else "bf16"
        tokens = tokens_of(self.proteins) / len(self.proteins)
        return Row(
            key=f"{self.form.key}-{name}{self.source.key}",
            title=f"{self.form.title}, {self.source.name}",
            unit="unpadded token",
            precision=name,
            sides=sides,
            parity="without dropout, against ours in float32: loss and gradient norm, the larger relative difference",
            tolerance=TOLERANCE[self.precision],
            targets=list(self._targets()),
            turns=TURNS,
            note=f"Fresh proteins in each turn, {tokens:.0f} tokens on average where settings are tuned and results "
            f"compared. Dropout {DROPOUT:g} of states and of attention weights on all sides while timed. Tokens count "
            "<cls> and <eos>, and no padding; where a side has fewer proteins, their mean length is about that of all. "
            "A side with fewer proteins takes the optimizer's step for fewer: up to a hundredth of its time more "
            "than ours.",
        )

    def _drawn(self, turn: int) -> list[MaskedProtein]:
        return masked_proteins(self.source.draw(turn, self.scale.proteins))

    def _ours(self) -> Side:
        ours = self.reference if self.precision == "32" else Ours(self.archive, self.precision, self.device)
        off = apart(
            in_evaluation(ours, ours.batches(self.proteins, self.scale.at_once)), self._reference(self.proteins)
        )
        settings = f"{ours.backends}; {len(self.proteins)} proteins a step, {self.scale.at_once} in a row"
        if self.precision != "32":
            settings += f"; {_off(off)}"

        def draw(turn: int) -> Inputs:
            proteins = self._drawn(turn)
            return Inputs(ours.batches(proteins, self.scale.at_once), tokens_of(proteins))

        return Side("ours, packed", ours.step, settings=settings, libraries=("torch",), draw=draw)

    def _reference(self, proteins: Sequence[MaskedProtein]) -> Found:
        """Return loss and gradient norm of ours in float32."""
        key = frozenset(map(id, proteins))
        if key not in self._found:
            batches = self.reference.batches(proteins, self.scale.at_once)
            self._found[key] = in_evaluation(self.reference, batches)
        return self._found[key]

    def _theirs(self) -> Iterator[Side]:
        precisions = (FLOAT32,) if self.precision == "32" else (AUTOCAST, BF16)
        for precision in precisions:
            yield from self._sides(precision, "")
        if self.device == "cuda" and self.form is not WHOLE_ESM1B:
            yield from self._sides(precisions[0], "compiled", compiled=True)
            yield from self._sides(precisions[0], "eager", attention="eager")

    def _sides(self, precision: str, kind: str, **options: Any) -> Iterator[Side]:
        """Yield the sides that share a model: padded to 512, to the longest in arrival order, sorted by length.

        Pure bf16, which has no float32 masters and so does less, is there at its best only: sorted by length.
        """
        peer = Theirs(self.form.family, self.shape, precision, self.device, **options)
        for way in WAYS if precision != BF16 else (BY_LENGTH,):
            yield self._side(peer, name_of(way, precision, kind), way)

    def _side(self, peer: Theirs, name: str, way: str) -> Side:
        width = WIDTH if way == FIXED else None

        def some(proteins: Sequence[MaskedProtein]) -> list[MaskedProtein]:
            few = alike(proteins, self.scale.fixed if way == FIXED else self.scale.others)
            return sorted(few, key=lambda protein: protein.tokens, reverse=True) if way == BY_LENGTH else few

        tuned = some(self.proteins)
        tried = [size for size in self.scale.sizes if size <= len(tuned)]
        made = {size: peer.batches(tuned, size, width) for size in tried}
        attention, said = self._attention(peer, made[tried[0]][:_TRIED_BATCHES])
        best = best_of(tried, lambda size: peer.gradients(made[size]))  # leaves the weights alone
        off = apart(in_evaluation(peer, made[best]), self._reference(tuned))

        def draw(turn: int) -> Inputs:
            proteins = some(self._drawn(turn))
            return Inputs(peer.batches(proteins, best, width), tokens_of(proteins))

        def work(batches: list[PaddedBatch]) -> None:
            peer.use(attention)
            peer.step(batches)

        sizes = ", ".join(map(str, tried))
        settings = (
            f"{peer.precision}, {attention}{said}{', torch.compile' * peer.compiled}, AdamW(fused); {best} at a time, "
            f"its best of {sizes}; {len(tuned)} proteins a step; {_off(off)}"
        )
        return Side(name, work, settings=settings, error=max(off), libraries=LIBRARIES, draw=draw)

    def _attention(self, peer: Theirs, batches: Sequence[PaddedBatch]) -> tuple[str, str]:
        """Return the peer's attention, and a note. On a CPU it is the faster one, because dropout slows SDPA."""
        if self.device != "cpu":
            return peer.attention, ""

        def tried(index: int) -> None:
            peer.use(ATTENTIONS[index])
            peer.gradients(batches)

        peer.use(ATTENTIONS[best_of(range(len(ATTENTIONS)), tried)])
        return peer.attention, f" (its best of {' and '.join(ATTENTIONS)})"

    def _targets(self) -> Iterator[Target]:
        first = FLOAT32 if self.precision == "32" else AUTOCAST
        yield Target(name_of(FIXED, first), ratio=5 if self.device == "cuda" else 4)
        yield Target(name_of(BY_LENGTH, first), ratio=2)
        if self.device != "cuda" or self.precision == "32":
            return
        if self.form is ESM1NV:
            yield Target(least_per_second=1.45e6)
            yield Target(name_of(FIXED, first, "eager"), ratio=9)
        if self.form is WHOLE_ESM1B:
            yield Target(least_per_second=110e3)


def name_of(way: str, precision: str, kind: str = "") -> str:
    """Return a side's name, which targets refer to."""
    rounding = {FLOAT32: "", AUTOCAST: " (autocast)", BF16: " (pure bf16)"}[precision]
    return f"Hugging Face{' ' * bool(kind)}{kind}, {way}{rounding}"


def _off(off: Found) -> str:
    return f"loss off by {off.loss:.1e}, gradient norm by {off.norm:.1e}"
