"""Several processes on one input: started here, one a device, or started by torchrun or srun, which say who is who."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.embedding.worker import EmbedTask, ProgressCallbacks, WorkerRank, embed_on_rank

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
