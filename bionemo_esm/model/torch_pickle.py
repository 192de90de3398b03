"""Tensors and plain values of `torch.save` files, read without running any code in them.

A pickle can ask for any function to be called. `torch.load(weights_only=True)` calls none but those that rebuild
tensors and plain containers. This module adds what that reader lacks: it lists the functions first and names one that
is not allowed, it ignores what other libraries or the environment allow in addition, and it limits the size of what
comes out. Tensors are memory-mapped where the format permits it, and are read when they are used.
"""

from __future__ import annotations

import argparse
import os
import pickle  # for the name of its exception; only torch's reader for weights unpickles
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bionemo_esm.errors import UserError
from bionemo_esm.model.tar_format import Section, quoted
from bionemo_esm.model.tensor_io import TensorInfo, TensorTable, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

ALLOWED: Mapping[str, type] = {"argparse.Namespace": argparse.Namespace}
"""Classes that a pickle may hold beside tensors and plain values where the caller permits it: names and values only."""
LFS_POINTER = b"version https://git-lfs"  # the content of a file that Git LFS has not fetched
_REBUILDS = re.compile(
    r"torch \w+|torch\.storage \w+|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2|"
    r"torch\.serialization _get_layout|torch\.nn\.parameter Parameter|collections (OrderedDict|Counter)|_codecs encode|"
    r"(builtins|__builtin__) (set|complex)"
)
"""Functions and classes that tensors and plain values are pickled as; `weights_only` refuses what it does not know."""
_LARGEST_PICKLE = 1 << 28  # bytes of the pickle itself, without the data of its tensors
_MOST_PLAIN = 1 << 20  # plain values, and letters of texts, in one file; the arguments of fairseq have some thousand
_DEEPEST = 24  # dicts and lists within each other
_MOST_EXPANSION = 4  # times the size of the file: views may repeat what the file holds once
_OLD_FORMAT_PICKLES = 5  # before torch 1.6: magic number, protocol, system, contents, keys of the storages
_UNSAFE_TORCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # overrides `weights_only=True`
_NOT_WHOLE = "is no file of torch.save, or one that was cut short; copy or download it again"
_NO_STATE = "it is no pickle of tensors"
_NOT_UNDERSTOOD = (
    LookupError, EOFError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
"""Exceptions that readers of pickles and zips raise for malformed bytes."""


class PickleError(UserError):
    """A pickle that cannot be opened safely; the message names the file, the cause and what to do."""

    code = "pickle"

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.why = why  # without the path, for a file that people know under another name


class _RefusalError(Exception):
    """Contents that are not those of a model's weights."""


@dataclass(frozen=True)
class PickledTensors(TensorTable):
    """The tensors of a pickle, contiguous copies on demand."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, source: Path, tensors: Mapping[str, Tensor]) -> PickledTensors:
        infos = {name: TensorInfo(dtype_name(name, t.dtype), tuple(t.shape), 0) for name, t in tensors.items()}
        return cls(source, source.name, infos, Section(0, source.stat().st_size), tensors)

    def load(self, name: str) -> Tensor:
        return self.empty(name).copy_(self.tensors[name].detach())


def read_pickle(
    source: Path, *, allowed: tuple[str, ...] = (), below: str = ""
) -> tuple[PickledTensors, dict[str, Any]]:
    """Return the tensors of a file of `torch.save`, and all else in it as plain values.

    A tensor has the dotted path of keys to it as its name ("model.encoder.x.weight"), in its own dtype. With `below`,
    only tensors under that path are returned. `allowed`: which of `ALLOWED` may occur; an `argparse.Namespace` becomes
    a dict.

    Plain values are dicts with keys of text, lists, text, numbers, booleans and None. Anything else stands there as
    the name of its type: "<set>" or, for a tensor that was not asked for, "<Tensor>".

    Raises `PickleError` for a pickle that asks for any other function or class, for one that is no dict, is damaged,
    or claims more than its size permits. Nothing in the file is run.
    """
    assert all(name in ALLOWED for name in allowed)
    try:
        _check_beginning(source)
        contents = _Contents(f"{below}." if below else "")
        plain = contents.sort(_load(source, allowed))
        contents.check_size(source.stat().st_size)
        return PickledTensors.of(source, contents.tensors), plain
    except _RefusalError as error:
        advice = "nothing of it was run. Convert it where you trust it, or ask its author for safetensors"
        raise PickleError(source, f"{error}; {advice}") from error
    except TypeError as error:  # of `dtype_name`
        raise PickleError(source, f"it has what safetensors cannot hold: {error}") from error
    except MemoryError as error:
        raise PickleError(source, "opening it needs more memory than there is; refused") from error
    except OSError as error:
        raise PickleError(source, f"cannot be read ({error.strerror}); give the path of a file") from error


def _check_beginning(source: Path) -> None:
    """Refuse what is no pickle at first sight."""
    with source.open("rb") as stream:
        beginning = stream.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        raise PickleError(source, "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`")
    if beginning[8:9] == b"{":
        raise PickleError(source, "is safetensors, and not a pickle of torch.save; its name is wrong")
    if not beginning:
        raise PickleError(source, "is empty; copy or download it again")


def _load(source: Path, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return the state dict in a file. Raises `_RefusalError`, or `PickleError` for a file that torch cannot read."""
    import torch

    try:
        is_zip = _check_functions(source, allowed)
        with _nothing_else_allowed(allowed):
            state = torch.load(str(source), map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error) or "magic number" in str(error):
            raise PickleError(source, _NOT_WHOLE) from error
        raise _RefusalError(_NO_STATE) from error
    except _NOT_UNDERSTOOD as error:
        if "allocate" in str(error):
            raise MemoryError from error
        raise PickleError(source, _NOT_WHOLE) from error
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise _RefusalError(_NO_STATE)
    return state


@contextmanager
def _nothing_else_allowed(allowed: tuple[str, ...]) -> Iterator[None]:
    """Make torch's reader for weights accept these classes and none that other libraries or the environment add."""
    import torch

    trusted, unsafe = torch.serialization.get_safe_globals(), os.environ.pop(_UNSAFE_TORCH, None)
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([ALLOWED[name] for name in allowed])
    try:
        with warnings.catch_warnings(action="ignore"):  # of protocols that another writer chose
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(trusted)
        if unsafe is not None:
            os.environ[_UNSAFE_TORCH] = unsafe


def _check_functions(source: Path, allowed: tuple[str, ...]) -> bool:
    """Return whether the file is a zip. Raises `_RefusalError`, naming the first function or class not allowed."""
    with source.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # the test by which torch tells its formats apart
            stream.seek(0)
            for _ in range(_OLD_FORMAT_PICKLES):
                _check_one(stream, allowed)
            return False
    with zipfile.ZipFile(source) as members:
        infos = members.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise _RefusalError("it is a compressed zip, which torch.save does not write")
        if sum(info.file_size for info in infos) > source.stat().st_size:
            raise _RefusalError("it is a zip with members that overlap")
        for info in infos:
            if info.filename.endswith("/data.pkl"):
                if info.file_size > _LARGEST_PICKLE:
                    raise _RefusalError("it is not a model but values without end")
                with members.open(info) as pickled:
                    _check_one(pickled, allowed)
    return True


def _check_one(stream: IO[bytes], allowed: tuple[str, ...]) -> None:
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if name not in allowed and not _REBUILDS.fullmatch(str(argument)):
                shown = quoted(name.removeprefix("__builtin__.").removeprefix("builtins."))[1:-1]
                raise _RefusalError(f"it asks for {shown}, which is no tensor")


@dataclass
class _Contents:
    """A tree of values, separated into tensors by their paths and the plain values that remain."""

    below: str  # the beginning of the names of tensors that are wanted
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seen: int = 0  # of `_MOST_PLAIN`

    def sort(self, value: object, path: str | None = "", depth: int = 0) -> Any:
        """Return the plain values at and under a path; the path is None within a list, where no name leads."""
        self.seen += 1 + (len(value) if isinstance(value, str) else 0)
        if self.seen > _MOST_PLAIN or depth > _DEEPEST:
            raise _RefusalError("it is not a model but values without end")
        if value is None or isinstance(value, str | bool | float):
            return value
        if isinstance(value, int) and value.bit_length() <= 64:
            return value
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            return self._sort_dict(value, path, depth)
        if isinstance(value, list | tuple):
            return [self.sort(item, None, depth + 1) for item in value]
        return f"<{type(value).__name__}>"

    def _sort_dict(self, mapping: dict[Any, Any], path: str | None, depth: int) -> dict[str, Any]:
        from torch import Tensor, strided

        plain: dict[str, Any] = {}
        names = set()
        for key, value in mapping.items():
            name = str(key) if isinstance(key, str | int) else f"<{type(key).__name__}>"
            if name in names:
                raise _RefusalError(f"it has two entries {quoted(name)} in one dict")
            names.add(name)
            place = None if path is None else f"{path}.{name}" if path else name
            if not (isinstance(value, Tensor) and place is not None and place.startswith(self.below)):
                self.seen += len(name)
                plain[name] = self.sort(value, place, depth + 1)
            elif value.layout != strided or value.is_quantized or value.device.type != "cpu":
                raise _RefusalError(f"it has tensor {quoted(place)}, which is sparse, quantized or without data")
            elif place in self.tensors:
                raise _RefusalError(f"it has two tensors {quoted(place)}")
            else:
                self.tensors[place] = value
        return plain

    def check_size(self, file_size: int) -> None:
        """Refuse views that repeat a few numbers of the file without end."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        if size > (1 << 24) + _MOST_EXPANSION * file_size:
            raise _RefusalError("it unfolds to more than four times its size")
