"""The folder of a run, in which one process writes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bionemo_esm.errors import ConfigError

_LOCK = ".lock"


def make_folder(folder: Path) -> None:
    """Raises `ConfigError` where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {folder} cannot be made ({error.strerror}); choose another place"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder for the length of a block, and clear it of what a killed process left half-written.

    Raises `ConfigError`, naming the holder, where another process holds it. The system lets go of it when the process
    ends, however it ends. Where the file system knows no locks there is none.
    """
    try:
        file = (folder / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {folder} cannot be written to ({error.strerror}); choose another place"
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                lock.seek(0)
                raise ConfigError(
                    f"{folder}: another process is at work on this run ({lock.read().strip() or 'unnamed'}); wait for "
                    "it to end, or give this run another exp_manager.name"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        for pattern in (".*.nemo.*.partial", ".*.json.partial", "*/.step-*.partial"):
            for partial in folder.glob(pattern):
                partial.unlink()
        yield
