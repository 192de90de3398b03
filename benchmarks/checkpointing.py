"""What checkpoints of ESM-1nv cost: the stall of training, the writing, the reading, and the average of 47.

python benchmarks/checkpointing.py [--folder DIR] [--copies 47]

Beside each stands what people use otherwise, on the same tensors in the same run: `torch.save` with an fsync, and the
usual averaging loop (load each file whole, add up in float32). Needs about 20 GB in DIR; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.training.averaging import average_checkpoints
from bionemo_esm.training.checkpoints import Copies

PARAMETERS = 43_612_544
ENCODER = {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}


def weights_of(seed: int) -> dict[str, Tensor]:
    """As many float32 numbers as ESM-1nv has, in tensors of the sizes it has."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(128, 768), (512, 768), (768, 768), (768,), (128,)]
    for _ in range(6):
        shapes += [(2304, 768), (768, 768), (3072, 768), (768, 3072), (2304,), (3072,), (768,), (768,)]
    tensors = {f"tensor.{i:03d}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    rest = PARAMETERS - sum(tensor.numel() for tensor in tensors.values())
    return tensors | {"tensor.rest": torch.randn(rest, generator=generator)}


def training_state() -> Archive:
    """Weights and Adam's two moments: what a checkpoint of ESM-1nv holds."""
    moments = {0: weights_of(1), 1: weights_of(2)}
    return Archive("ESM1nvModel", {"encoder": ENCODER}, weights_of(0), {"steps": 1000}, {"optimizer": moments})


def seconds(job: Callable[[], Any], repeats: int = 3) -> float:
    """The median of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def torch_save(path: Path, value: Any) -> None:
    """Peers' way, with the sync that makes it comparable."""
    with path.open("wb") as stream:
        torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def measure_saving(folder: Path) -> None:
    archive = training_state()
    ours, theirs = folder / "step-000001000.ckpt", folder / "torch.ckpt"
    plain = {"state_dict": dict(archive.weights), "state": archive.state}
    print("| a checkpoint of ESM-1nv (weights and two moments, float32) | ours | torch |")
    print("|---|---|---|")
    copies = Copies()
    first, stall = seconds(lambda: copies.of(archive), repeats=1), seconds(lambda: copies.of(archive))
    write, torch_write = seconds(lambda: write_archive(ours, archive)), seconds(lambda: torch_save(theirs, plain))
    print(f"| training waits, written in the background: first, and later times | {first:.2f} s, {stall:.2f} s | - |")
    print(f"| training waits, written at once (synced; ours hashed) | {write:.2f} s | {torch_write:.2f} s |")
    verify = seconds(lambda: ArchiveFile.open(ours).verify())
    print(f"| verify every byte | {verify:.2f} s | not possible |")

    def load() -> None:
        file = ArchiveFile.open(ours)
        file.load_weights(), file.load_state()

    torch_load = seconds(lambda: torch.load(theirs, weights_only=True))
    print(f"| load (ours verified and checked finite) | {seconds(load):.2f} s | {torch_load:.2f} s |")
    print(f"| size | {ours.stat().st_size / 1e6:,.1f} MB | {theirs.stat().st_size / 1e6:,.1f} MB |\n")
    ours.unlink(), theirs.unlink()


def average_naively(paths: list[Path]) -> dict[str, Tensor]:
    """The loop of the usual scripts: whole files, float32."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in torch.load(path, weights_only=True).items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return {name: tensor / len(paths) for name, tensor in total.items()}


def peak_memory() -> int:
    """Of this process so far, in bytes (a child's `getrusage` begins with its parent's)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run_averaging(kind: str, folder: Path) -> None:
    """In a process of its own: seconds and peak memory of one of the two ways."""
    before = peak_memory()
    started = time.perf_counter()
    if kind == "ours":
        paths = sorted(folder.glob("step-*.nemo"))
        average_checkpoints(paths, len(paths), folder / "averaged.nemo")
    else:
        torch_save(folder / "averaged.pt", average_naively(sorted(folder.glob("*.pt"))))
    took = time.perf_counter() - started
    peak = (peak_memory() - before) / (4 * PARAMETERS)
    print(f"{took:.1f} s, {peak:.1f} models of memory", end="")


def measure_averaging(folder: Path, copies: int) -> None:
    for number in range(copies):
        weights = weights_of(100 + number)
        provenance = {"steps": 1000 * (number + 1)}
        write_archive(
            folder / f"step-{number:09d}.nemo", Archive("ESM1nvModel", {"encoder": ENCODER}, weights, provenance)
        )
        torch_save(folder / f"{number:09d}.pt", weights)
    print(f"| average of {copies} | |\n|---|---|")
    for kind, label in (
        ("ours", "ours: float64, verified, checked finite"),
        ("torch", "torch.load in a loop, float32"),
    ):
        command = [sys.executable, __file__, "--averaging", kind, "--folder", str(folder)]
        print(f"| {label} | {subprocess.run(command, capture_output=True, text=True, check=True).stdout} |")
    paths = sorted(folder.glob("step-*.nemo"))
    exact = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights_of(0).items()}
    for path in paths:
        for name, tensor in ArchiveFile.open(path).weights.load_all().items():
            exact[name] += tensor.double()
    ours = ArchiveFile.open(folder / "averaged.nemo").weights.load_all()
    theirs = torch.load(folder / "averaged.pt", weights_only=True)
    for label, means in (("ours", ours), ("torch", theirs)):
        wrong = sum(int((means[name] != (exact[name] / copies).float()).sum()) for name in exact)
        print(f"| {label}: numbers that differ from the float64 mean, rounded | {wrong / PARAMETERS:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--copies", type=int, default=47)
    parser.add_argument("--averaging", choices=("ours", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.averaging:
        run_averaging(options.averaging, options.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure_saving(folder)
        measure_averaging(folder, options.copies)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
