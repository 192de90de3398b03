"""Options of all commands that use a model: the model, the device, the precision, and the exit codes.

All of it is known and checked before torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from bionemo_esm.console import run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile, is_our_archive
from bionemo_esm.model.config import PRECISIONS, ROTARY, EncoderConfig
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.settings import PositiveInt, Settings, expand_home

if TYPE_CHECKING:
    from bionemo_esm.inference.engine import Engine

_SPECIAL_TOKENS = 2  # <cls> and <eos>


class ModelSizes:
    """The sizes of a model, and how many residues it reads at once."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def window(self) -> int:
        """Residues of the longest protein that the model was trained to read whole."""
        return self.config.seq_length - _SPECIAL_TOKENS

    @property
    def longest(self) -> int | None:
        """Residues of the longest protein that the model can read at all; None (no limit) for rotary positions."""
        return None if self.config.position_embedding == ROTARY else self.window

    def layer(self, number: int) -> int:
        """Return a layer's number from 0 (the embeddings) to `layers`; -1 is the last.

        Raises `ConfigError` for a layer that the model does not have.
        """
        if not -self.layers - 1 <= number <= self.layers:
            raise ConfigError(f"layer {number}: the model has 0 (the embeddings) to {self.layers}, -1 is the last")
        return number if number >= 0 else self.layers + 1 + number


class EngineConfig(Settings):
    """The model and its device: the keys of `conf/inference/engine.yaml`, which every command over a model has."""

    model: Path
    device: str = "auto"
    precision: str = "32"
    batch_tokens: PositiveInt | None = None  # None: `engine.BATCH_TOKENS` of the device

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        """Check the syntax alone, not whether the device is present."""
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
        return device

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, precision: str) -> str:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        return precision

    def check(self) -> ModelSizes:
        """Return the model's sizes, read from the small members of its file.

        Raises `ArchiveError` for a file that is missing, is not an archive of this package, or contradicts itself.
        """
        return ModelSizes(check_sizes(open_model_file(self.model)))


def engine_config(
    path: Any, device: str = "auto", precision: str = "32", batch_tokens: int | None = None
) -> EngineConfig:
    """Return the arguments of a `load` method, checked. Raises `ConfigError`, naming the argument."""
    model = Path(path) if isinstance(path, os.PathLike) else path
    return EngineConfig(model=model, device=device, precision=precision, batch_tokens=batch_tokens)


def open_model_file(path: Path) -> ArchiveFile:
    """Open a model's archive and check its small members. Raises `ArchiveError` if it is not one of this package."""
    path = expand_home(path)
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


def describe(engine: Engine) -> str:
    """Return one line about a model and the device it runs on."""
    sizes = engine.config
    return (
        f"{sizes.family}, {sizes.num_layers} layers, hidden {sizes.hidden_size:,}, {sizes.parameters:,} parameters, "
        f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}"
    )


def run(job: Callable[[], int], on_interrupt: str) -> None:
    """Run a job to its exit code: 2 and one line for a user's error, 130 after Ctrl-C, 143 after SIGTERM."""
    with sigterm_as_exit(on_interrupt):
        run_to_exit_code(job, on_interrupt)
