"""Embeddings out of the files that `bionemo-esm embed` writes, one protein after another, whatever the format."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import UserError
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.inference.embedding.writers import ABOUT, COUNTS, HDF5, NPZ, PARQUET, PARQUET_ABOUT, PSEUDO_PERPLEXITY

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
