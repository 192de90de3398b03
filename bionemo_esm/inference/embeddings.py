"""Embeddings of proteins: hidden states of any layer, of every residue or one for the protein, logits, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import Protein


@dataclass(frozen=True)
class EmbeddingChoice:
    """What is wanted of each protein. `resolved` against a model before it is used."""

    layers: tuple[int, ...] = (-1,)  # 0: the embeddings, -1: the last
    mean: bool = True  # over the residues, of each layer
    cls: bool = False  # the state of <cls>, of each layer
    residues: bool = False  # the state of each residue, of each layer
    logits: bool = False  # of each residue, over the 33 tokens
    pseudo_perplexity: bool = False  # exp(-mean over residues of log p(residue | all others)): a pass a residue
    dtype: str = "float32"  # or float16, of what is written
    long_proteins: str = "windows"  # those over `window`; or truncate, or error
    window: int | None = None  # residues read at once; None: as many as the model was trained on
    overlap: int | None = None  # residues that neighbouring windows share, at least; None: half a window


class Embedding(NamedTuple):
    """What was asked of one protein."""

    id: str
    residues: int  # of the protein
    read: int  # residues that the model was shown, from the first on; fewer where it was cut
    windows: int  # 1 where it was read whole
    arrays: dict[str, NDArray[np.floating]]  # mean_6 [H], cls_6 [H], residues_6 [read, H], logits [read, 33]
    pseudo_perplexity: float | None


def embed_together(
    engine: Engine,
    proteins: Sequence[Protein],
    choice: EmbeddingChoice,
    answered: Callable[[int], None] = lambda residues: None,
) -> list[Embedding]:
    """Embed some proteins, in batches sorted by length; answers in the order given. `answered` is told of progress."""
    raise NotImplementedError
