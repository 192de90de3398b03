"""Download a file over https: resumable and checked.

A download survives lost connections, busy servers and Ctrl-C, and never joins parts of two versions of a file.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import sleep, time
from typing import IO, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from bionemo_esm.errors import UserError
from bionemo_esm.files import LockedError, lock_file, write_atomically

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes so far and the total, None where it is unknown."""

_RETRIES = 8  # without a byte gained in between: some three minutes of pauses
_TIMEOUT_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 60.0
_LONGEST_RETRY_AFTER_SECONDS = 3600.0
_BLOCK_BYTES = 2**16  # what a dropped connection loses at most
_T = TypeVar("_T")


class ReleaseError(UserError):
    """A release that cannot be downloaded; the message names the address or file, the problem and the remedy."""


class _PassingError(Exception):
    """A failure that may pass; the next attempt follows after `pause` seconds, if the server named a time."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
    retries: int = _RETRIES,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Path:
    """Download an https address to `target`, and check the `size` in bytes and the `md5` in hexadecimal, where given.

    A target that exists and matches both is returned at once; any other is replaced. When the download stops, even by
    Ctrl-C, the received bytes stay in `<target>.part`. The next call resumes from there, unless the file has changed at
    its source. Attempts that fail for a passing reason are repeated, `retries` times after the last byte received, with
    pauses that double. A server has `timeout_seconds` to answer.

    Raises `ReleaseError`: plain http from another host than this one, an answer that another attempt will not change,
    no retries left, too little space, another process at the same target, another size or MD5 than expected.
    """
    _check_url(url)
    if (size is not None or md5 is not None) and is_whole(target, size, md5):
        return target
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f"{target.name}.part")) as stream:
            part = _Part(url, stream, size, progress)
            try:
                if size is not None:
                    require_room(part.path, size)
                _persist(lambda: part.fetch(timeout_seconds), url, retries, lambda: part.length)
                part.finish(target, md5)
            except BaseException:
                if not part.length:
                    part.discard()
                raise
    return target


def read_small(url: str, most_bytes: int) -> bytes:
    """Return the content of an https address, of at most so many bytes. Raises `ReleaseError`."""

    def read() -> bytes:
        with _get(url, {}, _TIMEOUT_SECONDS) as response:
            text = bytearray()
            for block in _blocks(response):
                text += block
                if len(text) > most_bytes:
                    raise ReleaseError(f"{url}: is longer than {most_bytes} bytes; check the server")
            return bytes(text)

    return _persist(read, url, _RETRIES)


class _Part:
    """A partial download: its bytes, their MD5, and the version of the remote file that they belong to."""

    def __init__(self, url: str, stream: IO[bytes], size: int | None, progress: Progress | None) -> None:
        self.url, self.stream, self.size, self.progress = url, stream, size, progress
        self.path = Path(stream.name)
        self.origin_path = self.path.with_name(f"{self.path.name}.json")
        self.length = 0
        self.digest = hashlib.md5(usedforsecurity=False)
        self.validator = self._read_validator()
        if not self.validator:
            self.restart("")  # nothing shows that the rest would belong to it
            return
        stream.seek(0)
        while block := stream.read(1 << 20):
            self.digest.update(block)
            self.length += len(block)

    def _read_validator(self) -> str:
        try:
            origin = json.loads(self.origin_path.read_text())
            return str(origin["validator"]) if origin["url"] == self.url else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def restart(self, validator: str) -> None:
        self.stream.seek(0)
        self.stream.truncate()
        self.length = 0
        self.digest = hashlib.md5(usedforsecurity=False)
        self.validator = validator
        write_atomically(self.origin_path, json.dumps({"url": self.url, "validator": validator}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.origin_path.unlink(missing_ok=True)

    def fetch(self, timeout_seconds: float) -> None:
        """Request the missing bytes once. Raises `_PassingError` if fewer arrive."""
        if self.length and self.length == self.size:
            return
        headers = {"Range": f"bytes={self.length}-", "If-Range": self.validator} if self.length else {}
        with _get(self.url, headers, timeout_seconds) as response:
            total = self._begin(response)
            if response.status_code != 416:  # whose body is a message
                for block in _blocks(response):
                    self._append(block, total)
        if total is not None and self.length < total:
            raise _PassingError(f"the connection ended after {self.length} of {total} bytes")

    def _begin(self, response: requests.Response) -> int | None:
        """Check that the answer continues the bytes on disk, or restart. Return the size of the whole file."""
        if response.status_code in (206, 416):
            form = r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)"
            found = re.fullmatch(form, response.headers.get("Content-Range", ""))
            start = found and (found[1] or found[2])  # 416: nothing follows what is there if the file ends there
            if not found or start != str(self.length) or _validator(response.headers) not in ("", self.validator):
                self.restart("")
                raise _PassingError("the server sent another part than was asked for")
            total = found[2]
        else:
            self.restart(_validator(response.headers))
            total = response.headers.get("Content-Length", "")
        whole = int(total) if total.isdigit() else None
        self._check_size(whole)
        return self.size if whole is None else whole

    def _append(self, block: bytes, total: int | None) -> None:
        self.stream.write(block)
        self.digest.update(block)
        self.length += len(block)
        if self.size is not None and self.length > self.size:
            self._check_size(self.length)
        if self.progress is not None:
            self.progress(self.length, total)

    def _check_size(self, found: int | None) -> None:
        if self.size is not None and found is not None and found != self.size:
            self.discard()
            sizes = f"has {found} bytes at the server, {self.size} expected"
            raise ReleaseError(f"{self.url}: {sizes}; the release may just be changing, try again later")

    def finish(self, target: Path, md5: str | None) -> None:
        """Check the received file and rename it."""
        self._check_size(self.length)
        found = self.digest.hexdigest()
        if md5 is not None and found != md5.lower():
            self.discard()
            raise ReleaseError(
                f"{self.url}: arrived with MD5 {found}, {md5} expected; it was removed, download it again"
            )
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.path.replace(target)
        self.origin_path.unlink(missing_ok=True)


def _persist(attempt: Callable[[], _T], url: str, retries: int, gained: Callable[[], int] = lambda: 0) -> _T:
    """Repeat `attempt` after a `_PassingError` and return its result; new bytes reset the count."""
    failures, best = 0, gained()
    while True:
        try:
            return attempt()
        except _PassingError as interruption:
            if gained() > best:
                failures, best = 0, gained()
            failures += 1
            if failures > retries:
                advice = "check the connection and run it again; what has arrived is kept"
                raise ReleaseError(f"{url}: {interruption} ({failures} attempts in a row); {advice}") from None
            pause = interruption.pause
            sleep(min(2.0 ** (failures - 1), _LONGEST_PAUSE_SECONDS) if pause is None else pause)


@contextmanager
def _get(url: str, headers: Mapping[str, str], timeout_seconds: float) -> Iterator[requests.Response]:
    """Request an address; yield the answer, 2xx or 416, before its body is read. Raises as `_persist` expects."""
    _check_url(url)
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        response = requests.get(
            url, headers=headers, stream=True, timeout=timeout_seconds, hooks={"response": _check_redirect}
        )
    except (requests.ConnectionError, requests.Timeout) as error:
        if "CERTIFICATE" in str(error):
            raise ReleaseError(f"{url}: {error}; check this machine's clock and its certificates") from None
        if "NameResolutionError" in str(error):
            host = urlsplit(url).hostname
            raise ReleaseError(f"{url}: the name {host} cannot be resolved; check the connection") from None
        raise _PassingError(f"no answer ({error})") from None
    except requests.RequestException as error:
        raise ReleaseError(f"{url}: cannot be asked for ({error}); check the address") from None
    with response:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _PassingError(f"HTTP status {status}", _retry_after(url, response.headers.get("Retry-After", "")))
        if status not in (200, 206, 416):
            raise ReleaseError(f"{url}: HTTP status {status}; check that there is such a release, and the address")
        yield response


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body as sent: requests would decompress a .gz that a server calls Content-Encoding: gzip."""
    blocks = response.raw.stream(_BLOCK_BYTES, decode_content=False)
    while True:
        try:
            block: bytes = next(blocks, b"")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _PassingError(f"the connection was lost ({error})") from None
        if not block:
            return
        yield block


def _retry_after(url: str, value: str) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date). Raises `ReleaseError` for over an hour."""
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time()
    except (TypeError, ValueError):
        return None
    if seconds > _LONGEST_RETRY_AFTER_SECONDS:
        raise ReleaseError(f"{url}: the server asks to wait for {seconds:.0f} s; run it again after that")
    return max(seconds, 0.0)


def _validator(headers: Mapping[str, str]) -> str:
    """Return the validator for If-Range, which allows no weak ETag; '' if there is none."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _check_redirect(response: requests.Response, **_: object) -> None:
    if response.is_redirect:
        _check_url(urljoin(response.url, response.headers["Location"]))


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http" or not parts.hostname:
        raise ReleaseError(f"{url}: is no https address; give one")
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ReleaseError(f"{url}: plain http is for mirrors on this machine (127.0.0.1, localhost); use https")


def require_room(part: Path, size: int) -> None:
    """Raise `ReleaseError` unless the disk has room for `size` bytes at `part`, less the bytes that exist."""
    free = shutil.disk_usage(part.parent).free
    needed = size - (part.stat().st_size if part.exists() else 0)
    if needed > free:
        name, sizes = part.name.removesuffix(".part"), f"{needed / 1e9:.1f} GB needed"
        raise ReleaseError(
            f"{part.parent}: has {free / 1e9:.1f} GB free, {sizes} for {name}; make room, or choose another folder"
        )


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read and append, and keep other processes from it for the length of a block."""
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(lock_file(path, reopen=False))
        except LockedError:
            raise ReleaseError(
                f"{path}: another process is writing it; wait for that one, then run this again"
            ) from None
        yield stream


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Raise an `OSError` of the block as `ReleaseError`, naming `path` where the error names no file."""
    try:
        yield
    except OSError as error:
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and run it again" if room else "choose another folder"
        raise ReleaseError(f"{error.filename or path}: {error.strerror or error}; {advice}") from error


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_whole(path: Path, size: int | None, md5: str | None) -> bool:
    """Return whether the file exists, with this size and MD5 where they are given."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return md5 is None or md5_of(path) == md5.lower()
