"""Model files: the `.nemo` archive, and the `.ckpt`, which has the training state beside the same members.

A file is a plain tar of `model_config.yaml`, `manifest.json` and `model_weights.safetensors`; a checkpoint has
`state.json` and `state.safetensors` as well. It contains no pickle. No import path in it is followed: the class comes
from our own registry of names. No member is extracted to disk. Every byte is covered by a hash or checked to be
zero. Equal content gives equal bytes. Reading the small members needs neither torch nor NeMo.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.model.config import TRAINING_ONLY, EncoderConfig
from bionemo_esm.model.safe_serialization import check_plain, parse_json, parse_yaml, put_tensors_back, take_out_tensors
from bionemo_esm.model.tar_format import (
    HASHES,
    ArchiveError,
    Member,
    Section,
    SectionReader,
    Summary,
    find_members,
    hash_section,
    quoted,
    read_section,
    write_container,
)
from bionemo_esm.model.tensor_io import TensorTable, bytes_of, tensor_member

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Archive", "ArchiveError", "ArchiveFile", "is_our_archive", "read_archive", "write_archive"]

CONFIG, WEIGHTS, MANIFEST = "model_config.yaml", "model_weights.safetensors", "manifest.json"
STATE, STATE_TENSORS = "state.json", "state.safetensors"
FORMAT_VERSION = 2
_MODEL, _TRAINING = (CONFIG, MANIFEST, WEIGHTS), (STATE, STATE_TENSORS)
_SIZE_LIMITS = {CONFIG: 1 << 16, MANIFEST: 1 << 20, WEIGHTS: 1 << 38, STATE: 1 << 20, STATE_TENSORS: 1 << 40}
"""Bytes; far above any valid member, and low enough that a hostile one cannot keep a parser busy."""
_WEIGHT_DTYPES = ("F32", "BF16")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Archive:
    """Content of a file: name of the model's class, configuration, weights by parameter name, provenance.

    `state` is the training state of a checkpoint, a tree of plain values and tensors; None in a `.nemo`.
    """

    model_class: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None


def write_archive(path: Path, archive: Archive) -> Path:
    """Write an archive, complete or not at all. Raises `ArchiveError` if it cannot be written."""
    members: dict[str, Member | Summary] = {
        CONFIG: Member.of(yaml.safe_dump(dict(archive.config), sort_keys=True).encode()),
        WEIGHTS: tensor_member(archive.weights),
    }
    if archive.state is not None:
        state, tensors = take_out_tensors(archive.state)
        members |= {STATE: Member.of(_json(state)), STATE_TENSORS: tensor_member(tensors)}
    sizes = {name: member.size for name, member in members.items()}

    def manifest(digests: Mapping[str, Mapping[str, str]]) -> bytes:
        return _manifest_of(archive, {name: {"size": size, **digests[name]} for name, size in sizes.items()})

    length = len(
        manifest(dict.fromkeys(members, dict.fromkeys(HASHES, "0" * 64)))
    )  # it precedes the members whose hashes it lists
    first = {CONFIG: members.pop(CONFIG), MANIFEST: Summary(length, manifest)}  # the small members first
    members = first | members
    for name, member in members.items():
        if member.size > _SIZE_LIMITS[name]:
            raise ArchiveError(f"{path}: {name} would have {member.size:,} bytes, more than {_SIZE_LIMITS[name]:,}")
    write_container(path, members)
    return path


def _manifest_of(archive: Archive, files: Mapping[str, Mapping[str, int | str]]) -> bytes:
    manifest = {
        "format_version": FORMAT_VERSION,
        "model_class": archive.model_class,
        "alphabet": " ".join(TOKENS),
        "files": files,
        "provenance": dict(archive.provenance),
    }
    return _json(manifest | {"manifest_sha256": _self_hash(manifest)})


def read_archive(path: Path, with_weights: bool = True) -> Archive:
    """Read and check an archive; with `with_weights=False` the small members only.

    Raises `ArchiveError`, naming the file and the member, unless the members are exactly ours, are regular files of
    the sizes and hashes in the manifest, and have finite weights and a plain configuration.
    """
    file = ArchiveFile.open(path)
    weights = file.load_weights() if with_weights else {}
    return Archive(file.model_class, file.config, weights, file.provenance)


def is_our_archive(path: Path) -> bool:
    """Return whether the file begins like one of ours; False for NeMo's own archives and for other files."""
    try:
        with path.open("rb") as stream:
            header = stream.read(512)
    except OSError:
        return False
    return header[:100].rstrip(b"\0") == CONFIG.encode() and header[257:262] == b"ustar"


@dataclass(frozen=True)
class ArchiveFile:
    """An archive on disk: small members read and checked, large ones read on demand."""

    path: Path
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    weights: TensorTable
    sections: Mapping[str, Section]

    @classmethod
    def open(cls, path: Path) -> ArchiveFile:
        """Check the structure, the small members and the headers of the large ones; `verify` reads the rest.

        Raises `ArchiveError`, naming the file and the member.
        """
        sections = find_members(path, _SIZE_LIMITS)
        wanted = _MODEL + (_TRAINING if sections.keys() & set(_TRAINING) else ())
        for name in wanted:
            if name not in sections:
                raise ArchiveError(f"{path}: member {name} is missing; copy or download the file again")
        manifest = _manifest(path, read_section(path, sections[MANIFEST]), sections)
        config = read_section(path, sections[CONFIG])
        for algorithm in hashes_of(path, CONFIG, manifest):
            digest = HASHES[algorithm]()
            digest.update(memoryview(config))
            _compare(path, CONFIG, algorithm, digest.hexdigest(), manifest)
        try:
            values = parse_yaml(config)
            check_plain(values)
        except ValueError as error:
            raise ArchiveError(f"{path}: {CONFIG} cannot be used: {error}") from error
        if not isinstance(values, dict):
            raise ArchiveError(f"{path}: {CONFIG} is not a mapping")
        return cls(path, manifest, values, _weights(path, sections[WEIGHTS]), sections)

    @property
    def model_class(self) -> str:
        return str(self.manifest["model_class"])

    @property
    def provenance(self) -> Mapping[str, Any]:
        return dict(self.manifest["provenance"])

    @property
    def is_checkpoint(self) -> bool:
        return STATE in self.sections

    @property
    def weights_sha256(self) -> str:
        """SHA-256, in hex, of the member with the weights by the manifest; equal weights have equal hashes.

        Loading the weights compares the faster BLAKE3; `verify` compares both.
        """
        return str(self.manifest["files"][WEIGHTS]["sha256"])

    @property
    def model_identity(self) -> str:
        """SHA-256, in hex, of the weights' hash and of all configuration that changes an answer.

        Resume folders and caches compare it. Equal weights with another epsilon or token dropout are another model.
        Seed, initialization and dropout rates are left out: they change training only. Raises `ConfigError` for a
        configuration that describes no encoder.
        """
        encoder = EncoderConfig.from_config(self.config["encoder"]).to_dict()
        config = {key: value for key, value in self.config.items() if key != "seed"}
        config["encoder"] = {key: value for key, value in encoder.items() if key not in TRAINING_ONLY}
        name = hashes_of(self.path, WEIGHTS, self.manifest)[0]  # the one that loading compares
        parts = (self.model_class, self.manifest["alphabet"], self.manifest["files"][WEIGHTS][name], config)
        return hashlib.sha256(_json(parts)).hexdigest()

    def verify(
        self,
        *names: str,
        every_hash: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compare members (all, if none is named) with their hash. Raises `ArchiveError` for one that differs.

        `every_hash`: with BLAKE3 and SHA-256, where there are both; otherwise with the faster.
        `progress` is called with the bytes read and the bytes to read.
        """
        names = names or tuple(name for name in self.sections if name != MANIFEST)
        done, total = 0, sum(self.sections[name].size for name in names)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for name in names:
            algorithms = hashes_of(self.path, name, self.manifest)[: None if every_hash else 1]
            digests = hash_section(self.path, self.sections[name], advance, algorithms)
            for algorithm in algorithms:
                _compare(self.path, name, algorithm, digests[algorithm], self.manifest)

    def read_weights_once(self) -> TensorReader:
        """Return a reader that verifies the weights as it reads them."""
        return TensorReader(self, self.weights)

    def load_weights(self) -> dict[str, Tensor]:
        """Return the verified weights. Raises `ArchiveError` for damage, and for NaN or infinity."""
        return self._load_once(self.weights, must_be_finite=True)

    def load_finite(self, name: str) -> Tensor:
        """Return one tensor of the weights, not verified. Raises `ArchiveError` for NaN or infinity."""
        tensor = self.weights.load(name)
        if not _is_finite(tensor):
            raise self._not_finite(name)
        return tensor

    def _not_finite(self, name: str) -> ArchiveError:
        return ArchiveError(f"{self.path}: tensor {quoted(name)} holds NaN or infinity; the model is of no use")

    def _load_once(self, table: TensorTable, must_be_finite: bool) -> dict[str, Tensor]:
        """Read all tensors of a member once, and hash them on a second thread.

        Raises `ArchiveError` for damage, which comes first, and for NaN or infinity.
        """
        tensors, not_finite = {}, None
        with ThreadPoolExecutor(1) as hasher:
            reader = TensorReader(self, table, hasher)
            for name in table.infos:
                tensors[name] = reader.read_into(table.empty(name))
                if must_be_finite and not_finite is None and not _is_finite(tensors[name]):
                    not_finite = name
            reader.finish()
        if not_finite is not None:
            raise self._not_finite(not_finite)
        return tensors

    def load_outline(self) -> dict[str, Any]:
        """Return the training state without its tensors, verified."""
        if not self.is_checkpoint:
            raise ArchiveError(f"{self.path}: holds a model and no state of training; give a checkpoint")
        self.verify(STATE)
        try:
            outline = parse_json(read_section(self.path, self.sections[STATE]))
        except ValueError as error:
            raise ArchiveError(f"{self.path}: {STATE} cannot be used: {error}") from error
        if not isinstance(outline, dict):
            raise ArchiveError(f"{self.path}: {STATE} is not a mapping")
        return outline

    def load_state(self) -> dict[str, Any]:
        """Return the training state of a checkpoint, verified. Raises `ArchiveError` for damage."""
        outline = self.load_outline()
        try:
            table = TensorTable.open(self.path, STATE_TENSORS, self.sections[STATE_TENSORS])
        except ArchiveError:
            self.verify(STATE_TENSORS)  # a damaged file is reported as damaged
            raise
        tensors = self._load_once(table, must_be_finite=False)
        try:
            state = put_tensors_back(outline, tensors)
        except (ValueError, TypeError) as error:
            raise ArchiveError(f"{self.path}: {STATE} cannot be used: {error}") from error
        if not isinstance(state, dict):
            raise ArchiveError(f"{self.path}: {STATE} is not a mapping")
        return state


class TensorReader:
    """Reads the tensors of a member once, in the order of the file, and hashes them on the way.

    The tensors are verified once `finish` has returned, and not before.
    """

    def __init__(self, file: ArchiveFile, table: TensorTable, hasher: Executor | None = None) -> None:
        """hasher: see `SectionReader`."""
        self._file, self._table = file, table
        section = file.sections[table.member]
        self._algorithm = hashes_of(file.path, table.member, file.manifest)[0]
        self._reader = SectionReader(file.path, section, self._algorithm, hasher)
        self._reader.read_into(memoryview(bytearray(table.data.start - section.start)))  # the header of the member

    def read_into(self, tensor: Tensor) -> Tensor:
        """Fill a contiguous tensor of the right dtype with the next elements, and return it.

        Raises `ArchiveError` if the file ends early.
        """
        self._reader.read_into(bytes_of(tensor))
        return tensor

    def finish(self) -> None:
        """Raises `ArchiveError` if the bytes read do not match their hash, the fastest in the manifest."""
        _compare(self._file.path, self._table.member, self._algorithm, self._reader.hexdigest(), self._file.manifest)


def _manifest(path: Path, content: bytes, sections: Mapping[str, Section]) -> dict[str, Any]:
    """Return the parsed manifest. Raises `ArchiveError` unless it fits its own hash, the alphabet and the members."""
    try:
        manifest = parse_json(content)
    except ValueError as error:
        raise ArchiveError(f"{path}: {MANIFEST} cannot be parsed: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ArchiveError(
            f"{path}: {MANIFEST} is not of format {FORMAT_VERSION}; the file is of another release of bionemo_esm"
        )
    if manifest.pop("manifest_sha256", None) != (digest := _self_hash(manifest)):
        raise ArchiveError(f"{path}: {MANIFEST} does not match its own SHA-256; the file is damaged")
    if content != _json(manifest | {"manifest_sha256": digest}):
        raise ArchiveError(f"{path}: {MANIFEST} is not spelt as it was written; the file is damaged")
    for key, kind in (("model_class", str), ("files", dict), ("provenance", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ArchiveError(f"{path}: {key} in {MANIFEST} is missing or of the wrong kind")
    if manifest.get("alphabet") != " ".join(TOKENS):
        raise ArchiveError(f"{path}: its model was trained with another alphabet than the {len(TOKENS)} tokens of ESM")
    _check_files(path, manifest["files"], sections)
    return manifest


def _check_files(path: Path, files: Mapping[str, Any], sections: Mapping[str, Section]) -> None:
    if files.keys() != sections.keys() - {MANIFEST}:
        raise ArchiveError(f"{path}: {MANIFEST} lists {quoted(list(files))}, which are not the members of the file")
    for name, entry in files.items():
        if not isinstance(entry, dict) or entry.get("size") != sections[name].size:
            raise ArchiveError(f"{path}: {name} does not have the size that {MANIFEST} gives; the file is damaged")
        hashes_of(path, name, {"files": files})


def hashes_of(path: Path, name: str, manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of a member's hashes, the fastest first. Raises `ArchiveError` if none is known.

    Archives of version 0.1.0 and before have SHA-256 alone.
    """
    entry = manifest["files"][name]
    if not (found := [algorithm for algorithm in HASHES if algorithm in entry]):
        raise ArchiveError(
            f"{path}: {name} has no hash that is known here ({', '.join(HASHES)}) in {MANIFEST}, but "
            f"{quoted(sorted(entry.keys() - {'size'}))}; install a newer bionemo_esm"
        )
    for algorithm in found:
        if not isinstance(entry[algorithm], str) or not _DIGEST.fullmatch(entry[algorithm]):
            raise ArchiveError(f"{path}: the {algorithm} of {name} in {MANIFEST} is no hash; the file is damaged")
    return found


def _weights(path: Path, section: Section) -> TensorTable:
    table = TensorTable.open(path, WEIGHTS, section)
    for name, info in table.infos.items():
        if info.dtype not in _WEIGHT_DTYPES:
            raise ArchiveError(
                f"{path}: tensor {quoted(name)} has dtype {info.dtype}; weights are {' or '.join(_WEIGHT_DTYPES)}"
            )
    return table


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())  # NaN anywhere makes both NaN


def _compare(path: Path, name: str, algorithm: str, digest: str, manifest: Mapping[str, Any]) -> None:
    if manifest["files"][name][algorithm] != digest:
        label = {"blake3": "BLAKE3", "sha256": "SHA-256"}[algorithm]
        raise ArchiveError(f"{path}: {name} does not match its {label} in {MANIFEST}; the file is damaged")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()


def _self_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest without its entry for this hash."""
    return hashlib.sha256(_json(manifest)).hexdigest()
