"""`bionemo-esm inspect` for a model or a checkpoint: its card, without torch, NeMo or the model itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.card import ArchiveCard
from bionemo_esm.screen import Meter, Screen, exit_of


def inspect(arguments: Sequence[str]) -> None:
    """`bionemo-esm inspect FILE [--verify] [--json]`: the card of a `.nemo` or a `.ckpt`."""
    parser = argparse.ArgumentParser("bionemo-esm inspect", description="Show what a model or a checkpoint is.")
    parser.add_argument("file", type=Path, help="a model (.nemo) or a checkpoint (.ckpt)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its hash with the manifest")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    options = parser.parse_args(arguments)
    exit_of(lambda: _inspect(options), "Interrupted.")


def _inspect(options: argparse.Namespace) -> int:
    file, screen = ArchiveFile.open(options.file), Screen(sys.stdout)
    card = ArchiveCard.of(file)
    screen.say(json.dumps(card.to_dict(), indent=2) if options.json else card.text())
    if options.verify:
        file.verify(progress=Meter(Screen(sys.stdout, silent=options.json), "read"))
        if not options.json:
            screen.say("\nEvery member matches its hash in the manifest.")
    return 0
