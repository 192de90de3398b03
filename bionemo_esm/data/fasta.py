"""FASTA reader: records of a file or standard input, plain, gzip or zstd, one record in memory at a time.

This reader defines what a record is and which errors it raises. `kernels.parse` follows the same rules and reads many
times as fast for the store builder. Residues are handled by `bytes` methods, not by Python loops.

A `Source` is read once, in blocks, and hashed at the same time, so a pipe works as well as a file. Its first bytes
determine the compression. Decompression and hashing release the GIL and run in parallel with the consumer of the
blocks.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, cast

import numpy as np
import zstandard
from isal import isal_zlib
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS
from bionemo_esm.errors import UserError
from bionemo_esm.settings import STANDARD_INPUT

_READ_BYTES = 2**18  # of compressed bytes decompressed at once
_UNPACKED_BYTES = 2**20  # maximum bytes decompressed at once
_ZSTD_READ_BYTES = 2**12  # 4 bytes may expand to 128 KiB
_START_BYTES = 64
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OTHER_COMPRESSIONS = {
    b"\xfd7zXZ": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_ZSTD_MAX_WINDOW_BYTES = 2**27  # limit of `zstd -d` without --long


_GzipError = cast("type[Exception]", isal_zlib.error)


class SourceError(UserError):
    """A source that cannot be opened, or has an unsupported compression or format."""


class BackgroundHash:
    """SHA-256 of bytes passed in order, computed in a separate thread."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._last: Future[None] | None = None

    def update(self, content: bytes | memoryview) -> None:
        """Start hashing the next bytes once the previous bytes have been hashed."""
        self.wait()
        self._last = self._thread.submit(self._sha256.update, content)

    def wait(self) -> None:
        """Wait until all bytes have been hashed."""
        if self._last is not None:
            self._last.result()

    def hexdigest(self) -> str:
        """Return the hash of all bytes as 64 hexadecimal digits. No bytes may be added afterwards."""
        self._thread.shutdown()
        return self._sha256.hexdigest()


class Source:
    """One input: a path, or `-` for standard input.

    `fill` reads the decompressed text once. `bytes_read` counts the bytes of the file itself, compressed or not. At the
    end, `sha256` is their hash, and `damage` describes a truncated compressed stream or a checksum mismatch. Raises
    `SourceError` on entry.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.is_standard_input = os.fspath(path) == STANDARD_INPUT
        self.name = "standard input" if self.is_standard_input else os.fspath(path)
        self.size: int | None = None  # bytes of the file; None for a pipe
        self.bytes_read = 0
        self.sha256 = ""
        self.damage = ""
        self._path = Path(path)
        self._start = b""
        self._left = memoryview(b"")  # decompressed, but not yet consumed

    def __enter__(self) -> Source:
        self._stream = io.FileIO(0, closefd=False) if self.is_standard_input else _open(self._path)
        if not self.is_standard_input and self._path.is_file():
            self.size = self._path.stat().st_size
        self._hash = BackgroundHash()
        self._start = self._look_at_start()
        for magic, (name, command) in _OTHER_COMPRESSIONS.items():
            if self._start.startswith(magic):
                self.__exit__(None, None, None)
                if self._start.startswith(_OFFICE_ENTRIES, _ZIP_HEADER_BYTES) and name == "zip":
                    raise SourceError(f"{self.name}: {_WORKBOOK}", code="fasta.format")
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
        """Manifest entry of this source after its end: file, bytes, sha256."""
        return {
            "file": self.name if self.is_standard_input else self._path.name,
            "bytes": self.bytes_read,
            "sha256": self.sha256,
        }

    def fill(self, view: memoryview) -> int:
        """Write the next decompressed bytes to a view. Return their number, smaller than the view only at the end.

        The bytes are hashed until the next call and must not change before it.
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
        while len(start) < _START_BYTES and (more := self._stream.read(_START_BYTES - len(start))):
            start += more
        return start

    def _read_into(self, view: memoryview) -> int:
        """Read the next bytes of the file, starting with those read on entry."""
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
        """Yield the file in pieces of at most `size` bytes."""
        while True:
            piece = bytearray(size)
            count = self._read_into(memoryview(piece))
            if not count:
                return
            yield bytes(memoryview(piece)[:count])

    def _gunzip(self) -> Iterator[bytes]:
        """Decompress all members (bgzip and `cat a.gz b.gz` write several), with optional zero padding after them."""
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
            while rest := member.decompress(b"", _UNPACKED_BYTES):  # buffered in the decompressor
                yield rest
        except _GzipError as error:
            self.damage = f"the gzip stream is damaged ({error})"
        else:
            self.damage = "" if member.eof else "the gzip stream is damaged (it ends before its end mark)"

    def _unzstd(self) -> Iterator[bytes]:
        """Decompress all frames in small steps, because the size declared by a frame cannot be trusted."""
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


MAX_RECORD_BYTES = 64 * 2**20
"""Maximum size of a record. The longest of UniRef50 has about 45,000 residues, so a longer record is not a protein."""

_BLOCK_BYTES = 2**22
_SHOWN_BYTES = 40
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\n\r\v\f"
_NOT_BLANK = re.compile(rb"[^ \t\n\r\v\f]")


def _convertible(format_name: str, biopython: str) -> str:
    convert = f"Biopython's SeqIO.convert(FILE, '{biopython}', 'proteins.fasta', 'fasta')"
    return f"is {format_name}, not FASTA; convert it first, for instance with {convert}"


_OFFICE_ENTRIES, _ZIP_HEADER_BYTES = (b"[Content_Types].xml", b"_rels/", b"xl/", b"mimetypeapplication/vnd.oasis"), 30
_WORKBOOK = "is a workbook, not FASTA; export the sheet as CSV, with the columns id and sequence"
_TWICE = "is compressed twice; decompress it once, for instance with `gzip -d`"
_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (rb">(?:P1|F1|D[LC]|R[LC]|N[13]|XX);", _convertible("a PIR file", "pir")),
    (rb"LOCUS\s", _convertible("a GenBank file", "genbank")),
    (rb"ID {3}\S", _convertible("an EMBL or Swiss-Prot file", "swiss")),
    (rb"CLUSTAL|MUSCLE \(", _convertible("a Clustal alignment", "clustal")),
    (rb"#\s*STOCKHOLM", _convertible("a Stockholm alignment", "stockholm")),
    (rb"#NEXUS", _convertible("a NEXUS file", "nexus")),
    (rb"@(?!HD\t|SQ\t|RG\t|PG\t|CO\t)\S", _convertible("a FASTQ file of reads", "fastq")),
    (rb"HEADER {4}|ATOM {2}", _convertible("a PDB structure", "pdb-atom")),
    (rb"data_\S*\s", _convertible("an mmCIF structure", "cif-atom")),
    (rb"#A3M#", "is an A3M alignment, not FASTA; remove its first line, and the gaps and lower-case insertions"),
    (rb"<!DOCTYPE|<html", "is an HTML page, not FASTA; the download failed or needs another address"),
    (rb"<\?xml", "is an XML file, not FASTA; download the FASTA file of the same data"),
    (rb"\xd0\xcf\x11\xe0", _WORKBOOK),
    (rb"PK\x03\x04|\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", _TWICE),
)
"""Patterns for the first bytes of other formats often mistaken for FASTA, with the problem and its remedy."""

_NUCLEOTIDE_SHARE, _FEWEST_LETTERS = 0.95, 20
_NUCLEOTIDE_IDS = [TOKEN_IDS[letter] for letter in "ACGTUN"]
NUCLEOTIDE_RECORDS = 1_000
"""Number of first records that `refuse_nucleotides` checks."""


class FastaError(SourceError):
    """A FASTA file that cannot be read; the message names the file, the record, the byte and the remedy."""


class FastaRecord(NamedTuple):
    """One record: the header line without '>' and the residues as in the file, without white space."""

    header: str
    sequence: bytes
    number: int
    """1 for the first record of the file."""
    offset: int
    """Byte offset of the record's '>' in the decompressed file."""

    @property
    def id(self) -> str:
        """The first word of the header; '' for an empty header."""
        return self.header.split(maxsplit=1)[0] if self.header else ""


class RecordBlock(NamedTuple):
    """Complete records of the decompressed text, and the problem of the record after them."""

    text: memoryview
    """Text from a '>' to the next record or the end of the file; may be empty before a problem."""
    offset: int
    """Byte offset in the decompressed text."""
    problem: str = ""
    """If not empty, the reason why the record after `text` cannot be read."""


def read_fasta(path: str | os.PathLike[str]) -> Iterator[FastaRecord]:
    """Yield the records of a FASTA file, or of standard input (`-`), in order; plain, gzip or zstd.

    Lines may be wrapped or not, end in LF or CRLF, be blank or padded. A record may have an empty header or no
    residues. Memory: a few blocks of 4 MiB, or the longest record.

    Raises `SourceError` at the first record for a missing file, a folder, or another compression. Raises its subclass
    `FastaError`, naming record and byte, for an input without records, text before the first '>', a damaged or
    truncated stream, a NUL byte, a '>' inside a sequence line, lines that end in a lone CR, a header that is not UTF-8,
    or a record over `MAX_RECORD_BYTES`.
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
    """Yield an open source in blocks of complete records, about 4 MiB each, in order.

    `buffer_of` returns a buffer of at least the given size for the next block, whose text is a view into it. The end of
    a block depends on the source, so results must not depend on it. Raises `FastaError` for a source without records,
    or with text before the first record.
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
    """Raise `FastaError` for a file of another format, and for text before the first '>'."""
    for pattern, problem in _OTHER_FORMATS:
        if re.match(pattern, text, re.IGNORECASE):
            raise FastaError(f"{name}: {problem}", code="fasta.format")
    if not text or text.startswith(b">"):
        return
    if b"\0" in text[:_SHOWN_BYTES]:
        raise fasta_error(name, 1, offset, "a NUL byte: binary or UTF-16; save it as plain UTF-8 text")
    if text.startswith(_BYTE_ORDER_MARK):
        raise fasta_error(name, 1, 0, "begins with a byte order mark; save it as UTF-8 without one")
    shown = text[:_SHOWN_BYTES].decode("utf-8", errors="replace").splitlines()[0]
    raise fasta_error(name, 1, offset, f"text before the first '>' ({shown!r}); begin each record with a '>' header")


def parse_record(name: str, number: int, offset: int, piece: bytes) -> FastaRecord:
    """Parse the text between one '>' and the next. Raises `FastaError` as `read_fasta` does."""
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


def refuse_nucleotides(name: str, counts: NDArray[np.int64]) -> None:
    """Raise `FastaError` for an input whose first records look like DNA or RNA.

    counts: int64 [33], how often each token id occurs in the first `NUCLEOTIDE_RECORDS` records. An input is refused if
    over 95% of its letters are A, C, G, T, U or N, and every base occurs: repeats such as silk's (GAGAGS) are proteins.
    Fewer than 20 letters are not judged.
    """
    letters = int(counts.sum())
    if letters < _FEWEST_LETTERS:
        return
    share = int(counts[_NUCLEOTIDE_IDS].sum()) / letters
    a, c, g, t, u = (int(counts[TOKEN_IDS[base]]) for base in "ACGTU")
    if share > _NUCLEOTIDE_SHARE and a and c and g and (t or u):
        found = f"{share:.1%} of its letters are A, C, G, T, U or N"
        raise FastaError(
            f"{name}: looks like DNA or RNA ({found}); translate it first, or name a protein file",
            code="fasta.nucleotides",
        )


def fasta_error(name: str, number: int, offset: int, problem: str) -> FastaError:
    """Return the error for a record, with its number and byte offset in the decompressed text."""
    return FastaError(f"{name}, record {number}, byte {offset}: {problem}")
