"""Command `bionemo-esm inspect`: identify a file or a folder, one of ours or a model of Hugging Face."""

from __future__ import annotations

import argparse
import codecs
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bionemo_esm.console import Console
from bionemo_esm.errors import UserError

_LARGEST_JSON = 2**26  # bytes
_MOST_FILES = 12  # maximum number of files of a folder in a message
_START = 512  # bytes that tell a format
_EMBEDDINGS = (b"\x89HDF", b"PAR1", b"PK\x03\x04")
_OTHERS = {
    b">": "a FASTA file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet table",
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a zip archive, as .npz and .xlsx are",
    b"\x89PNG": "a picture",
}
"""First bytes of other file formats."""
_WANTED = "give the folder of a store, or the file of a model (.nemo) or checkpoint (.ckpt)"
Facts = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Print the format and contents of a file or folder. Raises `UserError` for an unknown one."""
    parser = argparse.ArgumentParser(
        "bionemo-esm inspect",
        description="Show what a store, a model, a checkpoint, embeddings, contacts or the folder of a run is.",
    )
    parser.add_argument("path", type=Path, help="a file or folder that a command wrote; or a Hugging Face folder")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its hash with the manifest")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--picture", metavar="FILE", help="of a store: draw lengths and composition as a PNG")
    options = parser.parse_args(arguments)
    path = options.path
    try:
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path}: {_what_is_wrong(path)}; {_WANTED}", code="inspect.absent")
        facts = _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be looked at ({error.strerror})", code="inspect.unreadable") from error
    if facts is None:
        _summary_of(path)(arguments)
        return
    if options.verify or options.picture:
        raise UserError(f"{path}: --verify and --picture are for stores and models; this is {facts['kind']}")
    text = json.dumps({"path": str(path), **facts}, indent=2) if options.json else _text(path, facts)
    Console(sys.stdout).print_line(text)


def _summary_of(path: Path) -> Callable[[Sequence[str]], None]:
    """Return the function that prints the summary of a store, for a folder, or of a model."""
    if path.is_dir():
        from bionemo_esm.data import store_commands

        return store_commands.inspect
    from bionemo_esm.model import summary

    return summary.inspect


def _folder(path: Path) -> Facts | None:
    """Return the facts about a folder; None for a store. Raises `UserError` for an unknown one, naming its content."""
    manifest, config, summary = (_json(path / name) for name in ("manifest.json", "config.json", "summary.json"))
    if "about" in manifest and "parts" in manifest:
        return _embeddings(path)
    if (path / "manifest.json").exists():
        return None
    if (path / "maps").is_dir() and (path / "contacts.csv").is_file():
        return {"kind": "contacts", **_plain(summary), "maps": len(list((path / "maps").glob("*.npz")))}
    if "model_type" in config:
        target = f"{path.absolute().name}.nemo"
        command = shlex.join(["bionemo-esm", "convert", f"source={path}", f"target={target}"])
        return {"kind": "a Hugging Face model", **_plain(config), "to use it here": command}
    if (path / "config.yaml").is_file():
        if re.search(r"^task:", (path / "config.yaml").read_text(errors="replace"), re.MULTILINE):
            return {"kind": "the folder of a fine-tuning", "files": _names(path, "*.nemo", "report.*")}
        return {"kind": "the folder of a run", **_plain(summary), "files": _names(path, "*.nemo", "checkpoints/*.ckpt")}
    names = sorted(entry.name for entry in path.iterdir())
    held = f"it holds {', '.join(names[:_MOST_FILES])}" if names else "it is empty"
    raise UserError(
        f"{path}: is not a store (no manifest.json), nor any other folder of ours; {held}; {_WANTED}",
        code="inspect.foreign",
    )


def _file(path: Path) -> Facts | None:
    """Return the facts about a file; None for an archive. Raises `UserError` for any other, naming its format."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", code="inspect.unreadable") from error
    if start[:4] in _EMBEDDINGS:
        from bionemo_esm.inference.embedding.formats import EmbeddingFileError

        try:
            return _embeddings(path)
        except EmbeddingFileError:
            pass
    if path.suffix in (".nemo", ".ckpt"):
        return None  # the archive reader names archives of NeMo and others in its errors
    if path.suffix == ".pt":
        command = shlex.join(["bionemo-esm", "convert", f"source={path}", f"target={path.stem}.nemo"])
        raise UserError(f"{path}: is of PyTorch; if it is a model of fair-esm: {command}", code="inspect.foreign")
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: is {what}, not a model or embeddings of ours; {_WANTED}", code="inspect.foreign")
    if start and b"\0" not in start and _is_text(start):
        raise UserError(f"{path}: is a text file, not a model or embeddings of ours; {_WANTED}", code="inspect.foreign")
    return None


def _is_text(start: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _what_is_wrong(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {path.readlink()}, which is not there"
    return "neither a folder nor a file" if path.exists() else "no such folder or file"


def _embeddings(path: Path) -> Facts:
    from bionemo_esm.inference.embedding.formats import read_about

    return {"kind": "embeddings", **read_about(path)}


def _json(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a JSON file; empty if the file is missing, too large or not a mapping."""
    try:
        values = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_JSON else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _plain(values: Mapping[str, Any]) -> Facts:
    """Return the entries whose values are scalars or lists of scalars."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, str | int | float)
        or (isinstance(value, list) and all(isinstance(item, str | int | float) for item in value))
    }


def _names(folder: Path, *patterns: str) -> list[str]:
    return [str(file) for pattern in patterns for file in sorted(folder.glob(pattern))][:_MOST_FILES]


def _text(path: Path, facts: Facts) -> str:
    """Return the facts as text, one per line, with terminal control characters escaped."""
    from bionemo_esm.model.summary import escaped

    rows = [(key.replace("_", " "), value) for key, value in facts.items() if key != "kind" and value not in (None, [])]
    width = max([*(len(key) for key, _ in rows), 0])
    lines = [escaped(f"{path}: {facts['kind']}")]
    for key, value in rows:
        items = value if isinstance(value, list) and key == "files" else [value]
        for number, item in enumerate(items):
            shown = ", ".join(map(str, item)) if isinstance(item, list) else f"{item}"
            lines.append(f"  {escaped('' if number else key):<{width}}  {escaped(shown, 300)}")
    return "\n".join(lines)
