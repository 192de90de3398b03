"""NVIDIA's resiliency extension (pip install nvidia-resiliency-ext), where it is installed; beside our own watch.

NeMo 3's exp_manager asks for it under the name of an older package, `ptl_resiliency`, and with arguments of that one,
so its settings `create_straggler_detection_callback` and `create_fault_tolerance_callback` fail with the package that
PyPI has. The callbacks are made here instead.

A run that stands still ends itself: with the stacks of every rank that can still write them, and exit code 4.

A rank that stops answering leaves all others waiting in a collective, and their devices idle, until somebody looks.
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
AT_LEAST_FOR_FIRST_STEP = 900.0  # seconds: devices and networks warm up, kernels are compiled
AT_LEAST_FOR_SAVING = 3600.0  # seconds: other ranks see nothing of rank 0's writing but that they wait
_WRITING_SECONDS = 20.0  # that a file system is given for the stacks: it may be what hangs


def collective_timeout(hang_timeout_seconds: float | None) -> timedelta:
    """How long ranks may wait for each other in a collective operation: longer than the watch does."""
    if hang_timeout_seconds is None:
        return timedelta(days=1)
    return timedelta(seconds=max(hang_timeout_seconds, AT_LEAST_FOR_SAVING), minutes=10)


class HangWatch(Callback):
    """Ends the process when no batch of training or validation has begun or ended for `timeout_seconds`.

    The first step of a session, and a save, may take longer: see the constants of this file. Each rank appends to
    `hang-rank-<n>.txt` in the run's folder; what others append there tells a rank that the run is over, so all end
    together. Time in which this very process was stopped (Ctrl-Z) does not count. None: nothing is watched.

    A thread does the watching, so a rank whose interpreter is blocked in C code that keeps Python's lock cannot end
    itself; the others can, and then their launcher ends it.
    """

    def __init__(self, folder: Path, timeout_seconds: float | None, console: Console) -> None:
        self.folder, self.timeout_seconds, self.console = folder, timeout_seconds, console
        self.interval = min((timeout_seconds or 0) / 10, 5.0)  # seconds between two looks
        self.rank, self.world_size = 0, 1
        self._silence, self._doing = 0.0, "starting"
        self._at_least = AT_LEAST_FOR_FIRST_STEP
        self._reports: dict[str, int] = {}  # stacks of earlier hangs
        self._over, self._ending = threading.Event(), threading.Event()
        self._children: Sequence[Any] = ()  # ranks that Lightning's launcher has started from this process

    @contextmanager
    def over_training(self) -> Iterator[None]:
        """Around `trainer.fit`: watches from its first step on, and no longer than this block."""
        try:
            yield
        finally:
            self._over.set()

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Around a save: it may take long, on this rank or on the one that it waits for."""
        before, self._at_least = self._at_least, AT_LEAST_FOR_SAVING
        self._moved("saving")
        try:
            yield
        finally:
            self._at_least = before
            self._moved("after a save")

    # --- signs of life ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.timeout_seconds is None:
            return
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self._children = getattr(trainer.strategy.launcher, "procs", ())
        self._reports = self._sizes()
        self._moved("the first step")
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._moved(f"step {trainer.global_step + 1:,}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._at_least = 0.0
        self._moved(f"the batch after step {trainer.global_step:,}")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._moved(f"validation after step {trainer.global_step:,}")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._moved(f"validation after step {trainer.global_step:,}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._moved(f"the batch after step {trainer.global_step:,}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What a rank raises because another has ended, or because a collective gave up, is the same hang."""
        if self.timeout_seconds is None:
            return
        if self._ending.is_set():
            threading.Event().wait()  # the watch is about to end this process
        elif self._silence > 0.9 * self._limit or self._others_gave_up():
            self._end("".join(traceback.format_exception(exception)))

    def _moved(self, to: str) -> None:
        self._silence, self._doing = 0.0, to

    # --- the watch --------------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return max(self.timeout_seconds or 0, self._at_least)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.interval):
            now = time.monotonic()
            self._silence += min(now - last, 2 * self.interval)  # more: this process itself was stopped
            last = now
            if self._silence > self._limit or (self._silence > self._limit / 2 and self._others_gave_up()):
                self._end()

    def _others_gave_up(self) -> bool:
        return self._sizes() != self._reports

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.glob("hang-rank-*.txt")}

    def _end(self, error: str = "") -> None:
        """Ends the process, whatever becomes of the report."""
        self._ending.set()
        reporting = threading.Thread(target=self._report, args=(error,), name="hang report", daemon=True)
        reporting.start()
        reporting.join(_WRITING_SECONDS + self._time_for_others)
        for child in self._children:
            child.kill()
        os._exit(EXIT_HANG)

    @property
    def _time_for_others(self) -> float:
        """Seconds for other ranks to find out, before the loss of this one makes them fail in some other way."""
        return 2 * self.interval + 1

    def _report(self, error: str) -> None:
        silence, doing, now = duration(self._silence), self._doing, time.strftime("%F %T %z")
        with open(self.folder / f"hang-rank-{self.rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"{now} rank {self.rank}: nothing moved for {silence}, at {doing}\n{error}")
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
        suspects = f"; nothing came from {_named(missing)}: look there first" if missing else ""
        return (
            f"error: the run hangs: nothing moved for {silence}, at {doing}. Stacks of {_named(wrote)} are in "
            f"{self.folder}/hang-rank-*.txt{suspects}. The same command goes on from the last checkpoint."
        )


def _named(ranks: list[int], most: int = 8) -> str:
    """`rank 3`, `ranks 0, 1 and 2`, or the first few and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:most]]
    last = f"{len(ranks) - most} more" if len(ranks) > most else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"


_CALLBACKS = "nvidia_resiliency_ext.ptl_resiliency"
_DETECTOR = "nvrx_cupti_module"  # compiled against CUPTI, which comes with CUDA
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # by which ft_launcher's monitor of a rank is reached
_REPORT_SECONDS = 300.0
_LOGGER = "lightning.pytorch.resiliency"  # whose messages reach output.log; NeMo's do not
_SLOW = 0.7  # of the performance of other GPUs, or of what this one had before


def resiliency_callbacks(device_type: str, folder: Path) -> list[Callback]:
    """Straggler detection on GPUs, and heartbeats to ft_launcher where it started this process.

    What is left out, and why, is a line in the log.
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
