"""The probe: a linear head fitted on the hidden states of the model every n steps, and its score on a labelled set.

The head is scikit-learn's logistic regression or ridge regression (Alain and Bengio 2016, arXiv:1610.01644, "linear
classifier probes"): a convex problem with one solution and no random numbers. The probe changes nothing of the run: the
model is in evaluation mode, without gradients; random generators, batches, and all files but the history stay as they
are. Shape suffixes: N known targets, F features, C classes, R rows of a protein (its residues, or one).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn

from bionemo_esm.console import Console
from bionemo_esm.finetuning.batches import Collator, EvaluationBatches
from bionemo_esm.finetuning.features import OneHot
from bionemo_esm.finetuning.metrics import METRIC_NAMES, scores
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.engine import BATCH_TOKENS
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.feature_extraction import representations
from bionemo_esm.model.parallel import data_parallel_rank, is_first_rank, tensor_parallel_sum, world_sum
from bionemo_esm.pretraining.callbacks import History, read_history
from bionemo_esm.pretraining.checkpoints import StopSignals
from bionemo_esm.pretraining.hang_watch import HangWatch
from bionemo_esm.pretraining.probe_config import ProbeSet

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Prediction]
_PENALTY = 0.01  # L2 penalty of `_fitted`; the best of 0.01 to 10 on 300 proteins of each task tried
_STEPS = 500  # of L-BFGS, at most
_DIGITS = 6  # of a score


class _InterruptedError(Exception):
    """A signal interrupted the measurement."""


class Probe(Callback):
    """Measure every n steps and after the last one, before the checkpoint of that step is written.

    The ranks of the first model copy compute, the others wait. A signal to one of the former interrupts the
    measurement; the resumed run starts with it: see `ProbeAtStart`.
    """

    def __init__(
        self,
        probed: ProbeSet,
        most_tokens: int,
        signals: StopSignals,
        watch: HangWatch,
        history: History,
        console: Console,
    ) -> None:
        """most_tokens: maximum tokens of a batch, at most those of a training micro batch."""
        self.probed, self.most_tokens = probed, most_tokens
        self.signals, self.watch, self.history, self.console = signals, watch, history, console
        self._one_hot: float | None = None  # score of the head on one-hot features; computed once per session

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.is_due(step) or step == trainer.max_steps:
            self.measure(trainer, pl_module)

    def is_due(self, step: int) -> bool:
        return step % self.probed.config.every_n_train_steps == 0

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, record and print. Collective."""
        assert isinstance(pl_module, ESM1nvModel)
        found = None
        with self.watch.long_operation():
            if data_parallel_rank() == 0:
                found = self._measure_head(trainer, pl_module)
            world_sum(torch.zeros(1, device=pl_module.device)).item()  # the others wait here; NCCL alone would not wait
        self.history.on_probe_end(trainer, found)
        if found is not None:
            self._report(trainer, found)

    # --- measuring --------------------------------------------------------------------------------------------------

    def _measure_head(self, trainer: Trainer, model: ESM1nvModel) -> dict[str, Any] | None:
        """Return a line of the history; None on other ranks than the first, and after an interruption."""
        task, validation = self.probed.task, self.probed.validation
        try:
            with _in_evaluation(model):
                features_NF = self._features_to_fit(trainer, model)
                predict = _fitted(task, features_NF, self._targets) if is_first_rank() else None
                predictions = self._predictions(trainer, model, predict)
        except _InterruptedError:
            return None
        if predict is None:
            return None
        if self._one_hot is None:
            self._one_hot = self._score_of_one_hot()
        found = scores(task, validation.targets, predictions)
        named = {"score": found[task.metric], "one_hot": self._one_hot, **found}
        numbers = {key: round(value, _DIGITS) if math.isfinite(value) else None for key, value in named.items()}
        return {"task": task.name, "metric": task.metric, **numbers}

    @property
    def _targets(self) -> NDArray[np.float32]:
        """Float32 [N], in the order of the training proteins."""
        together = np.concatenate(self.probed.train.targets)
        return together[np.isfinite(together)]

    def _features_to_fit(self, trainer: Trainer, model: ESM1nvModel) -> Floats:
        """Return the features with known targets, [N, F], in the order of the training proteins."""
        train = self.probed.train
        rows: dict[int, NDArray[np.float32]] = {}
        for number, rows_RF in self._states(trainer, model, train):
            rows[number] = rows_RF[np.isfinite(train.targets[number])]
        return np.concatenate([rows[number] for number in range(len(train))]).astype(np.float64)

    def _predictions(self, trainer: Trainer, model: ESM1nvModel, predict: Predict | None) -> list[Prediction]:
        """Return the predictions of the validation proteins, in order; [] on ranks that only compute states."""
        predictions: dict[int, Prediction] = {}
        for number, rows_RF in self._states(trainer, model, self.probed.validation):
            if predict is not None:
                predictions[number] = predict(rows_RF.astype(np.float64))
        return [predictions[number] for number in sorted(predictions)]

    def _states(
        self, trainer: Trainer, model: ESM1nvModel, labelled: LabelledDataset
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield each protein's number and hidden states, float32 [R, F], or their mean [1, F] for a task per sequence.

        Collective over tensor-parallel ranks. Raises `_InterruptedError` on all of them after a signal.
        """
        assert model.encoder is not None
        task, reading = self.probed.task, self.probed.reading
        tokens = min(self.most_tokens, BATCH_TOKENS[model.device.type])
        batches = EvaluationBatches(Collator(task, labelled, reading), tokens)
        for index in range(len(batches)):
            self.watch.on_validation_batch_start(trainer, model)  # reports progress
            asked = torch.tensor(int(self.signals.received is not None), device=model.device)
            if tensor_parallel_sum(asked).item():
                raise _InterruptedError
            batch = batches[index].to(model.device)
            assert batch.row is not None
            hidden_TH = representations(model.encoder, batch.row.row, [reading.layer])[reading.layer]
            yield from _by_protein(
                batch.numbers,
                batch.row.blended(hidden_TH, _residues(labelled, batch.numbers)),
                labelled,
                task.is_per_residue,
            )

    def _score_of_one_hot(self) -> float:
        """Return the score of the head on one-hot residues, or on residue frequencies: the baseline."""
        task, train, validation = self.probed.task, self.probed.train, self.probed.validation
        source = OneHot(train.proteins, pooled=not task.is_per_residue)
        rows = [source.of(number)[np.isfinite(target)] for number, target in enumerate(train.targets)]
        predict = _fitted(task, np.concatenate(rows).astype(np.float64), self._targets)
        source = OneHot(validation.proteins, pooled=not task.is_per_residue)
        predictions = [predict(source.of(number).astype(np.float64)) for number in range(len(validation))]
        return scores(task, validation.targets, predictions)[task.metric]

    # --- output -----------------------------------------------------------------------------------------------------

    def _report(self, trainer: Trainer, found: Mapping[str, Any]) -> None:
        task, step = self.probed.task, trainer.global_step
        self.console.print_line(
            f"  step {step:,}  probe {task.name}: {METRIC_NAMES[task.metric]} {_number(found['score'])} "
            f"(one-hot {_number(found['one_hot'])})" + ("" if step else ", before any training")
        )
        numbers = {f"probe_{key}": value for key, value in found.items() if isinstance(value, float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)


class ProbeAtStart(Callback):
    """Measure before the first step of a session, if this step's probe, or any first probe of the task, is missing."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop:
            return
        wanted = torch.tensor(int(trainer.is_global_zero and self._is_missing(trainer)), device=pl_module.device)
        if world_sum(wanted).item():
            self.probe.measure(trainer, pl_module)
            self.probe.history.begin()

    def _is_missing(self, trainer: Trainer) -> bool:
        lines = read_history(self.probe.history.path)
        task = self.probe.probed.task.name
        steps = {line["step"] for line in lines if line["kind"] == "probe" and line["task"] == task}
        return not steps or (self.probe.is_due(trainer.global_step) and trainer.global_step not in steps)


# --- features ---------------------------------------------------------------------------------------------------------


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients during the block; restore the mode of every module after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _residues(labelled: LabelledDataset, numbers: NDArray[np.int64]) -> int:
    return int(labelled.lengths[numbers].sum())


def _by_protein(
    numbers: NDArray[np.int64], states_RF: Tensor, labelled: LabelledDataset, per_residue: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    bounds = np.concatenate([[0], np.cumsum(labelled.lengths[numbers])]).tolist()
    for number, (begin, end) in zip(numbers.tolist(), pairwise(bounds), strict=True):
        own = states_RF[begin:end]
        yield number, (own if per_residue else own.mean(dim=0, keepdim=True)).cpu().numpy()


# --- the head ---------------------------------------------------------------------------------------------------------


def _fitted(task: Task, features_NF: Floats, targets_N: NDArray[np.float32]) -> Predict:
    """Fit a linear head. Returns a function from rows [R, F] to float32 [R, C]: see `Prediction`; NaN for NaN features.

    Features are scaled to mean 0 and mean square 1 / F, so that the penalty does not depend on the width.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    if not np.isfinite(features_NF).all():
        return lambda rows_RF: np.full((len(rows_RF), task.outputs), np.nan, dtype=np.float32)
    mean, scale = features_NF.mean(axis=0), features_NF.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0) * np.sqrt(features_NF.shape[1])
    targets = targets_N.astype(np.float64)
    head: Any = LogisticRegression(C=1 / _PENALTY, max_iter=_STEPS) if task.is_classification else Ridge(alpha=_PENALTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        head.fit((features_NF - mean) / scale, targets if task.is_classification else _standardised(task, targets))

    def predict(rows_RF: Floats) -> Prediction:
        predictions = np.full((len(rows_RF), task.outputs), np.nan, dtype=np.float32)
        whole = np.isfinite(rows_RF).all(axis=1)
        if not whole.any():
            return predictions
        standard = (rows_RF[whole] - mean) / scale
        if task.is_classification:  # classes of the training targets only
            shares = np.zeros((len(standard), task.outputs), dtype=np.float32)
            shares[:, head.classes_.astype(np.int64)] = head.predict_proba(standard)
            predictions[whole] = shares
        else:
            predictions[whole, 0] = head.predict(standard) * task.target_scale + task.target_mean
        return predictions

    return predict


def _standardised(task: Task, targets_N: Floats) -> Floats:
    standard: Floats = (targets_N - task.target_mean) / task.target_scale
    return standard


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
