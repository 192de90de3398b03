"""Differences between our outputs and those of the imported models, at their real sizes.

    python benchmarks/interchange_parity.py            # all; about 16 GB of memory
    python benchmarks/interchange_parity.py ESM-2      # models whose name contains this text

Each peer is built by its own library with random weights, saved by it, and converted by `import_model`. Both models
get the same masked proteins of the sample in float32: the peer padded, ours packed. The script prints the
largest absolute difference of every quantity, and the difference between the peer's float32 and float64 logits. If
the two are similar, the difference is rounding. Needs the `test` extra. Other load on the machine does not matter.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.data.preprocess import BuildPolicy, build_store_from_splits
from bionemo_esm.data.store import ProteinStore
from peers import Peer, Shape, batch_of, brought_here, errors, fair_esm, hugging_face, padded

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample"
WITH_MAPS = "1, 2 and 511 residues"  # short: the peers hold the attention maps of all layers several times
QUANTITIES = ("hidden states", "attentions", "contacts", "logits")
Build = Callable[[str, Shape, Path], Peer]
PEERS: list[tuple[str, Build, str, Shape]] = [
    ("ESM-1nv", hugging_face, "ESM-1nv", Shape(6, 768, 12, 0.02)),
    ("ESM-1b 650M", hugging_face, "ESM-1b", Shape(33, 1280, 20, 0.02)),
    ("ESM-2 8M", hugging_face, "ESM-2", Shape(6, 320, 20, 0.02)),
    ("ESM-2 35M", hugging_face, "ESM-2", Shape(12, 480, 20, 0.02)),
    ("ESM-2 150M", hugging_face, "ESM-2", Shape(30, 640, 20, 0.02)),
    ("ESM-2 650M", hugging_face, "ESM-2", Shape(33, 1280, 20, 0.02)),
    ("ESM-1b 650M", fair_esm, "ESM-1b", Shape(33, 1280, 20, 0.02)),
    ("ESM-1v 650M", fair_esm, "ESM-1v", Shape(33, 1280, 20, 0.02)),
    ("ESM-2 150M", fair_esm, "ESM-2", Shape(30, 640, 20, 0.02)),
    ("ESM-2 650M", fair_esm, "ESM-2", Shape(33, 1280, 20, 0.02)),
]


def batches(folder: Path) -> dict[str, PackedBatch]:
    parts = (SAMPLE / f"{part}.fasta.gz" for part in ("train", "validation", "test"))
    train: ProteinStore = build_store_from_splits(*parts, folder / "store", BuildPolicy())
    split = train.split("train")
    long = [split[int(index)] for index in np.flatnonzero(split.lengths >= 1022)[:3]]
    return {
        WITH_MAPS: batch_of([long[0][:1], long[1][:2], long[2][:511]]),
        "1,022 residues": batch_of([long[0][:1022]]),
    }


@torch.no_grad()
def rounding_of(peer: Peer, batch: PackedBatch) -> float:
    """Return the difference between the peer's float32 and float64 logits. Leaves the peer in float64."""
    tokens_BT = padded(batch, batch.tokens)
    single = peer.ask(tokens_BT, False).logits
    peer.model.double()
    return float((single - peer.ask(tokens_BT, False).logits).abs().max())


def compare(number: int) -> None:
    """Print the rows of one peer."""
    name, build, family, shape = PEERS[number]
    with tempfile.TemporaryDirectory() as folder:
        queries = batches(Path(folder))
        peer = build(family, shape, Path(folder) / "peer")
        ours = brought_here(peer, Path(folder))
        found = {query: errors(peer, ours, batch, maps=query == WITH_MAPS) for query, batch in queries.items()}
        del ours
        rounding = rounding_of(peer, queries[WITH_MAPS])
    for query, error in found.items():
        numbers = " | ".join(f"{error[name]:.1e}" if name in error else "" for name in QUANTITIES)
        own = f"{rounding:.1e}" if query == WITH_MAPS else ""
        library = {"hugging_face": "Hugging Face", "fair_esm": "fair-esm"}[build.__name__]
        print(f"| {name} | {library} | {query} | {numbers} | {own} |", flush=True)


def main(wanted: str = "") -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fair-esm"))
    print(f"{versions}, {torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}\n")
    print(f"| model | from | proteins | {' | '.join(QUANTITIES)} | their logits to float64 |")
    print("|---|---|---" + "|---:" * (len(QUANTITIES) + 1) + "|", flush=True)
    for number, (name, build, *_) in enumerate(PEERS):
        if wanted in f"{name} {build.__name__}":
            command = [sys.executable, __file__, "--peer", str(number)]  # a process returns all its memory when it ends
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        compare(int(sys.argv[2]))
    else:
        main(*sys.argv[1:2])
