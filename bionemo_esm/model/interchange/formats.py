"""Model formats for conversion, and the checks of a conversion's source and target; without torch.

One side of a conversion is always an archive (`.nemo` or `.ckpt`). The other side is a format of `FORMATS`. An
installed package adds a format with an entry point that names an instance of a `ModelFormat` subclass:

    [project.entry-points."bionemo_esm.formats"]
    my_format = "my_package.my_module:MY_FORMAT"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bionemo_esm.errors import ConfigError
from bionemo_esm.files import check_absent, check_writable
from bionemo_esm.model.archive import ArchiveFile, is_our_archive
from bionemo_esm.model.interchange import HUB_ID, PRECISIONS
from bionemo_esm.registry import Registry
from bionemo_esm.settings import expand_home

if TYPE_CHECKING:  # they import torch
    from bionemo_esm.model.interchange.export import ExportReport, Progress
    from bionemo_esm.model.interchange.state_dict_adapter import SourceModel

_HUB_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|commit)/([^/]+))?.*",
    re.ASCII,
)
_PUBLISHED = re.compile(r"esm(2|1b|1v)_t[0-9]+_\w+", re.ASCII)
"""Names of models of the organisation facebook on the Hub."""
_FILE_ENDINGS = (".nemo", ".ckpt", ".pt", ".pth", ".bin", ".safetensors")
"""File suffixes, which no id on the Hub has and no folder should have."""
_MOST_NAMED = 6  # maximum number of files or folders in a message


class ModelFormat:
    """A format of another library. A subclass overrides `detect`, and `read` or `write` or both.

    The module of a format is imported before torch. `read` and `write` import what they need.
    """

    description = ""
    """Name of a source in messages, such as "a fair-esm file"."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of the files that `write` makes, such as ".pt". They select the format of a target."""
    has_revisions = False
    """Whether a source has revisions: branches, tags, commits."""

    def detect(self, source: str) -> bool:
        """Return whether this path or id names a model of this format. May read only the beginning of files."""
        raise NotImplementedError

    def read(self, source: str, revision: str | None, advance: Callable[[int], None]) -> SourceModel:
        """Return the model; its weights are read on demand.

        `advance` is called with the number of bytes of each block read. Raises `UserError` for a model that our encoder
        cannot represent.
        """
        raise ConfigError(f"source: {source} is {self.description}, which cannot be imported")

    def write(
        self, file: ArchiveFile, target: Path, *, precision: str | None, shard_bytes: int, progress: Progress
    ) -> ExportReport:
        """Write the model of an archive atomically to a target that does not exist.

        precision: "32", "bf16", or None for that of the archive; shard_bytes: maximum bytes per file, if the format
        permits several files. Raises `UserError` for a model that the format cannot represent.
        """
        raise ConfigError(f"target: {target}: a model cannot be exported to this format")


FORMATS: Registry[ModelFormat] = Registry("model format", "source", "formats", ModelFormat)


class ArchiveFormat(ModelFormat):
    """Our own `.nemo` and `.ckpt`, one side of every conversion."""

    description, suffixes = "an archive of ours", (".nemo",)

    def detect(self, source: str) -> bool:
        return is_our_archive(expand_home(source))


class HuggingFaceFolder(ModelFormat):
    """A folder written by `save_pretrained` of Transformers."""

    description = "a Hugging Face folder"

    def detect(self, source: str) -> bool:
        return (expand_home(source) / "config.json").exists()

    def read(self, source: str, revision: str | None, advance: Callable[[int], None]) -> SourceModel:
        from bionemo_esm.model.interchange.huggingface import read_hugging_face

        return read_hugging_face(expand_home(source), advance=advance)

    def write(
        self, file: ArchiveFile, target: Path, *, precision: str | None, shard_bytes: int, progress: Progress
    ) -> ExportReport:
        from bionemo_esm.model.interchange.export import export_hugging_face

        return export_hugging_face(file, target, precision=precision, shard_bytes=shard_bytes, progress=progress)


class HuggingFaceHub(ModelFormat):
    """A model on the Hugging Face Hub, given by its id, organisation/name."""

    description, has_revisions = "a model on the Hugging Face Hub", True

    def detect(self, source: str) -> bool:
        path = expand_home(source)
        return bool(HUB_ID.fullmatch(source)) and path.suffix not in _FILE_ENDINGS and not path.exists()

    def read(self, source: str, revision: str | None, advance: Callable[[int], None]) -> SourceModel:
        from bionemo_esm.model.interchange.hub import fetch_from_hub
        from bionemo_esm.model.interchange.huggingface import read_hugging_face

        folder, commit = fetch_from_hub(source, revision)
        return read_hugging_face(folder, source=source, revision=commit, advance=advance)


class FairESMFile(ModelFormat):
    """A `.pt` of fair-esm."""

    description = "a fair-esm file"

    def detect(self, source: str) -> bool:
        path = expand_home(source)
        return path.suffix == ".pt" and path.is_file() and not is_our_archive(path)

    def read(self, source: str, revision: str | None, advance: Callable[[int], None]) -> SourceModel:
        from bionemo_esm.model.interchange.fair_esm import read_fair_esm

        return read_fair_esm(expand_home(source), advance=advance)


ARCHIVE, HUB, HUGGING_FACE_FOLDER = ArchiveFormat(), HuggingFaceHub(), HuggingFaceFolder()
for _name, _format in {
    "archive": ARCHIVE,
    "fair-esm": FairESMFile(),
    "hugging-face": HUGGING_FACE_FOLDER,
    "hugging-face-hub": HUB,
}.items():
    FORMATS.register(_name)(_format)


@dataclass(frozen=True)
class Conversion:
    """A checked pair of source and target."""

    source: str  # a path, or an id on the Hub
    source_format: ModelFormat
    target: Path
    target_format: ModelFormat

    @property
    def is_export(self) -> bool:
        return self.source_format is ARCHIVE

    @classmethod
    def of(cls, source: str, target: Path, revision: str | None = None, precision: str | None = None) -> Conversion:
        """Raises `ConfigError` for a source of no known format, a target that does not go with it or cannot be made, a
        revision of a source that has none, and an unknown precision.
        """
        source_format = detect_format(source)
        target_format = _target_format(source_format, source, target)
        if revision is not None and not source_format.has_revisions:
            raise ConfigError(
                f"revision: {source} is {source_format.description}; only a model on the Hub has revisions"
            )
        if precision is not None and precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be {' or '.join(PRECISIONS)}, or null for the source's, not {precision!r}"
            )
        return cls(source, source_format, target, target_format)


def detect_format(source: str) -> ModelFormat:
    """Return the format of a source. Raises `ConfigError` with a suggestion if no format detects it."""
    path = expand_home(source)
    try:
        for name in FORMATS:
            if (found := FORMATS.get(name)).detect(source) and not (found is HUB and _meant(source)):
                return found
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise ConfigError(f"source: {source} cannot be looked at ({error.strerror})") from error
    if is_folder:
        raise ConfigError(f"source: {path} {_problem_of_folder(path)}")
    if is_file:
        raise ConfigError(f"source: {path} {_problem_of_file(path)}")
    if not exists and (meant := _meant(source)):
        raise ConfigError(f"source: {source}: no such folder or file; did you mean {meant}?")
    raise ConfigError(
        f"source: {source}: {'neither a folder nor a file' if exists else 'no such folder or file'}; give a folder "
        "with a config.json, a model on the Hub as organisation/name, a fair-esm .pt, or a .nemo or .ckpt of ours"
    )


def _meant(source: str) -> str | None:
    """Suggest a source instead of the address of a page on the Hub, or of a name without its organisation."""
    if page := _HUB_URL.fullmatch(source):
        return f"{page[1]}, with revision={page[2]}" if page[2] and page[2] != "main" else page[1]
    return f"facebook/{source}" if _PUBLISHED.fullmatch(source) else None


def _problem_of_folder(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return (
            "is an adapter, not a model; merge it into its model with `merge_and_unload` of peft, save that with "
            "save_pretrained, and give its folder"
        )
    if checkpoints := sorted(path.glob("checkpoint-*/config.json"), key=_number_of_checkpoint):
        names = ", ".join(str(config.parent) for config in checkpoints[-_MOST_NAMED:])
        return f"has no config.json, but its checkpoints have; name one of them: {names}"
    found = sorted([*path.glob("*.nemo"), *path.glob("checkpoints/*.ckpt"), *path.glob("*.pt")])
    names = f"; name one of its files: {', '.join(map(str, found[:_MOST_NAMED]))}" if found else ""
    return f"has no config.json, so it is no Hugging Face model{names}"


def _number_of_checkpoint(config: Path) -> tuple[int, str]:
    """Return 500 for a file in the folder checkpoint-500; the sort key for the order of saving."""
    number = config.parent.name.removeprefix("checkpoint-")
    return (int(number) if re.fullmatch(r"[0-9]{1,12}", number) else -1), number


def _problem_of_file(path: Path) -> str:
    return {
        ".nemo": "is not an archive of ours; one of NeMo 1 or BioNeMo 1 is turned into one by `bionemo-esm "
        f"convert-legacy {path} NEW.nemo`",
        ".ckpt": "is not a checkpoint of ours, or damaged",
        ".safetensors": "holds weights alone; give the folder that it lies in, with its config.json",
        ".bin": "holds weights alone; give the folder that it lies in, with its config.json",
        ".json": "is one file of a model; give the folder that it lies in",
    }.get(path.suffix, "is none of the files we read: a fair-esm .pt, a .nemo or a .ckpt of ours")


def _target_format(source_format: ModelFormat, source: str, target: Path) -> ModelFormat:
    """Return the format of a target. Raises `ConfigError` if it does not fit the source or cannot be made."""
    if source_format is ARCHIVE:
        formats = (FORMATS.get(name) for name in FORMATS)
        found = next((one for one in formats if target.suffix in one.suffixes and one is not ARCHIVE), None)
        if found is None and target.suffix in _FILE_ENDINGS:
            raise ConfigError(
                f"target: {target}: from {source_format.description} a folder for Hugging Face is made, so name a "
                "folder" + ("; weights of a .ckpt alone: average it with last=1" if source.endswith(".ckpt") else "")
            )
        target_format = found or HUGGING_FACE_FOLDER
    elif target.suffix not in ARCHIVE.suffixes:
        raise ConfigError(
            f"target: {target}: from {source_format.description} an archive is made, so its name must end in .nemo"
        )
    else:
        target_format = ARCHIVE
    check_absent("target", target)
    if expand_home(source).is_dir() and target.resolve().is_relative_to(expand_home(source).resolve()):
        raise ConfigError(f"target: {target} lies within the source, {source}; choose a place outside it")
    check_writable("target", target)
    return target_format
