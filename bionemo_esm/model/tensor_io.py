"""Tensors in the safetensors format as a member of a tar: written one after another, read one at a time.

Hugging Face's library writes from memory and reads whole files only. Here a member lies within a larger file, is hashed
on the way, and a model of which 47 copies are averaged must not be held twice. The format:
8 bytes little-endian, the size of a JSON header; the header, {name: {dtype, shape, data_offsets}}; the data, in the
header's order without gaps. https://github.com/huggingface/safetensors#format. Tests compare reader and writer with the
library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bionemo_esm.model.tar_format import ArchiveError, Member, Section, quoted, read_into, readable

if TYPE_CHECKING:  # `inspect` does not wait for torch
    import torch
    from torch import Tensor

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, by the format's name of its type."""
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_FORMAT_NAMES = {f"torch.{torch_name}": name for name, torch_name in _TORCH_NAMES.items()}
_LARGEST_HEADER = 2**24  # bytes; ESM-1b's has 2**16
_MOST_DIMENSIONS, _LARGEST_COUNT = 8, 2**45
_METADATA = "__metadata__"  # not a tensor: texts that a writer may add


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by the header; `start` counts bytes from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorTable:
    """The tensors of one member: names, types and shapes in memory, contents read on demand."""

    path: Path
    member: str
    infos: Mapping[str, TensorInfo]  # in the order of the file
    data: Section

    @classmethod
    def open(cls, path: Path, member: str, section: Section) -> TensorTable:
        """Read and check the header. Raises `ArchiveError` for one that does not describe the data exactly."""
        try:
            with readable(path), path.open("rb") as stream:
                stream.seek(section.start)
                header, size = _read_header(stream, section.size)
            data = Section(section.start + size, section.size - size)
            infos = _checked_infos(header, data.size)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"{path}: {member} is not a proper safetensors file: {error}") from error
        return cls(path, member, infos, data)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        import torch

        dtype = getattr(torch, _TORCH_NAMES[self.infos[name].dtype])
        assert isinstance(dtype, torch.dtype)
        return dtype

    def empty(self, name: str) -> Tensor:
        """Return uninitialised memory for a tensor."""
        import torch

        return torch.empty(self.infos[name].shape, dtype=self.dtype(name), device="cpu")

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(info.elements for info in self.infos.values())

    def load(self, name: str) -> Tensor:
        """Return a copy of one tensor, on the CPU, in its own dtype."""
        tensor = self.empty(name)
        if not read_into(self.path, self.data.start + self.infos[name].start, bytes_of(tensor)):
            raise ArchiveError(f"{self.path}: {self.member} ends within tensor {quoted(name)}; it is cut short")
        return tensor


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors that are made when they are looked up, so that a model may be larger than the memory."""

    def __init__(self, outline: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        """`outline` has their shapes and dtypes, on the meta device; `make` returns one by its name."""
        self.outline, self._make = outline, make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def tensor_member(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> Member:
    """Return a member of the tensors in the order of their names; equal tensors give equal bytes.

    `notes`: texts for the header. Raises `TypeError`, naming the tensor, for a dtype or name that cannot be stored.
    """
    outline = tensors.outline if isinstance(tensors, LazyTensors) else tensors
    entries: dict[str, Any] = {_METADATA: dict(notes)} if notes else {}
    end = 0
    for name in sorted(outline):
        dtype = dtype_name(name, outline[name].dtype)
        start, end = end, end + outline[name].numel() * outline[name].element_size()
        entries[name] = {"dtype": dtype, "shape": list(outline[name].shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data is aligned

    def write(stream: IO[bytes]) -> None:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in sorted(outline):
            stream.write(bytes_of(tensors[name].detach().cpu().contiguous()))

    return Member(8 + len(header) + end, write)


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """Return the format's name of a dtype. Raises `TypeError`, naming the tensor, for what the format cannot store."""
    if name == _METADATA or (found := _FORMAT_NAMES.get(str(dtype))) is None:
        raise TypeError(f"tensor {quoted(name)} of {dtype} cannot be stored in the safetensors format")
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(stream: IO[bytes], available: int) -> tuple[Any, int]:
    """Return the parsed header and its size in bytes, length field included."""
    length = int.from_bytes(stream.read(8), "little")
    if length > min(_LARGEST_HEADER, available - 8):
        raise ValueError(f"its header claims {length:,} bytes")
    text = stream.read(length).decode("utf-8")
    return json.loads(text, object_pairs_hook=without_duplicates, parse_int=_count), 8 + length


def _count(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"its header has a negative number, {quoted(digits)}")
    return int(digits)


def _checked_infos(header: Any, data_size: int) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    notes = header.pop(_METADATA, None)
    if notes is not None and not (isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values())):
        raise ValueError(f"its {_METADATA} is not a mapping of texts")
    infos = {name: _checked_info(name, entry) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].size)))
    end = 0
    for name, info in infos.items():
        if info.start != end:
            raise ValueError(f"tensor {quoted(name)} overlaps another, or leaves a gap")
        end += info.size
    if end != data_size:
        raise ValueError(f"its tensors have {end:,} bytes, the data {data_size:,}")
    return infos


def _checked_info(name: str, entry: Any) -> TensorInfo:
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"the name {quoted(name)} is no proper text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {quoted(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {quoted(name)} has dtype {quoted(dtype)}; known are {', '.join(ITEM_BYTES)}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= _LARGEST_COUNT:
        raise ValueError(
            f"tensor {quoted(name)} has shape {quoted(shape)}: not {_MOST_DIMENSIONS} counts, or too large"
        )
    info = TensorInfo(dtype, tuple(shape), offsets[0] if _counts(offsets) and len(offsets) == 2 else -1)
    if offsets != [info.start, info.start + info.size]:
        raise ValueError(f"tensor {quoted(name)} of {info.size:,} bytes has data_offsets {quoted(offsets)}")
    return info


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST_COUNT for value in values)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a mapping for `json.loads`. Raises `ValueError` for a key that appears twice."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"key {quoted(keys.most_common(1)[0][0])} appears twice")
    return mapping
