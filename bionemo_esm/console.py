"""What a person sees: our messages on the terminal, everybody else's in a log file."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from bionemo_esm.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.5  # of a terminal's progress line


class Console:
    """Lines for a person; a terminal also gets a progress line that rewrites itself. Ranks other than 0 stay silent."""

    def __init__(self, stream: TextIO, silent: bool = False) -> None:
        self.stream, self.silent = stream, silent
        self.is_terminal = stream.isatty()
        self._progress_width = 0

    def print_line(self, text: str = "") -> None:
        """A line (or several) that stays."""
        if not self.silent:
            self._write(text.ljust(self._progress_width) + "\n")
            self._progress_width = 0

    def progress(self, text: str) -> None:
        """A line that the next one replaces; where there is no terminal it stays."""
        if self.silent:
            return
        if self.is_terminal:
            self._write(text.ljust(self._progress_width) + "\r")
            self._progress_width = len(text)
        else:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


@contextmanager
def redirect_output(log: Path, silent: bool = False) -> Iterator[Console]:
    """Send all that is written to standard output and error into `log`; the yielded screen still reaches the person.

    The redirection is of file descriptors, so it catches warnings of libraries written in C++ and of child processes.
    It ends with the block, before an exception of the block is reported.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved_output, saved_error = os.dup(1), os.dup(2)
    with open(log, "a", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    # Python's own streams may lie elsewhere (a notebook, a test runner); point them at the descriptors as well.
    streams = sys.stdout, sys.stderr
    with (
        os.fdopen(saved_output, "w", encoding="utf-8") as person,
        os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as sys.stdout,
        os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as sys.stderr,
    ):
        try:
            yield Console(person, silent)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_output, 1)
            os.dup2(saved_error, 2)
            os.close(saved_error)
            sys.stdout, sys.stderr = streams


class Unit(NamedTuple):
    """What progress is counted in, and how many of what is counted make one."""

    name: str
    size: float


MEGABYTES, RESIDUES = Unit("MB", 1e6), Unit("residues", 1.0)


class ProgressBar:
    """Progress of long work over so many bytes, or units: how far, how fast, how long still."""

    def __init__(self, console: Console, what: str, unit: Unit = MEGABYTES) -> None:
        self.console, self.what, self.unit = console, what, unit
        self._interval = _SECONDS_BETWEEN_UPDATES if console.is_terminal else _SECONDS_BETWEEN_LINES
        self._started = self._shown = time.monotonic()
        self._first = 0
        self._last: int | None = None

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` bytes, or what the unit is made of (None: not known); says so when it is time to."""
        now = time.monotonic()
        if self._last is None or done < self._last:  # what an earlier call had done counts for the share, not the rate
            self._first, self._started = done, now
        self._last = done
        if now - self._shown < self._interval:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        unit, size = self.unit.name, self.unit.size
        text = f"  {self.what}: {done / size:,.0f} {unit}"
        if total:
            text += f" of {total / size:,.0f} ({done / total:.0%})"
        text += f"{note}, {rate / size:,.0f} {unit}/s"
        if total and rate > 0:
            text += f", {duration((total - done) / rate)} left"
        self.console.progress(text)


def run_to_exit_code(job: Callable[[], int], on_interrupt: str, silent: bool = False) -> None:
    """Run a job to its exit code; 2 after one line for what a user can mend, 130 after `on_interrupt` on Ctrl-C."""
    try:
        code = job()
    except UserError as error:
        if not silent:
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there
            print(f"{clear}error: {_printable(str(error))}", file=sys.stderr)  # noqa: T201
        code = EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        if not silent:
            place = f"{error.filename}: " if error.filename else ""
            print(f"error: {place}{error.strerror}; free some space and run the same command again", file=sys.stderr)  # noqa: T201
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{on_interrupt}", file=sys.stderr)  # noqa: T201
        code = EXIT_INTERRUPTED
    if code:
        raise SystemExit(code)


@contextmanager
def sigterm_as_exit(message: str) -> Iterator[None]:
    """SIGTERM, which a scheduler sends when time is up, clears up as Ctrl-C does, and exits with 143."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            print(f"\n{message}", file=sys.stderr)  # noqa: T201
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """The text without what a terminal would obey: names out of a file may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def duration(seconds: float) -> str:
    """`4:05`, or `3:04:05` from an hour on, or `2 d 3:04:05` from a day on."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def is_rank_zero() -> bool:
    """Whether this process speaks and writes for all: so where torchrun, Slurm or Lightning's launcher gave rank 0,
    and where nobody gave any."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
