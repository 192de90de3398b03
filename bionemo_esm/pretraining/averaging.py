"""The mean of the last checkpoints' weights; ESM-1nv's final model is the mean of the last 47.

A run's end and the command call the same function, so they agree bit for bit. Weights are summed in float64, oldest
first, a block of a tensor at a time: memory holds the mean and a few blocks, for any number of files. Each file is read
and hashed once; nothing is returned before all hashes are verified.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bionemo_esm.errors import UserError
from bionemo_esm.model.archive import WEIGHTS, Archive, ArchiveFile, TensorReader, write_archive

_BLOCK = 2**18  # elements; their float64 sum fits into the cache of a core
_MOST_THREADS = 4  # that read and hash; more do not help

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the total."""


class AveragingError(UserError):
    """Checkpoints that cannot be averaged; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A checkpoint or an archive to be averaged."""

    file: ArchiveFile
    step: int

    @classmethod
    def open(cls, path: Path) -> Source:
        file = ArchiveFile.open(path)
        step = file.provenance.get("steps")
        if type(step) is not int:
            raise AveragingError(f"{path}: does not say after how many steps it was written; it cannot be put in order")
        if "averaged_from" in file.provenance:
            raise AveragingError(f"{path}: is an average itself; give the checkpoints that it was made from")
        return cls(file, step)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def interval(self) -> int | None:
        """Steps between the checkpoints of its run; None for the final archive of a run."""
        interval = self._schedule.get("every_n_train_steps")
        return interval if type(interval) is int and interval > 0 else None

    def is_on_schedule(self, newest: Source) -> bool:
        """Whether the schedule saved it, and not a stop, the best validation, or the end of an earlier session."""
        if self._schedule.get("on_schedule", True) is not True:
            return False
        return self.interval is None or self.step % self.interval == 0 or self is newest

    @property
    def _schedule(self) -> Mapping[str, Any]:
        schedule = self.file.provenance.get("checkpoint")
        return schedule if isinstance(schedule, dict) else {}

    def describe(self) -> dict[str, Any]:
        """Return its entry in the provenance of the mean."""
        return {"file": self.path.name, "steps": self.step, "weights_sha256": self.file.weights_sha256}


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths and glob patterns. Raises `AveragingError` for one without a file."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            raise AveragingError(f"{pattern}: is a folder; name its files, as in '{pattern}/*.ckpt'")
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob takes none that is absolute
        if not matches:
            raise AveragingError(f"{pattern}: no such file; give checkpoints (.ckpt) or archives (.nemo)")
        repeated = [match for match in matches if Path(match).resolve() in found]
        if repeated:
            raise AveragingError(f"{repeated[0]}: is given twice; it would count twice")
        found.update(dict.fromkeys(Path(match).resolve() for match in matches))
    return list(found)


def select(paths: Sequence[Path], last: int | None) -> tuple[list[Source], list[str]]:
    """Return the last checkpoints (None: all), oldest first, and a note for each that is skipped.

    Checkpoints off the run's schedule are skipped: they depend on the moment of a stop. Raises `AveragingError` if
    there are too few, if one of the series is missing, or if two are equal.
    """
    every = sorted(
        (Source.open(path) for path in paths), key=lambda source: (source.step, source.file.weights_sha256, source.path)
    )
    sources = [source for source in every if source.is_on_schedule(newest=every[-1])]
    notes = [f"{source.path.name}: left out; saved off the schedule" for source in every if source not in sources]
    if len(sources) < max(last or 0, 1):
        raise AveragingError(
            f"the last {last or 'ones'} were asked for, but there are {len(sources)}"
            + (f"; give more of them, or last={len(sources)}" if sources else "")
            + (f" ({'; '.join(notes)})" if notes else "")
        )
    chosen = sources[-last:] if last else sources
    _check_series(chosen)
    return chosen, notes


def average(sources: Sequence[Source], progress: Progress = lambda done, total: None) -> Archive:
    """Return the mean of the weights, float32, in an archive like the last source's that names all sources.

    Raises `ArchiveError` or `AveragingError`, naming the file, for damage, for different architectures, and for weights
    that are not finite.
    """
    last = sources[-1]
    _check_same_model(sources)
    weights = _means([source.file for source in sources], progress)
    provenance = {key: value for key, value in last.file.provenance.items() if key != "checkpoint"}
    provenance["averaged_from"] = [source.describe() for source in sources]
    return Archive(last.file.model_class, {**last.file.config, "precision": "32"}, weights, provenance)


@dataclass(frozen=True)
class AverageReport:
    """The averaged sources, oldest first, and notes on skipped ones."""

    sources: list[Source]
    notes: list[str]


def average_checkpoints(
    paths: Sequence[Path], last: int | None, output: Path, progress: Progress | None = None
) -> AverageReport:
    """Write the mean of the last checkpoints (None: all) to `output`. Raises as `select` and `average` do."""
    sources, notes = select(paths, last)
    write_archive(output, average(sources, progress or (lambda done, total: None)))
    return AverageReport(sources, notes)


def _means(files: Sequence[ArchiveFile], progress: Progress) -> dict[str, Tensor]:
    """Return the means of all tensors, float32, from one parallel pass over the files."""
    last, readers = files[-1].weights, [file.read_weights_once() for file in files]
    means = {name: torch.empty(info.shape, dtype=torch.float32, device="cpu") for name, info in last.infos.items()}
    done, total = 0, sum(file.weights.data.size for file in files)
    with ThreadPoolExecutor(threads := min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        ahead = _Prefetcher(pool, readers, torch.empty(threads + 1, _BLOCK, dtype=torch.float32, device="cpu"))
        for name, mean in means.items():
            dtypes = [file.weights.dtype(name) for file in files]
            for piece in mean.view(-1).split(_BLOCK):
                if not _mean(ahead.read(dtypes, len(piece)), len(files), piece):
                    raise _not_finite(files, name)
                progress(done := done + len(piece) * sum(dtype.itemsize for dtype in dtypes), total)
    for reader in readers:
        reader.finish()
    return means


def _mean(numbers: Iterator[Tensor], count: int, mean: Tensor) -> bool:
    """Fill `mean`, float32 [n], with the mean of `count` tensors, summed in float64. Return whether it is finite."""
    total = np.full(len(mean), -0.0)  # -0.0 is the neutral element of the sum
    with np.errstate(invalid="ignore"):
        for read in numbers:
            np.add(total, read.float().numpy(), out=total)
    if not np.isfinite(total).all():  # a sum of float32 cannot overflow float64
        return False
    np.divide(total, count, out=total)
    mean.numpy()[:] = total
    return True


class _Prefetcher:
    """Reads and hashes the next block of every file in threads, ahead of the sum."""

    def __init__(self, pool: Executor, readers: Sequence[TensorReader], buffers: Tensor) -> None:
        """buffers: float32 [blocks in flight, elements of a block]."""
        self.pool, self.readers, self.buffers = pool, readers, buffers

    def read(self, dtypes: Sequence[torch.dtype], count: int) -> Iterator[Tensor]:
        """Yield the next `count` elements of each file, [count] of its dtype, valid until the next one."""
        in_flight: deque[Future[Tensor]] = deque()
        for number, (reader, dtype) in enumerate(zip(self.readers, dtypes, strict=True)):
            if len(in_flight) == len(self.buffers):
                yield in_flight.popleft().result()
            buffer = self.buffers[number % len(self.buffers)].view(dtype)[:count]
            in_flight.append(self.pool.submit(reader.read_into, buffer))
        while in_flight:
            yield in_flight.popleft().result()


def _not_finite(files: Sequence[ArchiveFile], name: str) -> UserError:
    """Return the error that names the file. Damage, which may cause NaN, is reported first."""
    for file in files:
        file.verify(WEIGHTS)
    found = next((file.path for file in files if not file.weights.load(name).isfinite().all()), None)
    if found is None:
        return AveragingError(f"{files[-1].path.parent}: a file changed while tensor {name!r} was read; try again")
    return AveragingError(f"{found}: tensor {name!r} holds NaN or infinity; leave this file out")


def _check_series(sources: Sequence[Source]) -> None:
    """Raise `AveragingError` unless the sources are one run's, without repeated or missing steps."""
    last = sources[-1]
    for source in sources:
        for key in ("seed", "data_manifest_sha256"):
            ours, theirs = source.file.provenance.get(key), last.file.provenance.get(key)
            if ours != theirs:
                raise AveragingError(
                    f"{source.path}: is of another run than {last.path}: {key} is {ours}, there {theirs}; weights of "
                    "different runs have no meaningful mean"
                )
    for before, after in pairwise(sources):
        if before.step == after.step:
            same = (
                "has the weights of" if before.file.weights_sha256 == after.file.weights_sha256 else "is of the step of"
            )
            raise AveragingError(f"{after.path}: {same} {before.path}, step {after.step:,}; leave one of them out")
        interval = max(before.interval or 0, after.interval or 0)
        if before.interval and after.interval and after.step - before.step > interval:
            missing = (before.step // before.interval + 1) * before.interval
            raise AveragingError(
                f"the checkpoint of step {missing:,} is missing between {before.path.name} and {after.path.name}; "
                "bring it back, or choose a `last` that does not reach so far"
            )


def _check_same_model(sources: Sequence[Source]) -> None:
    last = sources[-1].file
    for file in (source.file for source in sources):
        if file.model_class != last.model_class:
            raise AveragingError(f"{file.path}: is a {file.model_class}, but {last.path} a {last.model_class}")
        ours, theirs = _architecture(file), _architecture(last)
        for key in sorted(ours.keys() | theirs.keys()):
            if (here := ours.get(key)) != (there := theirs.get(key)):
                raise AveragingError(
                    f"{file.path}: is another architecture than {last.path}: {key} is {here}, there {there}"
                )
        if list(file.weights.infos) != list(last.weights.infos):
            raise AveragingError(f"{file.path}: its tensors lie in another order than in {last.path}; write it anew")


def _architecture(file: ArchiveFile) -> dict[str, Any]:
    """Return the shapes of tensors and the encoder's configuration without dropout rates, which may differ."""
    shapes = {f"the shape of tensor {name!r}": list(info.shape) for name, info in file.weights.infos.items()}
    encoder = file.config.get("encoder")
    sizes = encoder.items() if isinstance(encoder, dict) else ()
    return shapes | {key: value for key, value in sizes if "dropout" not in key}
