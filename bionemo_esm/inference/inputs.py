"""Proteins to ask the model about: FASTA, CSV, TSV or Parquet, from a file or standard input, record by record.

What a record must be is the same everywhere: an id that no other has, and residues that the model knows, one at least.
Lower case is read as upper case, and a `*` at the end is left out. Memory: a block of the file, or the longest record,
and nine bytes an id.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, UNK_ID, encode
from bionemo_esm.data.digests import DigestSet
from bionemo_esm.data.fasta import MAX_RECORD_BYTES, read_fasta
from bionemo_esm.data.sources import STANDARD_INPUT, Source
from bionemo_esm.errors import ConfigError, UserError

FORMATS = ("fasta", "csv", "tsv", "parquet")
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_PACKED = (".gz", ".zst", ".zstd", ".bgz")
_SEQUENCE_COLUMNS = ("sequence", "seq")
_ID_COLUMN = "id"
_X_ID = TOKEN_IDS["X"]
_GAPS = np.array([TOKEN_IDS["."], TOKEN_IDS["-"]], dtype=np.uint8)
_CSV_BLOCK = 2**20
_ROWS_AT_ONCE = 1024


class InputError(UserError):
    """A record that cannot be used; the message names the file, the record and its id, and what to do."""


class Protein(NamedTuple):
    """One record, checked."""

    id: str
    tokens: NDArray[np.uint8]  # [R], R > 0: token ids, without <cls> and <eos>
    number: int  # 1 for the first record of the input, those that are skipped counted

    @property
    def residues(self) -> int:
        return len(self.tokens)


class _Record(NamedTuple):
    id: str
    sequence: bytes


@dataclass(frozen=True)
class InputPolicy:
    """How proteins are read.

    input_format: one of `FORMATS`, or None to tell by the name; standard input is FASTA unless told otherwise.
    id_column, sequence_column: of a table; None for `id` (the row's number where there is none), `sequence` or `seq`.
    bad_records: one that has no residue, an id met before, or an unknown letter ends the work ("error"), or is left out
    and counted ("skip"). unknown_letters: what the model has no token for (J, `*` within, digits), and gaps: makes a
    record bad ("error"), or is read as "X".
    """

    input_format: str | None = None
    id_column: str | None = None
    sequence_column: str | None = None
    bad_records: str = "error"
    unknown_letters: str = "error"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("input_format", self.input_format, (None, *FORMATS)),
            ("bad_records", self.bad_records, ("error", "skip")),
            ("unknown_letters", self.unknown_letters, ("error", "X")),
        ):
            if value not in allowed:
                words = ", ".join("null" if word is None else word for word in allowed)
                raise ConfigError(f"{key} must be one of {words}, not {value!r}")

    def format_of(self, path: str) -> str:
        """The format of a file, by `input_format` or its name."""
        if self.input_format is not None:
            return self.input_format
        name = path.lower()
        for packed in _PACKED:
            name = name.removesuffix(packed)
        endings = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
        return next((kind for ending, kind in endings.items() if name.endswith(ending)), "fasta")


@dataclass(frozen=True)
class Inventory:
    """What an input holds, of a first reading that computes nothing."""

    proteins: int
    residues: int
    longest: int  # residues
    skipped: int  # bad records, left out
    first_problem: str  # of the skipped ones; "" where there are none
    ids_are_numbers: bool  # as those of a table without an id column are


def read_proteins(
    path: str | os.PathLike[str],
    policy: InputPolicy = InputPolicy(),
    skipped: Callable[[str], None] = lambda problem: None,
) -> Iterator[Protein]:
    """The proteins of an input in order, `-` for standard input; plain, gzip or zstd.

    `skipped` is told why a record is left out, where the policy leaves it out; else `InputError` says so.
    Raises `SourceError` for what cannot be opened or decompressed, `InputError` for a table that is none, or lacks a
    column.
    """
    name = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
    yield from _checked(name, _records(os.fspath(path), name, policy), policy, skipped)


def proteins_of(
    sequences: str | os.PathLike[str] | Mapping[str, str] | Iterable[str],
    policy: InputPolicy = InputPolicy(),
) -> list[Protein]:
    """What a notebook has at hand: a mapping of ids to sequences, sequences (numbers are their ids), one sequence, or a
    file's name, which has a dot or a slash in it, as no sequence has. Raises `InputError`, `SourceError`.
    """
    if isinstance(sequences, str) and not set(sequences) & set("./"):
        sequences = [sequences]
    if isinstance(sequences, str | os.PathLike):
        return list(read_proteins(sequences, policy))
    pairs = sequences.items() if isinstance(sequences, Mapping) else enumerate(sequences, start=1)
    records = (_Record(str(name), _bytes(sequence)) for name, sequence in pairs)
    return list(_checked("sequences", records, policy, lambda problem: None))


def take_stock(path: str | os.PathLike[str], policy: InputPolicy = InputPolicy()) -> Inventory:
    """Read and check a whole input. Raises as `read_proteins`, and `InputError` where no protein is left."""
    proteins = residues = longest = skipped = 0
    first_problem, numbered = "", True

    def skip(problem: str) -> None:
        nonlocal skipped, first_problem
        skipped, first_problem = skipped + 1, first_problem or problem

    for protein in read_proteins(path, policy, skip):
        proteins, residues, longest = proteins + 1, residues + protein.residues, max(longest, protein.residues)
        numbered = numbered and protein.id == str(protein.number)
    if not proteins:
        raise InputError(f"{os.fspath(path)}: no protein {f'is left: {first_problem}' if skipped else 'in it'}")
    return Inventory(proteins, residues, longest, skipped, first_problem, numbered)


# --- what a protein must be -------------------------------------------------------------------------------------------


def _checked(
    name: str, records: Iterable[_Record], policy: InputPolicy, skipped: Callable[[str], None]
) -> Iterator[Protein]:
    seen = DigestSet()
    for number, record in enumerate(records, start=1):
        where = f"{name}, record {number}" + (f" ({_shown(record.id)})" if record.id else "")
        tokens = encode(record.sequence.removesuffix(b"*"))
        problem = _problem(record, tokens, policy)
        if not problem and not seen.add(np.array([_digest(record.id)], dtype=np.uint64))[0]:
            problem = "an earlier record has the same id; ids must differ, as results are found by them"
        if not problem:
            yield Protein(record.id, _with_x(tokens, policy), number)
        elif policy.bad_records == "skip":
            skipped(f"{where}: {problem}")
        else:
            raise InputError(f"{where}: {problem}; bad_records=skip leaves such records out")


def _problem(record: _Record, tokens: NDArray[np.uint8], policy: InputPolicy) -> str:
    if not record.id:
        return "it has no id; begin the header with one"
    if not len(tokens):
        return "it has no residues"
    if policy.unknown_letters == "X":
        return ""
    unknown = (tokens == UNK_ID) | np.isin(tokens, _GAPS)
    if not unknown.any():
        return ""
    place = int(unknown.argmax())
    letter = record.sequence[place : place + 1].decode("latin1")
    kind = "a gap, as alignments have; take them out" if letter in "-." else "no letter of a protein"
    return f"residue {place + 1} is {letter!r}, {kind}, or read it as X by unknown_letters=X"


def _with_x(tokens: NDArray[np.uint8], policy: InputPolicy) -> NDArray[np.uint8]:
    if policy.unknown_letters == "X":
        tokens[(tokens == UNK_ID) | np.isin(tokens, _GAPS)] = _X_ID
    return tokens


def _digest(identifier: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _shown(identifier: str) -> str:
    return identifier if len(identifier) <= 40 else identifier[:37] + "..."


def _bytes(sequence: object) -> bytes:
    if not isinstance(sequence, str):
        raise InputError(f"sequences: {sequence!r} is not a text of residues")
    return "".join(sequence.split()).encode("ascii", "replace")


# --- where records come from ------------------------------------------------------------------------------------------


def _records(path: str, name: str, policy: InputPolicy) -> Iterator[_Record]:
    kind = policy.format_of(path)
    if kind == "fasta":
        for record in read_fasta(path):
            yield _Record(record.id, record.sequence)
    elif kind == "parquet":
        yield from _parquet_records(path, name, policy)
    else:
        yield from _table_records(path, name, _SEPARATORS[kind], policy)


def _table_records(path: str, name: str, separator: str, policy: InputPolicy) -> Iterator[_Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with Source(path) as source:
        rows = csv.reader(_lines(source, name), delimiter=separator)
        try:
            header = next(rows, None)
            if header is None:
                raise InputError(f"{name}: the file is empty; its first line must name the columns")
            columns = _columns(name, [column.strip() for column in header], policy)
            for number, row in enumerate(rows, start=1):
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(f"{name}, row {number}: has {len(row)} fields, the header {len(header)}")
                identifier = str(number) if columns[0] is None else row[columns[0]].strip()
                yield _Record(identifier, _bytes(row[columns[1]]))
        except csv.Error as error:
            raise InputError(
                f"{name}, line {rows.line_num}: {error}; is it a {separator!r}-separated table?"
            ) from error


def _lines(source: Source, name: str) -> Iterator[str]:
    """Lines of text, with their ends, from the blocks of a source."""
    stream = io.TextIOWrapper(io.BufferedReader(_Raw(source), _CSV_BLOCK), encoding="utf-8-sig", newline="")
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if source.damage:
        raise InputError(f"{name}: {source.damage}; download or copy the file again")


class _Raw(io.RawIOBase):
    """A source as a stream of Python's."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        return self._source.fill(memoryview(buffer))  # type: ignore[arg-type]


def _parquet_records(path: str, name: str, policy: InputPolicy) -> Iterator[_Record]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with open(
            sys.stdin.fileno() if path == STANDARD_INPUT else path, "rb", closefd=path != STANDARD_INPUT
        ) as stream:
            table = parquet.ParquetFile(io.BytesIO(stream.read()) if path == STANDARD_INPUT else stream)
            identifiers, sequences = _columns(name, table.schema_arrow.names, policy)
            names = [table.schema_arrow.names[column] for column in (identifiers, sequences) if column is not None]
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=names):
                ids = batch.column(names[0]).to_pylist() if identifiers is not None else [None] * len(batch)
                for identifier, sequence in zip(ids, batch.column(names[-1]).to_pylist(), strict=True):
                    number += 1
                    yield _Record(str(number if identifiers is None else identifier or ""), _bytes(sequence or ""))
    except arrow.ArrowInvalid as error:
        raise InputError(f"{name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be opened ({error.strerror or error})") from error


def _columns(name: str, header: list[str], policy: InputPolicy) -> tuple[int | None, int]:
    """Which columns hold ids (None: none does) and sequences. Raises `InputError` where one is not there."""
    for key, wanted in (("id_column", policy.id_column), ("sequence_column", policy.sequence_column)):
        if wanted is not None and wanted not in header:
            raise InputError(f"{name}: {key}={wanted}: there are {', '.join(header[:20])}")
    identifier = policy.id_column or (_ID_COLUMN if _ID_COLUMN in header else None)
    sequence = policy.sequence_column or next((column for column in _SEQUENCE_COLUMNS if column in header), None)
    if sequence is None:
        columns = ", ".join(header[:20])
        raise InputError(f"{name}: no column named {' or '.join(_SEQUENCE_COLUMNS)}; say by sequence_column=... which "
                         f"one it is: {columns}")  # fmt: skip
    return None if identifier is None else header.index(identifier), header.index(sequence)
