"""The files inside a legacy `.nemo` archive, read without trusting them. Used by `bionemo_esm.model.legacy` alone.

A legacy archive is a tar, plain or gzipped, of `model_config.yaml`, `model_weights.ckpt` (a torch pickle) and artifacts
with a hash before their name. Members are looked at one by one and copied out by name. The pickle is opened by another
process, under limits, by torch's unpickler for weights only; what comes back is a safetensors file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import pickle  # the name of its exception only; nothing here unpickles but torch's own reader for weights
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bionemo_esm.errors import UserError

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_CONVERTED = "weights.safetensors"
_SMALL_MEMBER = 1 << 22  # bytes; a configuration or a vocabulary of amino acids has some thousand
_LARGEST_MEMBER = 1 << 36  # bytes; ESM-1b's weights have 2.6e9
_LONGEST_READ = 1 << 24  # bytes; a tar header that asks for more at once is no honest one
_MOST_MEMBERS = 1000
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT")  # what Python and torch need to start
_CHILD = "import sys; sys.path.append(sys.argv[1]); from bionemo_esm.model.legacy_files import child; child()"
_REFUSED, _OUT_OF_MEMORY = 3, 4  # exit codes of the child


class LegacyArchiveError(UserError):
    """A legacy archive that cannot be converted; the message names the file, the member and what to do."""


@dataclass(frozen=True)
class ChildLimits:
    """What the process that opens the pickle may use, where the platform can limit it (address space: Linux)."""

    seconds: float = 900.0  # wall clock
    cpu_seconds: int = 600
    memory_base: int = 1 << 30  # bytes above what torch itself takes
    memory_per_byte: int = 6  # of the weights file: unpickled, copied, serialized, with room to spare


# --- the tar --------------------------------------------------------------------------------------------------------


def sha256(stream: BinaryIO) -> str:
    """The digest of a whole file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class _BoundedReads:
    """A readable file that refuses reads of absurd size, which a tar header of a few bytes can ask for."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        content: bytes = self._stream.read(size)
        return content


class LegacyTar:
    """The members of a legacy archive by name, checked one by one; `stream` is the open file of `path`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        stream.seek(0)
        gzipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        with self._damage_reported():
            source = _BoundedReads(gzip.GzipFile(fileobj=stream) if gzipped else stream)
            self._tar = tarfile.open(fileobj=source, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            self.members = self._checked_members()

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, RecursionError) as error:
            raise LegacyArchiveError(
                f"{self.path}: not a .nemo archive, or cut short ({error}); copy or download it again"
            ) from error

    def _checked_members(self) -> dict[str, tarfile.TarInfo]:
        found: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(self._tar):
            name = str(PurePosixPath(member.name))  # without a leading ./
            if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
                raise self._refusal(member, "has a path that leaves the archive")
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise self._refusal(member, "is a link, a device or a sparse file")
            if name in found:
                raise self._refusal(member, "appears twice")
            if member.size > _LARGEST_MEMBER:
                raise self._refusal(member, f"claims {member.size} bytes")
            if count >= _MOST_MEMBERS:
                raise self._refusal(member, f"is one of more than {_MOST_MEMBERS}")
            found[name] = member
        return {name: member for name, member in found.items() if member.isreg()}

    def _refusal(self, member: tarfile.TarInfo, fault: str) -> LegacyArchiveError:
        return LegacyArchiveError(
            f"{self.path}: member {member.name!r} {fault}; refused, get the archive from its source"
        )

    def text(self, name: str) -> str:
        """A small member as text."""
        member = self._member(name)
        if member.size > _SMALL_MEMBER:
            raise self._refusal(member, f"claims {member.size} bytes, of at most {_SMALL_MEMBER}")
        content = b"".join(self._chunks(member))
        with self._damage_reported():
            return content.decode("utf-8")

    def copy(self, name: str, target: Path) -> None:
        """Copy a member into a new file of ours."""
        member = self._member(name)
        with target.open("xb") as out:
            for chunk in self._chunks(member):
                out.write(chunk)

    def _member(self, name: str) -> tarfile.TarInfo:
        if name in self.members:
            return self.members[name]
        reason = "it is cut short, or not a NeMo archive"
        if "model_weights.safetensors" in self.members:
            reason = "it is an archive of bionemo_esm already; use it as it is"
        elif any(re.search(r"(?:mp|tp)_rank_\d+|^model_weights/", other) for other in self.members):
            reason = "its weights are split over ranks; merge them with NeMo's own tools first"
        raise LegacyArchiveError(f"{self.path}: member {name} is missing; {reason}")

    def _chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        stream = self._tar.extractfile(member)
        assert stream is not None  # the member is a regular file
        left = member.size
        while left:
            with self._damage_reported():
                chunk = stream.read(min(left, 1 << 20))
                if not chunk:
                    raise tarfile.ReadError(f"member {member.name} ends early")
            left -= len(chunk)
            yield chunk


# --- the small files --------------------------------------------------------------------------------------------------


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can make a small file expand without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a model configuration")
        return super().compose_node(parent, index)


def read_config(tar: LegacyTar) -> dict[str, Any]:
    """The model's part of `model_config.yaml` as plain values; class paths in it (`target`) are text to us."""
    where, text = f"{tar.path}: {CONFIG}", tar.text(CONFIG)
    try:
        config = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader without aliases
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LegacyArchiveError(f"{where} cannot be parsed ({error}); write plain values there") from error
    config = config.get("model", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise LegacyArchiveError(f"{where} is not a mapping; the archive is no model of NeMo's")
    return config


def config_value(config: Mapping[str, Any], key: str, where: str) -> Any:
    """A value; `${.other}` stands for another key beside it, as OmegaConf writes it."""
    value = config.get(key)
    if isinstance(value, str) and (reference := re.fullmatch(r"\$\{(?:\.|model\.)?(\w+)\}", value)):
        value = config.get(reference[1])
    if isinstance(value, str) and "${" in value:
        raise LegacyArchiveError(f"{where}: {key} is {value!r}; write the value itself there")
    return value


def config_number(config: Mapping[str, Any], keys: tuple[str, ...], default: float | None, where: str) -> float:
    for key in keys:
        value = config_value(config, key, where)
        if value is None:
            continue
        try:
            number = float(value) if not isinstance(value, bool) else math.nan  # YAML 1.1 reads 1e-5 as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise LegacyArchiveError(f"{where}: {key} must be a number, not {value!r}")
        return number
    if default is None:
        raise LegacyArchiveError(f"{where}: {' or '.join(keys)} is missing; the archive is no BERT of NeMo's")
    return default


def read_vocabulary(tar: LegacyTar, config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The member that holds the vocabulary, and its tokens in the order of their ids.

    `.vocab` of sentencepiece has `token<TAB>score` lines, `vocab.txt` of BERT one token a line.
    """
    tokenizer = config.get("tokenizer")
    named = tokenizer.get("vocab_file") if isinstance(tokenizer, dict) else None
    member = str(named).removeprefix("nemo:")
    if member not in tar.members:
        candidates = [name for name in tar.members if name.endswith((".vocab", "vocab.txt"))]
        if len(candidates) != 1:
            raise LegacyArchiveError(
                f"{tar.path}: {'several vocabularies' if candidates else 'no vocabulary'} in it; the rows of the "
                "embedding cannot be told apart without the tokenizer's .vocab file or vocab.txt (one token a line). "
                f"Add the one that belongs to it to the tar, and name it in tokenizer.vocab_file of {CONFIG}"
            )
        member = candidates[0]
    tokens = [line.split("\t")[0] for line in tar.text(member).split("\n") if line]
    for token, times in Counter(tokens).items():
        if times > 1:
            raise LegacyArchiveError(
                f"{tar.path}: {member}: token {token!r} is there {times} times; ids would be a guess"
            )
    return member, [token.rstrip("\r") for token in tokens]


# --- the pickle, from outside ---------------------------------------------------------------------------------------


def read_weights(tar: LegacyTar, folder: Path, limits: ChildLimits) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `model_weights.ckpt` in their own dtypes, and the names of entries that are no tensors.

    `folder` is private to us and empty. Raises `LegacyArchiveError` for a pickle with anything but plain values and
    tensors in it, and for a child that fails, hangs or grows.
    """
    where = f"{tar.path}: {WEIGHTS}"
    tar.copy(WEIGHTS, folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    memory = limits.memory_base + limits.memory_per_byte * size
    root = str(Path(__file__).resolve().parents[2])
    arguments = [root, str(folder), str(limits.cpu_seconds), str(memory), str((1 << 24) + 4 * size)]
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, *arguments],
            cwd=folder,
            env=environment | {"HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LegacyArchiveError(
            f"{where}: opening it took more than {limits.seconds:g} seconds; refused, no model takes that long"
        ) from error
    if done.returncode:
        raise LegacyArchiveError(f"{where}: {_explain(done.returncode, done.stderr, memory)}")
    try:
        with safe_open(folder / _CONVERTED, "pt") as stored:
            others = json.loads((stored.metadata() or {}).get("others", "[]"))
            return {name: stored.get_tensor(name) for name in stored.keys()}, list(map(str, others))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise LegacyArchiveError(f"{where}: the process that opened it wrote no weights ({error})") from error


def _explain(code: int, stderr: bytes, memory: int) -> str:
    """Why the child ended as it did, in one line, and what to do."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    last = "".join(c if c.isprintable() else "?" for c in lines[-1][:300]) if lines else "no message"
    if code == _REFUSED:
        return f"{last}; nothing of it was run. Convert it where you trust it, or ask its author for safetensors"
    if code == _OUT_OF_MEMORY:
        return f"opening it needs more than the {memory / 2**30:.1f} GiB that its size allows; refused"
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        why = "it used up its processor time" if name == "SIGXCPU" else "out of memory, most likely"
        return f"the process that opened it was killed by {name} ({why}); try where there is more memory"
    return f"the process that opened it failed ({last}); the file may be damaged, copy or download it again"


# --- the pickle, from inside: the following runs in the child only --------------------------------------------------


def child() -> None:
    """Turn `model_weights.ckpt` in a folder into a safetensors file beside it, and exit."""
    folder, (cpu_seconds, memory, file_size) = Path(sys.argv[2]), map(int, sys.argv[3:6])
    _limit_this_process(cpu_seconds, memory, file_size)
    try:
        _convert(folder)
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        culprit = f"it asks for {named[1]}, which is no tensor" if named else "it is no pickle of tensors"
        sys.stderr.write(culprit)
        sys.exit(_REFUSED)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sys.exit(_OUT_OF_MEMORY)
    sys.exit(0)


def _convert(folder: Path) -> None:
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise pickle.UnpicklingError("not a state dict")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    others = json.dumps(sorted(state.keys() - tensors.keys()))
    save_file(copies, folder / _CONVERTED, {"others": others})


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
