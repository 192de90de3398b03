"""The training itself: model, strategy, callbacks and NeMo's exp_manager under a Lightning trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch
from lightning.pytorch import Callback, Trainer
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.screen import Screen
from bionemo_esm.training.background import BackgroundWriter
from bionemo_esm.training.callbacks import History, Progress
from bionemo_esm.training.checkpoint_averaging import CheckpointAveraging
from bionemo_esm.training.checkpoints import DAMAGED, Checkpoints, SafeCheckpointIO, newest_checkpoint, tidy
from bionemo_esm.training.prepared import PreparedRun
from bionemo_esm.training.recipe import Recipe, TrainerConfig
from bionemo_esm.training.requirements import is_rank_zero
from bionemo_esm.training.stopping import StopSignals
from bionemo_esm.training.strategy import MegatronStrategy

PRECISION_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16 with float32 masters"}


@dataclass(frozen=True)
class FitResult:
    """What came of the training."""

    model: ESM1nvModel
    steps: int
    averaging: CheckpointAveraging | None
    stopped_by: Signals | None  # the signal that ended it before its last step
    best_checkpoint: Path | None  # the one with the lowest validation loss
    seconds: float  # of training and validation, earlier sessions of the run included
    residues_per_second: float  # over the last logging interval
    resumed_from_step: int
    backends: str
    precision: str


def fit(run: PreparedRun, screen: Screen) -> FitResult:
    """Train to the recipe's last step, from the newest checkpoint in the run's folder that can be read."""
    recipe, folder = run.recipe, run.folder
    _send_nemo_messages_to_the_log()
    checkpoint = _checkpoint_to_go_on_from(folder / "checkpoints", screen)
    resumed_from_step = int(ArchiveFile.open(checkpoint).provenance["steps"]) if checkpoint else 0

    saving, signals = recipe.exp_manager.checkpoints, StopSignals()
    writer = BackgroundWriter(saving.in_background)
    history = History(folder / "metrics.jsonl", recipe.trainer.log_every_n_steps)
    checkpoints = Checkpoints(folder / "checkpoints", saving, signals, writer)
    averaging = None
    if saving.average_last:
        averaging = CheckpointAveraging(folder / "averaging", saving.average_last, saving.every_n_train_steps, writer)
    watching = [history, Progress(screen, history, run.unigram_perplexity)]  # first: a step is on record, then saved
    callbacks = [*watching, *([averaging] if averaging else []), checkpoints]
    trainer = _trainer(recipe.trainer, callbacks, SafeCheckpointIO(writer))
    _start_experiment(trainer, recipe, folder)

    model = _model(recipe, trainer)
    model.provenance = run.provenance
    model.setup_training_data(run.stream, recipe.data.num_workers)
    model.setup_validation_data(run.validation)
    dtype = parameter_dtype(recipe.trainer.precision, trainer.strategy.root_device.type)
    model.identity = {**run.identity, "precision": PRECISION_NAMES[dtype]}
    backends = choose_backends(trainer.strategy.root_device.type, dtype, recipe.model.attention_dropout).describe()
    screen.say(run.opening_screen(backends, PRECISION_NAMES[dtype], resumed_from_step))

    with signals.heeded():
        _fit_or_be_interrupted(trainer, model, checkpoint)
    best = checkpoints.path(checkpoints.best_step) if checkpoints.best_step is not None else None
    return FitResult(
        model=model,
        steps=trainer.global_step,
        averaging=averaging,
        stopped_by=signals.received if trainer.global_step < recipe.trainer.max_steps else None,
        best_checkpoint=best if best and best.is_file() else None,
        seconds=history.seconds,
        residues_per_second=history.residues_per_second,
        resumed_from_step=resumed_from_step,
        backends=backends,
        precision=PRECISION_NAMES[dtype],
    )


def _checkpoint_to_go_on_from(folder: Path, screen: Screen) -> Path | None:
    """The newest that is intact; damaged ones that are newer are set aside, and said to be."""
    checkpoint, complaints = newest_checkpoint(folder)
    for complaint in complaints:
        screen.say(f"warning: {complaint}; set aside as *{DAMAGED}, going back to {checkpoint and checkpoint.name}")
    if checkpoint is not None and is_rank_zero():
        tidy(folder, checkpoint)
    return checkpoint


def _fit_or_be_interrupted(trainer: Trainer, model: ESM1nvModel, checkpoint: Path | None) -> None:
    """Fit; an interruption that our handlers did not turn into an orderly stop stays what it is."""
    try:
        trainer.fit(model, ckpt_path=checkpoint)
    except SystemExit:  # what Lightning makes of KeyboardInterrupt
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def _model(recipe: Recipe, trainer: Trainer) -> ESM1nvModel:
    settings = {"encoder": recipe.model.to_dict(), "precision": recipe.trainer.precision, "seed": recipe.seed}
    model = ESM1nvModel(OmegaConf.create(settings), trainer)
    model.optim_config = recipe.optim
    model.initial_weights = recipe.restore_from_path
    return model


def _trainer(config: TrainerConfig, callbacks: list[Callback], checkpoint_io: SafeCheckpointIO) -> Trainer:
    """A Lightning trainer whose batches are optimizer steps: accumulation and clipping happen in the model's step."""
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=MegatronStrategy(),
        plugins=[checkpoint_io],
        callbacks=callbacks,
        max_epochs=-1,
        max_steps=config.max_steps,
        val_check_interval=config.val_check_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=config.limit_val_batches,
        log_every_n_steps=config.log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _start_experiment(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """NeMo's exp_manager: loggers, and a record of command and commit. Checkpoints and preemption are ours."""
    settings = recipe.exp_manager
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(folder / "logs"),
            "name": recipe.name,
            "create_tensorboard_logger": settings.create_tensorboard_logger,
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": dict(settings.wandb_logger_kwargs) if settings.create_wandb_logger else None,
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            "disable_validation_on_resume": False,
            "seconds_to_sleep": 0,
        },
    )


def _send_nemo_messages_to_the_log() -> None:
    """NeMo and Lightning hold on to the terminal's stream from their import; point them at ours, which is the log."""
    nemo_logging.remove_stream_handlers()
    logging.captureWarnings(True)
