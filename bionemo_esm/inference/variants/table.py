"""Tables of variants: reading, writing, correlation of scores with measurements, and baselines without a model.

A table is an Arrow table. Columns read as text (CSV, TSV) remain text, so they are written unchanged.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.data.fasta import MAX_RECORD_BYTES, Source
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.inputs import check_no_workbook, separator_advice, suffix_of, text_lines
from bionemo_esm.inference.variants.mutations import Variant
from bionemo_esm.settings import STANDARD_INPUT
from bionemo_esm.statistics import (
    FEWEST_FOR_CORRELATION,
    percentile_interval,
    resampled_counts,
    spearman,
    weighted_spearman,
)

FEWER_MUTATIONS, SUBSTITUTION_MATRIX = "(fewer mutations)", "(BLOSUM62)"
_ORDER = "ARNDCQEGHILKMFPSTWYV"
_BLOSUM62 = """
     4 -1 -2 -2  0 -1 -1  0 -2 -1 -1 -1 -1 -2 -1  1  0 -3 -2  0
    -1  5  0 -2 -3  1  0 -2  0 -3 -2  2 -1 -3 -2 -1 -1 -3 -2 -3
    -2  0  6  1 -3  0  0  0  1 -3 -3  0 -2 -3 -2  1  0 -4 -2 -3
    -2 -2  1  6 -3  0  2 -1 -1 -3 -4 -1 -3 -3 -1  0 -1 -4 -3 -3
     0 -3 -3 -3  9 -3 -4 -3 -3 -1 -1 -3 -1 -2 -3 -1 -1 -2 -2 -1
    -1  1  0  0 -3  5  2 -2  0 -3 -2  1  0 -3 -1  0 -1 -2 -1 -2
    -1  0  0  2 -4  2  5 -2  0 -3 -3  1 -2 -3 -1  0 -1 -3 -2 -2
     0 -2  0 -1 -3 -2 -2  6 -2 -4 -4 -2 -3 -3 -2  0 -2 -2 -3 -3
    -2  0  1 -1 -3  0  0 -2  8 -3 -3 -1 -2 -1 -2 -1 -2 -2  2 -3
    -1 -3 -3 -3 -1 -3 -3 -4 -3  4  2 -3  1  0 -3 -2 -1 -3 -1  3
    -1 -2 -3 -4 -1 -2 -3 -4 -3  2  4 -2  2  0 -3 -2 -1 -2 -1  1
    -1  2  0 -1 -3  1  1 -2 -1 -3 -2  5 -1 -3 -1  0 -1 -3 -2 -2
    -1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5  0 -2 -1 -1 -1 -1  1
    -2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6 -4 -2 -2  1  3 -1
    -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7 -1 -1 -4 -3 -2
     1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4  1 -3 -2 -2
     0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5 -2 -2  0
    -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11  2 -3
    -2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7 -1
     0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""
MATRIX: NDArray[np.int64] = np.array(_BLOSUM62.split(), dtype=np.int64).reshape(20, 20)
"""BLOSUM62 in half bits, rows and columns in the order of `_ORDER`.

Henikoff and Henikoff 1992, doi:10.1073/pnas.89.22.10915.
"""


def baselines(variants: Sequence[Variant | None]) -> dict[str, NDArray[np.float64]]:
    """Return baseline scores without a model, float64 [V]; NaN for None and for residues outside the standard 20.

    BLOSUM62: the sum over substitutions of M(wild type, mutant) - M(wild type, wild type). Fewer mutations: minus the
    number of substitutions; omitted if all variants have the same number.
    """
    fewer = np.array([np.nan if variant is None else -len(variant) for variant in variants], dtype=np.float64)
    matrix = np.array([np.nan if variant is None else _by_matrix(variant) for variant in variants])
    scores = {SUBSTITUTION_MATRIX: matrix}
    return {FEWER_MUTATIONS: fewer} | scores if len(np.unique(fewer[~np.isnan(fewer)])) > 1 else scores


def _by_matrix(variant: Variant) -> float:
    total = 0.0
    for one in variant:
        row, column = _ORDER.find(TOKENS[one.wildtype]), _ORDER.find(TOKENS[one.mutant])
        if row < 0 or column < 0:
            return np.nan
        total += float(MATRIX[row, column] - MATRIX[row, row])
    return total


if TYPE_CHECKING:
    import pyarrow as arrow

Floats = NDArray[np.float64]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
_NOT_MEASURED = ("", "na", "nan", "null", "none")


class TableError(UserError):
    """A table that cannot be used; the message names the file, the row or the column, and the remedy."""


@dataclass(frozen=True)
class VariantTable:
    """A table with the row numbers of its file."""

    name: str
    table: arrow.Table
    rows: NDArray[np.int64]  # [V]: the number of each row in the file; the header is row 1

    def where(self, index: int) -> str:
        """Return the name of a row for an error message."""
        return f"{self.name}, row {self.rows[index]}"

    def texts(self, column: str, key: str) -> list[str]:
        """Return a column as text, "" for an empty cell. Raises `TableError`, naming the key, for a missing column."""
        names = self.table.column_names
        if column not in names:
            raise TableError(no_column(self.name, key, column, names))
        values: list[Any] = self.table.column(names.index(column)).to_pylist()
        return ["" if value is None else str(value) for value in values]

    def numbers(self, column: str, key: str) -> Floats:
        """Return a column as numbers, NaN for an empty cell and NA. Raises `TableError` for anything else."""
        found = np.full(len(self.rows), np.nan)
        for index, text in enumerate(self.texts(column, key)):
            if text.strip().lower() in _NOT_MEASURED:
                continue
            try:
                found[index] = float(text)
            except ValueError:
                raise TableError(f"{self.where(index)}: {key}={column}: {text[:40]!r} is not a number") from None
        found[np.isinf(found)] = np.nan
        return found


def read_table(path: str | os.PathLike[str]) -> VariantTable:
    """Read a table by its suffix: CSV or TSV (plain, gzip or zstd) or Parquet; `-` is CSV from standard input.

    CSV and TSV need a header. Raises `TableError`, `SourceError`.
    """
    name = "standard input" if os.fspath(path) == STANDARD_INPUT else os.fspath(path)
    ending = ".csv" if name == "standard input" else suffix_of(name)
    check_no_workbook(os.fspath(path), name, TableError)
    if ending in PARQUET:
        return _read_parquet(name)
    if ending not in SEPARATORS:
        raise TableError(f"{name}: a table must end in .csv, .tsv, .parquet, or the first two and .gz or .zst")
    import pyarrow as arrow

    names, rows, numbers = _split(os.fspath(path), name, SEPARATORS[ending])
    columns = [arrow.array(column, arrow.string()) for column in zip(*rows, strict=True)]
    table = arrow.Table.from_arrays(columns, names=names)
    return _checked(name, table, np.array(numbers, dtype=np.int64))


def no_column(name: str, key: str, column: str, columns: Sequence[str], advice: str = "") -> str:
    """Return the message for a missing column, with `advice` if the separator of the header is right."""
    listed = ", ".join(columns[:20]) + (f" and {len(columns) - 20:,} more" if len(columns) > 20 else "")
    return f"{name}: {key}={column}: there is no such column, but {listed}{separator_advice(list(columns)) or advice}"


def check_ending(key: str, path: Path) -> None:
    """Raise `ConfigError`, naming the key, for a file name without a supported table suffix."""
    if path.suffix not in (*SEPARATORS, *PARQUET):
        raise ConfigError(f"{key}: {path} must end in .csv, .tsv or .parquet")


def with_columns(table: arrow.Table, columns: Mapping[str, NDArray[Any]]) -> arrow.Table:
    """Return the table with added columns; NaN becomes null. Raises `TableError` for a name that exists."""
    import pyarrow as arrow

    for name, values in columns.items():
        if name in table.column_names:
            raise TableError(f"the input has a column {name} already, as the scores are to be named; rename it")
        table = table.append_column(name, arrow.array(values, from_pandas=True))
    return table


def write_table(table: arrow.Table, stream: IO[bytes], ending: str, rounded: Collection[str]) -> None:
    """Write a table in the format of the suffix: Parquet, CSV or TSV.

    In CSV and TSV, columns in `rounded` have six decimals, and null is an empty field.
    """
    if ending in PARQUET:
        from pyarrow import parquet

        parquet.write_table(table, stream)
        return
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    rows = csv.writer(text, delimiter=SEPARATORS[ending], lineterminator="\n")
    rows.writerow(table.column_names)
    fields = [
        map(_rounded if name in rounded else _field, column.to_pylist())
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    rows.writerows(zip(*fields, strict=True))
    text.flush()
    text.detach()


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation between scores and measurements, with its 95% bootstrap interval."""

    spearman: float  # NaN if scores or measurements are constant, or there are fewer than three pairs
    low: float
    high: float
    variants: int  # with score and measurement

    def as_json(self) -> dict[str, float | int | None]:
        """Return the values for a JSON summary: six decimals, NaN as null."""
        return {
            key: value if isinstance(value, int) else None if np.isnan(value) else round(value, 6)
            for key, value in asdict(self).items()
        }


def agreement(scores: Floats, measured: Floats, resamples: int = 1000, seed: int = 1) -> Agreement:
    """Return Spearman's correlation with a percentile bootstrap over variants; ties get their average rank.

    Pairs with a NaN are excluded. A seed gives the same interval on every machine (NumPy's PCG64).
    """
    both = ~(np.isnan(scores) | np.isnan(measured))
    count = int(both.sum())
    if count < FEWEST_FOR_CORRELATION:
        return Agreement(np.nan, np.nan, np.nan, count)
    correlations = weighted_spearman(scores[both], [measured[both]])
    resampled = [correlations(counts)[0] for block in resampled_counts(count, resamples, seed) for counts in block]
    low, high = percentile_interval(np.array(resampled))
    return Agreement(spearman(scores[both], measured[both]), low, high, count)


# --- reading ----------------------------------------------------------------------------------------------------------


def _split(path: str, name: str, separator: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Return column names, rows and row numbers. Blank lines count in the numbers and are skipped."""
    with Source(path) as source:
        text = "".join(text_lines(source, TableError))
    if "\0" in text:
        raise TableError(f"{name}: is no text; is it the right file?")
    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    names: list[str] = []
    rows: list[list[str]] = []
    numbers = []
    try:
        for number, row in enumerate(reader, start=1):
            if not row:
                continue
            if not names:
                names = [column.strip() for column in row]
                continue
            if len(row) != len(names):
                raise TableError(f"{name}, row {number} (record {len(rows) + 1}): {_ragged(row, names)}")
            rows.append(row)
            numbers.append(number)
    except csv.Error as error:
        raise TableError(f"{name}, line {reader.line_num}: {error}; is it a {separator!r}-separated table?") from error
    if not rows:
        raise TableError(
            f"{name}: has a header ({', '.join(names[:20])}), but no row below it; is it the right file?"
            if names
            else f"{name}: is empty; its first line must name the columns, each further one is a record"
        )
    return names, rows, numbers


def _ragged(row: Sequence[str], names: Sequence[str]) -> str:
    """Return the problem of a row whose number of fields differs from the header's."""
    advice = separator_advice(list(names))
    if not advice and any("\n" in field for field in row):  # an open quote takes the next lines into its field
        advice = "; a field runs over several lines: is its quote not closed?"
    return f"has {len(row)} fields, the header {len(names)}{advice or '; correct it'}"


def _read_parquet(name: str) -> VariantTable:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with open(name, "rb") as stream:
            table = parquet.ParquetFile(stream).read()
    except arrow.ArrowException as error:
        raise TableError(f"{name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise TableError(f"{name}: cannot be opened ({error.strerror or error})") from error
    return _checked(name, table, np.arange(2, table.num_rows + 2))


def _checked(name: str, table: arrow.Table, rows: NDArray[np.int64]) -> VariantTable:
    if not table.num_rows:
        raise TableError(f"{name}: has no row; is it the right file?")
    twice = {column for column in table.column_names if table.column_names.count(column) > 1}
    if twice:
        raise TableError(f"{name}: two columns are named {min(twice)!r}; rename one")
    return VariantTable(name, table, rows)


def _field(value: Any) -> str:
    return "" if value is None else str(value)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{round(value, 6) + 0.0:.6f}"  # + 0.0 avoids -0.000000


# --- text summary -----------------------------------------------------------------------------------------------------


def agreements(
    scores: Mapping[str, Floats],
    measured: Floats,
    places: NDArray[np.int64],
    count: Callable[[Floats, Floats], Agreement],
) -> dict[str, dict[str, Agreement]]:
    """Return the agreement of each method over all variants, and over single and multiple mutants if both exist.

    A group with fewer than three measurements, or with constant ones, is omitted. `places`: number of residues that
    each variant replaces, int64 [V].
    """
    groups = {"all": places >= 0}
    if (places == 1).any() and (places > 1).any():
        groups |= {"single": places == 1, "multiple": places > 1}
    usable = [group for group, rows in groups.items() if group == "all" or _varies(measured[rows])]
    return {
        method: {group: count(values[groups[group]], measured[groups[group]]) for group in usable}
        for method, values in scores.items()
    }


def lines_of(found: Mapping[str, Mapping[str, Agreement]]) -> Iterable[str]:
    """Yield the agreements as a table of text."""
    yield f"  {'':<22} {'':<9} Spearman  95% interval       variants"
    for method, groups in found.items():
        for group, agreement in groups.items():
            interval = "" if np.isnan(agreement.low) else f"{agreement.low:.3f} to {agreement.high:.3f}"
            shown = "-" if np.isnan(agreement.spearman) else f"{agreement.spearman:.3f}"
            yield f"  {method:<22} {group:<9} {shown:>8}  {interval:<16} {agreement.variants:>9,}"


def verdict_of(found: Mapping[str, Mapping[str, Agreement]], baselines: Collection[str]) -> str:
    """Return a sentence if no method beats the best baseline over all variants; otherwise ""."""
    over_all = {name: groups["all"].spearman for name, groups in found.items()}
    known = {name: value for name, value in over_all.items() if not np.isnan(value)}
    best = max((name for name in known if name in baselines), key=lambda name: known[name], default=None)
    if best is None or any(value > known[best] for name, value in known.items() if name not in baselines):
        return ""
    return f"No method does better than {best.strip('()')} here, which needs no model"


def _varies(measured: Floats) -> bool:
    known = measured[~np.isnan(measured)]
    return len(known) >= FEWEST_FOR_CORRELATION and len(np.unique(known)) > 1
