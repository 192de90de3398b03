"""Files on disk: checks before long work begins, atomic writes, locks. Modes of files and folders follow the umask."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from bionemo_esm.errors import ConfigError

_BUFFER_BYTES = 2**22
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # of file systems


class LockedError(Exception):
    """Another process holds a lock. Callers raise a `UserError` that names the key or file instead."""


def check_absent(key: str, target: Path) -> None:
    """Raise `ConfigError`, naming the key, for a target that exists, be it a dangling link."""
    if os.path.lexists(target):
        raise ConfigError(f"{key}: {target} exists already; remove it or choose another name")


def check_writable(key: str, target: Path) -> None:
    """Raise `ConfigError`, naming the key, where no file or folder of this name can be made."""
    place = target.absolute().parent
    try:
        place = nearest_folder(target)
        with tempfile.TemporaryFile(dir=place, prefix=".writable."):  # permissions alone do not tell
            pass
    except OSError as error:
        what = f"{place} is not a folder that you may write to"
        raise ConfigError(f"{key}: {target} cannot be made: {what} ({error.strerror})") from error


def nearest_folder(target: Path) -> Path:
    """Return the nearest parent of a path that exists."""
    return next(parent for parent in target.absolute().parents if parent.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that replaces it when the block succeeds, and is removed otherwise.

    Missing parents are made. The file is synced before it takes its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, stream = _open_beside(path)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _open_beside(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file of another name; `tempfile` would ignore the umask."""
    while True:
        temporary = _temporary_name(path)
        try:
            return temporary, temporary.open("xb", buffering=_BUFFER_BYTES)
        except FileExistsError:
            continue


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole small file, text as UTF-8, as `atomic_write` does."""
    with atomic_write(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(key: str, folder: Path) -> Iterator[Path]:
    """Make a temporary folder beside `folder` that takes its name when the block succeeds, and is removed otherwise.

    Missing parents are made. Raises `ConfigError`, naming the key, where something of that name exists.
    """
    check_absent(key, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(folder)
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        check_absent(key, folder)  # the system replaces an empty folder
        temporary.rename(folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path, *patterns: str) -> None:
    """Remove temporary files that a killed process left, by default all in a folder and in its folders."""
    for pattern in patterns or (".*.partial", "*/.*.partial"):
        for path in folder.glob(pattern):
            if not path.is_dir():
                path.unlink(missing_ok=True)


def fsync_directory(folder: Path) -> None:
    """Make renames and removals in a folder survive a power failure, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not supported there
            raise
    finally:
        os.close(descriptor)


def lock_descriptor(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False where the file system has no locks.

    The system releases the lock when the process ends in any way. Raises `LockedError` where another process holds it,
    unless `wait`.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise LockedError from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def is_still(path: Path, descriptor: int) -> bool:
    """Return whether the name still belongs to this open file or folder, which a rename or removal may have changed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def lock_file(path: Path, *, shared: bool = False, wait: bool = False, reopen: bool = True) -> Iterator[IO[bytes]]:
    """Open a file to read and append, and hold a lock on it for the length of a block.

    The file is made where it is missing; so are its parents, unless `wait`: the process that is waited for may have
    removed them. A file that its holder renamed or removed meanwhile is opened again (`reopen`), or counts as locked.
    Raises `LockedError` where another process holds the lock, unless `wait`; and `OSError`.
    """
    while True:
        if not wait:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = path.open("a+b")
        except FileNotFoundError:
            if wait:
                raise
            continue
        with stream:
            lock_descriptor(stream.fileno(), shared=shared, wait=wait)
            if is_still(path, stream.fileno()):
                yield stream
                return
            if not reopen:
                raise LockedError


@contextmanager
def hold_output(key: str, target: Path) -> Iterator[None]:
    """Hold the name of a new output, as `hold_name` does, for the whole work of a command.

    Raises `ConfigError`, naming the key, for a target that exists, that cannot be written, or that another process
    holds.
    """
    check_absent(key, target)
    check_writable(key, target)
    with hold_name(key, target):
        check_absent(key, target)  # again: the process that held the name may have finished
        yield


@contextmanager
def hold_name(
    key: str, target: Path, *, otherwise: str = "choose another name", shared: bool = False
) -> Iterator[None]:
    """Hold the name of an output, which may exist, for the length of a block. Every command that writes does so.

    The lock is the file `.NAME.lock` beside the target. It names the holder, and is removed at the end. `shared`: the
    processes of one launcher hold a name together. On a file system without locks nothing is held. Raises
    `ConfigError`, naming the key and the holder, where another process holds the name: wait, or do `otherwise`; and
    where the lock cannot be written.
    """
    place = target.absolute()
    created = [parent for parent in place.parents if not parent.exists()]
    lock = place.with_name(f".{place.name}.lock")
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(lock_file(lock, shared=shared))
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            stream.flush()
        except LockedError:
            raise ConfigError(
                f"{key}: another process is writing {target} ({_holder(lock)}); wait for it to end, or {otherwise}",
                code="files.held",
            ) from None
        except OSError as error:
            raise ConfigError(f"{key}: {target} cannot be made ({error.strerror}); choose another place") from error
        try:
            yield
        finally:
            if not shared or _is_last(stream.fileno()):
                lock.unlink(missing_ok=True)
            with suppress(OSError):
                for folder in created:  # empty if nothing was written
                    folder.rmdir()


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8", errors="replace").strip() or "unnamed"
    except OSError:  # it has just ended
        return "unnamed"


def _is_last(descriptor: int) -> bool:
    """Return whether no other process holds a shared lock."""
    try:
        return lock_descriptor(descriptor)
    except LockedError:
        return False
