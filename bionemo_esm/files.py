"""Results on disk: looked at before long work begins, and under their names only when they are whole."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bionemo_esm.errors import ConfigError

_BUFFER_BYTES = 2**22
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems


def check_absent(key: str, target: Path) -> None:
    """Raises `ConfigError`, naming the key, for a target that is there, be it a link to nowhere."""
    if os.path.lexists(target):
        raise ConfigError(f"{key}: {target} exists already; remove it or choose another name")


def check_writable(key: str, target: Path) -> None:
    """Raises `ConfigError`, naming the key, where no file or folder of this name could be made."""
    place = target.absolute().parent
    try:
        place = nearest_folder(target)
        with tempfile.TemporaryFile(dir=place, prefix=".writable."):  # what permissions say is not all there is to it
            pass
    except OSError as error:
        what = f"{place} is not a folder that you may write to"
        raise ConfigError(f"{key}: {target} cannot be made: {what} ({error.strerror})") from error


def nearest_folder(target: Path) -> Path:
    """The first thing above a path that is there."""
    return next(parent for parent in target.absolute().parents if parent.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a temporary file beside `path` that takes its name when the block ends well, and goes otherwise.

    The folders above are made; what stood under the name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES) as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        fsync_directory(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def fsync_directory(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # no such thing there
            raise
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(folder: Path, key: str, otherwise: str) -> Iterator[None]:
    """Hold a folder for the length of a block.

    Raises `ConfigError`, naming the key, where it cannot be written to, and naming the holder, where another process
    holds it: wait, or do `otherwise`. The system lets go of it when the process ends, however it ends. Where the file
    system knows no locks there is none.
    """
    try:
        file = (folder / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be written to ({error.strerror}); choose another place") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                lock.seek(0)
                holder = lock.read().strip() or "unnamed"
                raise ConfigError(
                    f"{folder}: another process is at work on this run ({holder}); wait for it to end, or {otherwise}"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
