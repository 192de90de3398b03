"""Where text comes from: a file or standard input, plain, gzip or zstd, told apart by its first bytes.

A `Source` is read once, in blocks, and hashed on the way, so that a pipe serves as well as a file. Decompression and
hashing release Python's lock, so both run beside whatever consumes the blocks.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import cast

import zstandard
from isal import isal_zlib

from bionemo_esm.errors import UserError

STANDARD_INPUT = "-"

_READ_BYTES = 2**18  # of compressed bytes decompressed at once
_UNPACKED_BYTES = 2**20  # decompressed at once
_ZSTD_READ_BYTES = 2**12  # 4 bytes may stand for 128 KiB
_LONGEST_MAGIC = 5
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OTHER_FORMATS = {
    b"\xfd7zXZ": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_ZSTD_MAX_WINDOW_BYTES = 2**27  # what `zstd -d` accepts without --long


_GzipError = cast("type[Exception]", isal_zlib.error)


class SourceError(UserError):
    """A source that cannot be opened or whose compression is not read here."""


class BackgroundHash:
    """SHA-256 of bytes handed over in order, computed on a thread of its own."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._last: Future[None] | None = None

    def update(self, content: bytes | memoryview) -> None:
        """Hand over the next bytes; waits until those handed over before have been hashed."""
        self.wait()
        self._last = self._thread.submit(self._sha256.update, content)

    def wait(self) -> None:
        """Until all that was handed over has been hashed."""
        if self._last is not None:
            self._last.result()

    def hexdigest(self) -> str:
        """The hash of all bytes so far, as 64 hexadecimal digits; nothing may be added afterwards."""
        self._thread.shutdown()
        return self._sha256.hexdigest()


class Source:
    """One input: a path, or `-` for standard input.

    `fill` hands out its text once. `bytes_read` counts the bytes of the file itself, compressed where it is; at the end
    `sha256` is their hash, and `damage` says what is wrong where the compressed stream is cut short or contradicts its
    checksum. Raises `SourceError` on entry.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.is_standard_input = os.fspath(path) == STANDARD_INPUT
        self.name = "standard input" if self.is_standard_input else os.fspath(path)
        self.size: int | None = None  # bytes of the file; None where it is a pipe
        self.bytes_read = 0
        self.sha256 = ""
        self.damage = ""
        self._path = Path(path)
        self._start = b""
        self._left = memoryview(b"")  # decompressed, but not yet handed out

    def __enter__(self) -> Source:
        self._stream = io.FileIO(0, closefd=False) if self.is_standard_input else _open(self._path)
        if not self.is_standard_input and self._path.is_file():
            self.size = self._path.stat().st_size
        self._hash = BackgroundHash()
        self._start = self._look_at_start()
        for magic, (name, command) in _OTHER_FORMATS.items():
            if self._start.startswith(magic):
                self.__exit__(None, None, None)
                raise SourceError(f"{self.name}: is compressed with {name}; decompress it first with `{command}`")
        packed = {_GZIP_MAGIC: self._gunzip, _ZSTD_MAGIC: self._unzstd}
        self._unpacked = next((unpack() for magic, unpack in packed.items() if self._start.startswith(magic)), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hash.hexdigest()
        self._stream.close()

    @property
    def manifest_entry(self) -> dict[str, object]:
        """What a manifest says of this source, once it has been read to its end: file, bytes, sha256."""
        return {
            "file": self.name if self.is_standard_input else self._path.name,
            "bytes": self.bytes_read,
            "sha256": self.sha256,
        }

    def fill(self, view: memoryview) -> int:
        """Put the next decompressed bytes into a writable view; how many, fewer than it holds at the end only.

        The bytes are hashed until the next call: what was filled must not be changed before.
        """
        self._hash.wait()
        filled = 0
        while filled < len(view):
            read = self._fill_some(view[filled:])
            if not read:
                self.sha256 = self._hash.hexdigest()
                break
            filled += read
        return filled

    def _fill_some(self, view: memoryview) -> int:
        if self._unpacked is None:
            return self._read_into(view)
        while not self._left:
            block = next(self._unpacked, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _look_at_start(self) -> bytes:
        start = b""
        while len(start) < _LONGEST_MAGIC and (more := self._stream.read(_LONGEST_MAGIC - len(start))):
            start += more
        return start

    def _read_into(self, view: memoryview) -> int:
        """The next bytes of the file, those that were looked at on entry first."""
        if self._start:
            count = min(len(self._start), len(view))
            view[:count], self._start = self._start[:count], self._start[count:]
        else:
            count = self._stream.readinto(view) or 0
        if count:
            self.bytes_read += count
            self._hash.update(view[:count])
        return count

    def _packed(self, size: int) -> Iterator[bytes]:
        """The file in pieces of up to so many bytes."""
        while True:
            piece = bytearray(size)
            count = self._read_into(memoryview(piece))
            if not count:
                return
            yield bytes(memoryview(piece)[:count])

    def _gunzip(self) -> Iterator[bytes]:
        """All members, as bgzip and `cat a.gz b.gz` make several; zeros may pad them."""
        member = isal_zlib.decompressobj(wbits=31)
        try:
            for compressed in self._packed(_READ_BYTES):
                while compressed:
                    if member.eof:
                        compressed = compressed.lstrip(b"\0")
                        if not compressed:
                            break
                        member = isal_zlib.decompressobj(wbits=31)
                    yield member.decompress(compressed, _UNPACKED_BYTES)
                    compressed = member.unused_data if member.eof else member.unconsumed_tail
            while rest := member.decompress(b"", _UNPACKED_BYTES):  # what the decompressor still held
                yield rest
        except _GzipError as error:
            self.damage = f"the gzip stream is damaged ({error})"
        else:
            self.damage = "" if member.eof else "the gzip stream is damaged (it ends before its end mark)"

    def _unzstd(self) -> Iterator[bytes]:
        """All frames, read in small steps: a frame says nothing of its size that could be trusted."""
        frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        frame = frames.decompressobj()
        try:
            for compressed in self._packed(_ZSTD_READ_BYTES):
                while compressed:
                    if frame.eof:
                        frame = frames.decompressobj()
                    yield frame.decompress(compressed)
                    compressed = frame.unused_data if frame.eof else b""
        except zstandard.ZstdError as error:
            self.damage = f"the zstd stream is damaged ({error})"
        else:
            self.damage = "" if frame.eof else "the zstd stream is damaged (it ends before its end mark)"


def _open(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; check the path (the working folder is {Path.cwd()})") from None
    except IsADirectoryError:
        raise SourceError(f"{path}: is a folder; name a file in it") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened ({error.strerror}); check who may read it") from None
