"""FASTA as a stream of records: plain, gzip or zstd, read in blocks of bytes, one record in memory at a time.

All work over residues is done by `bytes` methods, none by Python loops. This reader defines what a record is and says
what is wrong with one; `blocks.py` reads many times as fast for the builder of stores, by the same rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bionemo_esm.data.sources import Source, SourceError

MAX_RECORD_BYTES = 64 * 2**20
"""The longest record accepted. The longest of UniRef50 has some 45,000 residues, so a longer one is no protein."""

_BLOCK_BYTES = 2**22
_SHOWN_BYTES = 40
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\n\r\v\f"
_NOT_BLANK = re.compile(rb"[^ \t\n\r\v\f]")


class FastaError(SourceError):
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


class RecordBlock(NamedTuple):
    """Some whole records as they stand in the decompressed text, and what is wrong with the one that follows."""

    text: memoryview
    """Begins with a '>' and ends before the next record's, or at the end of the file; may be empty at a problem."""
    offset: int
    """Byte offset in the decompressed text."""
    problem: str = ""
    """If not empty, the record after `text` cannot be read for this reason."""


def read_fasta(path: str | os.PathLike[str]) -> Iterator[FastaRecord]:
    """The records of a FASTA file in order, or of standard input (`-`); plain, gzip or zstd, told by their first bytes.

    Lines may be wrapped or not, end in LF or CRLF, be blank or padded; a record may have an empty header or no
    residues. Memory: a few blocks of 4 MiB, or the longest record.

    Raises `SourceError`, as soon as the first record is asked for: no such file, a folder, another compression; and its
    subclass `FastaError`, naming record and byte: no record at all, text before the first '>', a damaged or truncated
    stream, a NUL byte, a '>' amid a sequence line, lines that end in a lone CR, a header that is not UTF-8, a record
    over `MAX_RECORD_BYTES`.
    """
    number = 0
    with Source(path) as source:
        for block in record_blocks(source, bytearray):
            offset = block.offset
            for piece in bytes(block.text[1:]).split(b"\n>") if block.text else ():
                number += 1
                yield parse_record(source.name, number, offset, piece)
                offset += len(piece) + 2
            if block.problem:
                raise fasta_error(source.name, number + 1, block.offset + len(block.text), block.problem)


def record_blocks(source: Source, buffer_of: Callable[[int], bytearray]) -> Iterator[RecordBlock]:
    """An open source cut into blocks of whole records, some 4 MiB each, in order.

    `buffer_of` gives a buffer of at least so many bytes for the next block, whose text is a view into it. Where a block
    ends depends on the source, so nothing may be made to depend on it. Raises `FastaError` for a source without any
    record, or with text before the first.
    """
    offset, rest, started = 0, b"", False
    while True:
        buffer = buffer_of(len(rest) + _BLOCK_BYTES)
        view = memoryview(buffer)
        view[: len(rest)] = rest
        filled = len(rest) + source.fill(view[len(rest) :])
        begin = 0
        if not started:
            first = _NOT_BLANK.search(buffer, 0, filled)
            begin = first.start() if first else filled
            started = first is not None
            _check_start(source.name, offset + begin, bytes(view[begin : min(begin + _SHOWN_BYTES, filled)]))
        at_end = filled < len(buffer)
        end = filled if at_end and not source.damage else buffer.rfind(b"\n>", begin, filled) + 1
        problem = ""
        if source.damage:
            problem = f"{source.damage}; download or copy the file again and test it with `gzip -t` or `zstd -t`"
        elif filled - max(begin, end) > MAX_RECORD_BYTES:
            limit = f"is longer than {MAX_RECORD_BYTES // 2**20} MiB and cannot be a protein"
            problem = f"the record {limit}; check that it is a protein FASTA file"
        end = max(begin, end)
        if end > begin or problem:
            yield RecordBlock(view[begin:end], offset + begin, problem)
        if problem:
            return
        if at_end:
            break
        rest, offset = bytes(view[end:filled]), offset + end
    if not started:
        raise FastaError(f"{source.name}: the file is empty, no record was found; check how it was made or downloaded")


def _check_start(name: str, offset: int, text: bytes) -> None:
    """Only white space may stand before the first '>'."""
    if not text or text.startswith(b">"):
        return
    if b"\0" in text[:_SHOWN_BYTES]:
        raise fasta_error(name, 1, offset, "a NUL byte: binary or UTF-16; save it as plain UTF-8 text")
    if text.startswith(_BYTE_ORDER_MARK):
        raise fasta_error(name, 1, 0, "begins with a byte order mark; save it as UTF-8 without one")
    shown = text[:_SHOWN_BYTES].decode("utf-8", errors="replace").splitlines()[0]
    raise fasta_error(name, 1, offset, f"text before the first '>' ({shown!r}); begin each record with a '>' header")


def parse_record(name: str, number: int, offset: int, piece: bytes) -> FastaRecord:
    """The record of the text between one '>' and the next. Raises `FastaError` as `read_fasta` says."""
    header, _, body = piece.partition(b"\n")
    header = header.strip()
    sequence = body.translate(None, _WHITESPACE)
    if b"\0" in piece:
        where = offset + 1 + piece.find(b"\0")
        raise fasta_error(name, number, where, "a NUL byte: the file is binary or damaged; make it again as plain text")
    if b"\r" in header:
        raise fasta_error(
            name, number, offset, "lines end in a lone CR; convert them first, for instance with `mac2unix`"
        )
    if b">" in sequence:
        where = offset + 1 + piece.find(b">", piece.find(b"\n"))
        raise fasta_error(name, number, where, "a '>' amid a sequence line; begin each header on a line of its own")
    try:
        return FastaRecord(header.decode("utf-8"), sequence, number, offset)
    except UnicodeDecodeError as error:
        where = offset + 1 + piece.find(header) + error.start
        advice = "save the file as UTF-8, for instance with `iconv -f latin1 -t utf-8`"
        raise fasta_error(
            name, number, where, f"the header is not UTF-8 (byte {header[error.start]:#04x}); {advice}"
        ) from None


def fasta_error(name: str, number: int, offset: int, problem: str) -> FastaError:
    """The error for a record of a source, by its number and a byte offset in the decompressed text."""
    return FastaError(f"{name}, record {number}, byte {offset}: {problem}")
