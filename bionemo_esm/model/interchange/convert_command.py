"""Command `bionemo-esm convert`: import models of other libraries, and export archives to them."""

from __future__ import annotations

import shlex
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import model_validator

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import hold_output
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange import PRECISIONS
from bionemo_esm.model.interchange.formats import Conversion
from bionemo_esm.settings import Settings, plain_values

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.model.interchange.state_dict_adapter import ImportedWeights, SourceModel

_DEFAULT_SHARD = 5.0  # gigabytes


class ConvertConfig(Settings):
    """Configuration of a conversion; `conf/convert_checkpoint.yaml` explains the keys."""

    source: str | None
    target: Path
    revision: str | int | float | bool | None
    seq_length: int | None
    stretch_positions: bool
    precision: str | None
    shard_gigabytes: float

    @cached_property
    def conversion(self) -> Conversion:
        assert self.source and not isinstance(self.revision, int | float)
        return Conversion.of(self.source, self.target, self.revision, self.precision)

    @model_validator(mode="after")
    def _check(self) -> ConvertConfig:
        if not self.source:
            raise ConfigError(f"source must be a path or an id on the Hub, not {self.source!r}")
        if isinstance(self.revision, int | float):  # YAML reads a commit hash of only digits as a number
            raise ConfigError(
                f"revision: put it in quotes, as in revision=\"'{self.revision}'\"; YAML takes it for a number"
            )
        is_export = self.conversion.is_export
        if not 0 < self.shard_gigabytes < 1e6:
            raise ConfigError(f"shard_gigabytes must be over 0, not {self.shard_gigabytes:g}")
        if is_export and (self.seq_length is not None or self.stretch_positions):
            raise ConfigError("seq_length and stretch_positions are for imports")
        if not is_export and self.shard_gigabytes != _DEFAULT_SHARD:
            raise ConfigError("shard_gigabytes is for exports to Hugging Face; a .nemo is one file")
        if self.stretch_positions and self.seq_length is None:
            raise ConfigError("stretch_positions: say by seq_length how many tokens the position table is to reach")
        return self


def load_convert_config(cfg: DictConfig) -> ConvertConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key, for an unknown, missing or wrong key."""
    return ConvertConfig.from_config(plain_values(cfg))


def convert(cfg: DictConfig) -> None:
    """Convert a model as a composed Hydra configuration says. Exit with code 2 for an error that the user can fix."""
    with sigterm_as_exit("Stopped; nothing was written."):
        run_to_exit_code(lambda: _convert(load_convert_config(cfg)), "Interrupted; nothing was written.")


def _convert(config: ConvertConfig) -> int:
    console = Console(sys.stdout)
    conversion = config.conversion
    with hold_output("target", conversion.target):
        console.print_line(f"Reading {conversion.source}, {conversion.source_format.description}")
        (_export if conversion.is_export else _import)(config, conversion, console)
    return 0


def _import(config: ConvertConfig, conversion: Conversion, console: Console) -> None:
    from bionemo_esm.model.interchange.convert import import_model  # torch takes a second to import

    def tell(source: SourceModel, imported: ImportedWeights) -> None:
        console.print_line(f"  model    {describe(imported.config, imported.precision)}")
        revision = source.provenance["imported_from"].get("revision")
        if revision is not None:
            console.print_line(f"  commit   {revision}")
        for note in imported.notes:
            console.print_line(f"  note     {note}")

    report = import_model(
        conversion.source,
        conversion.target,
        revision=None if config.revision is None else str(config.revision),
        seq_length=config.seq_length,
        stretch_positions=config.stretch_positions,
        precision=config.precision,
        progress=ProgressBar(console, "converting"),
        tell=tell,
    )
    console.print_line(f"Wrote {report.output}, {report.output.stat().st_size:,} bytes; SHA-256 of the weights:")
    console.print_line(f"  {report.weights_sha256}")
    path = shlex.quote(str(report.output))
    console.print_line(f"Look at it:        bionemo-esm inspect {path}")
    console.print_line(f"Train it further:  bionemo-esm pretrain recipe=adapt model={path} data.fasta=mine.fasta")


def _export(config: ConvertConfig, conversion: Conversion, console: Console) -> None:
    from bionemo_esm.model.interchange.convert import export_model  # torch takes a second to import

    report = export_model(
        conversion.source,
        conversion.target,
        precision=config.precision,
        shard_bytes=int(config.shard_gigabytes * 1e9),
        progress=ProgressBar(console, "converting"),
    )
    console.print_line(f"  model    {describe(report.config, report.precision)}")
    for note in report.notes:
        console.print_line(f"  note     {note}")
    console.print_line(f"Wrote {report.folder}, {sum(report.files.values()):,} bytes:")
    for name, size in report.files.items():
        console.print_line(f"  {name:<40} {size:>16,}")
    console.print_line(f'Load it:  EsmForMaskedLM.from_pretrained("{report.folder}")')


def describe(config: EncoderConfig, precision: str) -> str:
    """Return a one-line description of a model."""
    return (
        f"{config.family}, {config.num_layers} layers, hidden {config.hidden_size:,}, {config.num_attention_heads} "
        f"heads, {config.parameters:,} parameters in {PRECISIONS[precision]}, up to {config.seq_length:,} tokens, "
        f"{config.position_embedding} positions, {'with' if config.contact_head else 'no'} contact head"
    )


main = ConfiguredCommand(convert, "convert_checkpoint", text_keys=("source", "target", "revision"))
"""`bionemo-esm convert`."""
