"""`bionemo-esm embed`: embeddings of all proteins of an input, into a file or a folder of parts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import EXIT_INTERRUPTED, RESIDUES, Console, ProgressBar, run_to_exit_code, sigterm_as_exit
from bionemo_esm.data.store import sha256_of_file
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import check_absent, check_writable
from bionemo_esm.inference.embedding.options import plural
from bionemo_esm.inference.embedding.work_folder import WorkFolder, copied
from bionemo_esm.inference.embedding.worker import (
    EmbedConfig,
    EmbedTask,
    Outcome,
    ProgressCallbacks,
    WorkerRank,
    embed_in_processes,
    embed_on_rank,
    launched,
)
from bionemo_esm.inference.inputs import scan_input
from bionemo_esm.settings import STANDARD_INPUT, plain_values

_STOPPED = "Stopped."
_SIGNALLED = (EXIT_INTERRUPTED, 128 + signal.SIGTERM)
_RESUMES = "the same command goes on from there"


def load_embed_config(cfg: DictConfig) -> EmbedConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return EmbedConfig.from_config(plain_values(cfg))


def embed(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration. Exits with 2 for a user's error, 1 if a process died."""
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
    rank = launched()
    console = Console(sys.stdout, silent=rank is not None and rank.rank > 0)
    if rank is not None:
        return _embed_launched(config, rank, console)
    check_absent("output", config.output)
    check_writable("output", config.output)
    config.resolved(config.check())
    work = config.work
    with work.held():
        task = _task(config, console, work)
        callbacks = ProgressCallbacks(console.print_line, _progress(console, "embedding", task.inventory.residues))
        if config.devices == 1:
            finished = embed_on_rank(task, WorkerRank(), callbacks)
            assert finished, "a single process finishes all parts"
        else:
            outcome = embed_in_processes(task, config.devices, callbacks)
            if not outcome.finished:
                return _fail(outcome, work)
    _report_finished(config.output, console)
    return 0


def _embed_launched(config: EmbedConfig, rank: WorkerRank, console: Console) -> int:
    """Run one of the processes of a launcher. They work independently; one makes the output."""
    if config.devices != 1:
        raise ConfigError(f"devices={config.devices}: {rank.world} processes were started already; leave devices out")
    if config.input == STANDARD_INPUT:
        raise ConfigError("input=-: several processes cannot share standard input; give a file, or use devices=N")
    check_writable("output", config.output)
    config.resolved(config.check())
    work = config.work
    with work.shared():
        task = _task(config, console, work)
        what = f"embedding, process 1 of {rank.world}"
        progress = _progress(console, what, task.inventory.residues // rank.world)
        finished = embed_on_rank(task, rank, ProgressCallbacks(console.print_line, progress))
    if finished:
        _report_finished(config.output, console)
    else:
        console.print_line(
            f"This process is done; the last of {rank.world} makes {config.output}. If one dies, finished parts are "
            f"kept: {_RESUMES}."
        )
    return 0


def _progress(console: Console, what: str, residues: int) -> Callable[[int], None]:
    """Return a progress display; its clock starts with the first result, since a model may take long to load."""
    bar: ProgressBar | None = None

    def progress(done: int) -> None:
        nonlocal bar
        bar = bar or ProgressBar(console, what, RESIDUES)
        bar(done, residues)

    return progress


def _task(config: EmbedConfig, console: Console, work: WorkFolder) -> EmbedTask:
    """Read and check the input. Raises `InputError`, `SourceError`."""
    is_stdin = config.input == STANDARD_INPUT
    name, place = ("standard input", work.input) if is_stdin else (config.input, Path(config.input))
    console.print_line(f"Reading {name}")
    if is_stdin:
        copied(sys.stdin.buffer, place)
    try:
        inventory = scan_input(place, config)
    except UserError as error:
        raise type(error)(str(error).replace(str(place), name), code=error.code) from error
    sizes = f"{plural(inventory.proteins, 'protein')}, {plural(inventory.residues, 'residue')}, the longest of"
    console.print_line(f"  input    {sizes} {inventory.longest:,}")
    if inventory.skipped:
        console.print_line(
            f"           {plural(inventory.skipped, 'record')} left out; "
            f"the first: {inventory.first_problem.replace(str(place), name)}"
        )
    if inventory.ids_are_numbers:
        console.print_line("           ids are the numbers of the rows")
    return EmbedTask(config, place, sha256_of_file(place), inventory)


def _fail(outcome: Outcome, work: WorkFolder) -> int:
    """Print why processes did not finish; return 2 for a user's error, 1 if one died."""
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
    return f"{plural(parts, 'finished part')} {'is' if parts == 1 else 'are'} kept: {_RESUMES}"


def _report_finished(output: Path, console: Console) -> None:
    files = list(output.iterdir()) if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files)
    parts = f", {plural(len(files), 'file')}" if output.is_dir() else ""
    console.print_line(f"Wrote {output}, {size:,} bytes{parts}")


main = ConfiguredCommand(
    embed,
    "embed",
    part="inference",
    text_keys=("model", "input", "output", "id_column", "sequence_column"),
    other_spellings=INFERENCE_SPELLINGS | {"trainer.devices": "devices"},
)
"""`bionemo-esm embed`."""
