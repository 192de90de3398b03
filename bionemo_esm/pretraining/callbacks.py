"""Metrics of a run: throughput on all ranks, the history in `metrics.jsonl`, and the progress line.

docs/watching.md defines each number with its unit and formula. Nothing here changes what is computed.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import distributed

from bionemo_esm.console import Console, duration
from bionemo_esm.files import write_atomically
from bionemo_esm.model.esm1nv import ESM1nvModel, Evaluation, StepReport
from bionemo_esm.model.nonfinite_guard import SkippedStep
from bionemo_esm.model.parallel import data_parallel_sum, world_size
from bionemo_esm.model.step_stats import StepStats
from bionemo_esm.pretraining.hang_watch import HangWatch
from bionemo_esm.pretraining.hardware import cpu_name, peak_flops

_SECONDS_BETWEEN_LINES = 15.0  # of progress, if the output is no terminal
_SECONDS_BETWEEN_REWRITES = 0.5
_NOTABLE_DATA_WAIT, _NOTABLE_EXCESS = 0.05, 0.1  # fractions of a step, and over the median rank, that are shown


class History(Callback):
    """Append to `metrics.jsonl`: a line every n steps, and one for each validation, probe and skipped step.

    A resumed run first drops the lines past its checkpoint, so the file is that of an uninterrupted run.
    """

    def __init__(self, path: Path, every_n_steps: int, meter: ThroughputMeter) -> None:
        self.path, self.every_n_steps, self.meter = path, every_n_steps, meter
        self.seconds = _seconds_of(read_history(path))  # of training so far, in all sessions
        self._started = self._mark = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            kept = [line for line in read_history(self.path) if self._precedes(line, trainer)]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.seconds = _seconds_of(kept)
        self._started = self._mark = time.monotonic()
        self._first_step = trainer.global_step

    def on_initial_validation_end(self, trainer: Trainer, pl_module: ESM1nvModel) -> None:
        """As `on_validation_end`, before the first step."""
        self.on_validation_end(trainer, pl_module)
        self.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ESM1nvModel) and pl_module.last_step is not None
        report = pl_module.last_step
        self.meter.add(report.work, self._lap())
        if report.skipped is not None:
            self._append(trainer, kind="skipped", **asdict(report.skipped))
        if trainer.global_step % self.every_n_steps:
            return
        measured = self.meter.read(pl_module).known()  # on all ranks
        pl_module.log_dict({name: float(value) for name, value in measured.items()}, batch_size=1)
        self._append(
            trainer,
            kind="train",
            consumed_samples=pl_module.consumed_samples,
            epoch=round(pl_module.epoch, 4),
            loss=_finite(report.loss),
            learning_rate=report.learning_rate,
            gradient_norm=_finite(report.gradient_norm),
            residues=report.work.residues,
            tokens=report.work.tokens,
            **measured,
            seconds_left=round(self.seconds_left(trainer), 1),
        )

    def seconds_left(self, trainer: Trainer) -> float:
        """Estimate the seconds to the last step from this session's mean rate, with validation and saving."""
        done = trainer.global_step - self._first_step
        return (time.monotonic() - self._started) / max(done, 1) * (trainer.max_steps - trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the throughput of a run that is shorter than a logging interval."""
        assert isinstance(pl_module, ESM1nvModel)
        if self.meter.latest is None and self.meter.steps:
            self.meter.read(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        self._lap()
        if pl_module.validation_interrupted:
            return
        assert pl_module.last_evaluation is not None
        result = pl_module.last_evaluation
        self._append(
            trainer,
            kind="validation",
            loss=result.loss,
            perplexity=result.perplexity,
            accuracy=result.accuracy,
            residues=result.residues,
        )

    def on_probe_end(self, trainer: Trainer, found: Mapping[str, Any] | None) -> None:
        """Record the result of a probe, if there is one. Its time does not count for any step."""
        self._lap()
        if found is not None:
            self._append(trainer, kind="probe", **found)

    def begin(self) -> None:
        """Start the clock of `seconds_left` at the first step."""
        self._started = time.monotonic()

    @staticmethod
    def _precedes(line: dict[str, Any], trainer: Trainer) -> bool:
        """Whether a line stays after a resume. A validation that was due at this step is repeated by Lightning."""
        last = trainer.global_step
        if line["kind"] == "validation" and last % trainer.val_check_interval == 0:
            last -= 1
        return bool(line["step"] <= last)

    def _lap(self) -> float:
        """Return the seconds since the last lap, and add them to the training time."""
        now = time.monotonic()
        lap, self._mark = now - self._mark, now
        self.seconds += lap
        return lap

    def _append(self, trainer: Trainer, **values: Any) -> None:
        if trainer.is_global_zero:
            line = {"step": trainer.global_step, "seconds": round(self.seconds, 3), **values}
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _seconds_of(lines: list[dict[str, Any]]) -> float:
    return float(lines[-1]["seconds"]) if lines else 0.0


def initial_validation(path: Path) -> Evaluation | None:
    """Return the validation before the first step from a `metrics.jsonl`; None if there was none."""
    for line in read_history(path):
        if line["kind"] == "validation" and line["step"] == 0:
            return Evaluation(line["loss"], line["accuracy"], line["residues"])
    return None


def last_probe(path: Path) -> dict[str, Any] | None:
    """Return step, task, metric and scores of the last probe from a `metrics.jsonl`; None if there was none."""
    lines = [line for line in read_history(path) if line["kind"] == "probe"]
    return {key: value for key, value in lines[-1].items() if key not in ("kind", "seconds")} if lines else None


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, without a last line that is incomplete."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress(Callback):
    """Print progress: step, loss, throughput, bottleneck and time left; and a line for each validation."""

    def __init__(self, console: Console, history: History, unigram_perplexity: float) -> None:
        self.console, self.history, self.unigram_perplexity = console, history, unigram_perplexity
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ESM1nvModel) and pl_module.last_step is not None
        if pl_module.last_step.skipped is not None:
            self._report_skipped_step(trainer.global_step, pl_module.last_step.skipped)
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_REWRITES if self.console.is_terminal else _SECONDS_BETWEEN_LINES
        last = trainer.global_step == trainer.max_steps
        if now - self._shown < pause and not last:
            return
        self._shown = now
        self._show(trainer, pl_module.last_step)

    def _show(self, trainer: Trainer, report: StepReport) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        self.console.progress(
            f"  step {step:,}/{steps:,} {_bar(step / steps)} loss {report.loss:.3f}  "
            f"{self._speed(report.learning_rate)}  {duration(self.history.seconds_left(trainer))} left"
        )

    def _speed(self, learning_rate: float) -> str:
        """Return tokens per second, MFU if known, and the bottleneck; without one, the learning rate."""
        meter = self.history.meter
        rate, latest = meter.tokens_per_second, meter.latest
        parts = [f"{rate / 1e6:.2f}M tokens/s" if rate >= 1e6 else f"{rate:,.0f} tokens/s"]
        if latest is not None and latest.mfu is not None:
            parts.append(f"MFU {latest.mfu:.0%}")
        if latest is not None and latest.data_wait_share >= _NOTABLE_DATA_WAIT:
            parts.append(f"{latest.data_wait_share:.0%} data wait")
        elif latest is not None and latest.slowest_rank_excess >= _NOTABLE_EXCESS:
            parts.append(f"rank {latest.slowest_rank} +{latest.slowest_rank_excess:.0%}")
        else:
            parts.insert(0, f"lr {learning_rate:.1e}")
        return "  ".join(parts)

    def _report_skipped_step(self, step: int, skipped: SkippedStep) -> None:
        first = skipped.suspects[0]
        samples = ", ".join(map(str, first.samples[:5])) + (", ..." if len(first.samples) > 5 else "")
        more = f" and {len(skipped.suspects) - 1} more micro batches" if len(skipped.suspects) > 1 else ""
        self.console.print_line(
            f"warning: step {step:,} was skipped: {skipped.reason}; rank {first.rank}, samples {samples}{more} "
            f"(all in {self.history.path.name})"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        if pl_module.validation_interrupted:
            return
        assert pl_module.last_evaluation is not None
        result = pl_module.last_evaluation
        self.console.print_line(
            f"  step {trainer.global_step:,}  validation perplexity {result.perplexity:.2f} "
            f"(residue frequencies: {self.unigram_perplexity:.2f}), {result.accuracy:.1%} of masked residues right"
            + ("" if trainer.global_step else ", before any training")
        )


class InitialValidation(Callback):
    """Validate before the first step of a run that starts from weights, on the batches of all later validations.

    A signal interrupts the validation and ends the run.
    """

    def __init__(
        self,
        limit: int | None,
        should_stop_now: Callable[[ESM1nvModel], bool],
        watch: HangWatch,
        history: History,
        progress: Progress,
    ) -> None:
        """limit: micro batches per rank, as `limit_val_batches`; None: all.

        should_stop_now: `Checkpoints.should_stop_now`, equal on all ranks.
        """
        self.limit, self.should_stop_now, self.watch = limit, should_stop_now, watch
        self.history, self.progress = history, progress

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESM1nvModel)
        was_training = pl_module.training
        pl_module.eval()
        result = self._evaluate(trainer, pl_module)
        pl_module.train(was_training)
        if result is None:
            trainer.should_stop = True
            return
        pl_module.last_evaluation, pl_module.validation_interrupted = result, False
        self.history.on_initial_validation_end(trainer, pl_module)
        self.progress.on_validation_end(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({"val_loss": result.loss, "val_perplexity": result.perplexity}, step=0)

    def _evaluate(self, trainer: Trainer, model: ESM1nvModel) -> Evaluation | None:
        """Return the evaluation, equal on all ranks; None if any rank must stop. Collective."""
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        for index, batch in enumerate(islice(model.val_dataloader(), self.limit)):
            self.watch.on_validation_batch_start(trainer, model)
            sums += model.score(batch.to(model.device))
            if index < model.shared_validation_batches and self.should_stop_now(model):
                return None
        self.watch.on_validation_end(trainer, model)
        return model.evaluation(data_parallel_sum(sums))


def _bar(fraction: float, width: int = 12) -> str:
    filled = int(fraction * width)
    return "[" + "#" * filled + "-" * (width - filled) + "]"


@dataclass(frozen=True)
class Measurements:
    """Measurements over the steps since the last logging step, without the time of validation. A device is a rank."""

    step_seconds: float  # mean
    tokens_per_second: float  # all ranks together; no padding, `<cls>` and `<eos>` counted
    tokens_per_second_per_device: float
    residues_per_second: float  # all ranks together
    flops_per_second_per_device: float  # of the model, forward and backward
    mfu: float | None  # fraction of the device's peak; None: the peak is unknown
    data_wait_seconds: float  # per step, on the rank that waited longest
    data_wait_share: float  # fraction of the step's time
    slowest_rank: int  # by its forward and backward passes
    slowest_rank_excess: float  # its time divided by the median of all ranks, minus one
    memory_gb: float  # 10^9 bytes, peak so far, of the rank with most: CUDA's allocator, or resident memory

    def known(self) -> dict[str, float]:
        """Return the known values by name, rounded to four digits."""
        return {name: _rounded(value) for name, value in asdict(self).items() if value is not None}


MEASURED = tuple(field.name for field in fields(Measurements))


class DataWaitTimer(Profiler):
    """Measure the seconds that training waits for batches, by Lightning's profiling hooks."""

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
        """Return the seconds of waiting since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class ThroughputMeter:
    """Accumulate work and time of the steps until the next logging step."""

    def __init__(self) -> None:
        self.data_wait = DataWaitTimer()  # the trainer's profiler
        self.latest: Measurements | None = None
        self._clear()

    def add(self, work: StepStats, seconds: float) -> None:
        """Add a step, with the seconds since the previous one, without validation."""
        self._work += work
        self._seconds += seconds
        self.steps += 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks, over the steps since the last reading."""
        if self._seconds == 0:
            return self.latest.tokens_per_second if self.latest else 0.0
        return self._work.tokens / self._seconds

    def read(self, model: ESM1nvModel) -> Measurements:
        """Return the measurements since the last call. Collective: all ranks call it after the same steps."""
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
    """Return the peak FLOP/s of the device in the precision of its matrix products; None: not known."""
    if device.type != "cuda":
        return None
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "32"
    return peak_flops(torch.cuda.get_device_name(device), "bf16" if dtype == torch.bfloat16 else precision)


def device_name(device: torch.device) -> str:
    """Return the model name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in 10^9 bytes: of the GPU, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9


def _of_all_ranks(values: tuple[float, ...], device: torch.device) -> list[list[float]]:
    """Return the values of all ranks, by rank. Collective."""
    if world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=device)
    table = [torch.empty_like(own) for _ in range(world_size())]
    distributed.all_gather(table, own)
    rows: list[list[float]] = torch.stack(table).tolist()
    return rows


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
