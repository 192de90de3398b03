"""Training runs with injected faults: real processes and process groups, signals or errors at chosen moments.

A fork server that has imported everything once forks the child processes, so a run of two ranks takes seconds.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import SMALL, composed

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(  # one list for all tests: a process has one fork server
    [
        "faults",
        "bionemo_esm.pretraining.trainer",
        "bionemo_esm.pretraining.report",
        "bionemo_esm.inference.embedding.embeddings",
    ]
)
_SECONDS = 120  # time limit of a run; a longer run counts as hung


@dataclass(frozen=True)
class Fault:
    """Act before or after the n-th call of a function on one rank, or replace its result."""

    place: str  # dotted path of a function or method
    action: Callable[[], object] | None = None
    spoil: Callable[[Any], Any] | None = None  # maps the result to another one
    call: int = 1
    rank: int = 0
    before: bool = True
    repeated: bool = False  # at every later call too

    def install(self) -> None:
        module, _, name = self.place.rpartition(".")
        owner = _resolve(module)
        original = getattr(owner, name)
        calls = 0

        def faulty(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            due = calls == self.call or (self.repeated and calls > self.call)
            if due and self.action and self.before:
                self.action()
            result = original(*arguments, **keywords)
            if due and self.action and not self.before:
                self.action()
            return self.spoil(result) if due and self.spoil else result

        setattr(owner, name, faulty)


def _resolve(path: str) -> Any:
    """Return a module, or a class in a module, by its dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(_resolve(module), name)


@dataclass(frozen=True)
class KillWhileSaving:
    """Send SIGKILL at the n-th file operation of a save: chunk, fsync, rename or removal."""

    event: int
    rank: int = 0

    def install(self) -> None:
        import bionemo_esm.model.tar_format as container

        container._CHUNK_BYTES = 4096  # splits a small file into several chunks on disk
        seen = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal seen
                seen += threading.current_thread().name.startswith("checkpoints")
                if seen == self.event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            return call

        for place in (
            "bionemo_esm.model.tensor_io.bytes_of",
            "bionemo_esm.model.tar_format.os.fsync",
            "bionemo_esm.model.tar_format.Path.replace",
            "bionemo_esm.model.tar_format.Path.unlink",
        ):
            module, _, name = place.rpartition(".")
            owner = _resolve(module)
            setattr(owner, name, counted(getattr(owner, name)))


def send(number: signal.Signals) -> None:
    """Send a signal to this process, as a scheduler or a user would."""
    os.kill(os.getpid(), number)


@dataclass
class Outcome:
    """Exit code of each rank (negative: killed by that signal) and the output of rank 0."""

    codes: list[int]
    console: str = ""
    errors: str = ""
    ranks: list[str] = field(default_factory=list)  # standard error of each rank
    screens: list[str] = field(default_factory=list)  # standard output of each rank


def run(
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    faults: Sequence[Fault | KillWhileSaving] = (),
    stopped: Sequence[int] = (),
) -> Outcome:
    """Train as the command line does, on the given number of ranks, with faults installed.

    `stopped`: ranks that hang. They are killed after the others have ended, as a launcher does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = [folder.parent / f".{folder.name}-rank{rank}" for rank in range(ranks)]
    processes = [
        FORK_SERVER.Process(target=_child, args=(folder, overrides, rank, ranks, port, names[rank], tuple(faults)))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        if rank not in stopped:
            process.join(_SECONDS)
    for rank in stopped:
        processes[rank].kill()
        processes[rank].join()
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    errors = [name.with_suffix(".err").read_text() for name in names]
    screens = [name.with_suffix(".out").read_text() for name in names]
    assert not hung, f"ranks {hung} hang\n{screens[0]}\n{errors}"
    return Outcome([process.exitcode or 0 for process in processes], screens[0], errors[0], errors, screens)


def _child(
    folder: Path,
    overrides: Sequence[str],
    rank: int,
    ranks: int,
    port: int,
    name: Path,
    faults: Sequence[Fault | KillWhileSaving],
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(name.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    if ranks > 1:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
        counts = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        own = {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in (places | counts | own).items()})
    from bionemo_esm.pretraining.run import pretrain

    for fault in faults:
        if fault.rank == rank:
            fault.install()
    place = (f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}", f"trainer.devices={ranks}")
    pretrain(composed(*SMALL, *place, *overrides))


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without the values that depend on the clock."""
    from bionemo_esm.pretraining.callbacks import MEASURED

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "seconds_left", *MEASURED):
            line.pop(name, None)
    return lines
