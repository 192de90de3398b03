"""`bionemo-esm inspect`: what a file or a folder is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bionemo_esm.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """The card of a store, if a folder is named; of a model or a checkpoint, if a file is; else exits with 2."""
    parser = argparse.ArgumentParser("bionemo-esm inspect", description="Show what is in a store, or what a model is.")
    parser.add_argument("path", type=Path, help="folder of a store, or file of a model (.nemo) or checkpoint (.ckpt)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its hash with the manifest")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    parser.add_argument("--picture", metavar="FILE", help="of a store: draw lengths and composition as a PNG")
    path = parser.parse_args(arguments).path
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"{path}: cannot be looked at ({error.strerror})") from error
    if is_folder and (path / "config.yaml").is_file() and not (path / "manifest.json").exists():
        files = [str(file) for file in sorted([*path.glob("*.nemo"), *path.glob("checkpoints/*.ckpt")])]
        raise UserError(
            f"{path}: the folder of a run; name one of its files: {', '.join(files[:6]) or 'there is none yet'}"
        )
    if is_folder:
        from bionemo_esm.data import store_commands as store_jobs

        store_jobs.inspect(arguments)
    elif is_file:
        from bionemo_esm.model import summary as model_jobs

        model_jobs.inspect(arguments)
    else:
        wrong = "neither a folder nor a file" if path.exists() else "no such folder or file"
        raise UserError(
            f"{path}: {wrong}; give the folder of a store, or the file of a model (.nemo) or checkpoint (.ckpt)"
        )
