"""Hang detection: a run without progress writes the stacks of its ranks and exits with code 4.

A rank that stops responding leaves all others waiting in a collective operation. Also here: the callbacks of NVIDIA's
resiliency extension (pip install nvidia-resiliency-ext), if it is installed. NeMo 3's exp_manager imports an older
package, `ptl_resiliency`, so its settings for straggler detection and fault tolerance fail with the one on PyPI.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from bionemo_esm.console import Console, duration
from bionemo_esm.model.backends import import_problem, importable

EXIT_HANG = 4
AT_LEAST_FOR_FIRST_STEP = 900.0  # seconds; kernels are compiled, connections set up
AT_LEAST_FOR_SAVING = 3600.0  # seconds; all ranks wait while rank 0 writes
_CALLBACKS = "nvidia_resiliency_ext.ptl_resiliency"
_DETECTOR = "nvrx_cupti_module"  # needs CUPTI, a part of CUDA
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # set by ft_launcher
_REPORT_SECONDS = 300.0
_PROFILED_EVERY = 50  # steps; profiling each, the default, costs up to 1% of a step
_LOGGER = "lightning.pytorch.resiliency"  # its messages reach output.log; NeMo's do not
_SLOW = 0.7  # fraction of the performance of other GPUs, or of this one before
_WRITING_SECONDS = 20.0  # for writing the stacks; the file system may hang, too


def collective_timeout(hang_timeout_seconds: float | None) -> timedelta:
    """Return the timeout of collective operations, which is longer than the hang timeout."""
    if hang_timeout_seconds is None:
        return timedelta(days=1)
    return timedelta(seconds=max(hang_timeout_seconds, AT_LEAST_FOR_SAVING), minutes=10)


class HangWatch(Callback):
    """End the process if no training or validation batch has started or ended for `timeout_seconds`.

    The first step of a session and a save may take longer: see the constants of this file. Each rank appends to
    `hang-rank-<n>.txt` in the run directory. A rank that finds the file of another rank ends, too. Time in which this
    process was stopped (Ctrl-Z) does not count. timeout_seconds None: no hang detection.

    The check runs in a thread. A rank that is blocked in C code that holds the GIL cannot end itself; the others end,
    and then the launcher ends it.
    """

    def __init__(self, folder: Path, timeout_seconds: float | None, console: Console) -> None:
        self.folder, self.timeout_seconds, self.console = folder, timeout_seconds, console
        self.interval = min((timeout_seconds or 0) / 10, 5.0)  # seconds between two checks
        self.rank, self.world_size = 0, 1
        self._idle_seconds, self._activity = 0.0, "starting"
        self._at_least = AT_LEAST_FOR_FIRST_STEP
        self._reports: dict[str, int] = {}  # sizes of the files of earlier hangs
        self._over, self._ending = threading.Event(), threading.Event()
        self._children: Sequence[Any] = ()  # ranks that Lightning started from this process

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context for `trainer.fit`: the check runs from the first step to the end of the block."""
        try:
            yield
        finally:
            self._over.set()

    @contextmanager
    def long_operation(self) -> Iterator[None]:
        """Context for a save, which may take longer, on this rank or on rank 0."""
        before, self._at_least = self._at_least, AT_LEAST_FOR_SAVING
        self._progressed("saving")
        try:
            yield
        finally:
            self._at_least = before
            self._progressed("after a save")

    # --- progress ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.timeout_seconds is None:
            return
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self._children = getattr(trainer.strategy.launcher, "procs", ())
        self._reports = self._sizes()
        self._progressed("the first step")
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._progressed(f"step {trainer.global_step + 1:,}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._at_least = 0.0
        self._progressed(f"the batch after step {trainer.global_step:,}")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._progressed(f"validation after step {trainer.global_step:,}")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._progressed(f"validation after step {trainer.global_step:,}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progressed(f"the batch after step {trainer.global_step:,}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Treat an error that follows the end of another rank, or a collective timeout, as the same hang."""
        if self.timeout_seconds is None:
            return
        if self._ending.is_set():
            threading.Event().wait()  # the thread is about to end this process
        elif self._idle_seconds > 0.9 * self._limit or self._other_ranks_ended():
            self._end("".join(traceback.format_exception(exception)))

    def _progressed(self, to: str) -> None:
        self._idle_seconds, self._activity = 0.0, to

    # --- the thread -------------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return max(self.timeout_seconds or 0, self._at_least)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.interval):
            now = time.monotonic()
            self._idle_seconds += min(now - last, 2 * self.interval)  # more: this process was stopped
            last = now
            if self._idle_seconds > self._limit or (self._idle_seconds > self._limit / 2 and self._other_ranks_ended()):
                self._end()

    def _other_ranks_ended(self) -> bool:
        return self._sizes() != self._reports

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.glob("hang-rank-*.txt")}

    def _end(self, error: str = "") -> None:
        """End the process, even if the report cannot be written."""
        self._ending.set()
        reporting = threading.Thread(target=self._report, args=(error,), name="hang report", daemon=True)
        reporting.start()
        reporting.join(_WRITING_SECONDS + self._time_for_others)
        for child in self._children:
            child.kill()
        os._exit(EXIT_HANG)

    @property
    def _time_for_others(self) -> float:
        """Seconds in which other ranks notice the hang, before the end of this rank makes them fail otherwise."""
        return 2 * self.interval + 1

    def _report(self, error: str) -> None:
        silence, doing, now = duration(self._idle_seconds), self._activity, time.strftime("%F %T %z")
        with open(self.folder / f"hang-rank-{self.rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"{now} rank {self.rank}: no progress for {silence}, at {doing}\n{error}")
            for thread in threading.enumerate():
                file.write(f"Thread 0x{thread.ident or 0:016x} is {thread.name}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        time.sleep(self._time_for_others)
        wrote = sorted(int(name.split("-")[-1][:-4]) for name in dict(self._sizes().items() - self._reports.items()))
        if self.rank == wrote[0]:  # rank 0, if it can
            Console(self.console.stream).print_line(self._message(silence, doing, wrote))
        sys.stdout.flush()
        sys.stderr.flush()

    def _message(self, silence: str, doing: str, wrote: list[int]) -> str:
        missing = [rank for rank in range(self.world_size) if rank not in wrote]
        suspects = f"; no report from {_named(missing)}: look there first" if missing else ""
        return (
            f"error: the run hangs: no progress for {silence}, at {doing}. Stacks of {_named(wrote)} are in "
            f"{self.folder}/hang-rank-*.txt{suspects}. The same command resumes from the last checkpoint."
        )


def _named(ranks: list[int], most: int = 8) -> str:
    """Return `rank 3`, `ranks 0, 1 and 2`, or the first few and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:most]]
    last = f"{len(ranks) - most} more" if len(ranks) > most else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"


def resiliency_callbacks(device_type: str, folder: Path) -> list[Callback]:
    """Return NVIDIA's callbacks: straggler detection on GPUs, and heartbeats if ft_launcher started this process.

    The log names those that are off, with the reason.
    """
    package = importable(_CALLBACKS)
    if package is None:
        rank_zero_info(f"NVIDIA's resiliency extension is off: {import_problem(_CALLBACKS)}")
        return []
    callbacks: list[Callback] = []
    if device_type != "cuda" or import_problem(_DETECTOR):
        why = import_problem(_DETECTOR) if device_type == "cuda" else "it measures GPUs"
        rank_zero_info(f"NVIDIA's straggler detection is off: {why}")
    else:
        callbacks.append(
            package.StragglerDetectionCallback(
                report_time_interval=_REPORT_SECONDS,
                profiling_interval=_PROFILED_EVERY,
                calc_relative_gpu_perf=True,
                calc_individual_gpu_perf=True,
                num_gpu_perf_scores_to_print=5,
                gpu_relative_perf_threshold=_SLOW,
                gpu_individual_perf_threshold=_SLOW,
                stop_if_detected=False,
                enable_ptl_logging=False,
                logger_name=_LOGGER,
            )
        )
    if _SOCKET in os.environ:
        callbacks.append(
            package.FaultToleranceCallback(
                autoresume=False, calculate_timeouts=True, exp_dir=folder, logger_name=_LOGGER
            )
        )
    else:
        rank_zero_info("heartbeats to NVIDIA's ft_launcher are off: it did not start this process")
    return callbacks
