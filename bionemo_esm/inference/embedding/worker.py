"""Embedding an input in several processes: of `world` processes, rank k computes parts k, k + world, k + 2 world, ...

No process waits for another. The one that finds all parts finished makes the output. The processes are started here,
one for each device, or by torchrun or srun, whose environment gives the ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import model_validator
from typing_extensions import Self

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.embedding.formats import format_of, read_about
from bionemo_esm.inference.embedding.options import EmbeddingOptions, plural
from bionemo_esm.inference.embedding.work_folder import WorkFolder, cut
from bionemo_esm.inference.engine_options import EngineConfig, describe
from bionemo_esm.inference.inputs import InputInventory, InputPolicy, Protein, read_proteins
from bionemo_esm.inference.load import load_engine
from bionemo_esm.settings import InputPath, PositiveInt

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.inference.engine import Engine

ABOUT_VERSION = 1
_MEGABYTE = 10**6


class EmbedConfig(EngineConfig, InputPolicy, EmbeddingOptions):
    """The keys of `conf/inference/embed.yaml`."""

    input: InputPath
    output: Path
    format: str | None = None
    devices: PositiveInt = 1
    part_proteins: PositiveInt = 4096
    part_megabytes: PositiveInt = 128

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        format_of(self.output, self.format)
        if self.devices > 1 and ":" in self.device:
            raise ConfigError(f"device={self.device} names one GPU, devices={self.devices} wants more; device=cuda")
        return self

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.output, *format_of(self.output, self.format))


@dataclass(frozen=True)
class EmbedTask:
    """An input that has been read, checked and hashed, and how to embed it."""

    config: EmbedConfig
    input: Path  # of `config`, or the copy of standard input
    input_sha256: str
    inventory: InputInventory

    @property
    def work(self) -> WorkFolder:
        return self.config.work


class WorkerRank(NamedTuple):
    """The rank of a process among all processes, and on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


class ProgressCallbacks(NamedTuple):
    """Progress of a process: lines for the screen, and the number of residues that its rank has done."""

    print_line: Callable[[str], None]
    progress: Callable[[int], None]


def embed_on_rank(task: EmbedTask, rank: WorkerRank, callbacks: ProgressCallbacks) -> bool:
    """Embed the parts of one rank; return whether the output exists, made by this process or another.

    Raises `UserError` for a user's error; before anything is computed if it can be known then.
    """
    engine = _loaded(task, rank)
    options = task.config.resolved(engine)
    about = _about(task, engine, options)
    work = task.work
    if rank.world > 1 and _finished_by_others(task, about):
        return True
    if options.long_proteins == "error" and task.inventory.longest > (options.window or 0):
        options.check_lengths(list(_over(task, options.window or 0)))
    work.claim(
        about
        | {
            "format": work.kind,
            "part_proteins": task.config.part_proteins,
            "part_megabytes": task.config.part_megabytes,
        }
    )
    progress = _Progress(callbacks.progress, work, rank)
    callbacks.print_line(f"  model    {describe(engine)}")
    callbacks.print_line(f"           layers {', '.join(map(str, options.layers)) or 'none'}; {_windows(options)}")
    if progress.present:
        there = f"{plural(progress.present, 'part')} {'is' if progress.present == 1 else 'are'} there"
        callbacks.print_line(f"  resumed  {there} from an earlier run")
    else:
        _check_space(task, options, engine.config.hidden_size)
    progress.start()
    parts = _compute(task, rank, engine, options, about, progress)
    return parts is None or work.finish(parts, about)


class _Progress:
    """Residues of the rank's share that are done: of earlier parts, of parts computed now, and of the current one."""

    def __init__(self, report: Callable[[int], None], work: WorkFolder, rank: WorkerRank) -> None:
        self._report = report
        records = work.records()
        self.present = len(records)  # parts of all processes
        self.kept = {number: record for number, record in records.items() if number % rank.world == rank.rank}
        self._done = sum(record.residues for record in self.kept.values())
        self._current = self._total = 0

    def start(self) -> None:
        self._report(self._done)

    def begin(self, residues: int) -> None:
        self._current, self._total = 0, residues

    def answered(self, residues: int) -> None:
        """Count residues that the model has read, at most those of the part: windows overlap."""
        self._current = min(self._current + residues, self._total)
        self._report(self._done + self._current)

    def end(self) -> None:
        self._done += self._total
        self._current = self._total = 0
        self._report(self._done)

    def forget(self, residues: int) -> None:
        self._done -= residues


def _loaded(task: EmbedTask, rank: WorkerRank) -> Engine:
    import torch

    config: EngineConfig = task.config
    if rank.local_world > 1:
        if config.device in ("auto", "cuda") and torch.cuda.is_available():
            config = config.replace(device=f"cuda:{rank.local_rank % torch.cuda.device_count()}")
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // rank.local_world))
    return load_engine(config)


def _about(task: EmbedTask, engine: Engine, options: EmbeddingOptions) -> dict[str, Any]:
    """Return what the output stores about itself: plain values, in a fixed order."""
    return {
        "version": ABOUT_VERSION,
        "model": engine.config.family,
        "weights_sha256": engine.weights_sha256,
        "model_identity": engine.model_identity,
        "precision": str(engine.dtype).removeprefix("torch."),
        "hidden_size": engine.config.hidden_size,
        "layers": list(options.layers),
        "mean": options.mean,
        "cls": options.cls,
        "residues": options.residues,
        "logits": options.logits,
        "pseudo_perplexity": options.pseudo_perplexity,
        "dtype": options.dtype,
        "long_proteins": options.long_proteins,
        "window": options.window,
        "overlap": options.overlap if options.long_proteins == "windows" else None,
        "input_sha256": task.input_sha256,
        "proteins": task.inventory.proteins,
        "bad_records": task.config.bad_records,
        "unknown_letters": task.config.unknown_letters,
        "id_column": task.config.id_column,
        "sequence_column": task.config.sequence_column,
    }


def _windows(options: EmbeddingOptions) -> str:
    over = f"proteins over {options.window:,} residues"
    return {
        "windows": f"{over} in windows that share {options.overlap:,}",
        "truncate": f"{over} cut there",
        "error": f"no {over}",
    }[options.long_proteins]


def _finished_by_others(task: EmbedTask, about: dict[str, Any]) -> bool:
    """Return whether other processes of this job have finished it. Raises `ConfigError` for another job's output."""
    if not os.path.lexists(task.config.output):
        return False
    if read_about(task.config.output) != about:
        raise ConfigError(
            f"output: {task.config.output} exists already, and is of another job; remove it or choose another name"
        )
    return True


def _over(task: EmbedTask, window: int) -> Iterator[Protein]:
    return (protein for protein in read_proteins(task.input, task.config, lambda _: None) if protein.residues > window)


def _check_space(task: EmbedTask, options: EmbeddingOptions, hidden: int) -> None:
    """Raise `ConfigError` if the disk cannot hold the arrays; a single file is joined from parts."""
    a_residue = options.bytes_of(2, hidden) - options.bytes_of(1, hidden)
    a_protein = options.bytes_of(1, hidden) - a_residue
    residues = task.inventory.residues
    if options.long_proteins == "truncate":
        residues = min(residues, task.inventory.proteins * (options.window or 0))
    needed = (task.inventory.proteins * a_protein + residues * a_residue) * (1 if task.work.is_folder else 2)
    free = shutil.disk_usage(task.work.folder).free
    if needed > free:
        twice = "" if task.work.is_folder else ", half of them until the file is joined from its parts"
        raise ConfigError(
            f"output: {task.config.output} takes {needed / 1e9:,.1f} GB{twice}; {free / 1e9:,.1f} GB are free there. "
            "dtype=float16 halves it; residues=false leaves the most out"
        )


def _compute(
    task: EmbedTask,
    rank: WorkerRank,
    engine: Engine,
    options: EmbeddingOptions,
    about: dict[str, Any],
    progress: _Progress,
) -> int | None:
    """Compute the missing parts of the rank; return the number of parts of the input, None if all were finished."""
    from bionemo_esm.inference.embedding.embeddings import embed_proteins

    work, before = task.work, task.input.stat()
    number = -1
    proteins = read_proteins(task.input, task.config, lambda _: None)
    pieces = cut(proteins, task.config.part_proteins, task.config.part_megabytes * _MEGABYTE,
                 lambda residues: options.bytes_of(residues, engine.config.hidden_size))  # fmt: skip
    for number, part in enumerate(pieces):
        if number % rank.world != rank.rank:
            continue
        if number in progress.kept:
            if work.is_intact(number, progress.kept[number]):
                continue
            progress.forget(progress.kept[number].residues)
        if rank.world > 1 and _finished_by_others(task, about):
            return None
        progress.begin(sum(protein.residues for protein in part))
        work.write(number, about, embed_proteins(engine, part, options, progress.answered))
        progress.end()
    after = task.input.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"input: {task.input} was changed while it was read; remove {work.folder} and begin anew")
    return number + 1


_SECONDS_TO_END = 5.0  # from terminating a process to killing it


class Outcome(NamedTuple):
    """The result of several processes: whether the output exists, or which failed and why."""

    finished: bool
    errors: list[str]  # of the user, without duplicates
    failed: list[str]  # which process ended, and how


def launched(environment: Mapping[str, str] = os.environ) -> WorkerRank | None:
    """Return the rank of this process if torchrun or srun has started several; None otherwise.

    Raises `ConfigError` for an environment that contradicts itself.
    """
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        if names[0] in environment and names[1] in environment:
            try:
                rank, world = int(environment[names[0]]), int(environment[names[1]])
                local = int(environment.get(names[2], rank))
                beside = int(environment.get(names[3], "1").split("(")[0].split(",")[0])  # Slurm writes 8(x22)
            except ValueError:
                raise ConfigError(f"{' and '.join(names[:2])} in the environment are not whole numbers") from None
            if not 0 <= rank < world:
                raise ConfigError(f"the environment names process {rank} ({names[0]}) of {world} ({names[1]})")
            return WorkerRank(rank, world, local, max(beside, 1)) if world > 1 else None
    return None


def embed_in_processes(task: EmbedTask, devices: int, callbacks: ProgressCallbacks) -> Outcome:
    """Embed in several processes of this machine. They end when this process is stopped or killed."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    ends: dict[Connection, int] = {}
    processes = []
    for rank in range(devices):
        here, there = context.Pipe(duplex=False)
        own = WorkerRank(rank, devices, rank, devices)
        processes.append(context.Process(target=_work, args=(task, own, there), name=f"process {rank}", daemon=True))
        processes[-1].start()
        there.close()
        ends[here] = rank
    try:
        finished, errors = _listen(ends, devices, callbacks)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_SECONDS_TO_END)
            process.kill()
            process.join()
    failed = [f"{process.name} {_ending(process.exitcode)}" for process in processes if process.exitcode]
    return Outcome(finished, errors, failed)


def _listen(ends: dict[Connection, int], devices: int, callbacks: ProgressCallbacks) -> tuple[bool, list[str]]:
    """Forward the messages of the processes until all have ended."""
    done: dict[int, int] = {}  # of those that have begun
    finished, errors = False, []
    while ends:
        for end in wait(list(ends)):
            assert isinstance(end, Connection)
            try:
                message = json.loads(end.recv_bytes())
            except EOFError:
                end.close()
                del ends[end]
                continue
            if "line" in message:
                callbacks.print_line(message["line"])
            elif "error" in message:
                errors += [message["error"]] if message["error"] not in errors else []
            elif "finished" in message:
                finished = finished or message["finished"]
            else:
                done[ends[end]] = message["done"]
                if len(done) == devices:  # parts of an earlier run must not count as speed
                    callbacks.progress(sum(done.values()))
    return finished, errors


def _work(task: EmbedTask, rank: WorkerRank, end: Connection) -> None:
    """Run one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        with suppress(BrokenPipeError):
            end.send_bytes(json.dumps(message).encode())

    def print_line(line: str) -> None:
        send(line=line)

    def progress(residues: int) -> None:
        send(done=residues)

    first: Callable[[str], None] = print_line if rank.rank == 0 else lambda line: None
    code = 0
    try:
        send(finished=embed_on_rank(task, rank, ProgressCallbacks(first, progress)))
    except UserError as error:
        send(error=str(error))
        code = 2
    except Exception:  # `os._exit` below prints nothing; the exit code reports it
        traceback.print_exc()
        code = 1
    end.close()
    sys.stderr.flush()
    os._exit(code)  # without waiting for CUDA and library threads


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ending(code: int | None) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
