"""A strict subset of tar, written completely or not at all, and read in place without extraction.

The members are regular files with names that the reader expects, once each. A link, a device, an extended header, a
sparse file or a stray byte between members is an error. Equal content gives equal bytes, and `tar tf` lists the file.
Python's `tarfile` parses the headers; its readers accept far more than this and extract to disk.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from blake3 import blake3

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


class _Hash(Protocol):
    def update(self, content: memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


HASHES: Mapping[str, Callable[[], _Hash]] = {"blake3": blake3, "sha256": hashlib.sha256}
"""The hashes of a member, the fastest first: BLAKE3 keeps up with memory; SHA-256 is the one that people compare."""


class ArchiveError(UserError):
    """A file that is not one of our archives, or is damaged; the message names the file and the member."""


@dataclass(frozen=True)
class Member:
    """Content to be written: its size in bytes, and the function that writes it to a stream."""

    size: int
    write: Callable[[IO[bytes]], None]

    @classmethod
    def of(cls, content: bytes) -> Member:
        return cls(len(content), lambda stream: (stream.write(content), None)[1])


@dataclass(frozen=True)
class Summary:
    """Content that is made from the hashes of all other members, once they are written.

    make: gets {member: {name of the hash in `HASHES`: hexadecimal digits}}.
    """

    size: int
    make: Callable[[Mapping[str, Mapping[str, str]]], bytes]


@dataclass(frozen=True)
class Section:
    """Position and size of the content of a member in its file, in bytes."""

    start: int
    size: int


class _HashingStream(io.RawIOBase):
    """Writes to another stream, and hashes the content on a second thread at the same time."""

    def __init__(self, stream: IO[bytes], hasher: Executor) -> None:
        self._stream, self._hasher, self._hashes = stream, hasher, {name: make() for name, make in HASHES.items()}

    def write(self, content: object) -> int:
        pending = [self._hasher.submit(hash_.update, content) for hash_ in self._hashes.values()]  # type: ignore[arg-type]
        count = self._stream.write(content)  # type: ignore[call-overload]
        for hashed in pending:
            hashed.result()  # the caller may change the memory after the return
        return int(count)

    def hexdigests(self) -> dict[str, str]:
        return {name: hash_.hexdigest() for name, hash_ in self._hashes.items()}


def write_container(path: Path, members: Mapping[str, Member | Summary]) -> None:
    """Write the members in their order under a temporary name, sync file and folder, then rename.

    The final name never holds an incomplete file; a file that was there stays until the new one is complete. Raises
    `ArchiveError`, with the reason, if it cannot be written.
    """
    digests: dict[str, dict[str, str]] = {}
    summaries: dict[int, Summary] = {}  # by their places in the file
    with atomic_write(path) as stream, ThreadPoolExecutor(1) as hasher:
        for name, member in members.items():
            info = tarfile.TarInfo(name)  # time, owner and group stay 0: equal content, equal bytes
            info.size = member.size
            stream.write(info.tobuf(tarfile.GNU_FORMAT))
            before = stream.tell()
            if isinstance(member, Summary):
                summaries[before] = member
                stream.write(bytes(member.size))
            else:
                hashing = _HashingStream(stream, hasher)
                member.write(cast(IO[bytes], hashing))
                digests[name] = hashing.hexdigests()
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
    """As `files.atomic_write`, but raises `ArchiveError` if the file cannot be written."""
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
    """Turn an `OSError` of reading a file into an `ArchiveError` of one line."""
    try:
        yield
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror})") from error


def find_members(path: Path, limits: Mapping[str, int]) -> dict[str, Section]:
    """Return the members of a file and their positions.

    limits: the permitted names, each with its largest size in bytes. Raises `ArchiveError`, naming file and member, for
    anything that `write_container` would not have written; owner and time may differ.
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
    """Return name and size of a member. Raises `ArchiveError` for a header that is not as it should be."""
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
    """Return the two valid headers of a plain file with these properties."""
    plain = tarfile.TarInfo(info.name)
    for key in ("size", "mode", "mtime", "type", "uid", "gid", "uname", "gname"):
        setattr(plain, key, getattr(info, key))
    return plain.tobuf(tarfile.GNU_FORMAT), plain.tobuf(tarfile.USTAR_FORMAT)


def quoted(name: object) -> str:
    """Return a name from a file in quotes, shortened, and without control characters."""
    text = str(name)
    return ascii(text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "...")


def _cut_short(path: Path, why: str) -> ArchiveError:
    return ArchiveError(f"{path}: cut short ({why}), or not a .nemo archive of ours; copy or download it again")


def read_into(path: Path, start: int, buffer: memoryview) -> bool:
    """Fill a buffer with the bytes of a file from `start` on; return False where the file ends before."""
    with readable(path), path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while buffer:
            if not (count := stream.readinto(buffer)):
                return False
            buffer = buffer[count:]
    return True


def read_section(path: Path, section: Section) -> bytes:
    """Return the content of a (small) member."""
    with readable(path), path.open("rb") as stream:
        stream.seek(section.start)
        return stream.read(section.size)


def hash_section(
    path: Path,
    section: Section,
    advance: Callable[[int], None] = lambda count: None,
    algorithms: Sequence[str] = ("sha256",),
) -> dict[str, str]:
    """Return hashes of the content of a member, in hex, by name; `advance` is called with the bytes of each piece."""
    hashes = {name: HASHES[name]() for name in algorithms}
    with readable(path), path.open("rb") as stream:
        stream.seek(section.start)
        for chunk in _chunks(stream, section.size):
            for hash_ in hashes.values():
                hash_.update(chunk)
            advance(len(chunk))
    return {name: hash_.hexdigest() for name, hash_ in hashes.items()}


class SectionReader:
    """Reads the content of a member once, from beginning to end, and hashes it.

    The file is open only during a read, so that any number of members can be read in turn.
    """

    def __init__(self, path: Path, section: Section, algorithm: str, hasher: Executor | None = None) -> None:
        """algorithm: a name in `HASHES`. hasher: one thread, which hashes in parallel; buffers must not change
        before `hexdigest`."""
        self.path, self._position, self._end = path, section.start, section.start + section.size
        self._hash, self._hasher = HASHES[algorithm](), hasher
        self._hashing: Future[object] | None = None

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes. Raises `ArchiveError` if the file ends early."""
        assert self._position + buffer.nbytes <= self._end
        if not read_into(self.path, self._position, buffer):
            raise _cut_short(self.path, "its end is missing")
        self._position += buffer.nbytes
        if self._hasher is None:
            self._hash.update(buffer)
        else:
            self._hashing = self._hasher.submit(self._hash.update, buffer)

    def hexdigest(self) -> str:
        """Return the hash of the content, in hex, after all of it has been read."""
        assert self._position == self._end, "not yet read to its end"
        if self._hashing is not None:
            self._hashing.result()  # the last of a queue
        return self._hash.hexdigest()


def _chunks(stream: IO[bytes], size: int) -> Iterator[memoryview]:
    """Yield the next `size` bytes in pieces, each valid until the next is requested."""
    buffer = memoryview(bytearray(min(size, _CHUNK_BYTES)))
    while size > 0:
        count = stream.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            return
        size -= count
        yield buffer[:count]
