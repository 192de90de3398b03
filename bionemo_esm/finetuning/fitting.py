"""One fit: epochs with early stopping under a Lightning trainer; the weights of the best epoch are kept.

The state of a fit is in a file that is written whole or not at all: after an epoch, so that the same command resumes
there, and at the end, so that it is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor

from bionemo_esm.console import Console, duration
from bionemo_esm.data.dataloader import BatchPlan
from bionemo_esm.finetuning.batches import Collator, EvaluationBatches, Features, TrainingSteps, gather_predictions
from bionemo_esm.finetuning.config import ReadingConfig, TuningConfig
from bionemo_esm.finetuning.features import Moments
from bionemo_esm.finetuning.heads import BUFFERS
from bionemo_esm.finetuning.model import ESMFineTunedModel, class_weights
from bionemo_esm.finetuning.splits import LabelledDataset
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.model.lightning import MegatronStrategy, build_trainer
from bionemo_esm.model.lightning import fit as fit_model
from bionemo_esm.model.optimizer import local_state
from bionemo_esm.model.parallel import data_parallel_rank, data_parallel_size, is_first_rank

_SECONDS_BETWEEN_SAVES = 20.0
_SECONDS_BETWEEN_LINES = 15.0  # of progress, if the output is no terminal

Sources = tuple[Features, Features, Features | None]  # of training, validation and test set


@dataclass(frozen=True)
class FitPlan:
    """The model, data, seed and devices of a fit."""

    name: str  # "pretrained, seed 1"
    file: Path  # holds its state
    config: Mapping[str, Any]  # of the model: see `ESMFineTunedModel`
    initial_weights: Path | None  # of the encoder; None: random ones, or no encoder
    tuning: TuningConfig
    train: LabelledDataset
    validation: LabelledDataset
    test: Sequence[Protein]  # without their labels
    sources: Sources | ReadingConfig
    standard: Moments  # of the head's features, over the training set
    accelerator: str
    devices: int
    num_nodes: int


@dataclass(frozen=True)
class Fitted:
    """The result of a fit at its best epoch."""

    weights: Mapping[str, Tensor]  # trained tensors, float32, by name
    history: list[dict[str, Any]]  # for each epoch: epoch (from 1), loss, seconds, and the validation scores
    best_epoch: int
    validation: list[Prediction]
    test: list[Prediction]

    @property
    def scores(self) -> dict[str, float]:
        """Scores on the validation set."""
        return dict(self.history[self.best_epoch - 1]["scores"])

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for name, tensor in self.weights.items() if name not in BUFFERS)

    @property
    def seconds(self) -> float:
        return sum(float(epoch["seconds"]) for epoch in self.history)


def fit(plan: FitPlan, console: Console) -> Fitted:
    """Fit, resume from the plan's file, or return the finished fit that it holds. Collective over data-parallel ranks.

    Raises `ArchiveError` for a damaged file, and `KeyboardInterrupt` on Ctrl-C; the saved state remains.
    """
    saved = _Saved.read(plan)
    if saved is not None and saved.finished is not None:
        return saved.finished
    batch = plan.tuning.global_batch_size
    recorder = _EpochRecorder(plan, console, saved)
    trainer = build_trainer(
        MegatronStrategy(leave_groups_up=True),
        [recorder],
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.num_nodes,
        val_check_interval=-(-len(plan.train) // batch),  # steps: an epoch
    )
    model = _model(plan, trainer, saved)
    fit_model(trainer, model)
    return recorder.result(model, trainer.strategy.root_device)


def _model(plan: FitPlan, trainer: Trainer, saved: _Saved | None) -> ESMFineTunedModel:
    model = ESMFineTunedModel(OmegaConf.create(dict(plan.config)), trainer)
    model.tuning, model.initial_weights = plan.tuning, plan.initial_weights
    if not isinstance(plan.sources, ReadingConfig):
        model.head_inputs = plan.sources[0].size
    model.standard = plan.standard
    if saved is not None:
        model.steps, model.resumed, model.resumed_optimizer = saved.steps, saved.weights, saved.optimizer
    weights = class_weights(model.task, plan.train.targets) if plan.tuning.class_weights else None
    model.class_weights = None if weights is None else torch.from_numpy(weights)
    tokens = plan.tuning.micro_batch_tokens
    batches = BatchPlan(global_batch_size=plan.tuning.global_batch_size, micro_batch_tokens=tokens)
    collator = _collator(plan, model.task, 0, plan.train)
    model.setup_training_data(TrainingSteps(collator, batches, model.seed, weights, model.steps))
    model.setup_validation_data(EvaluationBatches(_collator(plan, model.task, 1, plan.validation), tokens))
    return model


def _collator(plan: FitPlan, task: Task, place: int, labelled: LabelledDataset) -> Collator:
    """Return the collator of the set at this index of `Sources`."""
    if isinstance(plan.sources, ReadingConfig):
        return Collator(task, labelled, plan.sources)
    source = plan.sources[place]
    assert source is not None
    return Collator(task, labelled, source)


# --- epoch by epoch ---------------------------------------------------------------------------------------------------


class _EpochRecorder(Callback):
    """Record each epoch, keep the best one, save the state, and stop early."""

    def __init__(self, plan: FitPlan, console: Console, saved: _Saved | None) -> None:
        self.plan, self.console = plan, console
        self.history: list[dict[str, Any]] = [] if saved is None else saved.history
        self.best: dict[str, Tensor] = {} if saved is None else dict(saved.best)
        self._predictions: list[Prediction] = [] if saved is None else saved.validation
        self._saved_at = self._shown_at = self._started = time.monotonic()
        self._residues = 0

    @property
    def best_epoch(self) -> int:
        """The best epoch so far, from 1; 0 before the first."""
        return self.history[-1]["best_epoch"] if self.history else 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ESMFineTunedModel)
        self._residues += batch.residues
        now = time.monotonic()
        if now - self._shown_at < (0.5 if self.console.is_terminal else _SECONDS_BETWEEN_LINES):
            return
        self._shown_at = now
        steps = int(trainer.val_check_interval)
        done = (pl_module.steps - 1) % steps + 1
        rate = self._residues / max(now - self._started, 1e-9)
        left = (now - self._started) / done * (steps - done)
        self.console.progress(
            f"  {self.plan.name}: epoch {len(self.history) + 1}, {done / steps:.0%}, loss {pl_module.last_loss:.3f}, "
            f"{rate:,.0f} residues/s, {duration(left)} left of the epoch{self._best_so_far(pl_module.task)}"
        )

    def _best_so_far(self, task: Task) -> str:
        if not self.history:
            return ""
        best = self.history[self.best_epoch - 1]
        return f"; best {task.metric} {best['scores'][task.metric]:.4g}, epoch {best['epoch']}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ESMFineTunedModel)
        epoch, task, found = len(self.history) + 1, pl_module.task, pl_module.last_scores[pl_module.task.metric]
        best = self.history[self.best_epoch - 1]["scores"][task.metric] if self.history else float("nan")
        is_best = not self.history or task.is_better(found, best)
        if is_best:
            self.best = {name: tensor.cpu().clone() for name, tensor in pl_module.trained().items()}
            self._predictions = pl_module.last_predictions
        now = time.monotonic()
        self.history.append(
            {
                "epoch": epoch,
                "loss": pl_module.last_loss,
                "seconds": now - self._started,
                "scores": dict(pl_module.last_scores),
                "best_epoch": epoch if is_best else self.best_epoch,
            }
        )
        self._started, self._residues = now, 0
        self._stop_early(trainer)
        if now - self._saved_at > _SECONDS_BETWEEN_SAVES and not trainer.should_stop and is_first_rank():
            self._save(pl_module)

    def _stop_early(self, trainer: Trainer) -> None:
        epochs, tuning = len(self.history), self.plan.tuning
        if epochs and (epochs >= tuning.max_epochs or epochs - self.best_epoch >= tuning.patience):
            trainer.should_stop = True

    def _save(self, model: ESMFineTunedModel) -> None:
        optimizer: Any = model.optimizers()
        assert model.masters is not None
        progress = {
            "steps": model.steps,
            "weights": {name: tensor.cpu() for name, tensor in model.trained().items()},
            "optimizer": local_state(optimizer.optimizer, model.masters),
        }
        _write(self.plan, self.best, {**self._state([]), "progress": progress})
        self._saved_at = time.monotonic()

    def _state(self, test: Sequence[Prediction]) -> dict[str, Any]:
        validation = torch.from_numpy(np.concatenate(self._predictions))
        figures = {"history": self.history, "validation": validation}
        return figures | ({"test": torch.from_numpy(np.concatenate(test))} if test else {})

    def result(self, model: ESMFineTunedModel, device: torch.device) -> Fitted:
        """Return the result at the best epoch, with predictions for the test set, whose labels are not used."""
        test: list[Prediction] = []
        if self.plan.test:
            model.load_trained({name: tensor.to(model.device) for name, tensor in self.best.items()})
            test = _predicted(model.to(device).eval(), self.plan)
        if is_first_rank():
            _write(self.plan, self.best, self._state(test))
        return Fitted(self.best, self.history, self.best_epoch, self._predictions, test)


def _predicted(model: ESMFineTunedModel, plan: FitPlan) -> list[Prediction]:
    """Return the predictions for the test set, on all ranks."""
    per_residue = model.task.is_per_residue
    blank = [np.full(protein.residues if per_residue else 1, np.nan, dtype=np.float32) for protein in plan.test]
    collator = _collator(plan, model.task, 2, LabelledDataset(plan.test, blank))
    batches = EvaluationBatches(collator, plan.tuning.micro_batch_tokens, data_parallel_rank(), data_parallel_size())
    own: list[tuple[int, Prediction]] = []
    for index in range(len(batches)):
        batch = batches[index].to(model.device)
        own += zip(batch.numbers.tolist(), model.predictions(batch), strict=True)
    return gather_predictions(own, len(plan.test), model.device)


# --- on disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """The content of a fit's file: its result, or its state after an epoch."""

    finished: Fitted | None
    history: list[dict[str, Any]]
    best: Mapping[str, Tensor]
    validation: list[Prediction]
    steps: int = 0
    weights: Mapping[str, Tensor] | None = None
    optimizer: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, plan: FitPlan) -> _Saved | None:
        if not plan.file.exists():
            return None
        file = ArchiveFile.open(plan.file)
        weights, state = file.load_weights(), file.load_state()
        task = Task.from_mapping(plan.config["task"])
        validation = _split(task, state["validation"], plan.validation.proteins)
        history = state["history"]
        if progress := state.get("progress"):
            where = progress["steps"], progress["weights"], progress["optimizer"]
            return cls(None, history, weights, validation, *where)
        test = _split(task, state["test"], plan.test) if "test" in state else []
        return cls(Fitted(weights, history, history[-1]["best_epoch"], validation, test), history, weights, validation)


def _split(task: Task, rows: Tensor, proteins: Sequence[Protein]) -> list[Prediction]:
    sizes = [protein.residues if task.is_per_residue else 1 for protein in proteins]
    return [part.numpy() for part in rows.split(sizes)]


def _write(plan: FitPlan, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    write_archive(plan.file, Archive(ESMFineTunedModel.__name__, plan.config, weights, {"fit": plan.name}, state))
