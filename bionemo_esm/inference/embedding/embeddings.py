"""Embeddings of proteins: hidden states of any layer, of every residue or pooled; logits; pseudo-perplexity.

A protein over the window is read in several windows, whose results are blended residue by residue. Hidden states are
pooled on the device that computed them. Sums over residues are float32, whatever the precision of the model. Shape
suffixes: T tokens of a packed row, S sequences in it (proteins, or windows of one), R residues of a protein, H hidden
size, V tokens of the alphabet.

Pseudo-perplexity (Salazar et al. 2020, doi:10.18653/v1/2020.acl-main.240) is exp(-1/R * sum over the R residues of
log p(residue | all the others)), each residue masked alone: a forward pass for each residue. Probabilities are over all
33 tokens. 1 is certainty; 20 is a uniform guess among the standard residues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.errors import UserError
from bionemo_esm.inference.batching import (
    MaskedQuery,
    Residues,
    batches_by_length,
    blending_weights,
    masked,
    window_around,
)
from bionemo_esm.inference.embedding.options import Embedding, EmbeddingOptions, plural, record_label
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.feature_extraction import representations


@dataclass(frozen=True)
class PooledBatch:
    """Results of a packed row, in CPU memory, by name: mean_6, cls_6, residues_6, logits."""

    bounds: NDArray[np.int64]  # [S + 1], of the sequences in the row, <cls> and <eos> included
    sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [S, H], of residues times their weights
    first: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [S, H], of <cls>
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [T, H] or [T, V]


def pooled(
    engine: Engine, row: PackedBatch, weights: list[NDArray[np.float32]], wanted: EmbeddingOptions
) -> PooledBatch:
    """Run one pass over a packed row. `weights`: of each sequence, the weight of each residue in `sums`."""
    lengths = [len(each) + 2 for each in weights]
    found = PooledBatch(np.concatenate([[0], np.cumsum(lengths)]))
    last = {engine.layers} if wanted.logits else set()
    states = representations(engine.encoder, row, {*wanted.layers, *last})
    weights_T = torch.from_numpy(np.concatenate([np.pad(each, 1) for each in weights])).to(engine.device)
    for layer in wanted.layers:
        state_TH = states[layer]
        if wanted.mean:
            found.sums[f"mean_{layer}"] = _on_cpu(sums_by_sequence(state_TH, weights_T, lengths))
        if wanted.cls:
            found.first[f"cls_{layer}"] = _on_cpu(state_TH[row.cu_seqlens[:-1].long()])
        if wanted.residues:
            found.rows[f"residues_{layer}"] = _on_cpu(state_TH)
    if wanted.logits:
        found.rows["logits"] = _on_cpu(engine.encoder.logits(states[engine.layers]))
    return found


def sums_by_sequence(state_TH: Tensor, weights_T: Tensor, lengths: list[int]) -> Tensor:
    """Return the weighted sum of the rows of each sequence: float32 [S, H].

    `lengths`: rows of each sequence. Consecutive sequences of one length are summed together; a result does not depend
    on other sequences.
    """
    sums = []
    for begin, count, length in _runs(lengths):
        end = begin + count * length
        weighted_NH = state_TH[begin:end].float() * weights_T[begin:end, None]
        sums.append(weighted_NH.unflatten(0, (count, length)).sum(dim=1))
    return torch.cat(sums)


def _runs(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield begin, number and length of consecutive equal lengths."""
    begin = 0
    for length, alike in groupby(lengths):
        count = sum(1 for _ in alike)
        yield begin, count, length
        begin += count * length


def _on_cpu(rows: Tensor) -> NDArray[np.float32]:
    moved: NDArray[np.float32] = rows.cpu().float().numpy()  # the model's dtype may have half the bytes
    return moved


def pseudo_perplexities(
    engine: Engine,
    proteins: Sequence[Residues],
    window: int,
    answered: Callable[[int], None] = lambda residues: None,
) -> Iterator[float]:
    """Yield the pseudo-perplexity of each protein, in order; sums are float64.

    In a protein over `window` residues, each residue is masked in the window that has it in its middle, or as near to
    that as the ends of the protein allow. `answered` is called for each residue.
    """
    answers = engine.log_probabilities(query for tokens in proteins for query in _each_masked(tokens, window))
    for tokens in proteins:
        total = 0.0
        for residue in tokens.tolist():
            total += float(next(answers)[0, residue])
            answered(1)
        yield math.exp(-total / len(tokens))


def _each_masked(tokens: Residues, window: int) -> Iterator[MaskedQuery]:
    for site in range(len(tokens)):
        begin, end = window_around(site, site, len(tokens), window)
        yield masked(tokens[begin:end], np.array([site - begin], dtype=np.int64))


class Embeddings(Sequence[Embedding]):
    """Embeddings of proteins in order, by number or by id: `found["ubiquitin"]`."""

    def __init__(self, found: Sequence[Embedding]) -> None:
        self._found = list(found)
        self._indices = {embedding.id: index for index, embedding in enumerate(self._found)}

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, key: int | str) -> Embedding: ...
    @overload
    def __getitem__(self, key: slice) -> Embeddings: ...
    def __getitem__(self, key: int | str | slice) -> Embedding | Embeddings:
        """Return one embedding, or a slice. Raises `KeyError` for an unknown id."""
        if isinstance(key, slice):
            return Embeddings(self._found[key])
        return self._found[self._indices[key] if isinstance(key, str) else key]

    def __repr__(self) -> str:
        names = ", ".join(self._found[0].arrays) if self._found else "none"
        return f"<Embeddings of {plural(len(self), 'protein')}: {names}>"

    @property
    def ids(self) -> list[str]:
        return [embedding.id for embedding in self._found]

    @property
    def mean(self) -> NDArray[np.floating]:
        """The mean over each protein's residues, [proteins, H]: features for a classifier.

        Raises `UserError` unless exactly one layer was computed; `stacked` takes a name.
        """
        return self.stacked(self._only("mean"))

    @property
    def cls(self) -> NDArray[np.floating]:
        """The state of each protein's <cls>, [proteins, H]; as `mean`."""
        return self.stacked(self._only("cls"))

    @property
    def pseudo_perplexity(self) -> NDArray[np.float64]:
        """The pseudo-perplexity of each protein, float64 [proteins]. Raises `UserError` if it was not computed."""
        values = [embedding.pseudo_perplexity for embedding in self._found]
        if None in values:
            raise UserError(
                "pseudo_perplexity was not computed; ask for it: embed(..., pseudo_perplexity=True)",
                code="embeddings.not-computed",
            )
        return np.array(values, dtype=np.float64)

    def stacked(self, name: str) -> NDArray[np.floating]:
        """Return what each protein has one row of, such as `mean_6` or `cls_0`, as a matrix [proteins, H].

        Raises `UserError` for another name, with the known ones.
        """
        names = self._names()
        if name not in names or not name.startswith(("mean_", "cls_")):
            rows = ", ".join(each for each in names if each.startswith(("mean_", "cls_"))) or "none"
            raise UserError(f"{name!r}: no such row of each protein; there are: {rows}")
        return np.stack([embedding.arrays[name] for embedding in self._found])

    def _only(self, kind: str) -> str:
        names = [name for name in self._names() if name.startswith(f"{kind}_")]
        if len(names) != 1:
            raise UserError(f"{kind} is of one layer, here are {', '.join(names) or 'none'}; ask stacked('{kind}_...')")
        return names[0]

    def _names(self) -> list[str]:
        return list(self._found[0].arrays) if self._found else []


def embed_proteins(
    engine: Engine,
    proteins: Sequence[Protein],
    options: EmbeddingOptions,
    answered: Callable[[int], None] = lambda residues: None,
) -> list[Embedding]:
    """Embed proteins, in batches sorted by length; results are in the given order.

    `answered` is called with residues that were read; they add up to those of the proteins. Memory: all results, and
    one batch. Raises `ConfigError` as `EmbeddingOptions.resolved`; before anything is computed `InputError` for a
    protein over the window, if that is an error; `UserError` for a number that the dtype cannot hold.
    """
    options = options.resolved(engine)
    options.check_lengths(proteins)
    if not proteins:
        return []
    blends = [_Blend(protein, options) for protein in proteins]
    if options.reads_layers or options.logits:
        _read(engine, blends, options, (lambda residues: None) if options.pseudo_perplexity else answered)
    perplexities: list[float | None] = [None] * len(blends)
    if options.pseudo_perplexity:
        assert options.window is not None
        shown = [blend.protein.tokens[: blend.read] for blend in blends]
        perplexities = list(pseudo_perplexities(engine, shown, options.window, answered))
        if cut := sum(blend.protein.residues - blend.read for blend in blends):
            answered(cut)
    return [blend.embedding(perplexity) for blend, perplexity in zip(blends, perplexities, strict=True)]


class _Piece(NamedTuple):
    """A sequence as the model reads it: a protein, or a window of one."""

    blend: _Blend
    begin: int
    end: int
    weights: NDArray[np.float32] | None  # of its residues in the blend; None for a whole protein
    progress: int  # residues of the protein that no earlier piece covers

    @property
    def mean_weights(self) -> NDArray[np.float32]:
        """The weight of each of its residues in the mean over the protein."""
        weights = np.ones(self.end - self.begin, dtype=np.float32) if self.weights is None else self.weights
        return weights / np.float32(self.blend.read)


class _Blend:
    """The results for one protein, window by window."""

    def __init__(self, protein: Protein, options: EmbeddingOptions) -> None:
        self.protein, self.options = protein, options
        self.cover = options.cover(protein.residues)
        self.read = self.cover[-1][1]
        self.arrays: dict[str, NDArray[np.floating]] = {}
        self._missing = len(self.cover)

    def pieces(self) -> Iterator[_Piece]:
        if len(self.cover) == 1:
            yield _Piece(self, 0, self.read, None, self.protein.residues)
            return
        earlier = [0, *(end for _, end in self.cover)]
        for (begin, end), weights, covered in zip(self.cover, blending_weights(self.cover), earlier, strict=False):
            yield _Piece(self, begin, end, weights, end - covered)

    def add(self, piece: _Piece, batch: PooledBatch, index: int) -> None:
        """Add the result of a piece, which is a sequence of the batch."""
        for name, sums_SH in batch.sums.items():
            self._add(name, sums_SH[index], None)
        for name, first_SH in batch.first.items():
            self._add(name, first_SH[index] / np.float32(len(self.cover)), None)
        for name, rows_TX in batch.rows.items():
            rows = rows_TX[batch.bounds[index] + 1 : batch.bounds[index + 1] - 1]
            self._add(name, rows if piece.weights is None else rows * piece.weights[:, None], piece)
        self._missing -= 1
        if not self._missing:
            self.arrays = {name: self._narrowed(name, array) for name, array in self.arrays.items()}

    def _add(self, name: str, part: NDArray[np.float32], piece: _Piece | None) -> None:
        if len(self.cover) == 1:
            self.arrays[name] = part
        elif piece is None:
            self.arrays[name] = part + self.arrays.get(name, np.float32(0))
        else:
            if name not in self.arrays:
                self.arrays[name] = np.zeros((self.read, part.shape[1]), dtype=np.float32)
            self.arrays[name][piece.begin : piece.end] += part

    def _narrowed(self, name: str, array: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return a copy in the requested dtype, so that no row of a whole batch is kept for one protein."""
        with np.errstate(over="ignore"):
            narrow: NDArray[np.floating] = array.astype(self.options.dtype)
        if not np.isfinite(narrow).all():
            beyond = f"{self.options.dtype}'s {np.finfo(self.options.dtype).max:,.0f}"
            advice = "ask for dtype=float32" if np.isfinite(array).all() else "the model's own numbers overflow"
            raise UserError(f"{record_label(self.protein)}: {name} is beyond {beyond}; {advice}")
        return narrow

    def embedding(self, perplexity: float | None) -> Embedding:
        order = self.options.layers
        kinds = [f"{kind}_{layer}" for kind in ("mean", "cls", "residues") for layer in order]
        arrays = {name: self.arrays[name] for name in (*kinds, "logits") if name in self.arrays}
        return Embedding(self.protein.id, self.protein.residues, self.read, len(self.cover), arrays, perplexity)


@torch.inference_mode()
def _read(engine: Engine, blends: list[_Blend], options: EmbeddingOptions, answered: Callable[[int], None]) -> None:
    """Run one pass over each piece of each protein."""
    pieces = [piece for blend in blends for piece in blend.pieces()]
    lengths = np.array([piece.end - piece.begin for piece in pieces], dtype=np.int64)
    for batch_indices in batches_by_length(lengths, engine.batch_tokens):
        shown = [pieces[index] for index in batch_indices.tolist()]
        row = engine.packed([piece.blend.protein.tokens[piece.begin : piece.end] for piece in shown])
        batch = pooled(engine, row, [piece.mean_weights for piece in shown], options)
        for index, piece in enumerate(shown):
            piece.blend.add(piece, batch, index)
        answered(sum(piece.progress for piece in shown))
