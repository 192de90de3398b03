"""What the jobs over a model have in common: which model, on what, and how they end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.console import run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile, is_our_archive
from bionemo_esm.model.config import PRECISIONS, ROTARY, EncoderConfig
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.settings import integer, path

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.inference.engine import Engine

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


def open_model_file(path: Path) -> ArchiveFile:
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


ENGINE_KEYS = {"model", "device", "precision", "batch_tokens"}
"""Of every job's configuration: `conf/inference/engine.yaml`."""


@dataclass(frozen=True)
class EngineConfig:
    """Which model, and what computes it; `Engine.load` has what the values mean.

    Raises `ConfigError` as `check_words`.
    """

    model: Path
    device: str = "auto"
    precision: str = "32"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        check_words(self.device, self.precision, self.batch_tokens)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Raises `ConfigError`, naming the key, for a value of the wrong kind."""
        model, tokens = path("model", values["model"]), values["batch_tokens"]
        if model is None:
            raise ConfigError("model must be given: model=....nemo")
        tokens = None if tokens is None else integer("batch_tokens", tokens)
        return cls(model, str(values["device"]), str(values["precision"]), tokens)

    def check(self) -> ModelSizes:
        """The model's sizes, out of its file's small members: to be asked before an input is read.

        Raises `ArchiveError` for a file that is not there, is no model of ours, or contradicts itself.
        """
        return ModelSizes(check_sizes(open_model_file(self.model)))


def describe(engine: Engine) -> str:
    """A model and where it runs, in one line."""
    sizes = engine.config
    return (
        f"{sizes.family}, {sizes.num_layers} layers, hidden {sizes.hidden_size:,}, {sizes.parameters:,} parameters, "
        f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}"
    )


def run(job: Callable[[], int], on_interrupt: str) -> None:
    """Run a job to its exit code: 2 after one line for what a user can mend, 130 after Ctrl-C, 143 after SIGTERM."""
    with sigterm_as_exit(on_interrupt):
        run_to_exit_code(job, on_interrupt)
