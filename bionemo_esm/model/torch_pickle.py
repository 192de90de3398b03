"""Weights in torch's pickles, opened without trusting them.

A pickle can ask for any function to be called. So another process opens it: under limits, with torch's reader for
weights only, which knows tensors and plain values and calls nothing else. What comes back is safetensors and JSON.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle  # the name of its exception only; nothing here unpickles but torch's own reader for weights
import re
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.errors import UserError
from bionemo_esm.model.safe_serialization import parse_json
from bionemo_esm.model.tar_format import ArchiveError, Section, quoted
from bionemo_esm.model.tensor_io import TensorTable, tensor_member

if TYPE_CHECKING:
    from torch import Tensor

ALLOWED: Mapping[str, type] = {"argparse.Namespace": argparse.Namespace}
"""What a pickle may hold beside tensors and plain values, where the caller says so: a class of names and values."""
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT")  # what Python and torch need to start
_CHILD = "import sys; sys.path.append(sys.argv[1]); from bionemo_esm.model.torch_pickle import child; child()"
_REFUSED, _OUT_OF_MEMORY, _NO_SPACE, _DAMAGED = 3, 4, 5, 6  # exit codes of the child
_MOST_PLAIN = 1 << 20  # plain values, and letters of texts, in one file; the arguments of fairseq have some thousand
_DEEPEST = 24  # dicts and lists within each other
LFS_POINTER = b"version https://git-lfs"  # what lies in place of a file that was not fetched
_NO_STATE = "it is no pickle of tensors"


class _DamageError(Exception):
    """Bytes that torch's reader cannot follow."""


_NOT_UNDERSTOOD = (
    LookupError, EOFError, ValueError, TypeError, AttributeError, AssertionError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What readers of pickles and zips raise for bytes that make no sense to them."""


class PickleError(UserError):
    """A pickle that cannot be opened safely; the message names the file, the culprit and what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.why = why  # without the path, for a file that people know under another name


@dataclass(frozen=True)
class ChildLimits:
    """What the process that opens the pickle may use, where the platform can limit it (address space: Linux)."""

    seconds: float = 900.0  # wall clock
    cpu_seconds: int = 600
    slowest: int = 10_000_000  # bytes of the file in a second; a file of 30 GB has an hour
    memory_base: int = 1 << 30  # bytes above what torch itself takes
    memory_per_byte: int = 6  # of the weights file: unpickled, copied, serialized, with room to spare


@dataclass(frozen=True)
class PickledTensors(TensorTable):
    """The tensors of a pickle that was converted; messages say where they were, and not where the copy is."""

    copy: TensorTable

    @classmethod
    def of(cls, source: Path, output: Path) -> PickledTensors:
        """Those that `convert_pickle(source, output)` has written."""
        copy = TensorTable.open(output, output.name, Section(0, output.stat().st_size))
        return cls(source, source.name, copy.infos, copy.data, copy)

    def load(self, name: str, out: Tensor | None = None) -> Tensor:
        return self.copy.load(name, out)

    def load_all(self) -> dict[str, Tensor]:
        return self.copy.load_all()


def convert_pickle(
    source: Path, output: Path, *, allowed: tuple[str, ...] = (), below: str = "", limits: ChildLimits | None = None
) -> dict[str, Any]:
    """Write the tensors of a file of `torch.save` to a safetensors file; returns the rest of it, as plain values.

    `output` lies in a folder that is private to us. A tensor has the dotted path of keys to it as its name
    ("model.encoder.x.weight"), in its own dtype; one that the file has under two names is written twice. With `below`,
    only tensors under that path are written. `allowed`: which of `ALLOWED` may occur; an `argparse.Namespace` becomes
    a dict.

    What is returned: dicts with keys of text, lists, text, numbers, booleans and None; anything else in the file stands
    there as the name of its type, "<set>" or, for a tensor that was not written, "<Tensor>".

    Raises `PickleError` for a pickle that asks for anything else, for one that is no dict or is damaged, and for a
    process that fails, hangs or grows. Nothing is left then.
    """
    assert all(name in ALLOWED for name in allowed) and not output.exists()
    limits = limits or ChildLimits()
    output = output.resolve()
    plain = output.with_name(f"{output.name}.plain.json")
    try:
        _check_beginning(source)
        _open_elsewhere(source, output, plain, (below, *allowed), limits)
        return _results(source, output, plain)
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    finally:
        plain.unlink(missing_ok=True)


def _check_beginning(source: Path) -> None:
    """Say what is no pickle at first sight, before a process is started for it."""
    try:
        with source.open("rb") as stream:
            beginning = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise PickleError(source, f"cannot be read ({error.strerror}); give the path of a file") from error
    if beginning == LFS_POINTER:
        raise PickleError(source, "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`")
    if beginning[8:9] == b"{":
        raise PickleError(source, "is safetensors, and not a pickle of torch.save; its name is wrong")
    if not beginning:
        raise PickleError(source, "is empty; copy or download it again")


def _open_elsewhere(source: Path, output: Path, plain: Path, wanted: tuple[str, ...], limits: ChildLimits) -> None:
    """Let another process write `output` and `plain`; `wanted` are `below` and the names that are allowed."""
    size = source.stat().st_size
    memory = limits.memory_base + limits.memory_per_byte * size
    seconds = max(limits.seconds, size / limits.slowest)
    amounts = (max(limits.cpu_seconds, size // limits.slowest), memory, (1 << 24) + 4 * size)
    root, folder = Path(__file__).resolve().parents[2], output.parent
    arguments = [*map(str, (root, folder, *amounts, source.resolve(), output, plain)), *wanted]
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, *arguments],
            cwd=folder,
            env=environment | {"HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PickleError(
            source, f"opening it took more than {seconds:g} seconds; refused, no model takes that long"
        ) from error
    if done.returncode:
        raise PickleError(source, _explain(done.returncode, done.stderr, memory))


def _explain(code: int, stderr: bytes, memory: int) -> str:
    """Why the child ended as it did, in one line, and what to do."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    last = "".join(c if c.isprintable() else "?" for c in lines[-1][:300]) if lines else "no message"
    if code == _REFUSED:
        return f"{last}; nothing of it was run. Convert it where you trust it, or ask its author for safetensors"
    if code == _OUT_OF_MEMORY:
        return f"opening it needs more than the {memory / 2**30:.1f} GiB that its size allows; refused"
    if code == _NO_SPACE:
        return "there is no space for a copy of its weights; free some, or set TMPDIR to a larger disk"
    if code == _DAMAGED:
        return "is no file of torch.save, or one that was cut short; copy or download it again"
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        why = "it used up its processor time" if name == "SIGXCPU" else "out of memory, most likely"
        return f"the process that opened it was killed by {name} ({why}); try where there is more memory"
    return f"the process that opened it failed ({last}); the file may be damaged, copy or download it again"


def _results(source: Path, output: Path, plain: Path) -> dict[str, Any]:
    """The plain values, after a look at what the child has written."""
    try:
        TensorTable.open(output, output.name, Section(0, output.stat().st_size))
        with plain.open("rb") as stream:
            content = stream.read(32 * _MOST_PLAIN + 1)  # a letter takes up to six there, a number 24
        if len(content) > 32 * _MOST_PLAIN:
            raise ValueError("too many plain values")
        values = parse_json(content)
        if not isinstance(values, dict):
            raise ValueError("no mapping of plain values")
        return values
    except (ArchiveError, OSError, ValueError) as error:
        raise PickleError(source, f"the process that opened it wrote no weights ({error})") from error


# --- from inside: the following runs in the child only ----------------------------------------------------------------


def child() -> None:
    """Turn a pickle into safetensors and JSON, and exit."""
    cpu_seconds, memory, file_size = map(int, sys.argv[3:6])
    source, output, plain = map(Path, sys.argv[6:9])
    import torch  # noqa: F401 - before the limits, so that it is not counted

    _limit_this_process(cpu_seconds, memory, file_size)
    try:
        _convert(source, output, plain, sys.argv[9], tuple(sys.argv[10:]))
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)
    except pickle.UnpicklingError as error:
        sys.stderr.write(_culprit(str(error)))
        sys.exit(_REFUSED)
    except _DamageError:
        sys.exit(_DAMAGED)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sys.exit(_OUT_OF_MEMORY)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write("it unfolds to more than four times its size")
        sys.exit(_REFUSED if error.errno == errno.EFBIG else _NO_SPACE)
    sys.exit(0)


def _culprit(message: str) -> str:
    """What of torch's message is for people."""
    named = re.search(r"GLOBAL (\S+)", message)
    if named:
        return f"it asks for {named[1]}, which is no tensor"
    return message if message.startswith("it ") else _NO_STATE


def _convert(source: Path, output: Path, plain: Path, below: str, allowed: tuple[str, ...]) -> None:
    import torch

    torch.serialization.clear_safe_globals()  # what other libraries trust
    torch.serialization.add_safe_globals([ALLOWED[name] for name in allowed])
    state = _load(source)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise pickle.UnpicklingError("not a state dict")
    contents = _Contents(f"{below}." if below else "")
    plain.write_text(json.dumps(contents.sort(state)), encoding="ascii")
    try:
        member = tensor_member(contents.tensors)
    except (TypeError, UnicodeEncodeError) as error:
        raise pickle.UnpicklingError(f"it has what safetensors cannot hold: {error}") from error
    with output.open("xb") as stream:
        member.write(stream)


def _load(source: Path) -> object:
    """What torch's reader for weights makes of a file. Raises `_DamageError` where it is none that torch can read."""
    import torch

    with source.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"  # as torch tells it from its own format, from before 1.6
    try:
        if is_zip:
            _check_zip(source)
        # tensors in a zip are mapped, and so read when they are written, if they are
        return torch.load(str(source), map_location="cpu", weights_only=True, mmap=is_zip)
    except RuntimeError as error:
        if "allocate" in str(error):
            raise
        raise _DamageError from error
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error) and "magic number" not in str(error):
            raise
        raise _DamageError from error
    except _NOT_UNDERSTOOD as error:
        raise _DamageError from error


def _check_zip(source: Path) -> None:
    """torch.save never compresses; a zip that grows when it is read is a bomb."""
    with zipfile.ZipFile(source) as members:
        infos = members.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise pickle.UnpicklingError("it is a compressed zip, which torch.save does not write")
    if sum(info.file_size for info in infos) > source.stat().st_size:
        raise pickle.UnpicklingError("it is a zip with members that overlap")


@dataclass
class _Contents:
    """A tree of values, taken apart into tensors by their paths and the plain values that remain."""

    below: str  # where names of tensors begin that are wanted
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seen: int = 0  # of `_MOST_PLAIN`

    def sort(self, value: object, path: str | None = "", depth: int = 0) -> Any:
        """The plain values at and under a path; None is the path of what lies in a list, where no name leads."""
        self.seen += 1 + (len(value) if isinstance(value, str) else 0)
        if self.seen > _MOST_PLAIN or depth > _DEEPEST:
            raise pickle.UnpicklingError("it is not a model but values without end")
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
        from torch import Tensor

        plain: dict[str, Any] = {}
        names = set()
        for key, value in mapping.items():
            name = str(key) if isinstance(key, str | int) else f"<{type(key).__name__}>"
            if name in names:
                raise pickle.UnpicklingError(f"it has two entries {quoted(name)} in one dict")
            names.add(name)
            place = None if path is None else f"{path}.{name}" if path else name
            if isinstance(value, Tensor) and place is not None and place.startswith(self.below):
                self._keep(place, value)
            else:
                self.seen += len(name)
                plain[name] = self.sort(value, place, depth + 1)
        return plain

    def _keep(self, name: str, tensor: Tensor) -> None:
        from torch import contiguous_format, strided

        if tensor.layout != strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise pickle.UnpicklingError(f"it has tensor {quoted(name)}, which is sparse, quantized or without data")
        if name in self.tensors:
            raise pickle.UnpicklingError(f"it has two tensors {quoted(name)}")
        tensor = tensor.detach()
        # a single number may have any stride, and passes for contiguous
        self.tensors[name] = tensor.clone(memory_format=contiguous_format) if tensor.numel() == 1 else tensor


def _limit_this_process(cpu_seconds: int, memory: int, file_size: int) -> None:
    """Hard limits, which nothing in this process can lift; torch is imported already and is not counted."""
    if sys.platform == "win32":
        return
    import resource

    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_FSIZE: file_size}
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = in_use + memory
    for kind, amount in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        amount = amount if ceiling == resource.RLIM_INFINITY else min(amount, ceiling)
        resource.setrlimit(kind, (amount, amount))
