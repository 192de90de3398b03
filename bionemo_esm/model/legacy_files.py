"""The files inside a legacy `.nemo` archive, read without trusting them. Used by `bionemo_esm.model.legacy` alone.

A legacy archive is a tar, plain or gzipped, of `model_config.yaml`, `model_weights.ckpt` (a torch pickle) and artifacts
with a hash before their name. Members are looked at one by one and copied out by name. The pickle is opened by
`bionemo_esm.model.pickles`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml
from torch import Tensor

from bionemo_esm.errors import UserError
from bionemo_esm.model.pickles import ChildLimits, PickledTensors, PickleError, convert_pickle

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_CONVERTED = "weights.safetensors"
_SMALL_MEMBER = 1 << 22  # bytes; a configuration or a vocabulary of amino acids has some thousand
_LARGEST_MEMBER = 1 << 36  # bytes; ESM-1b's weights have 2.6e9
_LONGEST_READ = 1 << 24  # bytes; a tar header that asks for more at once is no honest one
_MOST_MEMBERS = 1000


class LegacyArchiveError(UserError):
    """A legacy archive that cannot be converted; the message names the file, the member and what to do."""


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


# --- the pickle -------------------------------------------------------------------------------------------------------


def read_weights(tar: LegacyTar, folder: Path, limits: ChildLimits) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `model_weights.ckpt` in their own dtypes, and the names of entries that are no tensors.

    `folder` is private to us and empty. Raises `LegacyArchiveError` for a pickle with anything but plain values and
    tensors in it, and for a child that fails, hangs or grows.
    """
    tar.copy(WEIGHTS, folder / WEIGHTS)
    converted = folder / _CONVERTED
    try:
        others = convert_pickle(folder / WEIGHTS, converted, limits=limits)
    except PickleError as error:
        raise LegacyArchiveError(f"{tar.path}: {WEIGHTS}: {error.why}") from error
    table = PickledTensors.of(folder / WEIGHTS, converted)
    dicts = tuple(f"{name}." for name, value in others.items() if isinstance(value, dict))
    tensors = {name: table.load(name) for name in table.infos if not name.startswith(dicts)}
    return tensors, sorted(others)
