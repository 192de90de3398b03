"""What a small head reads off the model while it is pretrained: a score on a labelled set, every n steps.

The head is linear and convex, so that it has one answer and nothing is drawn: scikit-learn's logistic regression, or a
ridge regression, on hidden states as they are by then (Alain and Bengio 2016, arXiv:1610.01644, "linear classifier
probes"). Nothing of the run changes: the model is asked in evaluation mode, without gradients, and no generator of
random numbers, no batch and no file but the history is touched. Shape suffixes: N targets that are known, F features, C
classes; a protein has R rows, its residues, or one.
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
from bionemo_esm.finetuning.dataset import LabelledDataset
from bionemo_esm.finetuning.features import OneHot
from bionemo_esm.finetuning.metrics import METRIC_NAMES, scores
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.engine import BATCH_TOKENS
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.feature_extraction import representations
from bionemo_esm.model.parallel import data_parallel_rank, is_first_rank, tensor_parallel_sum, world_sum
from bionemo_esm.pretraining.callbacks import History, read_history
from bionemo_esm.pretraining.hang_watch import HangWatch
from bionemo_esm.pretraining.probe_config import ProbeSet
from bionemo_esm.pretraining.signals import StopSignals

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Prediction]
_PENALTY = (
    0.01  # on the squares of the weights, see `_fitted`; of 10 to 0.01 the best for 300 proteins of any task tried
)
_STEPS = 500  # of L-BFGS, at most; what it has come to by then is the answer
_DIGITS = 6  # of a score


class _BrokenOffError(Exception):
    """Somebody asked the run to stop; no result."""


class Probe(Callback):
    """Measures every n steps and after the last one, before the checkpoint of that step is written.

    The data-parallel ranks that hold the first copy of the model compute, the others wait. A signal to one of the
    former breaks the measurement off; the run that goes on then begins with it: see `ProbeAtStart`.
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
        """most_tokens: that a device sees at a time in training, which this must not exceed."""
        self.probed, self.most_tokens = probed, most_tokens
        self.signals, self.watch, self.history, self.console = signals, watch, history, console
        self._one_hot: float | None = None  # the score of the same head on one-hot features; once a session

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.is_due(step) or step == trainer.max_steps:
            self.measure(trainer, pl_module)

    def is_due(self, step: int) -> bool:
        return step % self.probed.config.every_n_train_steps == 0

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and tell. Collective."""
        assert isinstance(pl_module, ESM1nvModel)
        found = None
        with self.watch.patience():
            if data_parallel_rank() == 0:
                found = self._found(trainer, pl_module)
            world_sum(torch.zeros(1, device=pl_module.device))  # the others wait here, where a wait is no hang
        self.history.on_probe_end(trainer, found)
        if found is not None:
            self._tell(trainer, found)

    # --- what a head finds ------------------------------------------------------------------------------------------

    def _found(self, trainer: Trainer, model: ESM1nvModel) -> dict[str, Any] | None:
        """A line of the history; None on other ranks than the first, and where it was broken off."""
        task, validation = self.probed.task, self.probed.validation
        try:
            with _in_evaluation(model):
                features_NF = self._features_to_fit(trainer, model)
                predict = _fitted(task, features_NF, self._targets) if is_first_rank() else None
                told = self._told(trainer, model, predict)
        except _BrokenOffError:
            return None
        if predict is None:
            return None
        if self._one_hot is None:
            self._one_hot = self._score_of_one_hot()
        found = scores(task, validation.targets, told)
        named = {"score": found[task.metric], "one_hot": self._one_hot, **found}
        numbers = {key: round(value, _DIGITS) if math.isfinite(value) else None for key, value in named.items()}
        return {"task": task.name, "metric": task.metric, **numbers}

    @property
    def _targets(self) -> NDArray[np.float32]:
        """Float32 [N], in the order of the training proteins."""
        together = np.concatenate(self.probed.train.targets)
        return together[np.isfinite(together)]

    def _features_to_fit(self, trainer: Trainer, model: ESM1nvModel) -> Floats:
        """Of the residues, or proteins, whose targets are known, [N, F], in the order of the training proteins."""
        train = self.probed.train
        rows: dict[int, NDArray[np.float32]] = {}
        for number, rows_RF in self._states(trainer, model, train):
            rows[number] = rows_RF[np.isfinite(train.targets[number])]
        return np.concatenate([rows[number] for number in range(len(train))]).astype(np.float64)

    def _told(self, trainer: Trainer, model: ESM1nvModel, predict: Predict | None) -> list[Prediction]:
        """Of the validation proteins, in their order; nothing without a head, on ranks that only compute states."""
        told: dict[int, Prediction] = {}
        for number, rows_RF in self._states(trainer, model, self.probed.validation):
            if predict is not None:
                told[number] = predict(rows_RF.astype(np.float64))
        return [told[number] for number in sorted(told)]

    def _states(
        self, trainer: Trainer, model: ESM1nvModel, labelled: LabelledDataset
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each protein's number and states, float32 [R, F], or their mean [1, F] for a task per sequence.

        Collective among tensor-parallel ranks. Raises `_BrokenOffError`, on all of them.
        """
        assert model.encoder is not None
        task, reading = self.probed.task, self.probed.reading
        tokens = min(self.most_tokens, BATCH_TOKENS[model.device.type])
        batches = EvaluationBatches(Collator(task, labelled, reading), tokens)
        for index in range(len(batches)):
            self.watch.on_validation_batch_start(trainer, model)  # a sign of life
            asked = torch.tensor(int(self.signals.received is not None), device=model.device)
            if tensor_parallel_sum(asked).item():
                raise _BrokenOffError
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
        """Of the same head on which amino acid stands there, or on how often each occurs: a model must do better."""
        task, train, validation = self.probed.task, self.probed.train, self.probed.validation
        source = OneHot(train.proteins, pooled=not task.is_per_residue)
        rows = [source.of(number)[np.isfinite(target)] for number, target in enumerate(train.targets)]
        predict = _fitted(task, np.concatenate(rows).astype(np.float64), self._targets)
        source = OneHot(validation.proteins, pooled=not task.is_per_residue)
        told = [predict(source.of(number).astype(np.float64)) for number in range(len(validation))]
        return scores(task, validation.targets, told)[task.metric]

    # --- what is said of it -----------------------------------------------------------------------------------------

    def _tell(self, trainer: Trainer, found: Mapping[str, Any]) -> None:
        task, step = self.probed.task, trainer.global_step
        self.console.print_line(
            f"  step {step:,}  probe {task.name}: {METRIC_NAMES[task.metric]} {_number(found['score'])} "
            f"(one-hot {_number(found['one_hot'])})" + ("" if step else ", before any training")
        )
        numbers = {f"probe_{key}": value for key, value in found.items() if isinstance(value, float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)


class ProbeAtStart(Callback):
    """Measures before the first step of a session, where this is due and an earlier one has not done it.

    Due: at the step of a probe; and before any other probe of this task, so that there is something to compare with.
    """

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
    """Without dropout and gradients; afterwards every part is in the mode it was in."""
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
    """A linear head; what it predicts of rows [R, F] is float32 [R, C], in the unit of `Prediction`, NaN where a state
    is not finite.

    Features are brought to mean 0 and mean square 1 / F, so that a penalty means the same for any width.
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
        told = np.full((len(rows_RF), task.outputs), np.nan, dtype=np.float32)
        whole = np.isfinite(rows_RF).all(axis=1)
        if not whole.any():
            return told
        standard = (rows_RF[whole] - mean) / scale
        if task.is_classification:  # of the classes that were fitted
            shares = np.zeros((len(standard), task.outputs), dtype=np.float32)
            shares[:, head.classes_.astype(np.int64)] = head.predict_proba(standard)
            told[whole] = shares
        else:
            told[whole, 0] = head.predict(standard) * task.target_scale + task.target_mean
        return told

    return predict


def _standardised(task: Task, targets_N: Floats) -> Floats:
    standard: Floats = (targets_N - task.target_mean) / task.target_scale
    return standard


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
