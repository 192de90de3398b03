"""One process's share of embedding an input: of `world` processes, rank k computes parts k, k + world, k + 2 world, ...

No process waits for another. Whichever finds all parts finished makes the output of them.
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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.embedding.formats import read_about
from bionemo_esm.inference.embedding.options import EmbeddingOptions, plural
from bionemo_esm.inference.embedding.work_folder import WorkFolder, cut
from bionemo_esm.inference.engine_options import EngineConfig, describe
from bionemo_esm.inference.inputs import InputInventory, InputPolicy, Protein, read_proteins
from bionemo_esm.inference.protein_model import load_engine

if TYPE_CHECKING:  # it imports torch
    from bionemo_esm.inference.engine import Engine

ABOUT_VERSION = 1
_MEGABYTE = 10**6


@dataclass(frozen=True)
class EmbedTask:
    """What to embed, how, and where to: the input read and checked, and hashed."""

    engine: EngineConfig
    input: Path
    input_sha256: str
    policy: InputPolicy
    stock: InputInventory
    output: Path
    kind: str  # a format of `writers`
    is_folder: bool
    options: EmbeddingOptions
    part_proteins: int
    part_megabytes: int

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.output, self.kind, self.is_folder)


class WorkerRank(NamedTuple):
    """Which process this is, of how many, and where on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


class ProgressCallbacks(NamedTuple):
    """How a process reports: lines for a person, and the residues of its share that are done, and are to do."""

    say: Callable[[str], None]
    progress: Callable[[int], None]


def embed_on_rank(task: EmbedTask, share: WorkerRank, tell: ProgressCallbacks) -> bool:
    """Embed the parts of one process; whether the output is there now, of this process's making or another's.

    Raises `UserError` for what a user can mend, before anything is computed where that can be known.
    """
    engine = _loaded(task, share)
    options = task.options.resolved(engine)
    about = _about(task, engine, options)
    work = task.work
    if share.world > 1 and _finished_by_others(task, about):
        return True
    if options.long_proteins == "error" and task.stock.longest > (options.window or 0):
        options.check_lengths(list(_over(task, options.window or 0)))
    work.claim(
        about | {"format": task.kind, "part_proteins": task.part_proteins, "part_megabytes": task.part_megabytes}
    )
    progress = _Progress(tell.progress, work, share)
    tell.say(f"  model    {describe(engine)}")
    tell.say(f"           layers {', '.join(map(str, options.layers)) or 'none'}; {_windows(options)}")
    if progress.there:
        there = f"{plural(progress.there, 'part')} {'is' if progress.there == 1 else 'are'} there"
        tell.say(f"  resumed  {there} from an earlier run")
    else:
        _check_space(task, options, engine.config.hidden_size)
    progress.start()
    parts = _compute(task, share, engine, options, about, progress)
    return parts is None or work.finish(parts, about)


class _Progress:
    """Residues of the share that are done: of parts that were there, of parts computed, and of the one at hand."""

    def __init__(self, report: Callable[[int], None], work: WorkFolder, share: WorkerRank) -> None:
        self._report = report
        records = work.records()
        self.there = len(records)  # of all processes
        self.kept = {number: record for number, record in records.items() if number % share.world == share.rank}
        self._done = sum(record.residues for record in self.kept.values())
        self._at_hand = self._most = 0

    def start(self) -> None:
        self._report(self._done)

    def begin(self, residues: int) -> None:
        self._at_hand, self._most = 0, residues

    def answered(self, residues: int) -> None:
        """What the model has read, which may be more than the proteins have: windows overlap."""
        self._at_hand = min(self._at_hand + residues, self._most)
        self._report(self._done + self._at_hand)

    def end(self) -> None:
        self._done += self._most
        self._at_hand = self._most = 0
        self._report(self._done)

    def forget(self, residues: int) -> None:
        self._done -= residues


def _loaded(task: EmbedTask, share: WorkerRank) -> Engine:
    import torch

    config = task.engine
    if share.local_world > 1:
        if config.device in ("auto", "cuda") and torch.cuda.is_available():
            config = replace(config, device=f"cuda:{share.local_rank % torch.cuda.device_count()}")
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // share.local_world))
    return load_engine(config)


def _about(task: EmbedTask, engine: Engine, options: EmbeddingOptions) -> dict[str, Any]:
    """What is said of the result in the result itself: plain values, in an order that stays."""
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
        "proteins": task.stock.proteins,
        "bad_records": task.policy.bad_records,
        "unknown_letters": task.policy.unknown_letters,
        "id_column": task.policy.id_column,
        "sequence_column": task.policy.sequence_column,
    }


def _windows(options: EmbeddingOptions) -> str:
    over = f"proteins over {options.window:,} residues"
    return {
        "windows": f"{over} in windows that share {options.overlap:,}",
        "truncate": f"{over} cut there",
        "error": f"no {over}",
    }[options.long_proteins]


def _finished_by_others(task: EmbedTask, about: dict[str, Any]) -> bool:
    """Whether the other processes of this very job have finished it. Raises `ConfigError` for another's output."""
    if not os.path.lexists(task.output):
        return False
    if read_about(task.output) != about:
        raise ConfigError(
            f"output: {task.output} exists already, and is of another job; remove it or choose another name"
        )
    return True


def _over(task: EmbedTask, window: int) -> Iterator[Protein]:
    return (protein for protein in read_proteins(task.input, task.policy, lambda _: None) if protein.residues > window)


def _check_space(task: EmbedTask, options: EmbeddingOptions, hidden: int) -> None:
    """Raises `ConfigError` where the disk has not room for the arrays alone; a single file is joined from parts."""
    a_residue = options.bytes_of(2, hidden) - options.bytes_of(1, hidden)
    a_protein = options.bytes_of(1, hidden) - a_residue
    residues = task.stock.residues
    if options.long_proteins == "truncate":
        residues = min(residues, task.stock.proteins * (options.window or 0))
    needed = (task.stock.proteins * a_protein + residues * a_residue) * (1 if task.is_folder else 2)
    free = shutil.disk_usage(task.work.folder).free
    if needed > free:
        twice = "" if task.is_folder else ", half of them until the file is joined from its parts"
        raise ConfigError(
            f"output: {task.output} takes {needed / 1e9:,.1f} GB{twice}; {free / 1e9:,.1f} GB are free there. "
            "dtype=float16 halves it; residues=false leaves the most out"
        )


def _compute(
    task: EmbedTask,
    share: WorkerRank,
    engine: Engine,
    options: EmbeddingOptions,
    about: dict[str, Any],
    progress: _Progress,
) -> int | None:
    """Compute what is not there of the share. The number of parts of the whole input; None if all were finished."""
    from bionemo_esm.inference.embedding.embeddings import embed_proteins

    work, before = task.work, task.input.stat()
    number = -1
    proteins = read_proteins(task.input, task.policy, lambda _: None)
    pieces = cut(proteins, task.part_proteins, task.part_megabytes * _MEGABYTE,
                 lambda residues: options.bytes_of(residues, engine.config.hidden_size))  # fmt: skip
    for number, part in enumerate(pieces):
        if number % share.world != share.rank:
            continue
        if number in progress.kept:
            if work.is_intact(number, progress.kept[number]):
                continue
            progress.forget(progress.kept[number].residues)
        if share.world > 1 and _finished_by_others(task, about):
            return None
        progress.begin(sum(protein.residues for protein in part))
        work.write(number, about, embed_proteins(engine, part, options, progress.answered))
        progress.end()
    after = task.input.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"input: {task.input} was changed while it was read; remove {work.folder} and begin anew")
    return number + 1


_SECONDS_TO_END = 5.0  # for a process that was asked to; then it is killed


class Outcome(NamedTuple):
    """What came of processes: the output, or who failed and why."""

    finished: bool
    errors: list[str]  # of a user's mending, each once
    failed: list[str]  # in words, which process ended how


def launched(environment: Mapping[str, str] = os.environ) -> WorkerRank | None:
    """The share of this process where torchrun or srun has started several; None where they have not.

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


def embed_in_processes(task: EmbedTask, devices: int, tell: ProgressCallbacks) -> Outcome:
    """Embed in so many processes of this machine. If this one is stopped, they are; if it is killed, they end."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    ends: dict[Connection, int] = {}
    processes = []
    for rank in range(devices):
        here, there = context.Pipe(duplex=False)
        share = WorkerRank(rank, devices, rank, devices)
        processes.append(context.Process(target=_work, args=(task, share, there), name=f"process {rank}", daemon=True))
        processes[-1].start()
        there.close()
        ends[here] = rank
    try:
        finished, errors = _listen(ends, devices, tell)
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


def _listen(ends: dict[Connection, int], devices: int, tell: ProgressCallbacks) -> tuple[bool, list[str]]:
    """What the processes say, until all have ended."""
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
            if "say" in message:
                tell.say(message["say"])
            elif "error" in message:
                errors += [message["error"]] if message["error"] not in errors else []
            elif "finished" in message:
                finished = finished or message["finished"]
            else:
                done[ends[end]] = message["done"]
                if len(done) == devices:  # what the last to begin finds done must not look like speed
                    tell.progress(sum(done.values()))
    return finished, errors


def _work(task: EmbedTask, share: WorkerRank, end: Connection) -> None:
    """One process, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        with suppress(BrokenPipeError):
            end.send_bytes(json.dumps(message).encode())

    def print_line(line: str) -> None:
        send(say=line)

    def progress(residues: int) -> None:
        send(done=residues)

    speaks: Callable[[str], None] = print_line if share.rank == 0 else lambda line: None
    code = 0
    try:
        send(finished=embed_on_rank(task, share, ProgressCallbacks(speaks, progress)))
    except UserError as error:
        send(error=str(error))
        code = 2
    except Exception:  # told here, as the process ends without unwinding; its exit code tells the others
        traceback.print_exc()
        code = 1
    end.close()
    sys.stderr.flush()
    os._exit(code)  # neither CUDA nor a thread of a library is waited for


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ending(code: int | None) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
