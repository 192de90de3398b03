"""Which encoder a run trains: of the sizes in its configuration, or that of the archive which it starts from.

`model=of_archive` (conf/model/of_archive.yaml) stands for the latter. Only small members are read: neither torch nor
NeMo is needed.
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
from bionemo_esm.model.interchange.format_detection import Kind, kind_of
from bionemo_esm.model.validate import extension_of
from bionemo_esm.settings import boolean

MARK = "of_archive"  # a key of the model's group; true: its sizes are the archive's
_FREE = ("hidden_dropout", "attention_dropout")
_NAMES = tuple(EncoderConfig.model_fields)
_CHOOSE = f"choose model={MARK}, which takes all sizes from it, or the model group that fits"


@dataclass(frozen=True)
class ResolvedModel:
    """The encoder of a run, and the weights that it starts from."""

    encoder: EncoderConfig
    weights_sha256: str | None = None  # of restore_from_path; None where it is not set, or there is no such file


def resolve_model(values: Any, restore_from: Path | None, continue_from: Path | None) -> ResolvedModel:
    """What the section `model` of a configuration comes to, beside restore_from_path and continue_from_path.

    A contact head belongs to an archive's weights: whatever the configuration says, it is there if it is there. Raises
    `ConfigError`, naming the key, for sizes that cannot be; for `model=of_archive` without an archive, or with sizes of
    its own; `ArchiveError` for a file of `restore_from_path` that is no archive.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"model must be a mapping, not {values!r}")
    takes_all = boolean(f"model.{MARK}", values.get(MARK, False))
    file = _file(restore_from, continue_from, takes_all)
    sha256 = file.weights_sha256 if file is not None and restore_from is not None else None
    if takes_all:
        if file is None:
            raise ConfigError(
                f"model={MARK} takes its sizes from an archive, and restore_from_path is not set; name a .nemo there, "
                "or choose another model. python examples/convert_checkpoint.py makes one of a model of Hugging Face's "
                "or fair-esm's"
            )
        return ResolvedModel(_of(file, values), sha256)
    encoder = EncoderConfig.from_config({key: value for key, value in values.items() if key != MARK})
    if file is not None:
        encoder = encoder.replace(contact_head=_has_contact_head(file))
    return ResolvedModel(encoder, sha256)


def check_that_it_is_the_archives(encoder: EncoderConfig, path: Path) -> None:
    """Raises `ConfigError` where the archive holds a model of another shape; dropout may differ."""
    for key, there, here in encoder.differences(_archived(ArchiveFile.open(path)).to_dict()):
        raise ConfigError(
            f"restore_from_path: {path} has {key} = {there}, the recipe model.{key} = {here}; set model.{key}={there}, "
            f"or {_CHOOSE}"
        )


def how_to_bring(path: Path) -> str | None:
    """What to do first about a model of another library's; None where the path names none."""
    try:
        kind = kind_of(str(path))
    except ConfigError:
        return None
    if kind is Kind.OURS:
        return None
    found = f"there is no {path}; if it is {kind.value}," if kind is Kind.HUB else f"{path} is {kind.value};"
    target = f"{path.name.removesuffix('.pt')}.nemo"
    command = shlex.join(["bionemo-esm", "convert", f"source={path}", f"target={target}"])
    return f"{found} bring it here first: {command}, then restore_from_path={target}"


def newest_archive(path: Path) -> ArchiveFile:
    """Of the checkpoints of a run's folder, the one after most steps, or the one that is named.

    Raises `ConfigError` where there is none that can be read. Hashes are left to the run itself.
    """
    files = [path] if path.is_file() else sorted(path.glob("checkpoints/step-*.ckpt"))
    found, problem = [], f"{path} holds no checkpoint; name a run's folder, or a .ckpt"
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
    """The archive that a run begins with; None where there is none at hand and none is needed."""
    if restore_from is not None and (is_needed or restore_from.is_file()):
        if (advice := how_to_bring(restore_from)) is not None:
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
                raise  # for other models, `check_requirements` says it, beside all else that is missing
    return None


def _archived(file: ArchiveFile) -> EncoderConfig:
    """The sizes that an archive records. Raises `ArchiveError` for what describes no encoder of ours."""
    values = file.config.get("encoder")
    try:
        if not isinstance(values, Mapping):
            raise ConfigError("it describes no encoder")
        return EncoderConfig.from_config(values)
    except ConfigError as error:
        raise ArchiveError(f"{file.path}: model_config.yaml: {error}; a run cannot start from it") from error


def _has_contact_head(file: ArchiveFile) -> bool:
    """What is no encoder of ours has none; `check_requirements` refuses it."""
    values = file.config.get("encoder")
    return isinstance(values, Mapping) and values.get("contact_head") is True


def _of(file: ArchiveFile, values: Mapping[str, Any]) -> EncoderConfig:
    """The archive's encoder, under the dropout that the configuration gives, where it gives one."""
    for key, value in values.items():
        if key not in (MARK, *_NAMES):
            raise ConfigError(f"unknown key model.{key}; known are: {', '.join((MARK, *_NAMES))}")
        if key == "seq_length" and type(value) is int and (advice := _another_length(file, value)) is not None:
            raise ConfigError(f"model.seq_length={value}: {advice}")
        if value is not None and key not in (MARK, *_FREE):
            raise ConfigError(
                f"model.{key}={value}: with model={MARK} it is what {file.path} has; only "
                f"{' and '.join(f'model.{name}' for name in _FREE)} can be set"
            )
    given = {key: values[key] for key in _FREE if values.get(key) is not None}
    return EncoderConfig.from_config({**_archived(file).to_dict(), **given})


def _another_length(file: ArchiveFile, seq_length: int) -> str | None:
    """How an imported model comes to be one for sequences of so many tokens; None for others, or where it is already.

    One that was trained here since is taken home first, so that what it learned is not lost.
    """
    archived = _archived(file)
    if "imported_from" not in file.provenance or seq_length == archived.seq_length:
        return None
    is_stretched = archived.position_embedding == LEARNED and seq_length > archived.seq_length
    words = ["convert source=… target=….nemo", f"seq_length={seq_length}", *(["stretch_positions=true"] * is_stretched)]
    where = "convert its source again"
    if "steps" in file.provenance:
        where = (
            f"take it home ({shlex.join(['bionemo-esm', 'convert', f'source={file.path}'])} target=…), and bring that"
        )
    return (
        f"{file.path} is for sequences of up to {archived.seq_length} tokens. For another length {where}: bionemo-esm "
        f"{' '.join(words)}"
    )
