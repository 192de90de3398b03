"""The commands `average` and `convert-legacy`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import field_validator, model_validator
from typing_extensions import Self

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, run_to_exit_code
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import hold_output
from bionemo_esm.settings import PositiveInt, Settings, plain_values


class AverageConfig(Settings):
    """The configuration of `average`: conf/average_checkpoints.yaml."""

    checkpoints: tuple[str, ...]  # paths and patterns
    last: PositiveInt | None  # null: all
    output: Path

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        patterns = value if isinstance(value, list | tuple) else [value]
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigError(f"checkpoints must be a path, a pattern or a list of them, not {value!r}")
        return patterns

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.output.exists():
            raise ConfigError(f"output: {self.output} exists already; remove it or choose another name")
        if self.output.suffix != ".nemo":
            raise ConfigError(f"output: {self.output} must end in .nemo")
        return self


def load_average_config(cfg: DictConfig) -> AverageConfig:
    """Return the configuration of `average`. Raises `ConfigError`, naming the key."""
    return AverageConfig.from_config(plain_values(cfg))


def average(cfg: DictConfig) -> None:
    """Average checkpoints as a composed Hydra configuration says. Exits with 2 for an error that a user can fix."""
    run_to_exit_code(lambda: _average(cfg), "Interrupted; nothing was written.")


def _average(cfg: DictConfig) -> int:
    config = load_average_config(cfg)
    from bionemo_esm.pretraining.averaging import average_checkpoints, find_files  # torch takes a second to import

    console = Console(sys.stdout)
    files = find_files(config.checkpoints)
    with hold_output("output", config.output):
        report = average_checkpoints(files, config.last, config.output, ProgressBar(console, "averaging"))
    for note in report.notes:
        console.print_line(f"  {note}")
    sources = report.sources
    console.print_line(
        f"Averaged {len(sources)} checkpoints, {sources[0].path.name} (step {sources[0].step:,}) to "
        f"{sources[-1].path.name} (step {sources[-1].step:,}), into {config.output}."
    )
    console.print_line(f"Look at it: bionemo-esm inspect {shlex.quote(str(config.output))}")
    return 0


average_main = ConfiguredCommand(
    average,
    "average_checkpoints",
    text_keys=("output",),
    list_keys=("checkpoints",),
)
"""`bionemo-esm average`."""


def convert(arguments: Sequence[str]) -> None:
    """Run `bionemo-esm convert-legacy OLD.nemo NEW.nemo`, the only command that opens an archive of pickles."""
    parser = argparse.ArgumentParser(
        "bionemo-esm convert-legacy",
        description="Turn an ESM-1nv archive of NeMo 1 or BioNeMo 1, which holds a pickle, into one of ours. The "
        "pickle is read in a process of its own by a reader that builds nothing but tensors.",
    )
    parser.add_argument("source", type=Path, metavar="OLD.nemo")
    parser.add_argument("output", type=Path, metavar="NEW.nemo")
    options = parser.parse_args(arguments)
    run_to_exit_code(lambda: _convert(options.source, options.output), "Interrupted; nothing was written.")


def _convert(source: Path, output: Path) -> int:
    from bionemo_esm.model.legacy import convert_legacy

    console = Console(sys.stdout)
    with hold_output("NEW.nemo", output):
        report = convert_legacy(source, output)
    console.print_line(
        f"Converted {source} into {output}: {report.parameters:,} parameters, {len(report.renamed)} tensors."
    )
    for name in report.dropped:
        console.print_line(f"  left out: {name}")
    for note in report.notes:
        console.print_line(f"  note: {note}")
    return 0
