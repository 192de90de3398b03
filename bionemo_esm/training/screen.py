"""What a person sees: our messages on the terminal, everybody else's in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Screen:
    """Lines for a person; a terminal also gets a progress line that rewrites itself. Ranks other than 0 stay silent."""

    def __init__(self, stream: TextIO, silent: bool = False) -> None:
        self.stream, self.silent = stream, silent
        self.is_terminal = stream.isatty()
        self._progress_width = 0

    def say(self, text: str = "") -> None:
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
def third_party_output_in(log: Path, silent: bool = False) -> Iterator[Screen]:
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
            yield Screen(person, silent)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_output, 1)
            os.dup2(saved_error, 2)
            os.close(saved_error)
            sys.stdout, sys.stderr = streams


def duration(seconds: float) -> str:
    """`4:05`, or `3:04:05` from an hour on, or `2 d 3:04:05` from a day on."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock
