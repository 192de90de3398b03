"""FASTA files as a stream of records: plain or gzip, read in blocks of bytes, one record in memory at a time.

All work over residues is done by `bytes` methods, none by Python loops. Only the standard library is needed here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bionemo_esm.errors import UserError

MAX_RECORD_BYTES = 64 * 2**20
"""The longest record accepted. The longest of UniRef50 has some 45,000 residues, so a longer one is no protein."""

_BLOCK_BYTES = 2**20  # larger blocks are slower: they fall out of the processor's cache between the passes over them
_GZIP_READ_BYTES = 2**18
_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_COMPRESSIONS = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\n\r\v\f"


class FastaError(UserError):
    """A FASTA file that cannot be read; the message names the file, the record, the byte, and what to do."""


class FastaRecord(NamedTuple):
    """One record: the header line without '>' and the residues as they stand in the file, without white space."""

    header: str
    sequence: bytes
    number: int
    """1 for the first record of the file."""
    offset: int
    """Byte offset of the record's '>' in the decompressed file."""

    @property
    def id(self) -> str:
        """The first word of the header; '' when the header is empty."""
        return self.header.split(maxsplit=1)[0] if self.header else ""


def read_fasta(path: str | os.PathLike[str]) -> Iterator[FastaRecord]:
    """The records of a FASTA file in order; plain or gzip (of one or many members), told apart by its first bytes.

    Lines may be wrapped or not, end in LF or CRLF, be blank or padded; a record may have an empty header or no
    residues. Header bytes that are not UTF-8 become U+FFFD. Memory: one record and two blocks of 1 MiB.

    Raises `FastaError`, as soon as the first record is asked for: no such file, a folder, no record in it, another
    compression, text before the first '>'; and on the way: a damaged or truncated gzip stream, a NUL byte, a '>' amid a
    sequence line, lines that end in a lone CR, a record over `MAX_RECORD_BYTES`.
    """
    source = Path(path)
    pieces = _pieces(source, _blocks(source))
    _, _, preamble = next(pieces)
    _check_preamble(source, preamble)
    number = 0
    for number, offset, piece in pieces:
        yield _parse(source, number, offset, piece)
    if number == 0:
        raise FastaError(f"{source}: the file is empty, no record was found; check how it was made or downloaded")


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed file in blocks of at most about 1 MiB."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise FastaError(f"{path}: no such file; check the path (the working folder is {Path.cwd()})") from None
    except IsADirectoryError:
        raise FastaError(f"{path}: is a folder; name one FASTA file in it") from None
    except OSError as error:
        raise FastaError(f"{path}: cannot be opened ({error.strerror}); check who may read it") from None
    with stream:
        start = stream.peek(8)
        for magic, (name, command) in _OTHER_COMPRESSIONS.items():
            if start.startswith(magic):
                raise FastaError(f"{path}: is compressed with {name}; decompress it first with `{command}`")
        if start.startswith(_GZIP_MAGIC):
            yield from _gunzip(stream)
        else:
            while block := stream.read(_BLOCK_BYTES):
                yield block


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """All members of a gzip file, a quarter faster than `gzip.open` for its larger reads.

    Raises `zlib.error` for damage, checksums included, and `EOFError` where the file ends within a member.
    """
    member = zlib.decompressobj(wbits=31)
    while compressed := stream.read(_GZIP_READ_BYTES):
        while compressed:
            if member.eof:
                compressed = compressed.lstrip(b"\0")  # members may be padded with zeros
                if not compressed:
                    break
                member = zlib.decompressobj(wbits=31)
            yield member.decompress(compressed, _BLOCK_BYTES)
            compressed = member.unused_data if member.eof else member.unconsumed_tail
    if not member.eof:
        raise EOFError("it ends before its end mark")


def _pieces(path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset of its '>', text after the '>') of each record; number 0 is what stands before the first '>'."""
    number, offset = 0, -2
    pending = b"\n"  # so that a '>' which opens the file is found like any other, after a line end
    try:
        for block in blocks:
            pending += block
            *whole, pending = pending.split(b"\n>")  # the last one may go on in the next block
            for piece in whole:
                yield number, offset, piece
                number += 1
                offset += len(piece) + 2
            if len(pending) > MAX_RECORD_BYTES:
                limit = f"is longer than {MAX_RECORD_BYTES // 2**20} MiB and cannot be a protein"
                raise _error(path, number, offset, f"the record {limit}; check that it is a protein FASTA file")
    except (zlib.error, EOFError) as damage:
        advice = "download or copy the file again and test it with `gzip -t`"
        raise _error(path, number, offset, f"the gzip stream is damaged ({damage}); {advice}") from None
    yield number, offset, pending


def _check_preamble(path: Path, preamble: bytes) -> None:
    """Only white space may stand before the first '>'."""
    text = preamble.strip()
    if b"\0" in text:
        raise _error(path, 1, preamble.find(b"\0") - 1, "a NUL byte: binary or UTF-16; save it as plain UTF-8 text")
    if text.startswith(_BYTE_ORDER_MARK):
        raise _error(path, 1, 0, "begins with a byte order mark; save it as UTF-8 without one")
    if text:
        shown = text[:40].decode("utf-8", errors="replace").splitlines()[0]
        offset = preamble.find(text) - 1
        raise _error(path, 1, offset, f"text before the first '>' ({shown!r}); begin each record with a '>' header")


def _parse(path: Path, number: int, offset: int, piece: bytes) -> FastaRecord:
    """The record of the text between one '>' and the next."""
    header, _, body = piece.partition(b"\n")
    header = header.strip()
    sequence = body.translate(None, _WHITESPACE)
    if b"\0" in piece:
        where = offset + 1 + piece.find(b"\0")
        raise _error(path, number, where, "a NUL byte: the file is binary or damaged; make it again as plain text")
    if b"\r" in header:
        raise _error(path, number, offset, "lines end in a lone CR; convert them first, for instance with `mac2unix`")
    if b">" in sequence:
        where = offset + 1 + piece.find(b">", piece.find(b"\n"))
        raise _error(path, number, where, "a '>' amid a sequence line; begin each header on a line of its own")
    return FastaRecord(header.decode("utf-8", errors="replace"), sequence, number, offset)


def _error(path: Path, number: int, offset: int, problem: str) -> FastaError:
    return FastaError(f"{path}, record {max(number, 1)}, byte {max(offset, 0)}: {problem}")
