"""The `.nemo` archive: a plain tar of a model's configuration, weights and manifest, with no pickle in it.

Members, and nothing else: `model_config.yaml`, `model_weights.safetensors`, `manifest.json`. They are read by name and
never extracted to disk; the class comes from our own registry of names, and no import path in an archive is followed.
Equal content gives equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from bionemo_esm.errors import UserError

CONFIG, WEIGHTS, MANIFEST = "model_config.yaml", "model_weights.safetensors", "manifest.json"
FORMAT_VERSION = 1
_SIZE_LIMITS = {CONFIG: 1 << 20, MANIFEST: 1 << 22, WEIGHTS: 1 << 38}  # bytes; no honest member comes near


class ArchiveError(UserError):
    """A file that is no archive of ours, or a damaged one; the message names the file and the member."""


@dataclass(frozen=True)
class Archive:
    """A model at rest: the name of its class, its configuration, its weights by parameter name, where it came from."""

    model_class: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_archive(path: Path, archive: Archive) -> Path:
    """Write under a temporary name, sync, then rename: the final name never holds half an archive."""
    config = yaml.safe_dump(dict(archive.config), sort_keys=True).encode()
    tensors = {name: archive.weights[name].detach().cpu().contiguous() for name in sorted(archive.weights)}
    weights = save_safetensors(tensors)
    manifest = {
        "format_version": FORMAT_VERSION,
        "model_class": archive.model_class,
        "files": {name: _fingerprint(content) for name, content in ((CONFIG, config), (WEIGHTS, weights))},
        "provenance": dict(archive.provenance),
    }
    members = {CONFIG: config, MANIFEST: json.dumps(manifest, indent=2, sort_keys=True).encode(), WEIGHTS: weights}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            _write_tar(stream, members)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _write_tar(stream: Any, members: Mapping[str, bytes]) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)  # time, owner and group stay 0: equal content, equal bytes
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def is_our_archive(path: Path) -> bool:
    """Whether the file begins like one of ours; False for NeMo's own archives, and for files that are no plain tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            names = [member.name for member in (tar.next(), tar.next()) if member]
    except (tarfile.TarError, OSError):
        return False
    return names == [CONFIG, MANIFEST]


def read_archive(path: Path, with_weights: bool = True) -> Archive:
    """Read and check an archive; `with_weights=False` reads the small members only.

    Raises `ArchiveError`, naming the file and the member, for anything but exactly our members as regular files with
    the sizes and SHA-256 that the manifest lists.
    """
    members = _read_members(path, [CONFIG, MANIFEST, *([WEIGHTS] if with_weights else [])])
    try:
        manifest = json.loads(members[MANIFEST])
        config = yaml.load(members[CONFIG], Loader=_PlainLoader)  # noqa: S506 - a SafeLoader without aliases
    except (ValueError, yaml.YAMLError) as error:
        raise ArchiveError(f"{path}: {MANIFEST} or {CONFIG} cannot be parsed: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ArchiveError(f"{path}: {MANIFEST} is not of format {FORMAT_VERSION}; it may be of a later release")
    if not isinstance(config, dict) or not isinstance(manifest.get("files"), dict):
        raise ArchiveError(f"{path}: {CONFIG} or `files` in {MANIFEST} is not a mapping")
    for name in members:
        if name != MANIFEST and manifest["files"].get(name) != _fingerprint(members[name]):
            raise ArchiveError(f"{path}: {name} does not match its size and SHA-256 in {MANIFEST}; the file is damaged")
    try:
        weights = load_safetensors(members[WEIGHTS]) if with_weights else {}
    except SafetensorError as error:
        raise ArchiveError(f"{path}: {WEIGHTS} is not a safetensors file: {error}") from error
    return Archive(str(manifest.get("model_class")), config, weights, manifest.get("provenance") or {})


def _read_members(path: Path, wanted: list[str]) -> dict[str, bytes]:
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file; give the path of a .nemo archive")
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_member(path, member, seen=contents.keys())
                stream = tar.extractfile(member) if member.name in wanted else None
                contents[member.name] = stream.read() if stream else b""
    except tarfile.ReadError as error:
        raise ArchiveError(f"{path}: not a .nemo archive, or cut short ({error}); copy or download it again") from error
    for name in _SIZE_LIMITS:
        if name not in contents:
            raise ArchiveError(f"{path}: member {name} is missing; it is cut short, or not an archive of bionemo_esm")
    return {name: contents[name] for name in wanted}


def _check_member(path: Path, member: tarfile.TarInfo, seen: Any) -> None:
    if member.name not in _SIZE_LIMITS or not member.isreg():
        raise ArchiveError(f"{path}: unexpected member {member.name!r}; only {', '.join(_SIZE_LIMITS)} belong there")
    if member.name in seen:
        raise ArchiveError(f"{path}: member {member.name} appears twice")
    if member.size > _SIZE_LIMITS[member.name]:
        raise ArchiveError(f"{path}: member {member.name} claims {member.size} bytes; refused")


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can make a small file expand without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a model configuration")
        return super().compose_node(parent, index)
