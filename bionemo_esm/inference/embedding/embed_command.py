"""`bionemo-esm embed`: embeddings of all proteins of an input, into a file or a folder of parts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import EXIT_INTERRUPTED, RESIDUES, Console, ProgressBar, run_to_exit_code, sigterm_as_exit
from bionemo_esm.data.fasta import STANDARD_INPUT
from bionemo_esm.data.store import sha256_of_file
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import check_absent, check_writable
from bionemo_esm.inference.embedding.formats import format_of
from bionemo_esm.inference.embedding.options import EmbeddingOptions, plural
from bionemo_esm.inference.embedding.work_folder import WorkFolder, copied
from bionemo_esm.inference.embedding.worker import (
    EmbedTask,
    Outcome,
    ProgressCallbacks,
    WorkerRank,
    embed_in_processes,
    embed_on_rank,
    launched,
)
from bionemo_esm.inference.engine_options import ENGINE_KEYS, EngineConfig
from bionemo_esm.inference.inputs import POLICY_KEYS, InputPolicy, scan_input
from bionemo_esm.settings import boolean, integer, known, path, plain_values

_STOPPED = "Stopped."
_SIGNALLED = (EXIT_INTERRUPTED, 128 + signal.SIGTERM)
_GOES_ON = "the same command goes on from there"
_BOOLEANS = ("mean", "cls", "residues", "logits", "pseudo_perplexity")
_KEYS = ENGINE_KEYS | {
    "input", "output", "format", "layers", *_BOOLEANS, "dtype", "long_proteins", "window", "overlap", *POLICY_KEYS,
    "devices", "part_proteins", "part_megabytes",
}  # fmt: skip


@dataclass(frozen=True)
class EmbedConfig:
    """The settings of the job; conf/inference/embed.yaml has what they mean."""

    engine: EngineConfig
    input: str  # a path, or `STANDARD_INPUT`
    policy: InputPolicy
    output: Path
    kind: str  # a format of `writers`
    is_folder: bool
    options: EmbeddingOptions
    devices: int
    part_proteins: int
    part_megabytes: int

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.output, self.kind, self.is_folder)

    def __post_init__(self) -> None:
        for key in ("devices", "part_proteins", "part_megabytes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.devices > 1 and ":" in self.engine.device:
            raise ConfigError(
                f"device={self.engine.device} names one GPU, devices={self.devices} wants more; device=cuda"
            )


def load_embed_config(cfg: DictConfig) -> EmbedConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), _KEYS)
    output, source = path("output", values["output"]), values["input"]
    if output is None or not isinstance(source, str) or not source:
        raise ConfigError("input and output must be paths")
    kind, is_folder = format_of(output, None if values["format"] is None else str(values["format"]))
    return EmbedConfig(
        EngineConfig.of(values),
        source if source == STANDARD_INPUT else str(Path(source).expanduser()),
        InputPolicy.of(values),
        output,
        kind,
        is_folder,
        _choice(values),
        integer("devices", values["devices"]),
        integer("part_proteins", values["part_proteins"]),
        integer("part_megabytes", values["part_megabytes"]),
    )


def _choice(values: dict[str, Any]) -> EmbeddingOptions:
    layers = values["layers"] if isinstance(values["layers"], list) else [values["layers"]]
    return EmbeddingOptions(
        layers=tuple(integer("layers", layer) for layer in layers),
        dtype=str(values["dtype"]),
        long_proteins=str(values["long_proteins"]),
        window=None if values["window"] is None else integer("window", values["window"]),
        overlap=None if values["overlap"] is None else integer("overlap", values["overlap"]),
        **{key: boolean(key, values[key]) for key in _BOOLEANS},
    )


def embed(cfg: DictConfig) -> None:
    """Embed as a composed Hydra configuration says. Exits with 2 for what a user can mend, 1 where a process died."""
    config: EmbedConfig | None = None

    def job() -> int:
        nonlocal config
        config = load_embed_config(cfg)
        return _embed(config)

    try:
        with sigterm_as_exit(_STOPPED):
            run_to_exit_code(job, _STOPPED)
    except SystemExit as stop:
        if stop.code in _SIGNALLED and config is not None and not config.output.exists():
            print(f"{_kept(config.work)}.", file=sys.stderr)  # noqa: T201
        raise


def _embed(config: EmbedConfig) -> int:
    share = launched()
    console = Console(sys.stdout, silent=share is not None and share.rank > 0)
    if share is not None:
        return _one_of_many(config, share, console)
    check_absent("output", config.output)
    check_writable("output", config.output)
    config.options.resolved(config.engine.check())
    work = config.work
    with work.held():
        task = _task(config, console, work)
        tell = ProgressCallbacks(console.print_line, _metered(console, "embedding", task.stock.residues))
        if config.devices == 1:
            finished = embed_on_rank(task, WorkerRank(), tell)
            assert finished, "one process alone finishes all parts"
        else:
            outcome = embed_in_processes(task, config.devices, tell)
            if not outcome.finished:
                return _fail(outcome, work)
    _say_finished(task, console)
    return 0


def _one_of_many(config: EmbedConfig, share: WorkerRank, console: Console) -> int:
    """One of the processes that a launcher has started: each on its own, until one finds that all is there."""
    if config.devices != 1:
        raise ConfigError(f"devices={config.devices}: {share.world} processes were started already; leave devices out")
    if config.input == STANDARD_INPUT:
        raise ConfigError("input=-: several processes cannot share standard input; give a file, or use devices=N")
    check_writable("output", config.output)
    config.options.resolved(config.engine.check())
    work = config.work
    with work.shared():
        task = _task(config, console, work)
        what = f"embedding, process 1 of {share.world}"
        tell = ProgressCallbacks(console.print_line, _metered(console, what, task.stock.residues // share.world))
        finished = embed_on_rank(task, share, tell)
    if finished:
        _say_finished(task, console)
    else:
        console.print_line(
            f"This process is done; the last of {share.world} makes {config.output}. If one dies, finished parts are "
            f"kept: {_GOES_ON}."
        )
    return 0


def _metered(console: Console, what: str, residues: int) -> Callable[[int], None]:
    """Shows how many residues are done; the clock begins with the first answer, as a model may take long to load."""
    meter: ProgressBar | None = None

    def progress(done: int) -> None:
        nonlocal meter
        meter = meter or ProgressBar(console, what, RESIDUES)
        meter(done, residues)

    return progress


def _task(config: EmbedConfig, console: Console, work: WorkFolder) -> EmbedTask:
    """The input read and checked. Raises `InputError`, `SourceError`."""
    place = Path(config.input)
    name = config.input
    if config.input == STANDARD_INPUT:
        name, place = "standard input", work.input
        console.print_line(f"Reading {name}")
        copied(sys.stdin.buffer, place)
    else:
        console.print_line(f"Reading {name}")
    try:
        stock = scan_input(place, config.policy)
    except UserError as error:
        raise type(error)(str(error).replace(str(place), name)) from error
    sizes = f"{plural(stock.proteins, 'protein')}, {plural(stock.residues, 'residue')}, the longest of"
    console.print_line(f"  input    {sizes} {stock.longest:,}")
    if stock.skipped:
        console.print_line(
            f"           {plural(stock.skipped, 'record')} left out; "
            f"the first: {stock.first_problem.replace(str(place), name)}"
        )
    if stock.ids_are_numbers:
        console.print_line("           ids are the numbers of the rows")
    return EmbedTask(
        config.engine, place, sha256_of_file(place), config.policy, stock, config.output, config.kind, config.is_folder,
        config.options, config.part_proteins, config.part_megabytes,
    )  # fmt: skip


def _fail(outcome: Outcome, work: WorkFolder) -> int:
    """Say why processes did not finish: 2 where a user can mend it, 1 where one died."""
    for error in outcome.errors:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
    if outcome.errors:
        return 2
    print(f"error: {'; '.join(outcome.failed)}. {_kept(work)}", file=sys.stderr)  # noqa: T201
    return 1


def _kept(work: WorkFolder) -> str:
    parts = len(work.records())
    if not parts:
        return "No part was finished: the same command begins anew"
    return f"{plural(parts, 'finished part')} {'is' if parts == 1 else 'are'} kept: {_GOES_ON}"


def _say_finished(task: EmbedTask, console: Console) -> None:
    place = task.output
    files = list(place.iterdir()) if place.is_dir() else [place]
    size = sum(file.stat().st_size for file in files)
    parts = f", {plural(len(files), 'file')}" if place.is_dir() else ""
    console.print_line(f"Wrote {place}, {size:,} bytes{parts}")


main = ConfiguredCommand(
    embed,
    "embed",
    part="inference",
    text_keys=("model", "input", "output", "id_column", "sequence_column"),
)
"""`bionemo-esm embed`."""
