"""Run a module of rows in its own process, with fresh memory and threads. A crash affects no other module.

The child writes lines of JSON to a pipe: progress, each measured row, and the final status. Output of libraries goes to
a log.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison import RowsOf, Setting, measure
from benchmarks.machine import ROOT
from benchmarks.table import result_values
from bionemo_esm.errors import UserError

_SECONDS_TO_END = 5.0
_LOG_LINES = 12  # of a crash, for the console


@dataclass(frozen=True)
class Message:
    """A message of the child: progress, a known row, a new row (see `result_values`), the end, or a failure."""

    kind: str  # "told", "known", "row", "end" or "failed"
    text: str = ""
    row: dict[str, Any] | None = None


def messages_of(path: str, setting: Setting, known: list[str], log: Path) -> Generator[Message, None, None]:
    """Run the rows of a module. The last message is "end" or "failed". Rows in `known` are not measured again.

    Closing the generator ends the process and all its children.
    """
    told = {"path": path, "folder": str(setting.folder), "device": setting.device, "quick": setting.quick}
    told |= {"fasta": None if setting.fasta is None else str(setting.fasta), "known": known}
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "benchmarks.running", str(writing), json.dumps(told)]
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with open(log, "wb") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env=os.environ | {"PYTHONPATH": search},
            start_new_session=True,  # own group: ends with its children; Ctrl-C reaches only the parent
        )
    os.close(writing)
    ended = False
    try:
        with os.fdopen(reading, encoding="utf-8") as lines:
            for line in lines:
                message = Message(**json.loads(line))
                ended = message.kind in ("end", "failed")
                yield message
                if ended:
                    return
        code = child.wait()
        last = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        yield Message("failed", f"its process ended by {how}; its last words:\n{last}")
    finally:
        if ended:
            _wait(child)
        _end(child)


def _wait(child: subprocess.Popen[bytes]) -> bool:
    """Wait briefly. Return whether the process has ended."""
    try:
        child.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # all processes have ended
            break
        if _wait(child):
            break


def run(path: str, setting: Setting, known: list[str], send: Callable[[Message], None]) -> None:
    """Measure the rows of a module and pass each `Message` to `send`."""
    rows: RowsOf = importlib.import_module(path).rows
    send(Message("told", "preparing the first row"))
    for row in rows(setting):
        if row.key in known:
            send(Message("known", row.key))
            continue
        turns = 1 if setting.quick else row.turns
        result = measure(replace(row, turns=turns), lambda what: send(Message("told", what)))
        send(Message("row", row.key, result_values(result)))
        del row, result  # free memory before the next row is built
        send(Message("told", "preparing the next row"))


def main() -> None:
    """Entry point of the child. Arguments: the descriptor of the pipe, and the task."""
    pipe, told = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(pipe, False)
    fasta = None if told["fasta"] is None else Path(told["fasta"])
    setting = Setting(Path(told["folder"]), told["device"], told["quick"], fasta)
    with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as lines:

        def send(message: Message) -> None:
            lines.write(json.dumps(vars(message), allow_nan=False) + "\n")

        try:
            run(told["path"], setting, told["known"], send)
            send(Message("end"))
        except UserError as error:
            send(Message("failed", str(error)))  # any other error ends the process and appears in the log


if __name__ == "__main__":
    main()
