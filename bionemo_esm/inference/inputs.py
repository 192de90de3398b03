"""Proteins as input: FASTA, CSV, TSV or Parquet from a file or standard input, or sequences of a Python program.

Every record needs a unique id and at least one residue, all of them known to the model. Lower case counts as upper
case; white space and a trailing `*` are dropped. Memory: a block of the file, or the longest record, and nine bytes an
id.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, UNK_ID, VOCABULARY_SIZE, encode
from bionemo_esm.data.fasta import (
    MAX_RECORD_BYTES,
    NUCLEOTIDE_RECORDS,
    Source,
    read_fasta,
    refuse_nucleotides,
)
from bionemo_esm.data.kernels import DigestSet
from bionemo_esm.errors import UserError
from bionemo_esm.settings import STANDARD_INPUT, Settings

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Sequences: TypeAlias = str | os.PathLike[str] | Mapping[str, str] | Iterable[str | tuple[str, str]]
"""Inputs of `proteins_of`; also Biopython's `SeqRecord`s, a pandas Series, and tables (pandas, Polars, Arrow)."""
COMPRESSED = (".gz", ".zst", ".zstd", ".bgz")
"""Endings of compressed files, which `Source` decompresses."""
SEPARATORS = {"csv": ",", "tsv": "\t"}
_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
_SEQUENCE_COLUMNS = ("sequence", "seq")
_ID_COLUMN = "id"
_X_ID = TOKEN_IDS["X"]
_IS_UNKNOWN = np.isin(np.arange(len(TOKEN_IDS)), [UNK_ID, TOKEN_IDS["."], TOKEN_IDS["-"]])  # gaps included
_LONGEST_ID = 1024  # characters; HDF5 limits names
_BLOCK_BYTES = 2**20
_ROWS_AT_ONCE = 1024
_SEPARATOR_ADVICE = {
    ";": "is it separated by ';'? Save it with commas, or as .tsv with tabs",
    "\t": "is it separated by tabs? Name it .tsv",
    ",": "is it separated by commas? Name it .csv",
}
_OTHER_CONTENT = (  # first bytes, and what the file is
    (b"\x1f\x8b", "is compressed twice; decompress it once (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "is compressed twice; decompress it once (unzstd)"),
    (b"PAR1", "is Parquet; name it .parquet"),
    (codecs.BOM_UTF16_LE, "is UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "is UTF-16 text; save it as UTF-8"),
)


class InputPolicy(Settings):
    """The policy for reading proteins.

    input_format: None tells it by the file's name; standard input is FASTA by default.
    id_column, sequence_column: of a table. None: `id` (without such a column the ids are the numbers of the rows), and
    `sequence` or `seq`, in upper or lower case.
    bad_records: a record without residues, with an id met before, or with an unknown letter ends the work ("error"), or
    is left out and counted ("skip"). unknown_letters: gaps and letters without a token (J, `*` inside, digits) make a
    record bad ("error"), or are read as "X".
    """

    input_format: Literal["fasta", "csv", "tsv", "parquet"] | None = None
    id_column: str | None = None
    sequence_column: str | None = None
    bad_records: Literal["error", "skip"] = "error"
    unknown_letters: Literal["error", "X"] = "error"
    advice_form: ClassVar[str] = "{key}={value}"
    """The setting to change, for messages; empty if the user cannot change it."""

    def format_of(self, path: str) -> str:
        """Return the format of a file, by `input_format` or its name."""
        return self.input_format or _SUFFIXES.get(suffix_of(path), "fasta")

    def advice(self, text: str, key: str, value: str) -> str:
        """Return the text with how to set a key in the place of `{}`."""
        return text.format(self.advice_form.format(key=key, value=value)) if self.advice_form else ""


class _PythonPolicy(InputPolicy):
    """A policy that is an argument of a method."""

    advice_form = "policy=InputPolicy({key}={value!r})"


class _FixedPolicy(InputPolicy):
    """The default policy, which the user cannot change."""

    advice_form = ""


class InputError(UserError):
    """A record that cannot be used; the message names the file, the record and its id, and what to do."""

    code = "input"


class Protein(NamedTuple):
    """A checked record."""

    id: str
    tokens: NDArray[np.uint8]  # [R], R > 0: token ids, without <cls> and <eos>
    number: int  # 1 for the first record of the input; skipped records count

    @property
    def residues(self) -> int:
        return len(self.tokens)


class _Record(NamedTuple):
    id: str
    sequence: bytes


@dataclass(frozen=True)
class InputInventory:
    """The content of an input, from a first pass that computes nothing."""

    proteins: int
    residues: int
    longest: int  # residues
    skipped: int  # bad records
    first_problem: str  # of the skipped records; "" if there are none
    ids_are_numbers: bool  # row numbers stand for ids


def read_proteins(
    path: str | os.PathLike[str],
    policy: InputPolicy | None = None,
    skipped: Callable[[str], None] = lambda problem: None,
) -> Iterator[Protein]:
    """Yield the proteins of an input in order: a file (plain, gzip or zstd), or `-` for standard input.

    Without a policy the default one holds, and no message advises to change it. `skipped` is called with the reason for
    each record that the policy leaves out. Raises `InputError` for a bad record and for a table without the columns,
    `SourceError` for a file that cannot be opened or decompressed.
    """
    name = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
    policy = _FixedPolicy() if policy is None else policy
    yield from _checked(name, _records(os.fspath(path), name, policy), policy, skipped)


def proteins_of(sequences: Sequences, policy: InputPolicy | None = None) -> list[Protein]:
    """Return the proteins that a Python program passes, checked.

    Accepted: a mapping of ids to sequences; (id, sequence) pairs; sequences (their numbers, from 1, are the ids);
    Biopython's `SeqRecord`s; a pandas Series, whose index holds the ids; a table of pandas, Polars or Arrow with the
    columns of the policy (a pandas table without an id column: its index); one sequence; a file name, which contains a
    dot or a slash, as no sequence does. pandas' default index (0, 1, 2, ...) is no id: rows are numbered from 1.

    Without a policy the default one holds, and no message advises to change it. Raises `InputError`, also if there is
    no protein, and `SourceError`.
    """
    policy = _FixedPolicy() if policy is None else _PythonPolicy(**policy.model_dump())
    problems: list[str] = []
    if hasattr(sequences, "seq") or (isinstance(sequences, str) and not set(sequences) & set("./")):
        sequences = [sequences]  # type: ignore[list-item]  # Biopython is no dependency
    if isinstance(sequences, str | os.PathLike):
        name, proteins = os.fspath(sequences), read_proteins(sequences, policy, problems.append)
    else:
        name = "sequences"
        proteins = _checked(name, _records_of_objects(sequences, policy), policy, problems.append)
    if found := list(proteins):
        return found
    raise InputError(f"{name}: no protein {f'is left: {problems[0]}' if problems else 'is there'}")


def scan_input(path: str | os.PathLike[str], policy: InputPolicy | None = None) -> InputInventory:
    """Read and check a whole input. Raises as `read_proteins`, and `InputError` if no protein is left."""
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
    return InputInventory(proteins, residues, longest, skipped, first_problem, numbered)


def suffix_of(path: str) -> str:
    """Return the ending of a file's name in lower case, without that of its compression."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return os.path.splitext(name)[1]  # noqa: PTH122 - a URL or pattern is no path


# --- what a protein must be -------------------------------------------------------------------------------------------


def _checked(
    name: str, records: Iterable[_Record], policy: InputPolicy, skipped: Callable[[str], None]
) -> Iterator[Protein]:
    seen, counts = DigestSet(), np.zeros(VOCABULARY_SIZE, dtype=np.int64)
    for number, record in enumerate(records, start=1):
        where = f"{name}, record {number}" + (f" ({_shortened(record.id)})" if record.id else "")
        tokens = encode(_one_byte_each(record.sequence.removesuffix(b"*")))
        if number <= NUCLEOTIDE_RECORDS:
            counts += np.bincount(tokens, minlength=VOCABULARY_SIZE)
        if number == NUCLEOTIDE_RECORDS:
            refuse_nucleotides(name, counts)
        problem = _problem(record, tokens, policy)
        if not problem and not seen.add(np.array([_digest(record.id)], dtype=np.uint64))[0]:
            problem = "an earlier record has the same id; ids must differ, as results are found by them"
        if not problem:
            if policy.unknown_letters == "X":
                tokens[_IS_UNKNOWN[tokens]] = _X_ID
            yield Protein(record.id, tokens, number)
        elif policy.bad_records == "skip":
            skipped(f"{where}: {problem}")
        else:
            advice = policy.advice("; {} leaves such records out", "bad_records", "skip")
            raise InputError(f"{where}: {problem}{advice}")
    refuse_nucleotides(name, counts)


def _problem(record: _Record, tokens: NDArray[np.uint8], policy: InputPolicy) -> str:
    """Return why a record cannot be used; "" if it can."""
    if not record.id:
        return "it has no id; give each record one"
    if len(record.id) > _LONGEST_ID:
        return f"its id has {len(record.id):,} characters, over {_LONGEST_ID:,}; is it the right column, or word?"
    if not record.id.isprintable() and any(category(letter) in ("Cc", "Cs") for letter in record.id):
        return "its id has a control character in it, or half of one of Unicode's pairs; take that out"
    if not len(tokens):
        return "it has no residues"
    unknown = _IS_UNKNOWN[tokens]
    if policy.unknown_letters == "X" or not unknown.any():
        return ""
    position = int(unknown.argmax())
    letter = record.sequence[position : position + 4].decode("utf-8", "replace")[0]  # all letters before are one byte
    kind = "a gap, as alignments have; take it out" if letter in "-." else "not a letter of proteins; correct it"
    advice = policy.advice(", or read it as X by {}", "unknown_letters", "X")
    return f"residue {position + 1} is {letter!r}, {kind}{advice}"


def _one_byte_each(sequence: bytes) -> bytes:
    """Return the sequence with `?` for each multi-byte character, so that residues are counted right."""
    return sequence if sequence.isascii() else sequence.decode("utf-8", "replace").encode("ascii", "replace")


def _digest(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def _shortened(identifier: str) -> str:
    return identifier if len(identifier) <= 40 else identifier[:37] + "..."


# --- records of Python objects ----------------------------------------------------------------------------------------


def _records_of_objects(sequences: Any, policy: InputPolicy) -> Iterator[_Record]:
    for number, (identifier, value) in enumerate(_pairs_of_objects(sequences, policy), start=1):
        if isinstance(value, tuple) and len(value) == 2:  # an id of its own, as in fair-esm's batches
            identifier, value = value
        elif hasattr(value, "seq"):  # a SeqRecord of Biopython; a mapping's key is its id
            identifier = identifier if isinstance(sequences, Mapping) else value.id
            value = str(value.seq)
        if not isinstance(value, str):
            raise InputError(f"sequences, record {number} ({_shortened(str(identifier))}): {value!r} is not text")
        yield _Record(str(identifier).strip(), _residues(value))


def _pairs_of_objects(sequences: Any, policy: InputPolicy) -> Iterable[tuple[Any, Any]]:
    if isinstance(sequences, Mapping):
        return sequences.items()
    if hasattr(sequences, "columns"):
        return _pairs_of_table(sequences, policy)
    if hasattr(sequences, "index") and hasattr(sequences, "items"):  # a Series of pandas
        return zip(_index_ids(sequences), sequences, strict=True)
    if isinstance(sequences, bytes) or not isinstance(sequences, Iterable):
        raise InputError(
            f"sequences: {_shortened(repr(sequences))} is not a sequence; give text, a list of sequences, a mapping of "
            "ids to sequences, or a file's name",
            code="input.type",
        )
    return enumerate(sequences, start=1)


def _pairs_of_table(table: Any, policy: InputPolicy) -> Iterable[tuple[Any, Any]]:
    names = [str(name) for name in getattr(table, "column_names", table.columns)]  # Arrow, or pandas and Polars
    id_place, sequence_place = _columns("sequences", names, policy)

    def column(place: int) -> Any:
        values = table[names[place]]
        return values.to_pylist() if hasattr(values, "to_pylist") else values

    sequences = column(sequence_place)
    if id_place is not None:
        ids = column(id_place)
    else:
        ids = _index_ids(table) if hasattr(table, "index") else range(1, len(sequences) + 1)
    return zip(ids, sequences, strict=True)


def _index_ids(pandas_object: Any) -> Iterable[Any]:
    """Return the index of a pandas object as ids; the numbers of its rows, from 1, for the default index."""
    index = pandas_object.index
    if getattr(index, "nlevels", 1) > 1:
        raise InputError("sequences: the index has several levels; give the ids in a column `id`", code="input.index")
    if type(index).__name__ == "RangeIndex" and index.start == 0 and index.step == 1:
        return range(1, len(index) + 1)
    return index  # type: ignore[no-any-return]


# --- records of files -------------------------------------------------------------------------------------------------


def _records(path: str, name: str, policy: InputPolicy) -> Iterator[_Record]:
    check_no_workbook(path, name)
    kind = policy.format_of(path)
    if kind == "fasta":
        for record in read_fasta(path):
            yield _Record(record.id, record.sequence)
    elif kind == "parquet":
        yield from _parquet_records(path, name, policy)
    else:
        yield from _table_records(path, name, SEPARATORS[kind], policy)


def _residues(sequence: str) -> bytes:
    """Return the text without white space; half of a Unicode surrogate pair becomes `?`, which is no residue."""
    return "".join(sequence.split()).encode("utf-8", "replace")


def _table_records(path: str, name: str, separator: str, policy: InputPolicy) -> Iterator[_Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with Source(path) as source:
        rows = csv.reader(text_lines(source), delimiter=separator, strict=True)
        number = good = 0  # records, and lines that could be read
        try:
            header = next(rows, None)
            if not header:
                raise InputError(f"{name}: the first line is empty; it must name the columns")
            id_place, sequence_place = _columns(name, [column.strip() for column in header], policy)
            for row in rows:
                good = rows.line_num
                if not any(field.strip() for field in row) and len(row) < 2:
                    continue
                number += 1
                if len(row) != len(header):
                    where = f"{name}, record {number} (line {rows.line_num})"
                    raise InputError(f"{where}: has {len(row)} fields, the header {len(header)}; correct it")
                if number == 1 and id_place is None and not header[0].strip() and row[0] not in ("", "0"):
                    id_place = 0  # the index of a pandas table; the default one begins with 0 and is no id
                identifier = str(number) if id_place is None else row[id_place].strip()
                yield _Record(identifier, _residues(row[sequence_place]))
        except csv.Error as error:
            advice = f"close quotes, and is it a table with {separator!r} between columns?"
            raise InputError(f"{name}, after line {good}: {error}; {advice}") from error


def text_lines(source: Source, error: type[UserError] = InputError) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with their ends.

    Raises `error` for content that is not such text (a file that is compressed twice, UTF-16, old Mac line ends)
    and, before the end of a damaged file is given out, for the damage.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number, rest, at_end = 1, "", False
    while not at_end:
        block = bytearray(_BLOCK_BYTES)  # a new one: the source hashes it in the background
        filled = source.fill(memoryview(block))
        at_end = filled < len(block)
        if number == 1 and not rest and (problem := foreign_content(block[:filled])):
            raise error(f"{source.name}: {problem}", code="input.foreign-content")
        if source.damage:
            raise error(f"{source.name}: {source.damage}; download or copy the file again")
        try:
            *lines, rest = (rest + decoder.decode(memoryview(block)[:filled], final=at_end)).split("\n")
        except UnicodeDecodeError as problem:
            if b"\0" in block[:filled]:
                raise error(f"{source.name}: is no text; is it the right file?") from None
            raise error(
                f"{source.name}, line {number} or later: is not UTF-8 text ({problem.reason}); save it as UTF-8"
            ) from None
        if len(rest) > MAX_RECORD_BYTES:
            raise error(f"{source.name}, line {number + len(lines)}: is too long for a protein; is it a table?")
        number += len(lines)
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def foreign_content(start: bytes | bytearray) -> str:
    """Return what a file is that begins like this and is no table of text, and what to do; "" for text."""
    for signature, problem in _OTHER_CONTENT:
        if start.startswith(signature):
            return problem
    if b"\r" in start and b"\n" not in start:
        return "ends its lines with a carriage return alone, as old Macs did; save it with line feeds (LF or CR LF)"
    return ""


def check_no_workbook(path: str, name: str, error: type[UserError] = InputError) -> None:
    """Raise `error` for a spreadsheet, by its name or its first bytes."""
    start = b""
    if os.path.isfile(path) and os.access(path, os.R_OK):  # noqa: PTH113 - standard input and pipes are not read here
        with open(path, "rb") as stream:
            start = stream.read(4)
    if suffix_of(path) in (".xlsx", ".xlsm", ".xls", ".ods") or start in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        raise error(f"{name}: is a spreadsheet, or another zip file; save the sheet as CSV", code="input.workbook")


def separator_advice(columns: list[str]) -> str:
    """Return what to do about a header of one column that contains another separator; "" for any other header."""
    if len(columns) == 1:
        return next((f"; {advice}" for separator, advice in _SEPARATOR_ADVICE.items() if separator in columns[0]), "")
    return ""


def _parquet_records(path: str, name: str, policy: InputPolicy) -> Iterator[_Record]:
    import pyarrow as arrow
    from pyarrow.parquet import ParquetFile

    try:
        with io.FileIO(0, closefd=False) if path == STANDARD_INPUT else open(path, "rb") as stream:
            table = ParquetFile(io.BytesIO(stream.read()) if path == STANDARD_INPUT else stream)
            names = _parquet_columns(name, table, policy)
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column for column in names if column is not None]):
                sequences = batch.column(names[1]).to_pylist()
                ids = [None] * len(sequences) if names[0] is None else batch.column(names[0]).to_pylist()
                for identifier, sequence in zip(ids, sequences, strict=True):
                    number += 1
                    own = "" if identifier is None else str(identifier).strip()
                    yield _Record(str(number) if names[0] is None else own, _residues(sequence or ""))
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    except OSError as error:
        if error.strerror:
            raise InputError(f"{name}: cannot be opened ({error.strerror})") from error
        raise InputError(f"{name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _parquet_columns(name: str, table: ParquetFile, policy: InputPolicy) -> tuple[str | None, str]:
    """Return the names of the columns of ids (None: there is none) and sequences; checks what the two hold."""
    from pyarrow import types

    schema = table.schema_arrow
    id_place, sequence_place = _columns(name, schema.names, policy)
    if id_place is None:  # pandas stores an index that is not the default one as a column
        stored = (schema.pandas_metadata or {}).get("index_columns", [])
        if len(stored) == 1 and stored[0] in schema.names and stored[0] != schema.names[sequence_place]:
            id_place = schema.names.index(stored[0])
    for place, content in ((id_place, "ids"), (sequence_place, "sequences")):
        if place is None:
            continue
        kind = schema.field(place).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        is_text = str(value) in ("string", "large_string", "string_view")
        if not is_text and not (content == "ids" and types.is_integer(value)):
            raise InputError(f"{name}: column {schema.names[place]!r}, of {content}, holds {kind}; make it text")
    return None if id_place is None else schema.names[id_place], schema.names[sequence_place]


def _columns(name: str, header: list[str], policy: InputPolicy) -> tuple[int | None, int]:
    """Return the indices of the columns of ids (None: there is none) and sequences.

    Raises `InputError` for a column that is missing, and for one that occurs twice.
    """
    identifier = _column(name, header, "id_column", policy.id_column, (_ID_COLUMN,))
    sequence = _column(name, header, "sequence_column", policy.sequence_column, _SEQUENCE_COLUMNS)
    if sequence is None:
        advice = separator_advice(header) or policy.advice("; say by {} which one it is", "sequence_column", "...")
        raise InputError(
            f"{name}: no column named {' or '.join(_SEQUENCE_COLUMNS)}{advice}: {_listed(header)}",
            code="input.no-column",
        )
    return identifier, sequence


def _column(name: str, header: list[str], key: str, wanted: str | None, usual: tuple[str, ...]) -> int | None:
    """Return the index of the wanted column, or of the first usual one that is there."""
    if wanted is not None and wanted not in header:
        raise InputError(
            f"{name}: {key}={wanted}: there is no such column, but {_listed(header)}{separator_advice(header)}",
            code="input.no-column",
        )
    names = header if wanted is not None else [column.lower() for column in header]
    chosen = next((each for each in (usual if wanted is None else (wanted,)) if each in names), None)
    if chosen is None:
        return None
    if names.count(chosen) > 1:
        raise InputError(f"{name}: {names.count(chosen)} columns are named {chosen!r}; rename all but one")
    return names.index(chosen)


def _listed(header: list[str]) -> str:
    more = f" and {len(header) - 20} more" if len(header) > 20 else ""
    return ", ".join(column[:40] for column in header[:20]) + more
