"""File formats of embeddings: HDF5, Parquet, NPZ, and those that other packages add.

A format is one class: it writes and reads its files. The suffix of `output` selects it. Equal embeddings give equal
bytes: files contain no date. Nothing is compressed, as the digits of hidden states do not shrink. Shape suffixes: N
proteins, R residues of one, H hidden size.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.registry import Registry

ABOUT = "about"
"""Name of the JSON text about model, layers and windows: an HDF5 attribute, a member of an NPZ file."""
PARQUET_ABOUT = b"bionemo_esm"
"""Its key in the metadata of a Parquet file."""
COUNTS = ("residues", "read", "windows")
"""Integers of each protein, named as in `Embedding`."""
PSEUDO_PERPLEXITY = "pseudo_perplexity"
MANIFEST = "manifest.json"
"""Of a folder of parts: which files, in which order, and what they hold."""
PART_FORMAT = "npz"
"""The format of the parts of which a single file is joined."""
_DATE = (1980, 1, 1, 0, 0, 0)  # of zip members: the earliest possible
_HDF5_VERSIONS = ("v108", "v110")  # readable by HDF5 1.10 of 2016 and later
_ROWS_AT_ONCE = 64  # of Parquet
_SIGNATURE_BYTES = 16
_FILE_SUFFIX = re.compile(r"\.(?:[a-z]{2,8}|h5ad)")  # of a file that somebody expects; `.v2` can end a folder's name


class EmbeddingFileError(UserError):
    """A file or folder that holds no embeddings, or is damaged; the message names it."""

    code = "embeddings.file"


class EmbeddingFormat(ABC):
    """A file format of embeddings. An installed package adds one in the entry-point group
    `bionemo_esm.embedding_writers`, under the suffix of its files: `".tsv" = "my_package:TsvFormat"`.
    """

    name: ClassVar[str]  # the value of the key `format`
    suffix: ClassVar[str]  # of the files of a folder of parts
    signature: ClassVar[bytes] = b""  # the first bytes of a file, up to 16; empty: the suffix alone tells

    @abstractmethod
    def write(self, stream: IO[bytes], about: Mapping[str, Any], batches: Iterable[Sequence[Embedding]]) -> None:
        """Write a file. `batches`: embeddings in order, to be held one batch at a time; `about`: a JSON object to
        store.

        `stream` is a new file on disk. Every `OSError` of a write must be raised.
        """

    @abstractmethod
    def read(self, path: Path) -> Iterator[Embedding]:
        """Yield the embeddings of a file, bit for bit as they were written. Any usual exception reports damage."""

    @abstractmethod
    def read_about(self, path: Path) -> dict[str, Any]:
        """Return the `about` of a file."""

    def join(self, stream: IO[bytes], about: Mapping[str, Any], parts: Sequence[Path]) -> None:
        """Write a file from parts on disk, in NPZ."""
        self.write(stream, about, (list(read_embeddings(part)) for part in parts))


FORMATS: Registry[type[EmbeddingFormat]] = Registry("embedding format", "output", "embedding_writers", EmbeddingFormat)
"""Formats by the suffix of a file."""


def format_named(name: str) -> EmbeddingFormat:
    """Return a format by the value of the key `format`. Raises `ConfigError`, with the known ones."""
    known = {FORMATS.get(suffix).name: FORMATS.get(suffix) for suffix in FORMATS}
    if name not in known:
        raise ConfigError(
            f"format must be one of {', '.join(sorted(known))}, or null, not {name!r}", code="embeddings.format"
        )
    return known[name]()


def format_of(output: Path, wanted: str | None) -> tuple[str, bool]:
    """Return the format of an output, and whether it is a folder of parts. A file has the suffix of its format.

    `wanted`: the value of `format`. Raises `ConfigError` for an unknown format, and for one that contradicts the name.
    """
    name = None if wanted is None else format_named(wanted).name
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        if name is None and _FILE_SUFFIX.fullmatch(suffix):
            raise ConfigError(
                f"output: {output} ends in {suffix}, which is no format of embeddings; files end in "
                f"{', '.join(FORMATS)} (others come with packages that add to {FORMATS.group}); for a folder of parts "
                "choose a name without an ending, or give format=...",
                code="embeddings.unknown-suffix",
            )
        return name or "parquet", True
    found = FORMATS.get(suffix).name
    if name not in (None, found):
        raise ConfigError(f"format={wanted}: {output} ends as {found}; leave format out, or choose another name")
    return found, False


def read_embeddings(path: str | os.PathLike[str]) -> Iterator[Embedding]:
    """Yield the embeddings of an output of `bionemo-esm embed`, file or folder, in the order of its input.

    Memory: a few proteins. Raises `EmbeddingFileError`.
    """
    folder = Path(path)
    files = [folder / part["file"] for part in _manifest(folder)["parts"]] if folder.is_dir() else [folder]
    for file in files:
        kind = _format_of_file(file)
        try:
            yield from kind.read(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise EmbeddingFileError(f"{file}: cannot be read as embeddings ({error}); make it anew") from error


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the model, layers and windows of an output; docs/embeddings.md lists the keys. Raises
    `EmbeddingFileError`.
    """
    file = Path(path)
    if file.is_dir():
        return dict(_manifest(file)[ABOUT])
    kind = _format_of_file(file)
    try:
        return dict(kind.read_about(file))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise EmbeddingFileError(f"{file}: does not say which model it is of ({error}); make it anew") from error


def _embedding(
    identifier: str, counts: Sequence[int], arrays: dict[str, NDArray[np.floating]], perplexity: float | None
) -> Embedding:
    residues, read, windows = counts
    return Embedding(identifier, residues, read, windows, arrays, perplexity)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = [part["file"] for part in manifest["parts"]]
        if any(Path(name).name != name for name in names) or not isinstance(manifest[ABOUT], dict):
            raise ValueError("names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmbeddingFileError(f"{folder}: no folder of embeddings: {MANIFEST} {error}") from error
    return dict(manifest)


def _format_of_file(file: Path) -> EmbeddingFormat:
    """Return the format of a file, by its first bytes, or by its suffix for a format without a signature."""
    try:
        with file.open("rb") as stream:
            start = stream.read(_SIGNATURE_BYTES)
    except OSError as error:
        raise EmbeddingFileError(f"{file}: cannot be opened ({error.strerror})") from error
    suffix = file.suffix.lower()
    known = [FORMATS.get(each) for each in FORMATS]
    for kind in known:
        if kind.signature and start.startswith(kind.signature):
            return kind()
    if suffix in FORMATS and not FORMATS.get(suffix).signature:
        return FORMATS.get(suffix)()
    others = "".join(f", nor {kind.name}" for kind in known if kind not in (Hdf5Format, ParquetFormat, NpzFormat))
    raise EmbeddingFileError(f"{file}: is neither HDF5, Parquet nor NPZ{others}")


# --- HDF5 -------------------------------------------------------------------------------------------------------------


@FORMATS.register(".hdf5")
@FORMATS.register(".h5")
class Hdf5Format(EmbeddingFormat):
    """A group for each protein, in input order: numbers as attributes, arrays as datasets."""

    name, suffix, signature = "hdf5", ".h5", b"\x89HDF"

    def write(self, stream: IO[bytes], about: Mapping[str, Any], batches: Iterable[Sequence[Embedding]]) -> None:
        import h5py

        disk = _Disk(stream)
        with h5py.File(disk, "w", libver=_HDF5_VERSIONS, track_order=True) as file:
            file.attrs[ABOUT] = json.dumps(about)
            for batch in batches:
                for embedding in batch:
                    group = file.create_group(group_name(embedding.id))
                    group.attrs["id"] = embedding.id
                    for name in COUNTS:
                        group.attrs[name] = getattr(embedding, name)
                    if embedding.pseudo_perplexity is not None:
                        group.attrs[PSEUDO_PERPLEXITY] = embedding.pseudo_perplexity
                    for name, array in embedding.arrays.items():
                        group.create_dataset(name, data=array)
                disk.check()
        disk.check()  # HDF5 writes most of its own structures when the file is closed

    def read(self, path: Path) -> Iterator[Embedding]:
        import h5py

        with h5py.File(path, "r") as file:
            for group in map(file.__getitem__, file):
                arrays = {key: dataset[()] for key, dataset in group.items()}
                perplexity = group.attrs.get(PSEUDO_PERPLEXITY)
                counts = [int(group.attrs[count]) for count in COUNTS]
                yield _embedding(group.attrs["id"], counts, arrays, None if perplexity is None else float(perplexity))

    def read_about(self, path: Path) -> dict[str, Any]:
        import h5py

        with h5py.File(path, "r") as file:
            return dict(json.loads(file.attrs[ABOUT]))


def group_name(identifier: str) -> str:
    """Return an id as the name of an HDF5 group: `/`, and names of dots alone, are percent-encoded."""
    encoded = identifier.replace("%", "%25").replace("/", "%2F")
    return encoded.replace(".", "%2E") if set(encoded) == {"."} else encoded


class _Disk:
    """A file for h5py, whose library can neither report a full disk nor close a file on one.

    After the first error all writes are dropped without one; `check` raises that error.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._descriptor = stream.fileno()
        self._position = 0
        self._error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        content = os.pread(self._descriptor, size, self._position)
        self._position += len(content)
        return content

    def write(self, content: bytes | memoryview) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        while len(rest) and self._error is None:
            try:
                written = os.pwrite(self._descriptor, rest, self._position)
            except OSError as error:
                self._error = error
                break
            self._position += written
            rest = rest[written:]
        self._position += len(rest)
        return size

    def truncate(self, size: int) -> int:
        if self._error is None:
            try:
                os.ftruncate(self._descriptor, size)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Do nothing: no write is buffered here."""


# --- Parquet ----------------------------------------------------------------------------------------------------------


@FORMATS.register(".parquet")
class ParquetFormat(EmbeddingFormat):
    """A row for each protein: arrays [H] as lists of fixed size, arrays [R, H] as lists of those."""

    name, suffix, signature = "parquet", ".parquet", b"PAR1"

    def write(self, stream: IO[bytes], about: Mapping[str, Any], batches: Iterable[Sequence[Embedding]]) -> None:
        from pyarrow import parquet

        plain: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
        with ExitStack() as stack:
            writer: Any = None
            for batch in filter(None, batches):
                table = _arrow_table(batch, about)
                writer = writer or stack.enter_context(parquet.ParquetWriter(stream, table.schema, **plain))
                writer.write_table(table)

    def read(self, path: Path) -> Iterator[Embedding]:
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in ("id", *COUNTS, PSEUDO_PERPLEXITY)]
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                plain = {name: batch.column(name).to_pylist() for name in batch.schema.names if name not in names}
                perplexities = plain.get(PSEUDO_PERPLEXITY, [None] * len(batch))
                arrays = {name: _rows_of_lists(batch.column(name)) for name in names}
                for row, identifier in enumerate(plain["id"]):
                    counts = [plain[name][row] for name in COUNTS]
                    own = {name: column[row] for name, column in arrays.items()}
                    yield _embedding(identifier, counts, own, perplexities[row])

    def read_about(self, path: Path) -> dict[str, Any]:
        from pyarrow import parquet

        return dict(json.loads((parquet.read_schema(path).metadata or {})[PARQUET_ABOUT]))


def _arrow_table(embeddings: Sequence[Embedding], about: Mapping[str, Any]) -> Any:
    import pyarrow as arrow

    columns: dict[str, Any] = {"id": arrow.array([embedding.id for embedding in embeddings], arrow.string())}
    for name in COUNTS:
        columns[name] = arrow.array([getattr(embedding, name) for embedding in embeddings], arrow.int64())
    if embeddings[0].pseudo_perplexity is not None:
        columns[PSEUDO_PERPLEXITY] = arrow.array([embedding.pseudo_perplexity for embedding in embeddings])
    for name in embeddings[0].arrays:
        columns[name] = _lists_of_rows([embedding.arrays[name] for embedding in embeddings])
    return arrow.table(columns).replace_schema_metadata({PARQUET_ABOUT: json.dumps(about).encode()})


def _lists_of_rows(arrays: Sequence[NDArray[np.floating]]) -> Any:
    import pyarrow as arrow

    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    values = arrow.array(np.concatenate(rows).reshape(-1))
    lists = arrow.FixedSizeListArray.from_arrays(values, rows[0].shape[1])
    if arrays[0].ndim == 1:
        return lists
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    return arrow.ListArray.from_arrays(arrow.array(offsets), lists)


def _rows_of_lists(column: Any) -> list[NDArray[np.floating]]:
    """Return arrays [H] or [R, H], one for each row, of lists made by `_lists_of_rows`."""
    import pyarrow as arrow

    if arrow.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return list(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width))
    offsets = column.offsets.to_numpy()
    width = column.type.value_type.list_size
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return np.split(flat, offsets[1:-1] - offsets[0])


# --- NPZ --------------------------------------------------------------------------------------------------------------


@FORMATS.register(".npz")
class NpzFormat(EmbeddingFormat):
    """A member for each array, as `numpy.savez` writes them: [N, H], or all residues of all proteins one after another.

    Rows `offset[i]` to `offset[i + 1]` of the latter belong to protein i. No Python objects, no pickle.
    """

    name, suffix, signature = "npz", ".npz", b"PK\x03\x04"

    def write(self, stream: IO[bytes], about: Mapping[str, Any], batches: Iterable[Sequence[Embedding]]) -> None:
        """Write all batches, which are in memory together: `join` streams from parts instead."""
        _write_members(stream, about, _columns_of([embedding for batch in batches for embedding in batch]))

    def join(self, stream: IO[bytes], about: Mapping[str, Any], parts: Sequence[Path]) -> None:
        _write_members(stream, about, _joined_columns(parts))

    def read(self, path: Path) -> Iterator[Embedding]:
        with zipfile.ZipFile(path) as archive, ExitStack() as stack:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
            members = {
                name: _Member(stack.enter_context(archive.open(f"{name}.npy"))) for name in names if name != ABOUT
            }
            offsets, perplexity = members.pop("offset"), members.pop(PSEUDO_PERPLEXITY, None)
            identifiers, counts = members.pop("id"), [members.pop(name) for name in COUNTS]
            begin = int(offsets.next_rows(1)[0])
            for _ in range(identifiers.rows):
                end = int(offsets.next_rows(1)[0])
                arrays = {
                    name: member.next_rows(end - begin) if _is_of_residues(name) else member.next_rows(1)[0]
                    for name, member in members.items()
                }
                begin = end
                value = None if perplexity is None else float(perplexity.next_rows(1)[0])
                numbers = [int(count.next_rows(1)[0]) for count in counts]
                yield _embedding(str(identifiers.next_rows(1)[0]), numbers, arrays, value)

    def read_about(self, path: Path) -> dict[str, Any]:
        with np.load(path) as archive:
            return dict(json.loads(str(archive[ABOUT])))


class _Column(NamedTuple):
    """A member of an NPZ file, written piece by piece along the first axis."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]


def _write_members(stream: IO[bytes], about: Mapping[str, Any], columns: Mapping[str, _Column]) -> None:
    text = np.array(json.dumps(about))
    members = {ABOUT: _Column(text.dtype, (), lambda: iter([text])), **columns}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, column in members.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as member:
                description = np.lib.format.dtype_to_descr(column.dtype)
                header = {"descr": description, "fortran_order": False, "shape": column.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for piece in column.pieces():
                    member.write(np.ascontiguousarray(piece, dtype=column.dtype).data.cast("B") if piece.size else b"")


def _columns_of(embeddings: Sequence[Embedding]) -> dict[str, _Column]:
    wholes: dict[str, NDArray[Any]] = {"id": np.array([embedding.id for embedding in embeddings], dtype=np.str_)}
    for name in COUNTS:
        wholes[name] = np.array([getattr(embedding, name) for embedding in embeddings], dtype=np.int64)
    wholes["offset"] = np.concatenate([[0], np.cumsum(wholes["read"])]).astype(np.int64)
    if embeddings[0].pseudo_perplexity is not None:
        wholes[PSEUDO_PERPLEXITY] = np.array([embedding.pseudo_perplexity for embedding in embeddings])
    columns = {name: _column_of([array]) for name, array in wholes.items()}
    for name, array in embeddings[0].arrays.items():
        pieces = [embedding.arrays[name] for embedding in embeddings]
        columns[name] = _column_of([piece[None] for piece in pieces] if array.ndim == 1 else pieces)
    return columns


def _column_of(pieces: list[NDArray[Any]]) -> _Column:
    rows = sum(len(piece) for piece in pieces)
    return _Column(pieces[0].dtype, (rows, *pieces[0].shape[1:]), lambda: iter(pieces))


def _joined_columns(parts: Sequence[Path]) -> dict[str, _Column]:
    """Return the columns of NPZ files, joined. Memory: a member of one file."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for part in parts:
        with zipfile.ZipFile(part) as archive:
            for name in (info.filename.removesuffix(".npy") for info in archive.infolist()):
                if name != ABOUT:
                    with archive.open(f"{name}.npy") as stream:
                        member = _Member(stream)
                    shapes.setdefault(name, []).append(member.shape)
                    dtypes[name] = max(dtypes.get(name, member.dtype), member.dtype, key=lambda kind: kind.itemsize)
    columns = {}
    for name, of_parts in shapes.items():
        rows = sum(shape[0] for shape in of_parts) - (len(parts) - 1) * (name == "offset")
        pieces = _joined_offsets if name == "offset" else _joined
        columns[name] = _Column(dtypes[name], (rows, *of_parts[0][1:]), partial(pieces, parts, name))
    return columns


def _joined(parts: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    for part in parts:
        with np.load(part) as archive:
            yield archive[name]


def _joined_offsets(parts: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    yield np.zeros(1, dtype=np.int64)
    base = 0
    for offsets in _joined(parts, name):
        yield offsets[1:] + base
        base += int(offsets[-1])


class _Member:
    """A member of an NPZ file, read some rows at a time."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        np.lib.format.read_magic(stream)  # type: ignore[arg-type]
        self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[arg-type]
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        self.rows, self._row = (self.shape[0] if self.shape else 1), self.shape[1:]

    def next_rows(self, rows: int) -> NDArray[Any]:
        wanted = rows * int(np.prod(self._row, dtype=np.int64)) * self.dtype.itemsize
        content = self._stream.read(wanted)
        if len(content) < wanted:
            raise EOFError("it is cut short")
        return np.frombuffer(content, self.dtype).reshape(rows, *self._row)


def _is_of_residues(name: str) -> bool:
    return name == "logits" or name.startswith("residues_")
