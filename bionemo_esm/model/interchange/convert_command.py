"""`bionemo-esm convert`: models of other libraries into archives of ours, and back."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.format_detection import PRECISIONS, Route, route
from bionemo_esm.settings import boolean, integer, known, number, path, plain_values

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.model.interchange.state_dict_adapter import ImportedWeights, SourceModel

_KEYS = {"source", "target", "revision", "seq_length", "stretch_positions", "precision", "shard_gigabytes"}
_DEFAULT_SHARD = 5.0  # gigabytes


@dataclass(frozen=True)
class ConvertConfig:
    """From where to where, and what is to change on the way."""

    route: Route
    revision: str | None  # of a model on the Hub
    seq_length: int | None  # tokens; null: the source's
    stretch_positions: bool
    precision: str | None  # "32" or "bf16"; null: the source's
    shard_gigabytes: float

    def __post_init__(self) -> None:
        self.route.check(self.revision, self.precision)
        if not 0 < self.shard_gigabytes < 1e6:
            raise ConfigError(f"shard_gigabytes must be over 0, not {self.shard_gigabytes:g}")
        if self.route.is_export:
            if self.seq_length is not None or self.stretch_positions:
                raise ConfigError("seq_length and stretch_positions are for models that are brought in")
        elif self.shard_gigabytes != _DEFAULT_SHARD:
            raise ConfigError("shard_gigabytes is for models that are taken to Hugging Face; a .nemo is one file")
        if self.stretch_positions and self.seq_length is None:
            raise ConfigError("stretch_positions: say by seq_length how many tokens the position table is to reach")


def load_convert_config(cfg: DictConfig) -> ConvertConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), _KEYS)
    source, target, revision, precision = (values[key] for key in ("source", "target", "revision", "precision"))
    for key, text in (("source", source), ("target", target)):
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{key} must be a path{' or an id on the Hub' * (key == 'source')}, not {text!r}")
    if isinstance(revision, bool | int | float):  # YAML reads a commit of digits alone as a number
        raise ConfigError(f"revision: put it in quotes, as in revision=\"'{revision}'\"; YAML takes it for a number")
    seq_length = values["seq_length"]
    place = path("target", target)
    assert place is not None
    return ConvertConfig(
        route(source, place),
        revision,
        None if seq_length is None else integer("seq_length", seq_length),
        boolean("stretch_positions", values["stretch_positions"]),
        None if precision is None else str(precision),
        number("shard_gigabytes", values["shard_gigabytes"]),
    )


def convert(cfg: DictConfig) -> None:
    """Convert a model as a composed Hydra configuration says. Exits with 2 for what a user can mend."""
    with sigterm_as_exit("Stopped; nothing was written."):
        run_to_exit_code(lambda: _convert(load_convert_config(cfg)), "Interrupted; nothing was written.")


def _convert(config: ConvertConfig) -> int:
    console = Console(sys.stdout)
    console.print_line(f"Reading {config.route.source}, {config.route.kind.value}")
    (_export if config.route.is_export else _import)(config, console)
    return 0


def _import(config: ConvertConfig, console: Console) -> None:
    from bionemo_esm.model.interchange.convert import import_model  # torch takes a second to import

    def tell(foreign: SourceModel, taken: ImportedWeights) -> None:
        console.print_line(f"  model    {describe(taken.config, taken.precision)}")
        revision = foreign.provenance["imported_from"].get("revision")
        if revision is not None:
            console.print_line(f"  commit   {revision}")
        for note in taken.notes:
            console.print_line(f"  note     {note}")

    report = import_model(
        config.route.source,
        config.route.target,
        revision=config.revision,
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
    console.print_line(
        f"Train it further:  bionemo-esm pretrain recipe=adapt restore_from_path={path} data.fasta=mine.fasta"
    )


def _export(config: ConvertConfig, console: Console) -> None:
    from bionemo_esm.model.interchange.convert import export_model  # torch takes a second to import

    report = export_model(
        config.route.source,
        config.route.target,
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
    """A model in one line."""
    return (
        f"{config.family}, {config.num_layers} layers, hidden {config.hidden_size:,}, {config.num_attention_heads} "
        f"heads, {config.parameters:,} parameters in {PRECISIONS[precision]}, up to {config.seq_length:,} tokens, "
        f"{config.position_embedding} positions, {'with' if config.contact_head else 'no'} contact head"
    )


main = ConfiguredCommand(
    convert,
    "convert_checkpoint",
    text_keys=("source", "target", "revision"),
)
"""`bionemo-esm convert`."""
