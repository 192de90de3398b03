"""Which way a conversion goes, told from its two ends before torch is imported and anything long begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bionemo_esm.errors import ConfigError
from bionemo_esm.files import check_absent, check_writable
from bionemo_esm.model.archive import is_our_archive

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|commit)/([^/]+))?.*",
    re.ASCII,
)
_PUBLISHED = re.compile(r"esm(2|1b|1v)_t[0-9]+_\w+", re.ASCII)
"""Names of models that are of the organisation facebook on the Hub."""
PRECISIONS = {"32": "float32", "bf16": "bfloat16"}
"""Of weights, as archives give them, and as people and torch call them."""
_OURS = (".nemo", ".ckpt")
_FILES = (*_OURS, ".pt", ".pth", ".bin", ".safetensors")
"""Endings of files, which no id on the Hub has and no folder should."""
_MOST_NAMED = 6  # files or folders in one message


class Kind(Enum):
    """What a source is; the value is what people are told."""

    FOLDER = "a Hugging Face folder"
    HUB = "a model on the Hugging Face Hub"
    FAIR_ESM = "a fair-esm file"
    OURS = "an archive of ours"


@dataclass(frozen=True)
class Route:
    """From where to where."""

    source: str  # a path, or an id on the Hub
    kind: Kind
    target: Path

    @property
    def is_export(self) -> bool:
        return self.kind is Kind.OURS

    def check(self, revision: str | None, precision: str | None) -> None:
        """Raises `ConfigError` for a revision of what has none, and for a precision that is none."""
        if revision is not None and self.kind is not Kind.HUB:
            raise ConfigError(f"revision: {self.source} is {self.kind.value}; only a model on the Hub has revisions")
        if precision is not None and precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be {' or '.join(PRECISIONS)}, or null for the source's, not {precision!r}"
            )


def route(source: str, target: Path) -> Route:
    """Look at both ends. Raises `ConfigError` for ends that do not go together, or a target that cannot be."""
    kind = kind_of(source)
    _check_target(kind, source, target)
    return Route(source, kind, target)


def kind_of(source: str) -> Kind:
    """What is there under this name. Raises `ConfigError`, saying what could be, where it is nothing we read."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        if path.is_file():
            return _kind_of_file(path)
        there = path.exists()
    except OSError as error:
        raise ConfigError(f"source: {source} cannot be looked at ({error.strerror})") from error
    if not there and (meant := _meant(source)):
        raise ConfigError(f"source: {source}: no such folder or file; did you mean {meant}?")
    if not there and HUB_ID.fullmatch(source) and path.suffix not in _FILES:
        return Kind.HUB
    raise ConfigError(
        f"source: {source}: {'neither a folder nor a file' if there else 'no such folder or file'}; give a folder with "
        "a config.json, a model on the Hub as organisation/name, a fair-esm .pt, or a .nemo or .ckpt of ours"
    )


def _meant(source: str) -> str | None:
    """What to give instead of the address of a page on the Hub, or of a model's name without its organisation."""
    if page := _HUB_URL.fullmatch(source):
        return f"{page[1]}, with revision={page[2]}" if page[2] and page[2] != "main" else page[1]
    return f"facebook/{source}" if _PUBLISHED.fullmatch(source) else None


def _kind_of_folder(path: Path) -> Kind:
    if (path / "config.json").exists():
        return Kind.FOLDER
    if (path / "adapter_config.json").exists():
        raise ConfigError(
            f"source: {path} is an adapter, not a model; merge it into its model with `merge_and_unload` of peft, save "
            "that with save_pretrained, and give its folder"
        )
    if checkpoints := sorted(path.glob("checkpoint-*/config.json"), key=_number_of_checkpoint):
        names = ", ".join(str(config.parent) for config in checkpoints[-_MOST_NAMED:])
        raise ConfigError(f"source: {path} has no config.json, but its checkpoints have; name one of them: {names}")
    found = sorted([*path.glob("*.nemo"), *path.glob("checkpoints/*.ckpt"), *path.glob("*.pt")])
    names = f"; name one of its files: {', '.join(map(str, found[:_MOST_NAMED]))}" if found else ""
    raise ConfigError(f"source: {path} has no config.json, so it is no Hugging Face model{names}")


def _number_of_checkpoint(config: Path) -> tuple[int, str]:
    """Of the file in the folder checkpoint-500: 500, to have them in the order in which they were saved."""
    number = config.parent.name.removeprefix("checkpoint-")
    return (int(number) if re.fullmatch(r"[0-9]{1,12}", number) else -1), number


def _kind_of_file(path: Path) -> Kind:
    if is_our_archive(path):
        return Kind.OURS
    if path.suffix == ".pt":
        return Kind.FAIR_ESM
    reasons = {
        ".nemo": "is not an archive of ours; one of NeMo 1 or BioNeMo 1 is turned into one by `bionemo-esm "
        f"convert-legacy {path} NEW.nemo`",
        ".ckpt": "is not a checkpoint of ours, or damaged",
        ".safetensors": "holds weights alone; give the folder that it lies in, with its config.json",
        ".bin": "holds weights alone; give the folder that it lies in, with its config.json",
        ".json": "is one file of a model; give the folder that it lies in",
    }
    reason = reasons.get(path.suffix, "is none of the files we read: a fair-esm .pt, a .nemo or a .ckpt of ours")
    raise ConfigError(f"source: {path} {reason}")


def _check_target(kind: Kind, source: str, target: Path) -> None:
    if kind is Kind.OURS and target.suffix in _FILES:
        raise ConfigError(
            f"target: {target}: from {kind.value} a folder for Hugging Face is made, so name a folder"
            + ("; weights of a .ckpt alone: average it with last=1" if source.endswith(".ckpt") else "")
        )
    if kind is not Kind.OURS and target.suffix != ".nemo":
        raise ConfigError(f"target: {target}: from {kind.value} an archive is made, so its name must end in .nemo")
    check_absent("target", target)
    if kind is Kind.FOLDER and target.resolve().is_relative_to(Path(source).expanduser().resolve()):
        raise ConfigError(f"target: {target} lies within the source, {source}; choose a place outside it")
    check_writable("target", target)
