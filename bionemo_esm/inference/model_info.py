"""What can be said of a model and of how it is to be computed before it is loaded; without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile, is_our_archive
from bionemo_esm.model.config import PRECISIONS, ROTARY, EncoderConfig

_SPECIAL_TOKENS = 2  # <cls> and <eos>


class ModelSizes:
    """How large a model is, and how much of a protein it reads."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def window(self) -> int:
        """Residues of the longest protein that the model was trained to see whole."""
        return self.config.seq_length - _SPECIAL_TOKENS

    @property
    def longest(self) -> int | None:
        """Residues of the longest protein that the model can read at all; None with rotary positions: any."""
        return None if self.config.position_embedding == ROTARY else self.window

    def layer(self, number: int) -> int:
        """A layer by its number, 0 (the embeddings) to `layers`, or from the end: -1 is the last.

        Raises `ConfigError` for one that the model does not have.
        """
        if not -self.layers - 1 <= number <= self.layers:
            raise ConfigError(f"layer {number}: the model has 0 (the embeddings) to {self.layers}, -1 is the last")
        return number if number >= 0 else self.layers + 1 + number


def check_words(device: str, precision: str, batch_tokens: int | None) -> None:
    """Raises `ConfigError` for what no machine could do; whether a GPU is there is not looked at."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"batch_tokens must be at least 1, not {batch_tokens}")


def opened(path: Path) -> ArchiveFile:
    """A model's file, its small members read and checked. Raises `ArchiveError` for one that is none of ours."""
    path = path.expanduser()
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.exists() else "no such file"
        raise ArchiveError(f"model: {path}: {what}; give a .nemo, which a training run or `bionemo-esm convert` writes")
    if not os.access(path, os.R_OK):
        raise ArchiveError(f"model: {path}: may not be read; check its permissions")
    if path.is_file() and not is_our_archive(path):
        raise ArchiveError(
            f"model: {path}: is not an archive of ours; `bionemo-esm convert` makes one of a model of Hugging Face or "
            "fair-esm, `bionemo-esm convert-legacy` of a .nemo of NeMo 1"
        )
    return ArchiveFile.open(path)
