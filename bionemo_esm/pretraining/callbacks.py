"""Watching a run: its history on disk, and its progress before a person's eyes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bionemo_esm.console import Console, duration
from bionemo_esm.files import write_atomically
from bionemo_esm.model.esm1nv import ESM1nvModel, Evaluation, StepReport
from bionemo_esm.model.nonfinite_guard import SkippedStep
from bionemo_esm.model.parallel import data_parallel_sum
from bionemo_esm.pretraining.hang_watch import HangWatch
from bionemo_esm.pretraining.throughput import ThroughputMeter

_SECONDS_BETWEEN_LINES = 15.0  # of progress, where output is no terminal
_SECONDS_BETWEEN_REWRITES = 0.5
_NOTABLE_DATA_WAIT, _NOTABLE_EXCESS = 0.05, 0.1  # of a step, and over the median rank; less is not worth a word


class History(Callback):
    """Appends what happened to `metrics.jsonl`: a line every n steps, and one for each validation and each probe.

    A run that goes on from a checkpoint drops the lines past it first, so the file reads like that of an unbroken run.
    """

    def __init__(self, path: Path, every_n_steps: int, gauges: ThroughputMeter) -> None:
        self.path, self.every_n_steps, self.gauges = path, every_n_steps, gauges
        self.seconds = _seconds_of(read_history(path))  # of training so far, sessions before this one included
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
        self.gauges.add(report.work, self._lap())
        if report.skipped is not None:
            self._append(trainer, kind="skipped", **asdict(report.skipped))
        if trainer.global_step % self.every_n_steps:
            return
        measured = self.gauges.read(pl_module).known()  # on all ranks
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
        """To the last step, if the rest goes as fast as this session so far, validation and saving included."""
        done = trainer.global_step - self._first_step
        return (time.monotonic() - self._started) / max(done, 1) * (trainer.max_steps - trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that is shorter than a logging interval has its speed measured, too."""
        assert isinstance(pl_module, ESM1nvModel)
        if self.gauges.latest is None and self.gauges.steps:
            self.gauges.read(pl_module)

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
        """What a probe found, if it was not broken off; the time it took is no step's."""
        self._lap()
        if found is not None:
            self._append(trainer, kind="probe", **found)

    def begin(self) -> None:
        """The first step begins now: what came before says nothing of how long the rest will take."""
        self._started = time.monotonic()

    @staticmethod
    def _precedes(line: dict[str, Any], trainer: Trainer) -> bool:
        """Whether a line lies before what training does next: where a validation was due, Lightning repeats it."""
        last = trainer.global_step
        if line["kind"] == "validation" and last % trainer.val_check_interval == 0:
            last -= 1
        return bool(line["step"] <= last)

    def _lap(self) -> float:
        """Seconds since the last lap; the whole training time adds them up."""
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
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _seconds_of(lines: list[dict[str, Any]]) -> float:
    return float(lines[-1]["seconds"]) if lines else 0.0


def initial_validation(path: Path) -> Evaluation | None:
    """The validation before the first step, from a `metrics.jsonl`; None where there was none."""
    for line in read_history(path):
        if line["kind"] == "validation" and line["step"] == 0:
            return Evaluation(line["loss"], line["accuracy"], line["residues"])
    return None


def last_probe(path: Path) -> dict[str, Any] | None:
    """What the last probe found, from a `metrics.jsonl`: step, task, metric and scores; None where there was none."""
    lines = [line for line in read_history(path) if line["kind"] == "probe"]
    return {key: value for key, value in lines[-1].items() if key not in ("kind", "seconds")} if lines else None


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that an interruption cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress(Callback):
    """One line: how far, the loss, how fast, what holds it up, and the time left; and a line for each validation."""

    def __init__(self, console: Console, history: History, unigram_perplexity: float) -> None:
        self.console, self.history, self.unigram_perplexity = console, history, unigram_perplexity
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ESM1nvModel) and pl_module.last_step is not None
        if pl_module.last_step.skipped is not None:
            self._say_what_was_skipped(trainer.global_step, pl_module.last_step.skipped)
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
        """Tokens a second, MFU where it is known, and what holds the run up; the learning rate where nothing does."""
        gauges = self.history.gauges
        rate, latest = gauges.tokens_per_second, gauges.latest
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

    def _say_what_was_skipped(self, step: int, skipped: SkippedStep) -> None:
        first = skipped.suspects[0]
        samples = ", ".join(map(str, first.samples[:5])) + (", ..." if len(first.samples) > 5 else "")
        more = f" and {len(skipped.suspects) - 1} more micro batches" if len(skipped.suspects) > 1 else ""
        self.console.print_line(
            f"warning: step {step:,} was not taken: {skipped.reason}; rank {first.rank}, samples {samples}{more} "
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
    """Validates before the first step, on the batches that every later validation has: what the weights are worth that
    a run starts from. A signal breaks it off, and ends the run before it has begun.
    """

    def __init__(
        self,
        limit: int | None,
        must_stop: Callable[[ESM1nvModel], bool],
        watch: HangWatch,
        history: History,
        progress: Progress,
    ) -> None:
        """limit: micro batches of each rank, as `limit_val_batches`; None: all. must_stop: whether some rank was asked
        to, the same on all (`Checkpoints.must_stop`). The last three are told of the result.
        """
        self.limit, self.must_stop, self.watch = limit, must_stop, watch
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
        """The evaluation, the same on every rank; None where some rank was asked to stop. Collective."""
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        for index, batch in enumerate(islice(model.val_dataloader(), self.limit)):
            self.watch.on_validation_batch_start(trainer, model)
            sums += model.score(batch.to(model.device))
            if index < model.shared_validation_batches and self.must_stop(model):
                return None
        self.watch.on_validation_end(trainer, model)
        return model.evaluation(data_parallel_sum(sums))


def _bar(fraction: float, width: int = 12) -> str:
    filled = int(fraction * width)
    return "[" + "#" * filled + "-" * (width - filled) + "]"
