"""The average of the last checkpoints' weights, as ESM-1nv's final model is one of the last 47.

One function for the end of a run and for the command; so the two agree bit for bit. Weights are added up in float64,
oldest first, a piece of a tensor at a time: what is held is the averaged model and a few pieces more, however many
there are. Each file is read once, and hashed while it is: no mean is given out before every hash has been compared.
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

_PIECE = 2**18  # numbers of a tensor at a time, whose sum in float64 stays within the cache of a core
_MOST_THREADS = 4  # to read and hash; more than a disk and a memory serve

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes to read."""


class AveragingError(UserError):
    """Checkpoints that must not be averaged; the message names the file."""


@dataclass(frozen=True)
class Source:
    """A checkpoint or an archive whose weights go into an average."""

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
        """Steps between the checkpoints of the run that wrote it; None for what a run exported at its end."""
        interval = self._schedule.get("every_n_train_steps")
        return interval if type(interval) is int and interval > 0 else None

    def is_on_schedule(self, newest: Source) -> bool:
        """False where it was saved because of a stop or a good validation, or at an end that was not the last."""
        if self._schedule.get("on_schedule", True) is not True:
            return False
        return self.interval is None or self.step % self.interval == 0 or self is newest

    @property
    def _schedule(self) -> Mapping[str, Any]:
        schedule = self.file.provenance.get("checkpoint")
        return schedule if isinstance(schedule, dict) else {}

    def describe(self) -> dict[str, Any]:
        """For the provenance of the result."""
        return {"file": self.path.name, "steps": self.step, "weights_sha256": self.file.weights_sha256}


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name. Raises `AveragingError` for one that names none."""
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
    """The last so many (None: all) of some checkpoints, oldest first, and a note on each that was passed over.

    Those that a run saved off its schedule, because it was stopped or validated well, are passed over: they depend on
    when somebody pressed Ctrl-C. Raises `AveragingError` when there are too few, when one of the series is missing,
    or when two are the same.
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
    """The mean of the weights, float32, in an archive like the last source's that names all of them.

    Raises `ArchiveError` or `AveragingError`, naming the file, for damage, for models that differ, and for a number
    that is not finite.
    """
    last = sources[-1]
    _check_same_model(sources)
    weights = _means([source.file for source in sources], progress)
    provenance = {key: value for key, value in last.file.provenance.items() if key != "checkpoint"}
    provenance["averaged_from"] = [source.describe() for source in sources]
    return Archive(last.file.model_class, {**last.file.config, "precision": "32"}, weights, provenance)


@dataclass(frozen=True)
class AverageReport:
    """What went into an average, oldest first, and what was passed over."""

    sources: list[Source]
    notes: list[str]


def average_checkpoints(
    paths: Sequence[Path], last: int | None, output: Path, progress: Progress | None = None
) -> AverageReport:
    """Average the last so many (None: all) of `paths` into `output`. Raises as `select` and `average` do."""
    sources, notes = select(paths, last)
    write_archive(output, average(sources, progress or (lambda done, total: None)))
    return AverageReport(sources, notes)


def _means(files: Sequence[ArchiveFile], progress: Progress) -> dict[str, Tensor]:
    """The means of all tensors, float32, from one pass over the files side by side."""
    last, readers = files[-1].weights, [file.read_weights_once() for file in files]
    means = {name: torch.empty(info.shape, dtype=torch.float32) for name, info in last.infos.items()}
    done, total = 0, sum(file.weights.data.size for file in files)
    with ThreadPoolExecutor(threads := min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        ahead = _Ahead(pool, readers, torch.empty(threads + 1, _PIECE, dtype=torch.float32))
        for name, mean in means.items():
            dtypes = [file.weights.dtype(name) for file in files]
            for piece in mean.view(-1).split(_PIECE):
                if not _mean(ahead.read(dtypes, len(piece)), len(files), piece):
                    raise _not_finite(files, name)
                progress(done := done + len(piece) * sum(dtype.itemsize for dtype in dtypes), total)
    for reader in readers:
        reader.finish()
    return means


def _mean(numbers: Iterator[Tensor], count: int, mean: Tensor) -> bool:
    """Put the mean of `count` tensors into `mean` (float32 [n]), added up in float64; False where one is not finite."""
    total = np.full(len(mean), -0.0)  # adds nothing, not even a sign
    with np.errstate(invalid="ignore"):
        for read in numbers:
            np.add(total, read.float().numpy(), out=total)
    if not np.isfinite(total).all():  # float32 cannot overflow float64: one of them is not finite itself
        return False
    np.divide(total, count, out=total)
    mean.numpy()[:] = total
    return True


class _Ahead:
    """Reads the next piece of every file in turn, and hashes it, in threads: while one is added up, others are read."""

    def __init__(self, pool: Executor, readers: Sequence[TensorReader], buffers: Tensor) -> None:
        """buffers: float32 [pieces under way, numbers of a piece]."""
        self.pool, self.readers, self.buffers = pool, readers, buffers

    def read(self, dtypes: Sequence[torch.dtype], count: int) -> Iterator[Tensor]:
        """The next `count` numbers of each file, [count] of its dtype; good until the next is asked for."""
        under_way: deque[Future[Tensor]] = deque()
        for number, (reader, dtype) in enumerate(zip(self.readers, dtypes, strict=True)):
            if len(under_way) == len(self.buffers):
                yield under_way.popleft().result()
            buffer = self.buffers[number % len(self.buffers)].view(dtype)[:count]
            under_way.append(self.pool.submit(reader.read_into, buffer))
        while under_way:
            yield under_way.popleft().result()


def _not_finite(files: Sequence[ArchiveFile], name: str) -> UserError:
    """Which file it is; damage, which may look like this, is told first."""
    for file in files:
        file.verify(WEIGHTS)
    culprit = next((file.path for file in files if not file.weights.load(name).isfinite().all()), None)
    if culprit is None:
        return AveragingError(f"{files[-1].path.parent}: a file changed while tensor {name!r} was read; try again")
    return AveragingError(f"{culprit}: tensor {name!r} holds NaN or infinity; leave this file out")


def _check_series(sources: Sequence[Source]) -> None:
    """One run, every step once, none missing in between."""
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
        ours, theirs = _shapes(file), _shapes(last)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise AveragingError(
                    f"{file.path}: is another architecture than {last.path}: tensor {name!r} has shape "
                    f"{ours.get(name, 'none')} there, and {theirs.get(name, 'none')} here"
                )
        if list(ours) != list(theirs):
            raise AveragingError(f"{file.path}: its tensors lie in another order than in {last.path}; write it anew")
        here, there = _sizes(file), _sizes(last)
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                raise AveragingError(
                    f"{file.path}: is another architecture than {last.path}: {key} is {here.get(key)}, there "
                    f"{there.get(key)}"
                )


def _shapes(file: ArchiveFile) -> dict[str, list[int]]:
    return {name: list(info.shape) for name, info in file.weights.infos.items()}


def _sizes(file: ArchiveFile) -> dict[str, Any]:
    """What the configuration says of the architecture; dropout may differ."""
    encoder = file.config.get("encoder")
    return {key: value for key, value in encoder.items() if "dropout" not in key} if isinstance(encoder, dict) else {}
