"""Proteins to ask the model about: FASTA, CSV, TSV or Parquet, from a file or standard input, record by record.

What a record must be is the same everywhere: an id that no other has, and residues that the model knows, one at least.
Lower case is read as upper case, white space and a `*` at the end are left out. Memory: a block of the file, or the
longest record, and nine bytes an id.

How proteins are read, and how to say to whoever can change it what to change.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, UNK_ID, VOCABULARY_SIZE, encode
from bionemo_esm.data.fasta import (
    MAX_RECORD_BYTES,
    NUCLEOTIDE_RECORDS,
    STANDARD_INPUT,
    Source,
    read_fasta,
    refuse_nucleotides,
)
from bionemo_esm.data.kernels import DigestSet
from bionemo_esm.errors import ConfigError, UserError

FORMATS = ("fasta", "csv", "tsv", "parquet")
_PACKED = (".gz", ".zst", ".zstd", ".bgz")


@dataclass(frozen=True)
class InputPolicy:
    """How proteins are read.

    input_format: one of `FORMATS`, or None to tell by the name; standard input is FASTA unless told otherwise.
    id_column, sequence_column: of a table; None for `id` (where there is none, the record's number) and `sequence` or
    `seq`, in capitals or not.
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

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InputPolicy:
        """The policy of a job's configuration, by `POLICY_KEYS`. Raises `ConfigError`, naming the key."""
        return cls(**{key: None if values[key] is None else str(values[key]) for key in POLICY_KEYS})  # type: ignore[arg-type]

    def format_of(self, path: str) -> str:
        """The format of a file, by `input_format` or its name."""
        if self.input_format is not None:
            return self.input_format
        name = path.lower()
        for packed in _PACKED:
            name = name.removesuffix(packed)
        endings = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
        return next((kind for ending, kind in endings.items() if name.endswith(ending)), "fasta")

    def advice(self, text: str, key: str, value: str) -> str:
        """The text with how to set a key in the place of `{}`, in the words of who can."""
        return text.format(f"{key}={value}")


POLICY_KEYS = tuple(field.name for field in fields(InputPolicy))
"""Of a job's configuration."""


class PythonPolicy(InputPolicy):
    """The same, as an argument of a method."""

    def advice(self, text: str, key: str, value: str) -> str:
        return text.format(f"policy=InputPolicy({key}={value!r})")


class FixedPolicy(InputPolicy):
    """The usual one, where nobody has a say in it."""

    def advice(self, text: str, key: str, value: str) -> str:
        return ""


if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = [
    "InputError",
    "InputInventory",
    "InputPolicy",
    "Protein",
    "Sequences",
    "proteins_of",
    "read_proteins",
    "scan_input",
]  # fmt: skip

Sequences: TypeAlias = str | os.PathLike[str] | Mapping[str, str] | Iterable[str | tuple[str, str]]
"""What `proteins_of` takes."""
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_SEQUENCE_COLUMNS = ("sequence", "seq")
_ID_COLUMN = "id"
_X_ID = TOKEN_IDS["X"]
_IS_UNKNOWN = np.isin(np.arange(len(TOKEN_IDS)), [UNK_ID, TOKEN_IDS["."], TOKEN_IDS["-"]])  # gaps counted
_LONGEST_ID = 1024  # characters; HDF5 has its limits, and a longer one is a mistake
_BLOCK_BYTES = 2**20
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
class InputInventory:
    """What an input holds, of a first reading that computes nothing."""

    proteins: int
    residues: int
    longest: int  # residues
    skipped: int  # bad records, left out
    first_problem: str  # of the skipped ones; "" where there are none
    ids_are_numbers: bool  # as those of a table without an id column are


def read_proteins(
    path: str | os.PathLike[str],
    policy: InputPolicy | None = None,
    skipped: Callable[[str], None] = lambda problem: None,
) -> Iterator[Protein]:
    """The proteins of an input in order, `-` for standard input; plain, gzip or zstd.

    Without a policy the usual one holds, and no error tells of its keys.

    `skipped` is told why a record is left out, where the policy leaves it out; else `InputError` says so.
    Raises `SourceError` for what cannot be opened or decompressed, `InputError` for a table that is none, or lacks a
    column.
    """
    name = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
    policy = FixedPolicy() if policy is None else policy
    yield from _checked(name, _records(os.fspath(path), name, policy), policy, skipped)


def proteins_of(sequences: Sequences, policy: InputPolicy | None = None) -> list[Protein]:
    """What a notebook has at hand: a mapping of ids to sequences, pairs of both, sequences (numbers are their ids), one
    sequence, or a file's name, which has a dot or a slash in it, as no sequence has.

    Without a policy the usual one holds, and no error tells of its keys. Raises `InputError`, also where there is no
    protein, and `SourceError`.
    """
    policy = FixedPolicy() if policy is None else PythonPolicy(**vars(policy))
    problems: list[str] = []
    if isinstance(sequences, str) and not set(sequences) & set("./"):
        sequences = [sequences]
    if isinstance(sequences, str | os.PathLike):
        name, proteins = os.fspath(sequences), read_proteins(sequences, policy, problems.append)
    elif hasattr(sequences, "columns"):  # whose items would be the names of columns, which may well look like sequences
        raise InputError("sequences: this is a table; give dict(zip(table['id'], table['sequence'])), or its file")
    else:
        name = "sequences"
        proteins = _checked(name, _records_at_hand(sequences), policy, problems.append)
    if found := list(proteins):
        return found
    raise InputError(f"{name}: no protein {f'is left: {problems[0]}' if problems else 'is there'}")


def scan_input(path: str | os.PathLike[str], policy: InputPolicy | None = None) -> InputInventory:
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
    return InputInventory(proteins, residues, longest, skipped, first_problem, numbered)


# --- what a protein must be -------------------------------------------------------------------------------------------


def _checked(
    name: str, records: Iterable[_Record], policy: InputPolicy, skipped: Callable[[str], None]
) -> Iterator[Protein]:
    seen, counts = DigestSet(), np.zeros(VOCABULARY_SIZE, dtype=np.int64)
    for number, record in enumerate(records, start=1):
        where = f"{name}, record {number}" + (f" ({_shown(record.id)})" if record.id else "")
        tokens = encode(_one_byte_each(record.sequence.removesuffix(b"*")))
        if number <= NUCLEOTIDE_RECORDS:
            counts += np.bincount(tokens, minlength=VOCABULARY_SIZE)
        if number == NUCLEOTIDE_RECORDS:
            refuse_nucleotides(name, counts)
        problem = _problem(record, tokens, policy)
        if not problem and not seen.add(np.array([_digest(record.id)], dtype=np.uint64))[0]:
            problem = "an earlier record has the same id; ids must differ, as results are found by them"
        if not problem:
            yield Protein(record.id, _with_x(tokens, policy), number)
        elif policy.bad_records == "skip":
            skipped(f"{where}: {problem}")
        else:
            advice = policy.advice("; {} leaves such records out", "bad_records", "skip")
            raise InputError(f"{where}: {problem}{advice}")
    refuse_nucleotides(name, counts)


def _problem(record: _Record, tokens: NDArray[np.uint8], policy: InputPolicy) -> str:
    if not record.id:
        return "it has no id; give each record one"
    if problem := _id_problem(record.id):
        return problem
    if not len(tokens):
        return "it has no residues"
    if policy.unknown_letters == "X":
        return ""
    unknown = _IS_UNKNOWN[tokens]
    if not unknown.any():
        return ""
    place = int(unknown.argmax())
    letter = record.sequence[place : place + 4].decode("utf-8", "replace")[0]  # before it all are of one byte
    kind = "a gap, as alignments have; take it out" if letter in "-." else "not a letter of proteins; correct it"
    advice = policy.advice(", or read it as X by {}", "unknown_letters", "X")
    return f"residue {place + 1} is {letter!r}, {kind}{advice}"


def _id_problem(identifier: str) -> str:
    if len(identifier) > _LONGEST_ID:
        return f"its id has {len(identifier):,} characters, over {_LONGEST_ID:,}; is it the right column, or word?"
    if not identifier.isprintable() and any(category(letter) in ("Cc", "Cs") for letter in identifier):
        return "its id has a control character in it, or half of one of Unicode's pairs; take that out"
    return ""


def _with_x(tokens: NDArray[np.uint8], policy: InputPolicy) -> NDArray[np.uint8]:
    if policy.unknown_letters == "X":
        tokens[_IS_UNKNOWN[tokens]] = _X_ID
    return tokens


def _one_byte_each(sequence: bytes) -> bytes:
    """The sequence with `?` for each character that has several bytes, so that residues are counted right."""
    return sequence if sequence.isascii() else sequence.decode("utf-8", "replace").encode("ascii", "replace")


def _digest(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def _shown(identifier: str) -> str:
    return identifier if len(identifier) <= 40 else identifier[:37] + "..."


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


def _records_at_hand(sequences: Mapping[str, str] | Iterable[str | tuple[str, str]]) -> Iterator[_Record]:
    pairs: Iterable[Any] = sequences.items() if isinstance(sequences, Mapping) else enumerate(sequences, start=1)
    for number, (name, sequence) in enumerate(pairs, start=1):
        if isinstance(sequence, tuple) and len(sequence) == 2:  # an id of its own, as in fair-esm's batches
            name, sequence = sequence
        if not isinstance(sequence, str):
            raise InputError(f"sequences, record {number} ({_shown(str(name))}): {sequence!r} is not text")
        yield _Record(str(name).strip(), _residues(sequence))


def _residues(sequence: str) -> bytes:
    """The text without white space; what is half a pair of Unicode's becomes `?`, as no letter is."""
    return "".join(sequence.split()).encode("utf-8", "replace")


def _table_records(path: str, name: str, separator: str, policy: InputPolicy) -> Iterator[_Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with Source(path) as source:
        rows = csv.reader(_lines(source), delimiter=separator, strict=True)
        number = good = 0  # records, and lines that could be read
        try:
            header = next(rows, None)
            if not header:
                raise InputError(f"{name}: the first line is empty; it must name the columns")
            columns = _columns(name, [column.strip() for column in header], policy)
            for row in rows:
                good = rows.line_num
                if not any(field.strip() for field in row) and len(row) < 2:
                    continue
                number += 1
                if len(row) != len(header):
                    where = f"{name}, record {number} (line {rows.line_num})"
                    raise InputError(f"{where}: has {len(row)} fields, the header {len(header)}; correct it")
                identifier = str(number) if columns[0] is None else row[columns[0]].strip()
                yield _Record(identifier, _residues(row[columns[1]]))
        except csv.Error as error:
            advice = f"close quotes, and is it a table with {separator!r} between columns?"
            raise InputError(f"{name}, after line {good}: {error}; {advice}") from error


def _lines(source: Source) -> Iterator[str]:
    """Lines of text, with their ends. Raises `InputError` for what is no text, or damaged, before it gives its end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number, rest, at_end = 1, "", False
    while not at_end:
        block = bytearray(_BLOCK_BYTES)  # a new one: the source goes on hashing it
        filled = source.fill(memoryview(block))
        at_end = filled < len(block)
        if source.damage:
            raise InputError(f"{source.name}: {source.damage}; download or copy the file again")
        try:
            *lines, rest = (rest + decoder.decode(memoryview(block)[:filled], final=at_end)).split("\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source.name}, line {number} or later: is not UTF-8 text ({error.reason}); save it as UTF-8"
            ) from None
        if len(rest) > MAX_RECORD_BYTES:
            raise InputError(f"{source.name}, line {number + len(lines)}: is too long for a protein; is it a table?")
        number += len(lines)
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


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
    """Names of the columns of ids and sequences, which hold what ids and sequences are made of."""
    from pyarrow import types

    schema = table.schema_arrow
    found = _columns(name, schema.names, policy)
    for place, what in zip(found, ("ids", "sequences"), strict=True):
        if place is None:
            continue
        kind = schema.field(place).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        is_text = str(value) in ("string", "large_string", "string_view")
        if not is_text and not (what == "ids" and types.is_integer(value)):
            raise InputError(f"{name}: column {schema.names[place]!r}, of {what}, holds {kind}; make it text")
    return None if found[0] is None else schema.names[found[0]], schema.names[found[1]]


def _columns(name: str, header: list[str], policy: InputPolicy) -> tuple[int | None, int]:
    """Which columns hold ids (None: none does) and sequences. Raises `InputError` where one is not there, or twice."""
    identifier = _column(name, header, "id_column", policy.id_column, (_ID_COLUMN,))
    sequence = _column(name, header, "sequence_column", policy.sequence_column, _SEQUENCE_COLUMNS)
    if sequence is None:
        raise InputError(
            f"{name}: no column named {' or '.join(_SEQUENCE_COLUMNS)}"
            f"{policy.advice('; say by {} which one it is', 'sequence_column', '...')}: {_listed(header)}"
        )
    return identifier, sequence


def _column(name: str, header: list[str], key: str, wanted: str | None, usual: tuple[str, ...]) -> int | None:
    """The place of the column that is wanted, or else of the first of the usual ones, if any is there."""
    if wanted is not None and wanted not in header:
        raise InputError(f"{name}: {key}={wanted}: there is no such column, but {_listed(header)}")
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
