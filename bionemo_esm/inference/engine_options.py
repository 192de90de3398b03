"""What the jobs over a model have in common: which model, on what, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.console import run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.model_info import ModelSizes, check_words, opened
from bionemo_esm.inference.protein_model import load_engine
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.settings import integer, path

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.inference.engine import Engine

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
        return ModelSizes(check_sizes(opened(self.model)))

    def load(self) -> Engine:
        """The model, ready. Raises `ArchiveError`, `ConfigError`."""
        return load_engine(self.model, self.device, self.precision, self.batch_tokens)


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
