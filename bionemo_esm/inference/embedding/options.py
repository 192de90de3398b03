"""What is wanted of a protein, and what it gets; without torch, so that results are read without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.batching import windows
from bionemo_esm.inference.inputs import InputError, Protein

if TYPE_CHECKING:
    from bionemo_esm.inference.engine_options import ModelSizes

DTYPES = ("float32", "float16")
LONG_PROTEINS = ("windows", "truncate", "error")


@dataclass(frozen=True)
class EmbeddingOptions:
    """What is wanted of each protein. `resolved` against a model before it is used.

    Raises `ConfigError`, naming the key, for what no model could do.
    """

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

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("long_proteins", self.long_proteins, LONG_PROTEINS),
        ):
            if value not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {value!r}")
        for layer in self.layers:
            if type(layer) is not int:
                raise ConfigError(f"layers: {layer!r} is not the number of a layer")
        if self.reads_layers and not self.layers:
            raise ConfigError("layers: name one at least, of which to give mean, cls or residues; -1 is the last")
        if not (self.reads_layers or self.logits or self.pseudo_perplexity):
            raise ConfigError("nothing is asked for; set one of mean, cls, residues, logits, pseudo_perplexity to true")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 residue, not {self.window}")
        if self.overlap is not None and not 0 <= self.overlap < (self.window or self.overlap + 1):
            raise ConfigError(f"overlap must be from 0 to below the window{_of(self.window)}, not {self.overlap}")

    @property
    def reads_layers(self) -> bool:
        return self.mean or self.cls or self.residues

    def resolved(self, model: ModelSizes) -> EmbeddingOptions:
        """The same choice in terms of a model: layers from 0, each once; window and overlap as numbers.

        Raises `ConfigError` for a layer that the model does not have, a window over what it can read, or an overlap
        that is none of its windows.
        """
        layers = [model.layer(layer) for layer in self.layers] if self.reads_layers else []
        window = model.window if self.window is None else self.window
        if model.longest is not None and window > model.longest:
            raise ConfigError(f"window={window}: the model reads up to {model.longest} residues at once")
        overlap = window // 2 if self.overlap is None else self.overlap
        return replace(self, layers=tuple(dict.fromkeys(layers)), window=window, overlap=overlap)

    def cover(self, residues: int) -> list[tuple[int, int]]:
        """Begin and end of what is read of a protein of so many residues, window by window; of a resolved choice."""
        assert self.window is not None and self.overlap is not None, "resolve the choice first"
        if self.long_proteins == "windows":
            return windows(residues, self.window, self.overlap)
        return [(0, min(residues, self.window))]

    def bytes_of(self, residues: int, hidden: int) -> int:
        """Bytes of the arrays of a protein of so many residues; of a resolved choice, for a model of that hidden size.

        While a long protein is being blended, float16 takes twice that.
        """
        read = self.cover(residues)[-1][1]
        rows = self.mean + self.cls + read * self.residues
        numbers = rows * len(self.layers) * hidden + read * VOCABULARY_SIZE * self.logits
        return numbers * np.dtype(self.dtype).itemsize + 8 * self.pseudo_perplexity

    def check_lengths(self, proteins: Sequence[Protein]) -> None:
        """Raises `InputError` for a protein over the window, where the choice is to end there; of a resolved choice."""
        assert self.window is not None
        if self.long_proteins != "error":
            return
        for protein in proteins:
            if protein.residues > self.window:
                raise InputError(
                    f"{record_label(protein)} has {protein.residues:,} residues, over the window of {self.window:,}; "
                    "long_proteins=windows reads it window by window, long_proteins=truncate its beginning alone"
                )


class Embedding(NamedTuple):
    """What was asked of one protein."""

    id: str
    residues: int  # of the protein
    read: int  # residues that the model was shown, from the first on; fewer where it was cut
    windows: int  # 1 where it was read whole
    arrays: dict[str, NDArray[np.floating]]  # mean_6 [H], cls_6 [H], residues_6 [read, H], logits [read, 33]
    pseudo_perplexity: float | None


def record_label(protein: Protein) -> str:
    """A protein in a message."""
    return f"record {protein.number} ({protein.id[:40]})"


def plural(number: int, what: str) -> str:
    """`1 part`, `2 parts`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _of(window: int | None) -> str:
    return "" if window is None else f" of {window}"
