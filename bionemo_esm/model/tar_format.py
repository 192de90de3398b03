"""A plain tar that is written whole or not at all, and read without ever unpacking it.

The members are regular files with names that the reader knows beforehand, once each, in a tar of the simplest kind; a
link, a device, an extended header, a sparse file or a stray byte between them is refused. Equal content gives equal
bytes, and `tar tf` lists them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from bionemo_esm import files as outputs
from bionemo_esm.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 2**22  # of reading and hashing
_LONGEST_NAME = 80  # characters of it in a message
_MOST_PADDING = 2**20  # zeros behind the last member; tar programs round files up to 10 kB
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
    tarfile.GNUTYPE_LONGNAME: "a long name",
    tarfile.GNUTYPE_LONGLINK: "a long name",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class ArchiveError(UserError):
    """A file that is no archive of ours, or a damaged one; the message names the file and the member."""


@dataclass(frozen=True)
class Member:
    """Content to be written: its size in bytes, and how to write it to a stream."""

    size: int
    write: Callable[[IO[bytes]], None]

    @classmethod
    def of(cls, content: bytes) -> Member:
        return cls(len(content), lambda stream: (stream.write(content), None)[1])


@dataclass(frozen=True)
class Summary:
    """Content that is made of the SHA-256, in hex, of all other members by their names, once they are written."""

    size: int
    make: Callable[[Mapping[str, str]], bytes]


@dataclass(frozen=True)
class Section:
    """Where the content of a member lies in its file, in bytes."""

    start: int
    size: int


class _HashingStream(io.RawIOBase):
    """Passes on what is written to it, and hashes it meanwhile: a core does one, a second the other."""

    def __init__(self, stream: IO[bytes], beside: Executor) -> None:
        self._stream, self._beside, self.sha256 = stream, beside, hashlib.sha256()

    def write(self, content: object) -> int:
        hashed = self._beside.submit(self.sha256.update, content)  # type: ignore[arg-type]
        count = self._stream.write(content)  # type: ignore[call-overload]
        hashed.result()  # the writer may change its memory as soon as we return
        return int(count)


def write_container(path: Path, members: Mapping[str, Member | Summary]) -> None:
    """Write the members, in their order, under a temporary name; sync it and its folder; then rename.

    The final name never holds half a file, and what stood there before stays until the whole is safe. Raises
    `ArchiveError`, saying why, where the disk does not take it.
    """
    digests: dict[str, str] = {}
    summaries: dict[int, Summary] = {}  # by their places in the file
    with atomic_write(path) as stream, ThreadPoolExecutor(1) as beside:
        for name, member in members.items():
            info = tarfile.TarInfo(name)  # time, owner and group stay 0: equal content, equal bytes
            info.size = member.size
            stream.write(info.tobuf(tarfile.GNU_FORMAT))
            before = stream.tell()
            if isinstance(member, Summary):
                summaries[before] = member
                stream.write(bytes(member.size))
            else:
                hashing = _HashingStream(stream, beside)
                member.write(cast(IO[bytes], hashing))
                digests[name] = hashing.sha256.hexdigest()
            assert stream.tell() - before == member.size, name
            stream.write(bytes(-member.size % _BLOCK))
        stream.write(bytes(2 * _BLOCK))
        for place, summary in summaries.items():
            content = summary.make(digests)
            assert len(content) == summary.size
            stream.seek(place)
            stream.write(content)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """As `files.atomic_write`, raising `ArchiveError` where the disk does not take it."""
    try:
        with outputs.atomic_write(path) as stream:
            yield stream
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ArchiveError:
    advice = {
        errno.ENOSPC: "free some space there",
        errno.EDQUOT: "free some of your quota",
        errno.EROFS: "choose a disk that can be written to",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
    }.get(error.errno or 0, "choose another place")
    return ArchiveError(f"{path}: cannot be written ({error.strerror}); {advice}. Nothing half-written is left")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one line why a file cannot be read: it may go away, or its disk may fail, at any moment."""
    try:
        yield
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror})") from error


def find_members(path: Path, limits: Mapping[str, int]) -> dict[str, Section]:
    """The members of a file and where they lie.

    `limits` has the names that may occur, with the most bytes that an honest one could have. Raises `ArchiveError`,
    naming file and member, for whatever `write_container` would not have written; owner and time may differ.
    """
    with readable(path):
        if not path.exists():
            raise ArchiveError(f"{path}: no such file; give the path of a .nemo archive or of a checkpoint")
        if not path.is_file():
            raise ArchiveError(f"{path}: is not a file; give the path of a .nemo archive or of a checkpoint")
    sections: dict[str, Section] = {}
    with readable(path), path.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        while any(header := _read_header(path, stream)):
            name, size = _checked(path, header, limits, sections)
            section = Section(stream.tell(), size)
            if section.start + size > total:
                raise _cut_short(path, f"{name} claims {size:,} bytes")
            sections[name] = section
            stream.seek(size, os.SEEK_CUR)
            if any(stream.read(-size % _BLOCK)):
                raise ArchiveError(f"{path}: bytes behind the end of {name}; the file is damaged")
        rest = total - stream.tell()
        if rest < _BLOCK:
            raise _cut_short(path, "half an end of the archive")
        if rest > _MOST_PADDING or any(stream.read(rest)):
            raise ArchiveError(f"{path}: bytes behind the last member; the file is damaged")
    return sections


def _read_header(path: Path, stream: IO[bytes]) -> bytes:
    header = stream.read(_BLOCK)
    if len(header) < _BLOCK:
        raise _cut_short(path, "no end of the archive")
    return header


def _checked(path: Path, header: bytes, limits: Mapping[str, int], seen: Mapping[str, Section]) -> tuple[str, int]:
    """Name and size of a member whose header is as it should be."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ArchiveError(
            f"{path}: not a .nemo archive of ours, or damaged ({error}); one of NeMo 1 is turned into one of ours by "
            "`bionemo-esm convert-legacy`"
        ) from error
    expected = ", ".join(limits)
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = _KINDS.get(info.type, "no plain file")
        raise ArchiveError(
            f"{path}: unexpected member {quoted(info.name)}, {kind}; only files named {expected} belong there"
        )
    if info.name not in limits:
        raise ArchiveError(f"{path}: unexpected member {quoted(info.name)}; only {expected} belong there")
    if info.name in seen:
        raise ArchiveError(f"{path}: member {info.name} appears twice")
    if not 0 <= info.size <= limits[info.name]:
        raise ArchiveError(f"{path}: member {info.name} claims {info.size:,} bytes; refused")
    if header not in _spellings(info):
        raise ArchiveError(f"{path}: the header of {info.name} is not as tar writes it; the file is damaged")
    return info.name, info.size


def _spellings(info: tarfile.TarInfo) -> tuple[bytes, bytes]:
    """The headers that say this of a plain file, and nothing besides."""
    plain = tarfile.TarInfo(info.name)
    for key in ("size", "mode", "mtime", "type", "uid", "gid", "uname", "gname"):
        setattr(plain, key, getattr(info, key))
    return plain.tobuf(tarfile.GNU_FORMAT), plain.tobuf(tarfile.USTAR_FORMAT)


def quoted(name: object) -> str:
    """A name out of a file, fit for a person's terminal: in quotes, not long, nothing in it that a terminal obeys."""
    text = str(name)
    return ascii(text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "...")


def _cut_short(path: Path, why: str) -> ArchiveError:
    return ArchiveError(f"{path}: cut short ({why}), or not a .nemo archive of ours; copy or download it again")


def read_section(path: Path, section: Section) -> bytes:
    """The content of a (small) member."""
    with readable(path), path.open("rb") as stream:
        stream.seek(section.start)
        return stream.read(section.size)


def hash_section(path: Path, section: Section, tell: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of the content of a member, in hex, read in pieces; `tell` is given the bytes of each."""
    sha256 = hashlib.sha256()
    with readable(path), path.open("rb") as stream:
        stream.seek(section.start)
        for chunk in _chunks(stream, section.size):
            sha256.update(chunk)
            tell(len(chunk))
    return sha256.hexdigest()


class SectionReader:
    """Reads the content of a member once, from its front to its back, and hashes what it reads.

    Its file is open only while it is read from, so that any number of members may be read side by side.
    """

    def __init__(self, path: Path, section: Section, beside: Executor | None = None) -> None:
        """beside: has one thread, which hashes while the caller goes on; what was read must not change before that."""
        self.path, self._position, self._end = path, section.start, section.start + section.size
        self._sha256, self._beside = hashlib.sha256(), beside
        self._hashing: Future[None] | None = None

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer with the bytes that come next. Raises `ArchiveError` where the file ends before."""
        assert self._position + buffer.nbytes <= self._end
        with readable(self.path), self.path.open("rb", buffering=0) as stream:
            stream.seek(self._position)
            rest = buffer
            while rest:
                count = stream.readinto(rest)
                if not count:
                    raise _cut_short(self.path, "its end is missing")
                rest = rest[count:]
        self._position += buffer.nbytes
        if self._beside is None:
            self._sha256.update(buffer)
        else:
            self._hashing = self._beside.submit(self._sha256.update, buffer)

    def hexdigest(self) -> str:
        """SHA-256 of the content, in hex, once all of it is read."""
        assert self._position == self._end, "not yet read to its end"
        if self._hashing is not None:
            self._hashing.result()  # the last of a queue
        return self._sha256.hexdigest()


def _chunks(stream: IO[bytes], size: int) -> Iterator[memoryview]:
    """The next `size` bytes in pieces, each valid until the next is asked for."""
    buffer = memoryview(bytearray(min(size, _CHUNK_BYTES)))
    while size > 0:
        count = stream.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            return
        size -= count
        yield buffer[:count]
