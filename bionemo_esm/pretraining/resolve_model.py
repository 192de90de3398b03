"""The encoder of a run: of the sizes in the configuration, or, with `model=of_archive`, of the archive to start from.

Only small members of an archive are read, without torch and NeMo.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile
from bionemo_esm.model.config import LEARNED, EncoderConfig
from bionemo_esm.model.interchange.formats import ARCHIVE, HUB, detect_format
from bionemo_esm.model.validate import extension_of

OF_ARCHIVE = "of_archive"  # a key of conf/model/of_archive.yaml; true: take all sizes from the archive
_DROPOUT_KEYS = ("hidden_dropout", "attention_dropout")
_NAMES = tuple(EncoderConfig.model_fields)
_CHOOSE = f"choose model={OF_ARCHIVE}, which takes all sizes from it, or the model group that fits"


@dataclass(frozen=True)
class ResolvedModel:
    """The encoder of a run, and the hash of the weights that it starts from."""

    encoder: EncoderConfig
    weights_sha256: str | None = None  # of restore_from_path; None: not set, or no such file


def resolve_model(values: Mapping[str, Any], restore_from: Path | None, continue_from: Path | None) -> ResolvedModel:
    """Return the encoder of the section `model`, given restore_from_path and continue_from_path.

    A model that starts from an archive has a contact head if and only if the archive has one. Raises `ConfigError`,
    naming the key, for impossible sizes, and for `model=of_archive` without an archive or with sizes of its own;
    `ArchiveError` if restore_from_path is a file but no archive.
    """
    takes_all = values.get(OF_ARCHIVE, False)
    if not isinstance(takes_all, bool):
        raise ConfigError(f"model.{OF_ARCHIVE} must be true or false, not {takes_all!r}", code="config.type")
    file = _file(restore_from, continue_from, takes_all)
    sha256 = file.weights_sha256 if file is not None and restore_from is not None else None
    if takes_all:
        if file is None:
            raise ConfigError(
                f"model={OF_ARCHIVE} takes its sizes from an archive, and restore_from_path is not set; name a .nemo "
                "there, or choose another model. `bionemo-esm convert` converts a model of Hugging "
                "Face or fair-esm into one"
            )
        return ResolvedModel(_encoder_of(file, values), sha256)
    encoder = EncoderConfig.from_config({key: value for key, value in values.items() if key != OF_ARCHIVE})
    if file is not None:
        encoder = encoder.replace(contact_head=_has_contact_head(file))
    return ResolvedModel(encoder, sha256)


def check_encoder_of_archive(encoder: EncoderConfig, path: Path) -> None:
    """Raise `ConfigError` if the archive has another architecture; dropout may differ."""
    for key, there, here in encoder.differences(_archived(ArchiveFile.open(path)).to_dict()):
        raise ConfigError(
            f"restore_from_path: {path} has {key} = {there}, the recipe model.{key} = {here}; set model.{key}={there}, "
            f"or {_CHOOSE}"
        )


def import_advice(path: Path) -> str | None:
    """Return how to import a model of another library; None if the path names no such model."""
    try:
        found = detect_format(str(path))
    except ConfigError:
        return None
    if found is ARCHIVE:
        return None
    what = f"there is no {path}; if it is {found.description}," if found is HUB else f"{path} is {found.description};"
    target = f"{path.name.removesuffix('.pt')}.nemo"
    command = shlex.join(["bionemo-esm", "convert", f"source={path}", f"target={target}"])
    return f"{what} bring it here first: {command}, then restore_from_path={target}"


def newest_archive(path: Path) -> ArchiveFile:
    """Return the checkpoint with the most steps of a run directory, or the checkpoint that is named.

    Raises `ConfigError` if none can be read. Hashes are checked later, by the run.
    """
    files = [path] if path.is_file() else sorted(path.glob("checkpoints/step-*.ckpt"))
    what = f"{path} holds no checkpoint" if path.exists() else f"there is no {path}"
    found, problem = [], f"{what}; name a run's folder, or a .ckpt"
    for candidate in files:
        try:
            file = ArchiveFile.open(candidate)
        except ArchiveError as error:
            problem = str(error)
            continue
        if not file.is_checkpoint:
            problem = f"{candidate} holds a model and no state of training; name a .ckpt, or restore_from_path"
        elif type(file.provenance.get("steps")) is int:
            found.append(file)
    if not found:
        raise ConfigError(f"continue_from_path: {problem}")
    return max(found, key=lambda file: file.provenance["steps"])


def _file(restore_from: Path | None, continue_from: Path | None, is_needed: bool) -> ArchiveFile | None:
    """Return the archive to start from; None if there is none and none is needed."""
    if restore_from is not None and (is_needed or restore_from.is_file()):
        if (advice := import_advice(restore_from)) is not None:
            raise ConfigError(f"restore_from_path: {advice}")
        if not restore_from.is_file():
            raise ConfigError(f"restore_from_path: {restore_from} is not a file; name a .nemo")
        file = ArchiveFile.open(restore_from)
        if extension_of(file) is not None:
            raise ConfigError(f"restore_from_path: {restore_from} is a fine-tuned model; name the pretrained .nemo")
        return file
    if restore_from is None and continue_from is not None:
        try:
            return newest_archive(continue_from)
        except ConfigError:
            if is_needed:
                raise  # otherwise `check_requirements` reports it with all other problems
    return None


def _archived(file: ArchiveFile) -> EncoderConfig:
    """Return the archive's encoder. Raises `ArchiveError` if it describes none of this package."""
    values = file.config.get("encoder")
    try:
        if not isinstance(values, Mapping):
            raise ConfigError("it describes no encoder")
        return EncoderConfig.from_config(values)
    except ConfigError as error:
        raise ArchiveError(f"{file.path}: model_config.yaml: {error}; a run cannot start from it") from error


def _has_contact_head(file: ArchiveFile) -> bool:
    """Whether the archive has a contact head; `check_requirements` refuses archives of other models."""
    values = file.config.get("encoder")
    return isinstance(values, Mapping) and values.get("contact_head") is True


def _encoder_of(file: ArchiveFile, values: Mapping[str, Any]) -> EncoderConfig:
    """Return the archive's encoder, with the dropout rates of the configuration, if it has any."""
    for key, value in values.items():
        if key not in (OF_ARCHIVE, *_NAMES):
            raise ConfigError(f"unknown key model.{key}; known are: {', '.join((OF_ARCHIVE, *_NAMES))}")
        if key == "seq_length" and type(value) is int and (advice := _another_length(file, value)) is not None:
            raise ConfigError(f"model.seq_length={value}: {advice}")
        if value is not None and key not in (OF_ARCHIVE, *_DROPOUT_KEYS):
            raise ConfigError(
                f"model.{key}={value}: with model={OF_ARCHIVE} it is what {file.path} has; only "
                f"{' and '.join(f'model.{name}' for name in _DROPOUT_KEYS)} can be set"
            )
    given = {key: values[key] for key in _DROPOUT_KEYS if values.get(key) is not None}
    return EncoderConfig.from_config({**_archived(file).to_dict(), **given})


def _another_length(file: ArchiveFile, seq_length: int) -> str | None:
    """Return how to convert an imported model to another length; None for others, or if the length is the same.

    A model that was trained after its import is exported first, so that its training is kept.
    """
    archived = _archived(file)
    if "imported_from" not in file.provenance or seq_length == archived.seq_length:
        return None
    is_stretched = archived.position_embedding == LEARNED and seq_length > archived.seq_length
    words = ["convert source=… target=….nemo", f"seq_length={seq_length}", *(["stretch_positions=true"] * is_stretched)]
    where = "convert its source again"
    if "steps" in file.provenance:
        where = f"export it ({shlex.join(['bionemo-esm', 'convert', f'source={file.path}'])} target=…), and import that"
    return (
        f"{file.path} is for sequences of up to {archived.seq_length} tokens. For another length {where}: bionemo-esm "
        f"{' '.join(words)}"
    )
