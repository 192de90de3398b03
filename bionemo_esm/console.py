"""Terminal output of the commands, their signals and their exit codes.

Exit codes: 0 done; 1 a crash, or a check that failed; 2 an error that the user can fix, after one line; 130 Ctrl-C;
143 SIGTERM. A reader of the output that closes early (`| head -1`) is no error: the command goes on, and what it still
prints is dropped.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from bionemo_esm.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_BAD_PATH = (*(errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),)
_READER_GONE = (errno.EPIPE, errno.EIO)  # EIO: of a terminal that was closed
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.5  # of a terminal's progress line


class Console:
    """Lines on a terminal or in a file; a terminal also gets a progress line. Ranks other than 0 are silent."""

    def __init__(self, stream: TextIO, silent: bool = False) -> None:
        self.stream, self.silent = stream, silent
        self.is_terminal = stream.isatty()
        self._progress_width = 0

    def print_line(self, text: str = "") -> None:
        """Print one line, or several."""
        if not self.silent:
            self._write(text.ljust(self._progress_width) + "\n")
            self._progress_width = 0

    def progress(self, text: str) -> None:
        """Print a line that the next one replaces on a terminal."""
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
    """Redirect standard output and error into `log`; the yielded console still prints to where they went before.

    File descriptors are redirected: the log also gets what C++ libraries and child processes print. The redirection
    ends with the block, before an exception of the block is reported.
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
        _output_stream(saved_output, streams[0]) as terminal,
        os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as sys.stdout,
        os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1) as sys.stderr,
    ):
        try:
            yield Console(terminal, silent)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_output, 1)
            os.dup2(saved_error, 2)
            os.close(saved_error)
            sys.stdout, sys.stderr = streams


class _Descriptor(io.FileIO):
    """A file descriptor whose reader may close it: what is written after that is dropped.

    After any other failure, such as a full disk, it drops as well: the error is raised once.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if error.errno not in _READER_GONE:
                raise
            return memoryview(data).nbytes


def _output_stream(descriptor: int, like: TextIO, closefd: bool = True) -> TextIO:
    """A text stream with the encoding of `like`; letters that it cannot encode become `\\xfc`."""
    raw = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=closefd))
    encoding = getattr(like, "encoding", None) or "utf-8"
    by_line, unbuffered = (bool(getattr(like, name, False)) for name in ("line_buffering", "write_through"))
    return io.TextIOWrapper(raw, encoding, "backslashreplace", None, by_line, unbuffered)


class Unit(NamedTuple):
    """The unit in which progress is shown, and how many counts make one."""

    name: str
    size: float


MEGABYTES, RESIDUES = Unit("MB", 1e6), Unit("residues", 1.0)


class ProgressBar:
    """Progress of long work: share done, rate, and time left."""

    def __init__(self, console: Console, what: str, unit: Unit = MEGABYTES) -> None:
        self.console, self.what, self.unit = console, what, unit
        self._interval = _SECONDS_BETWEEN_UPDATES if console.is_terminal else _SECONDS_BETWEEN_LINES
        self._started = self._shown = time.monotonic()
        self._first = 0
        self._last: int | None = None

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show `done` of `total` counts (None: not known), if the last line is old enough."""
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


def run_program(main: Callable[[], None]) -> None:
    """Run a command in this process: one line for what a user can fix, and the exit codes of this module's docstring.

    Standard streams that are closed are opened to nothing. Raises `SystemExit` for any exit code but 0.
    """
    streams = sys.stdin, sys.stdout, sys.stderr
    _prepare_streams()

    def job() -> int:
        try:
            Path.cwd()
        except OSError as error:
            raise UserError("the working folder was deleted; change to another one (cd)", code="cwd") from error
        try:
            main()
        finally:
            sys.stdout.flush()  # here, so that a full disk is an error
        return 0

    try:
        with sigterm_as_exit("Stopped."):
            run_to_exit_code(job, "Interrupted.")
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not print a traceback on the way out
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = streams if None not in streams else (sys.stdin, sys.stdout, sys.stderr)


def _prepare_streams() -> None:
    """Open closed standard streams to nothing; let output survive its reader, and letters that it cannot encode."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # not one of a test runner or a notebook
            stream.flush()
            setattr(sys, name, _output_stream(stream.fileno(), stream, closefd=False))


def run_to_exit_code(job: Callable[[], int], on_interrupt: str, silent: bool = False) -> None:
    """Run a job to its exit code; 2 after one line for what a user can fix, 130 after `on_interrupt` on Ctrl-C."""
    try:
        code = job()
    except UserError as error:
        code = _refused(str(error), silent)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in _DISK_FULL:
            code = _refused(f"{place}{error.strerror}; free some space and run the same command again", silent)
        elif place and error.errno in _BAD_PATH:
            code = _refused(f"{place}{error.strerror}", silent)
        else:
            raise
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # of Path.resolve, up to Python 3.12
            raise
        code = _refused(str(error), silent)
    except KeyboardInterrupt:
        Console(sys.stderr).print_line(f"\n{on_interrupt}")
        code = EXIT_INTERRUPTED
    if code:
        raise SystemExit(code)


def _refused(message: str, silent: bool) -> int:
    """Print an error and return its exit code."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there
    Console(sys.stderr, silent).print_line(f"{clear}error: {_printable(message)}")
    return EXIT_USER_ERROR


@contextmanager
def sigterm_as_exit(message: str) -> Iterator[None]:
    """Unwind on SIGTERM, which a scheduler sends when time is up, as on Ctrl-C: print `message`, exit with 143."""
    received = False

    def end(number: int, frame: object) -> NoReturn:
        nonlocal received
        received = True
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit:
        if received:
            Console(sys.stderr).print_line(f"\n{message}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """The text with control characters escaped: names that come from files may hold terminal commands."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def duration(seconds: float) -> str:
    """`4:05`, or `3:04:05` from an hour on, or `2 d 3:04:05` from a day on."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or the only one, by the environment of torchrun, Slurm or Lightning."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
