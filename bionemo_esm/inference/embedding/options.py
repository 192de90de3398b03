"""The options of embeddings, and the embedding of one protein; without torch, so that results are read quickly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator, model_validator
from typing_extensions import Self

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.batching import WindowSpec, windows
from bionemo_esm.inference.inputs import InputError, Protein
from bionemo_esm.settings import PositiveInt, Settings

if TYPE_CHECKING:
    from bionemo_esm.inference.engine_options import ModelSizes


class EmbeddingOptions(Settings):
    """The arrays to compute for each protein. `resolved` adapts the options to a model; do that before using them.

    layers: 0 is the embedding layer, 1 the first block, -1 the last. mean: the mean over residues, of each layer. cls:
    the state of <cls>. residues: the state of each residue. logits: of each residue, over the 33 tokens.
    pseudo_perplexity: exp(-mean over residues of log p(residue | all others)), a pass for each residue. dtype: of the
    results. long_proteins: those over `window`. window: residues read at once (None: the trained length). overlap:
    residues that neighbouring windows share, at least (None: half a window).
    """

    layers: tuple[int, ...] = (-1,)
    mean: bool = True
    cls: bool = False
    residues: bool = False
    logits: bool = False
    pseudo_perplexity: bool = False
    dtype: Literal["float32", "float16"] = "float32"
    long_proteins: Literal["windows", "truncate", "error"] = "windows"
    window: PositiveInt | None = None
    overlap: int | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_several(cls, layers: Any) -> Any:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            layers = (layers,)
        layers = tuple(layers)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
                raise ConfigError(f"layers must be an integer, not {layer!r}")
        return tuple(map(int, layers))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.reads_layers and not self.layers:
            raise ConfigError("layers: name one at least, of which to give mean, cls or residues; -1 is the last")
        if not (self.reads_layers or self.logits or self.pseudo_perplexity):
            raise ConfigError("nothing is asked for; set one of mean, cls, residues, logits, pseudo_perplexity to true")
        if self.overlap is not None and not 0 <= self.overlap < (self.window or self.overlap + 1):
            size = "" if self.window is None else f" of {self.window}"
            raise ConfigError(f"overlap must be from 0 to below the window{size}, not {self.overlap}")
        return self

    @property
    def reads_layers(self) -> bool:
        return self.mean or self.cls or self.residues

    def resolved(self, model: ModelSizes) -> EmbeddingOptions:
        """Return the options for a model: layers from 0, without duplicates; window and overlap as numbers.

        Raises `ConfigError` for a layer that the model does not have, a window that it cannot read, and an overlap that
        does not fit the window.
        """
        layers = [model.layer(layer) for layer in self.layers] if self.reads_layers else []
        spec = WindowSpec.of(model, self.window, self.overlap)
        values = {name: getattr(self, name) for name in EmbeddingOptions.model_fields}
        values |= {"layers": tuple(dict.fromkeys(layers)), "window": spec.window, "overlap": spec.overlap}
        return EmbeddingOptions(**values)

    def cover(self, residues: int) -> list[tuple[int, int]]:
        """Return begin and end of each window over a protein of this length. Needs resolved options."""
        assert self.window is not None and self.overlap is not None, "resolve the options first"
        if self.long_proteins == "windows":
            return windows(residues, self.window, self.overlap)
        return [(0, min(residues, self.window))]

    def bytes_of(self, residues: int, hidden: int) -> int:
        """Return the bytes of the arrays of a protein of this length, for a model's hidden size. Needs resolved
        options.

        While the windows of a long protein are blended, float16 takes twice that.
        """
        read = self.cover(residues)[-1][1]
        rows = self.mean + self.cls + read * self.residues
        numbers = rows * len(self.layers) * hidden + read * VOCABULARY_SIZE * self.logits
        return numbers * np.dtype(self.dtype).itemsize + 8 * self.pseudo_perplexity

    def check_lengths(self, proteins: Sequence[Protein]) -> None:
        """Raise `InputError` for a protein over the window if `long_proteins` is "error". Needs resolved options."""
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
    """The results for one protein."""

    id: str
    residues: int  # of the protein
    read: int  # residues that the model read, from the first on; fewer than `residues` if it was truncated
    windows: int  # 1 for a protein that was read whole
    arrays: dict[str, NDArray[np.floating]]  # mean_6 [H], cls_6 [H], residues_6 [read, H], logits [read, 33]
    pseudo_perplexity: float | None


def record_label(protein: Protein) -> str:
    """Return the name of a protein in a message."""
    return f"record {protein.number} ({protein.id[:40]})"


def plural(number: int, noun: str) -> str:
    """Return `1 part`, `2 parts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
