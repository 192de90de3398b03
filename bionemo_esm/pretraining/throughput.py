"""How fast a run goes, what holds it up, and what it takes: measured on every rank, gathered on logging steps.

docs/watching.md has each number with its unit and formula. Nothing here touches what is computed.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import distributed

from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.step_stats import StepStats
from bionemo_esm.pretraining.hardware import cpu_name, peak_flops


@dataclass(frozen=True)
class Measurements:
    """Of the steps since the last logging step. A device is a rank; seconds of validation are left out."""

    step_seconds: float  # mean; the next seven follow from it and from what the steps had to do
    tokens_per_second: float  # all ranks together; no padding, `<cls>` and `<eos>` counted
    tokens_per_second_per_device: float
    residues_per_second: float  # all ranks together
    flops_per_second_per_device: float  # of the model, forward and backward
    mfu: float | None  # the same as a share of the device's best; None: that is not known
    data_wait_seconds: float  # a step, on the rank that waited longest for its batches
    data_wait_share: float  # of the step's time
    slowest_rank: int  # by its own forward and backward passes
    slowest_rank_excess: float  # its time over the median of all ranks, less one
    memory_gb: float  # 10^9 bytes, highest so far: of CUDA's allocator, or resident; of the rank with most

    def known(self) -> dict[str, float]:
        """By name, rounded to what can be measured, without what is not known."""
        return {name: _rounded(value) for name, value in asdict(self).items() if value is not None}


MEASURED = tuple(field.name for field in fields(Measurements))


class DataWaitTimer(Profiler):
    """Seconds that training waited for its batches, as Lightning's profiling hooks have it."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._seconds += time.perf_counter() - self._since

    def read(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class ThroughputMeter:
    """Adds up what steps did and how long they took, until the next logging step."""

    def __init__(self) -> None:
        self.data_wait = DataWaitTimer()  # to be given to the trainer as its profiler
        self.latest: Measurements | None = None
        self._clear()

    def add(self, work: StepStats, seconds: float) -> None:
        """A step, and the time since the one before it, validation left out."""
        self._work += work
        self._seconds += seconds
        self.steps += 1

    @property
    def tokens_per_second(self) -> float:
        """Of the steps under way, or just read; all ranks together."""
        if self._seconds == 0:
            return self.latest.tokens_per_second if self.latest else 0.0
        return self._work.tokens / self._seconds

    def read(self, model: ESM1nvModel) -> Measurements:
        """Measurements since the last call. Collective: every rank calls it after the same steps."""
        own = (model.stopwatch.read(), self.data_wait.read(), memory_gb(model.device))
        computing, waiting, memory = zip(*_of_all_ranks(own, model.device), strict=True)
        usual, slowest = median(computing), max(computing)
        seconds, ranks = self._seconds, len(computing)
        flops = self._work.flops(model.encoder_config) / seconds / ranks
        best = device_flops(model.device, next(model.parameters()).dtype)
        self.latest = Measurements(
            step_seconds=seconds / self.steps,
            tokens_per_second=self._work.tokens / seconds,
            tokens_per_second_per_device=self._work.tokens / seconds / ranks,
            residues_per_second=self._work.residues / seconds,
            flops_per_second_per_device=flops,
            mfu=flops / best if best else None,
            data_wait_seconds=max(waiting) / self.steps,
            data_wait_share=max(waiting) / seconds,
            slowest_rank=computing.index(slowest),
            slowest_rank_excess=slowest / usual - 1 if usual > 0 else 0.0,
            memory_gb=max(memory),
        )
        self._clear()
        return self.latest

    def _clear(self) -> None:
        self._work, self._seconds, self.steps = StepStats(), 0.0, 0


def device_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of this device at best, in the precision that its products are taken in; None: not known."""
    if device.type != "cuda":
        return None
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "32"
    return peak_flops(torch.cuda.get_device_name(device), "bf16" if dtype == torch.bfloat16 else precision)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def memory_gb(device: torch.device) -> float:
    """The most that this process has held so far, in 10^9 bytes: of the device's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9


def _of_all_ranks(values: tuple[float, ...], device: torch.device) -> list[list[float]]:
    """The values of every rank, by rank; collective."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    table = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(table, own)
    rows: list[list[float]] = torch.stack(table).tolist()
    return rows


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
