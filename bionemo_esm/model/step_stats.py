"""Token counts and FLOPs of an optimizer step over all ranks, and a stopwatch for a rank's computation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.costs import training_flops
from bionemo_esm.model.parallel import data_parallel_sum

_MOST_SPANS = 1000


@dataclass(frozen=True)
class StepStats:
    """Counts of a global batch. The sum of two adds their counts."""

    targets: int = 0  # masked positions
    residues: int = 0
    tokens: int = 0  # residues, `<cls>` and `<eos>`; there is no padding
    squared_lengths: int = 0  # over sequences, of their tokens

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def flops(self, config: EncoderConfig) -> float:
        """Return the floating-point operations of forward and backward; see `costs.training_flops`."""
        return training_flops(config, self.tokens, self.squared_lengths, self.targets)


def measure_step(batches: Sequence[PackedBatch], device: torch.device) -> torch.Tensor:
    """Return the fields of `StepStats` over the micro batches of all ranks, int64 [4] on the device. Collective.

    They stay on the device: the host would have to wait for them before the step begins.
    """
    counts = torch.tensor([[len(b.targets), b.residues, len(b.tokens)] for b in batches], device=device).sum(0)
    squares = [torch.diff(batch.cu_seqlens).long().square().sum() for batch in batches]
    return data_parallel_sum(torch.cat([counts, torch.stack(squares).sum().view(1)]))


class Stopwatch:
    """Seconds spent in `running` blocks since the last `read`.

    On CUDA the time is the device's, between events; the host waits for it in `read` only.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time the enclosed block, which computes on `device`."""
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        if len(self._spans) == _MOST_SPANS:  # bounds memory if `read` is never called
            self._add_up()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._spans.append((start, end))

    def read(self) -> float:
        """Return the seconds since the last call. On CUDA this waits for the device."""
        self._add_up()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_up(self) -> None:
        for start, end in self._spans:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._spans.clear()
