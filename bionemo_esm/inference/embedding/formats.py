"""Embeddings into files: HDF5, Parquet or NPZ, each streamed, so that memory holds the proteins that are added at once.

The same embeddings give the same bytes: there is no date in a file, and nothing is compressed, as random digits do not
shrink. `reader.read_embeddings` reads all three. Shape suffixes: N proteins, R residues of one, H hidden
size.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.embedding.options import Embedding

HDF5, PARQUET, NPZ = "hdf5", "parquet", "npz"
ENDINGS = {HDF5: ".h5", PARQUET: ".parquet", NPZ: ".npz"}
"""Formats, and how the names of their files end."""
_KINDS = {".h5": HDF5, ".hdf5": HDF5, ".parquet": PARQUET, ".npz": NPZ}
ABOUT = "about"
"""Name of the JSON text that says which model, layers and windows: an attribute of HDF5, a member of NPZ."""
PARQUET_ABOUT = b"bionemo_esm"
"""The key of that text among the metadata of a Parquet file."""
COUNTS = ("residues", "read", "windows")
"""Whole numbers of each protein, by which `Embedding` calls them."""
PSEUDO_PERPLEXITY = "pseudo_perplexity"
_DATE = (1980, 1, 1, 0, 0, 0)  # of members of a zip: the first that it knows
_HDF5_VERSIONS = ("v108", "v110")  # what HDF5 1.10 of 2016 and later read


def format_of(output: Path, wanted: str | None) -> tuple[str, bool]:
    """The format of an output, and whether it is a folder of parts: by its name, which for a file must end as one.

    Raises `ConfigError` for a format that there is not, or that contradicts the name.
    """
    if wanted is not None and wanted not in ENDINGS:
        raise ConfigError(f"format must be one of {', '.join(ENDINGS)}, or null, not {wanted!r}")
    kind = _KINDS.get(output.suffix.lower())
    if kind is None:
        return wanted or PARQUET, True
    if wanted not in (None, kind):
        raise ConfigError(f"format={wanted}: {output} ends as {kind}; leave format out, or choose another name")
    return kind, False


class Writer(Protocol):
    """Takes embeddings in order; the file is whole after `close`."""

    def add(self, embeddings: Sequence[Embedding]) -> None: ...

    def close(self) -> None: ...


def write_file(kind: str, stream: IO[bytes], about: Mapping[str, Any], lots: Iterable[Sequence[Embedding]]) -> None:
    """Write lots of embeddings into one HDF5 or Parquet file, one lot at a time. `stream`: new, of a real file."""
    makers: dict[str, Callable[[IO[bytes], Mapping[str, Any]], Writer]] = {HDF5: Hdf5Writer, PARQUET: ParquetWriter}
    with closing(makers[kind](stream, about)) as writer:
        for lot in lots:
            writer.add(lot)


def write_part(kind: str, stream: IO[bytes], about: Mapping[str, Any], embeddings: Sequence[Embedding]) -> None:
    """Write embeddings that are in memory into a file of any format."""
    if kind == NPZ:
        write_npz(stream, about, columns_of(embeddings))
    else:
        write_file(kind, stream, about, [embeddings])


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def group_name(identifier: str) -> str:
    """An id as the name of a group: `/` and a lone `.`, which mean something else to HDF5, percent-encoded."""
    encoded = identifier.replace("%", "%25").replace("/", "%2F")
    return encoded.replace(".", "%2E") if set(encoded) == {"."} else encoded


class Hdf5Writer:
    """A group a protein, in the order of the input, with its numbers as attributes and its arrays as datasets."""

    def __init__(self, stream: IO[bytes], about: Mapping[str, Any]) -> None:
        import h5py

        self._disk = _Disk(stream)
        self._file = h5py.File(self._disk, "w", libver=_HDF5_VERSIONS, track_order=True)
        self._file.attrs[ABOUT] = json.dumps(about)

    def add(self, embeddings: Sequence[Embedding]) -> None:
        for embedding in embeddings:
            group = self._file.create_group(group_name(embedding.id))
            group.attrs["id"] = embedding.id
            for name in COUNTS:
                group.attrs[name] = getattr(embedding, name)
            if embedding.pseudo_perplexity is not None:
                group.attrs[PSEUDO_PERPLEXITY] = embedding.pseudo_perplexity
            for name, array in embedding.arrays.items():
                group.create_dataset(name, data=array)
        self._disk.check()

    def close(self) -> None:
        self._file.close()
        self._disk.check()


class _Disk:
    """A file for h5py, whose library can neither report a full disk nor close a file on one.

    Of the first error it is told nothing, and what it writes afterwards is dropped; `check` raises that error.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._descriptor = stream.fileno()
        self._place = 0
        self._error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        content = os.pread(self._descriptor, size, self._place)
        self._place += len(content)
        return content

    def write(self, content: bytes | memoryview) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        while len(rest) and self._error is None:
            try:
                written = os.pwrite(self._descriptor, rest, self._place)
            except OSError as error:
                self._error = error
                break
            self._place += written
            rest = rest[written:]
        self._place += len(rest)
        return size

    def truncate(self, size: int) -> int:
        if self._error is None:
            try:
                os.ftruncate(self._descriptor, size)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Nothing is held back here; whoever opened the file syncs it."""


# --- Parquet ----------------------------------------------------------------------------------------------------------


class ParquetWriter:
    """A row a protein: arrays [H] as lists of fixed size, arrays [R, H] as lists of those."""

    def __init__(self, stream: IO[bytes], about: Mapping[str, Any]) -> None:
        self._stream, self._about = stream, about
        self._writer: Any = None

    def add(self, embeddings: Sequence[Embedding]) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        if not embeddings:
            return
        columns: dict[str, Any] = {"id": arrow.array([embedding.id for embedding in embeddings], arrow.string())}
        for name in COUNTS:
            columns[name] = arrow.array([getattr(embedding, name) for embedding in embeddings], arrow.int64())
        if embeddings[0].pseudo_perplexity is not None:
            columns[PSEUDO_PERPLEXITY] = arrow.array([embedding.pseudo_perplexity for embedding in embeddings])
        for name in embeddings[0].arrays:
            columns[name] = _arrow_lists([embedding.arrays[name] for embedding in embeddings])
        table = arrow.table(columns).replace_schema_metadata({PARQUET_ABOUT: json.dumps(self._about).encode()})
        if self._writer is None:
            plain: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
            self._writer = parquet.ParquetWriter(self._stream, table.schema, **plain)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _arrow_lists(arrays: Sequence[NDArray[np.floating]]) -> Any:
    import pyarrow as arrow

    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    values = arrow.array(np.concatenate(rows).reshape(-1))
    lists = arrow.FixedSizeListArray.from_arrays(values, rows[0].shape[1])
    if arrays[0].ndim == 1:
        return lists
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    return arrow.ListArray.from_arrays(arrow.array(offsets), lists)


# --- NPZ --------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A member of an NPZ file that is written piece by piece, the pieces one after another along the first axis."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]


def write_npz(stream: IO[bytes], about: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
    """An NPZ file as NumPy's own, uncompressed, without pickled objects."""
    text = np.array(json.dumps(about))
    members = {ABOUT: Column(text.dtype, (), lambda: iter([text])), **columns}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, column in members.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as member:
                description = np.lib.format.dtype_to_descr(column.dtype)
                header = {"descr": description, "fortran_order": False, "shape": column.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for piece in column.pieces():
                    member.write(np.ascontiguousarray(piece, dtype=column.dtype).data.cast("B") if piece.size else b"")


def columns_of(embeddings: Sequence[Embedding]) -> dict[str, Column]:
    """Embeddings as columns; of each residue, those of protein i are the rows `offset[i]` to `offset[i + 1]`."""
    wholes: dict[str, NDArray[Any]] = {"id": np.array([embedding.id for embedding in embeddings], dtype=np.str_)}
    for name in COUNTS:
        wholes[name] = np.array([getattr(embedding, name) for embedding in embeddings], dtype=np.int64)
    wholes["offset"] = np.concatenate([[0], np.cumsum(wholes["read"])]).astype(np.int64)
    if embeddings[0].pseudo_perplexity is not None:
        wholes[PSEUDO_PERPLEXITY] = np.array([embedding.pseudo_perplexity for embedding in embeddings])
    columns = {name: _of_pieces([array]) for name, array in wholes.items()}
    for name, array in embeddings[0].arrays.items():
        pieces = [embedding.arrays[name] for embedding in embeddings]
        columns[name] = _of_pieces([piece[None] for piece in pieces] if array.ndim == 1 else pieces)
    return columns


def _of_pieces(pieces: list[NDArray[Any]]) -> Column:
    rows = sum(len(piece) for piece in pieces)
    return Column(pieces[0].dtype, (rows, *pieces[0].shape[1:]), lambda: iter(pieces))


def joined_columns(parts: Sequence[Path]) -> dict[str, Column]:
    """The columns of NPZ files, one file after another; of one at a time a member is in memory."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for part in parts:
        with zipfile.ZipFile(part) as archive:
            for name in (info.filename.removesuffix(".npy") for info in archive.infolist()):
                if name != ABOUT:
                    with archive.open(f"{name}.npy") as member:
                        np.lib.format.read_magic(member)  # type: ignore[arg-type]
                        shape, _, dtype = np.lib.format.read_array_header_1_0(member)  # type: ignore[arg-type]
                    shapes.setdefault(name, []).append(shape)
                    dtypes[name] = max(dtypes.get(name, dtype), dtype, key=lambda kind: kind.itemsize)  # of ids
    columns = {}
    for name, of_parts in shapes.items():
        rows = sum(shape[0] for shape in of_parts) - (len(parts) - 1) * (name == "offset")
        pieces = _joined_offsets if name == "offset" else _joined
        columns[name] = Column(dtypes[name], (rows, *of_parts[0][1:]), _bound(pieces, parts, name))
    return columns


def _bound(
    pieces: Callable[[Sequence[Path], str], Iterator[NDArray[Any]]], parts: Sequence[Path], name: str
) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: pieces(parts, name)


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


# --- reading ---


MANIFEST = "manifest.json"
"""Of a folder of parts: which files, in which order, and what they hold."""
_ROWS_AT_ONCE = 64  # of Parquet
_MAGIC = {b"\x89HDF": HDF5, b"PAR1": PARQUET, b"PK\x03\x04": NPZ}


class EmbeddingFileError(UserError):
    """A file or folder that holds no embeddings of ours, or is damaged; the message names it."""


def read_embeddings(path: str | os.PathLike[str]) -> Iterator[Embedding]:
    """What `bionemo-esm embed` wrote, file or folder, in the order of its input; memory holds a few proteins.

    Raises `EmbeddingFileError`.
    """
    for file in _files(Path(path)):
        kind = _kind(file)
        try:
            yield from _READERS[kind](file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise EmbeddingFileError(f"{file}: cannot be read as embeddings ({error}); make it anew") from error


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Of which model, layers and windows the embeddings are: docs/embeddings.md has the keys.

    Raises `EmbeddingFileError`.
    """
    file = Path(path)
    if file.is_dir():
        return dict(_manifest(file)[ABOUT])
    kind = _kind(file)
    try:
        return dict(json.loads(_ABOUT_READERS[kind](file)))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise EmbeddingFileError(f"{file}: does not say which model it is of ({error}); make it anew") from error


def _files(path: Path) -> list[Path]:
    return [path / part["file"] for part in _manifest(path)["parts"]] if path.is_dir() else [path]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = [part["file"] for part in manifest["parts"]]
        if any(Path(name).name != name for name in names) or not isinstance(manifest[ABOUT], dict):
            raise ValueError("names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmbeddingFileError(f"{folder}: no folder of embeddings: {MANIFEST} {error}") from error
    return dict(manifest)


def _kind(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise EmbeddingFileError(f"{file}: cannot be opened ({error.strerror})") from error
    if start not in _MAGIC:
        raise EmbeddingFileError(f"{file}: is neither HDF5, Parquet nor NPZ")
    return _MAGIC[start]


def _embedding(
    identifier: str, counts: list[int], arrays: dict[str, NDArray[np.floating]], perplexity: float | None
) -> Embedding:
    return Embedding(identifier, counts[0], counts[1], counts[2], arrays, perplexity)


def _read_hdf5(path: Path) -> Iterator[Embedding]:
    import h5py

    with h5py.File(path, "r") as file:
        for name in file:
            group = file[name]
            arrays = {key: dataset[()] for key, dataset in group.items()}
            perplexity = group.attrs.get(PSEUDO_PERPLEXITY)
            counts = [int(group.attrs[count]) for count in COUNTS]
            yield _embedding(group.attrs["id"], counts, arrays, None if perplexity is None else float(perplexity))


def _read_parquet(path: Path) -> Iterator[Embedding]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name not in ("id", *COUNTS, PSEUDO_PERPLEXITY)]
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            identifiers = batch.column("id").to_pylist()
            counts = [batch.column(name).to_pylist() for name in COUNTS]
            perplexities = (
                batch.column(PSEUDO_PERPLEXITY).to_pylist()
                if PSEUDO_PERPLEXITY in batch.schema.names
                else [None] * len(batch)
            )
            arrays = {name: _rows_of(batch.column(name)) for name in names}
            for row, identifier in enumerate(identifiers):
                own = {name: column[row] for name, column in arrays.items()}
                yield _embedding(identifier, [count[row] for count in counts], own, perplexities[row])


def _rows_of(column: Any) -> list[NDArray[np.floating]]:
    """Arrays [H] or [R, H], one a row, of lists as `writers.ParquetWriter` makes them."""
    import pyarrow as arrow

    if arrow.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return list(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width))
    offsets = column.offsets.to_numpy()
    width = column.type.value_type.list_size
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return np.split(flat, offsets[1:-1] - offsets[0])


class _Member:
    """A member of an NPZ file, read a few rows at a time."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        np.lib.format.read_magic(stream)  # type: ignore[arg-type]
        shape, _, self.dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[arg-type]
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        self.rows, self._row = (shape[0] if shape else 1), shape[1:]

    def to_native(self, rows: int) -> NDArray[Any]:
        wanted = rows * int(np.prod(self._row, dtype=np.int64)) * self.dtype.itemsize
        content = self._stream.read(wanted)
        if len(content) < wanted:
            raise EOFError("it is cut short")
        return np.frombuffer(content, self.dtype).reshape(rows, *self._row)


def _read_npz(path: Path) -> Iterator[Embedding]:
    with zipfile.ZipFile(path) as archive, ExitStack() as stack:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        members = {name: _Member(stack.enter_context(archive.open(f"{name}.npy"))) for name in names if name != ABOUT}
        offsets, perplexity = members.pop("offset"), members.pop(PSEUDO_PERPLEXITY, None)
        identifiers, counts = members.pop("id"), [members.pop(name) for name in COUNTS]
        begin = int(offsets.to_native(1)[0])
        for _ in range(identifiers.rows):
            end = int(offsets.to_native(1)[0])
            arrays = {
                name: member.to_native(end - begin) if _is_of_residues(name) else member.to_native(1)[0]
                for name, member in members.items()
            }
            begin = end
            value = None if perplexity is None else float(perplexity.to_native(1)[0])
            numbers = [int(count.to_native(1)[0]) for count in counts]
            yield _embedding(str(identifiers.to_native(1)[0]), numbers, arrays, value)


def _is_of_residues(name: str) -> bool:
    return name == "logits" or name.startswith("residues_")


def _about_of_hdf5(path: Path) -> str:
    import h5py

    with h5py.File(path, "r") as file:
        return str(file.attrs[ABOUT])


def _about_of_parquet(path: Path) -> str:
    from pyarrow import parquet

    return str((parquet.read_schema(path).metadata or {})[PARQUET_ABOUT].decode())


def _about_of_npz(path: Path) -> str:
    with np.load(path) as archive:
        return str(archive[ABOUT])


_READERS = {HDF5: _read_hdf5, PARQUET: _read_parquet, NPZ: _read_npz}
_ABOUT_READERS = {HDF5: _about_of_hdf5, PARQUET: _about_of_parquet, NPZ: _about_of_npz}
