"""What people run on checkpoints and archives: averaging, and the conversion of legacy archives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, run_to_exit_code
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import integer, known, path, plain_values


@dataclass(frozen=True)
class AverageConfig:
    """Which checkpoints to average into what."""

    checkpoints: tuple[str, ...]  # paths and patterns
    last: int | None  # null: all
    output: Path

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError(f"last must be at least 1, or null for all, not {self.last}")
        if self.output.exists():
            raise ConfigError(f"output: {self.output} exists already; remove it or choose another name")
        if self.output.suffix != ".nemo":
            raise ConfigError(f"output: {self.output} must end in .nemo")


def load_average_config(cfg: DictConfig) -> AverageConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), {"checkpoints", "last", "output"})
    checkpoints = values["checkpoints"]
    patterns = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"checkpoints must be a path, a pattern or a list of them, not {checkpoints!r}")
    output = path("output", values["output"])
    if output is None:
        raise ConfigError("output must be the path of the .nemo to write")
    last = values["last"]
    return AverageConfig(tuple(patterns), None if last is None else integer("last", last), output)


def average(cfg: DictConfig) -> None:
    """Average checkpoints as a composed Hydra configuration says. Exits with 2 for what a user can mend."""
    run_to_exit_code(lambda: _average(load_average_config(cfg)), "Interrupted; nothing was written.")


def _average(config: AverageConfig) -> int:
    from bionemo_esm.pretraining.averaging import average_checkpoints, find_files  # torch takes a second to import

    console = Console(sys.stdout)
    files = find_files(config.checkpoints)
    report = average_checkpoints(files, config.last, config.output, ProgressBar(console, "averaging"))
    for note in report.notes:
        console.print_line(f"  {note}")
    sources = report.sources
    console.print_line(
        f"Averaged {len(sources)} checkpoints, {sources[0].path.name} (step {sources[0].step:,}) to "
        f"{sources[-1].path.name} (step {sources[-1].step:,}), into {config.output}."
    )
    console.print_line(f"Look at it: bionemo-esm inspect {config.output}")
    return 0


average_main = ConfiguredCommand(
    average,
    "average_checkpoints",
    text_keys=("output",),
    list_keys=("checkpoints",),
)
"""`bionemo-esm average`."""


def convert(arguments: Sequence[str]) -> None:
    """`bionemo-esm convert-legacy OLD.nemo NEW.nemo`: the one command that opens an archive of pickles."""
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
    if output.exists():
        raise ConfigError(f"{output} exists already; remove it or choose another name")
    report = convert_legacy(source, output)
    console.print_line(
        f"Converted {source} into {output}: {report.parameters:,} parameters, {len(report.renamed)} tensors."
    )
    for name in report.dropped:
        console.print_line(f"  left out: {name}")
    for note in report.notes:
        console.print_line(f"  note: {note}")
    return 0
