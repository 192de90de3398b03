"""Where text comes from: a file or standard input, plain, gzip or zstd, told apart by its first bytes.

A `Source` is read once, in blocks, and hashed on the way, so that a pipe serves as well as a file. Decompression and
hashing release Python's lock, so both run beside whatever consumes the blocks.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

import zstandard
from isal import isal_zlib

from bionemo_esm.errors import UserError

STANDARD_INPUT = "-"

_BLOCK_BYTES = 2**22  # of decompressed text handed out at once
_READ_BYTES = 2**18  # of compressed bytes decompressed at once
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


class DamageError(Exception):
    """The compressed stream ends early or contradicts its checksum. The reader of records adds the place."""


class BackgroundHash:
    """SHA-256 of bytes handed over in order, computed on a thread of its own."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._last: Future[None] | None = None

    def update(self, content: bytes) -> None:
        """Hand over the next bytes; waits while those before the last ones are still being hashed."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._sha256.update, content)

    def hexdigest(self) -> str:
        """The hash of all bytes so far, as 64 hexadecimal digits; nothing may be added afterwards."""
        self._thread.shutdown()
        return self._sha256.hexdigest()


class Source:
    """One input: a path, or `-` for standard input.

    `blocks()` yields its text once. `bytes_read` counts the bytes of the file itself, compressed where it is, and
    `sha256` is their hash once the blocks are exhausted. Raises `SourceError` on entry.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.is_standard_input = os.fspath(path) == STANDARD_INPUT
        self.name = "standard input" if self.is_standard_input else os.fspath(path)
        self.size: int | None = None  # bytes of the file; None where it is a pipe
        self.bytes_read = 0
        self.sha256 = ""
        self._path = Path(path)
        self._stream: BinaryIO | IO[bytes] | None = None
        self._start = b""

    def __enter__(self) -> Source:
        self._stream = sys.stdin.buffer if self.is_standard_input else _open(self._path)
        if not self.is_standard_input and self._path.is_file():
            self.size = self._path.stat().st_size
        self._hash = BackgroundHash()
        self._start = self._read(_LONGEST_MAGIC)
        for magic, (name, command) in _OTHER_FORMATS.items():
            if self._start.startswith(magic):
                self.__exit__(None, None, None)
                raise SourceError(f"{self.name}: is compressed with {name}; decompress it first with `{command}`")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hash.hexdigest()
        if self._stream is not None and not self.is_standard_input:
            self._stream.close()

    @property
    def manifest_entry(self) -> dict[str, object]:
        """What a manifest says of this source, once it has been read to its end: file, bytes, sha256."""
        return {
            "file": self.name if self.is_standard_input else self._path.name,
            "bytes": self.bytes_read,
            "sha256": self.sha256,
        }

    def blocks(self) -> Iterator[bytes]:
        """The decompressed text in blocks of up to 4 MiB. Raises `DamageError` for a damaged or truncated stream."""
        if self._start.startswith(_GZIP_MAGIC):
            yield from self._gunzip()
        elif self._start.startswith(_ZSTD_MAGIC):
            yield from self._unzstd()
        else:
            while block := self._next(_BLOCK_BYTES):
                yield block
        self.sha256 = self._hash.hexdigest()

    def _read(self, size: int) -> bytes:
        assert self._stream is not None, "a source is used in a with-block"
        content = self._stream.read(size)
        self.bytes_read += len(content)
        if content:
            self._hash.update(content)
        return content

    def _next(self, size: int) -> bytes:
        """The next bytes of the file, those that were looked at on entry first."""
        start, self._start = self._start, b""
        return start or self._read(size)

    def _gunzip(self) -> Iterator[bytes]:
        """All members, as bgzip and `cat a.gz b.gz` make several; zeros may pad them."""
        member = isal_zlib.decompressobj(wbits=31)
        try:
            while compressed := self._next(_READ_BYTES):
                while compressed:
                    if member.eof:
                        compressed = compressed.lstrip(b"\0")
                        if not compressed:
                            break
                        member = isal_zlib.decompressobj(wbits=31)
                    yield member.decompress(compressed, _BLOCK_BYTES)
                    compressed = member.unused_data if member.eof else member.unconsumed_tail
            while rest := member.decompress(b"", _BLOCK_BYTES):  # what the decompressor still held
                yield rest
        except _GzipError as error:
            raise DamageError(f"the gzip stream is damaged ({error})") from None
        if not member.eof:
            raise DamageError("the gzip stream is damaged (it ends before its end mark)")

    def _unzstd(self) -> Iterator[bytes]:
        """All frames, read in small steps: a frame says nothing of its size that could be trusted."""
        frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        frame = frames.decompressobj()
        try:
            while compressed := self._next(_ZSTD_READ_BYTES):
                while compressed:
                    if frame.eof:
                        frame = frames.decompressobj()
                    yield frame.decompress(compressed)
                    compressed = frame.unused_data if frame.eof else b""
        except zstandard.ZstdError as error:
            raise DamageError(f"the zstd stream is damaged ({error})") from None
        if not frame.eof:
            raise DamageError("the zstd stream is damaged (it ends before its end mark)")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; check the path (the working folder is {Path.cwd()})") from None
    except IsADirectoryError:
        raise SourceError(f"{path}: is a folder; name one FASTA file in it") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened ({error.strerror}); check who may read it") from None
