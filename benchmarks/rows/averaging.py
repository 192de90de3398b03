"""Row: average the last 47 checkpoints, which gives ESM-1nv's final weights, compared with the usual loop.

Our side verifies every byte, checks every number to be finite, and sums in float64. The loops load and sum in float32,
as the averaging scripts of most projects do. Each side reads its own, distinct files and writes a synced model.
Averaging runs on a CPU even after training on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.comparison import Row, Setting, Side
from benchmarks.rows.archives import check_space, model_of, synced
from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.pretraining.averaging import average_checkpoints

COPIES, QUICK_COPIES = 47, 5
Weights = Mapping[str, Tensor]


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the row. Raises `ConfigError` without disk space for 47 models in each of two formats."""
    copies = QUICK_COPIES if setting.quick else COPIES
    ours, theirs, exact = _write_sources(setting, copies)
    output, averaged = setting.folder / "averaged.nemo", setting.folder / "averaged.pt"

    def average_ours() -> None:
        average_checkpoints(ours, copies, output)

    average_ours()
    found = ArchiveFile.open(output).load_weights()
    wrong = sum(int((found[name] != mean.float()).sum()) for name, mean in exact.items())
    assert not wrong, "ours is to be the mean in float64, rounded once"
    sides = [Side("ours", average_ours, copies, "float64; every byte verified, every number checked to be finite")]
    for name, average, settings in (
        ("torch.load in a loop", loop, "float32, weights_only=True"),
        ("torch.load in a loop, tuned", tuned_loop, "float32, weights_only=True, mmap=True, added in place"),
    ):
        work = _averager(average, theirs, averaged)
        work()
        error = farthest(torch.load(averaged, weights_only=True), exact)
        sides.append(Side(name, work, copies, settings, error, ("torch",)))
    megabytes = ours[0].stat().st_size / 1e6
    yield Row(
        "averaging", f"Average of {copies} checkpoints of {megabytes:,.0f} MB", "checkpoint", "float32", sides,
        "largest difference from the mean in float64, over the largest weight", 1e-5, seconds_matter=True, turns=3,
        note="Ours is the mean in float64, rounded once, to the last bit; the time includes BLAKE3 of every byte.",
    )  # fmt: skip


def _write_sources(setting: Setting, copies: int) -> tuple[list[Path], list[Path], dict[str, Tensor]]:
    """Write checkpoints in our format and in PyTorch's, with the same weights. Return both, and the mean in float64."""
    archive = describe(model_of(setting))
    base = {name: tensor.detach().cpu() for name, tensor in archive.weights.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in base.values())
    check_space(setting.folder, (2 * copies + 3) * size)
    exact = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in base.items()}
    ours, theirs = [], []
    for number in range(copies):
        step = 1000 * (number + 1)
        generator = torch.Generator().manual_seed(number)
        weights = {name: tensor + 0.01 * _noise(tensor, generator) for name, tensor in base.items()}
        for name, tensor in weights.items():
            exact[name] += tensor
        said = Archive(archive.model_class, archive.config, weights, {"steps": step})
        ours.append(write_archive(setting.folder / f"step-{step:09d}.nemo", said))
        theirs.append(setting.folder / f"step-{step:09d}.pt")
        synced(theirs[-1], partial(torch.save, weights))
    for total in exact.values():
        total.div_(copies)
    return ours, theirs, exact


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator)


def _averager(
    average: Callable[[list[Path]], dict[str, Tensor]], paths: list[Path], output: Path
) -> Callable[[], None]:
    return lambda: synced(output, lambda to: torch.save(average(paths), to))


def loop(paths: list[Path]) -> dict[str, Tensor]:
    """Average with the usual loop over whole files, in float32."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in torch.load(path, weights_only=True).items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return {name: tensor / len(paths) for name, tensor in total.items()}


def tuned_loop(paths: list[Path]) -> dict[str, Tensor]:
    """Average with the same loop without its copies."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in torch.load(path, weights_only=True, mmap=True).items():
            if name in total:
                total[name] += tensor
            else:
                total[name] = tensor.clone()
    return {name: tensor.div_(len(paths)) for name, tensor in total.items()}


def farthest(found: Weights, exact: Weights) -> float:
    """Return the largest difference over the largest absolute value of `exact`; infinity if tensors are missing."""
    if found.keys() != exact.keys():
        return float("inf")
    largest = max(float(mean.abs().max()) for mean in exact.values())
    return max(float((found[name].double() - mean).abs().max()) for name, mean in exact.items()) / largest
