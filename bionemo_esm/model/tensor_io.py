"""Tensors in the safetensors format, a member of a container: written one after another, read one at a time.

Hugging Face's library reads and writes whole files in memory. Here a member lies within a larger file, and a model of
which 47 copies are averaged must not be held twice; so the format, which is small, is ours to read and write:
8 bytes little-endian, the size of a JSON header; the header, {name: {dtype, shape, data_offsets}}; the data, in the
header's order without gaps. https://github.com/huggingface/safetensors#format. Tests hold both against the library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bionemo_esm.model.tar_format import ArchiveError, Member, Section, quoted, readable

if TYPE_CHECKING:  # a card is printed without waiting for torch
    import torch
    from torch import Tensor

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""The element types that we read, as the format names them, and their sizes."""
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LARGEST_HEADER = 2**24  # bytes; ESM-1b's has 2**16
_MOST_DIMENSIONS, _LARGEST_COUNT = 8, 2**45
_METADATA = "__metadata__"  # not a tensor: texts that a writer may add


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor; `start` counts bytes from the beginning of the data."""

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
    """The tensors of one member: names, types and shapes at hand, contents on demand."""

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
        """Of a tensor."""
        import torch

        dtype = getattr(torch, _TORCH_NAMES[self.infos[name].dtype])
        assert isinstance(dtype, torch.dtype)
        return dtype

    def empty(self, name: str) -> Tensor:
        """Memory for a tensor."""
        import torch

        return torch.empty(self.infos[name].shape, dtype=self.dtype(name))

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(info.elements for info in self.infos.values())

    def load(self, name: str, out: Tensor | None = None) -> Tensor:
        """A copy of one tensor, on the CPU, in its own dtype; in `out`, where one of its shape and dtype is given."""
        with readable(self.path), self.path.open("rb", buffering=0) as stream:
            return self._read(stream, name, out)

    def load_all(self) -> dict[str, Tensor]:
        """All tensors by name."""
        with readable(self.path), self.path.open("rb", buffering=0) as stream:
            return {name: self._read(stream, name) for name in self.infos}

    def _read(self, stream: RawIOBase, name: str, out: Tensor | None = None) -> Tensor:
        info = self.infos[name]
        tensor = self.empty(name) if out is None else out
        assert tensor.shape == info.shape and tensor.dtype == self.dtype(name)
        stream.seek(self.data.start + info.start)
        rest = bytes_of(tensor)
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise ArchiveError(f"{self.path}: {self.member} ends within tensor {quoted(name)}; it is cut short")
            rest = rest[count:]
        return tensor


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors that are made when they are looked up: a model is written that no memory would hold whole."""

    def __init__(self, outline: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        """`outline` has their shapes and dtypes, on the meta device; `make` gives one by its name."""
        self.outline, self._make = outline, make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def tensor_member(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> Member:
    """The tensors, in the order of their names, as a member to be written; equal tensors give equal bytes.

    `notes`: texts for the header. Raises `TypeError`, naming the tensor, for a dtype or a name that the format does not
    know.
    """
    names = {f"torch.{torch_name}": name for name, torch_name in _TORCH_NAMES.items()}
    outline = tensors.outline if isinstance(tensors, LazyTensors) else tensors
    entries: dict[str, Any] = {_METADATA: dict(notes)} if notes else {}
    end = 0
    for name in sorted(outline):
        dtype = str(outline[name].dtype)
        if name == _METADATA or dtype not in names:
            raise TypeError(f"tensor {quoted(name)} of {dtype} cannot be stored in the safetensors format")
        start, end = end, end + outline[name].numel() * outline[name].element_size()
        entries[name] = {"dtype": names[dtype], "shape": list(outline[name].shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data is aligned

    def write(stream: IO[bytes]) -> None:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in sorted(outline):
            stream.write(bytes_of(tensors[name].detach().cpu().contiguous()))

    return Member(8 + len(header) + end, write)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(stream: IO[bytes], available: int) -> tuple[Any, int]:
    """The parsed header, and how many bytes it takes with its length."""
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
    """For `json.loads`: a mapping; a key that appears twice raises `ValueError`."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"key {quoted(keys.most_common(1)[0][0])} appears twice")
    return mapping
