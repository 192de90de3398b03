"""Training: model, callbacks and NeMo's exp_manager under a Lightning trainer."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from bionemo_esm.console import Console
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.esm1nv import ESM1nvModel, Evaluation
from bionemo_esm.model.lightning import MegatronStrategy, build_trainer
from bionemo_esm.model.lightning import fit as fit_model
from bionemo_esm.pretraining.callbacks import (
    History,
    InitialValidation,
    Progress,
    ThroughputMeter,
    device_name,
    initial_validation,
    last_probe,
)
from bionemo_esm.pretraining.checkpoints import (
    AsyncWriter,
    CheckpointAveraging,
    Checkpoints,
    SafeCheckpointIO,
    StopSignals,
)
from bionemo_esm.pretraining.hang_watch import HangWatch, collective_timeout, resiliency_callbacks
from bionemo_esm.pretraining.preflight import RankAgreement, slurm_environment
from bionemo_esm.pretraining.probe import Probe, ProbeAtStart
from bionemo_esm.pretraining.probe_config import ProbeSet
from bionemo_esm.pretraining.recipe import Recipe, TrainerConfig
from bionemo_esm.pretraining.resume import StartingPoint, choose_starting_checkpoint
from bionemo_esm.pretraining.run_context import RunContext

PRECISION_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16 with float32 masters"}


@dataclass(frozen=True)
class FitResult:
    """The trained model and what the summary records of the training."""

    model: ESM1nvModel
    steps: int
    averaging: CheckpointAveraging | None
    stopped_by: Signals | None  # the signal that stopped it before its last step
    best_checkpoint: Path | None  # with the lowest validation loss
    seconds: float  # of training and validation, in all sessions
    initial: Evaluation | None  # before the first step; None if the run did not start from weights
    probe: dict[str, Any] | None  # result of the last one: `last_probe`
    measured: dict[str, float]  # over the last logging interval: `Measurements`
    resumed_from_step: int
    first_step: int  # over 0 if the run continues a parent run
    backends: str
    precision: str
    device_name: str


def fit(run: RunContext, console: Console, ranks: RankAgreement) -> FitResult:
    """Train to the recipe's last step, from the newest readable checkpoint of the run directory."""
    recipe, folder = run.recipe, run.folder
    _send_nemo_messages_to_the_log()
    chosen = ranks.on_rank_zero(lambda: _broadcast_start(run, console))
    start = StartingPoint(**{**chosen, "checkpoint": chosen["checkpoint"] and Path(chosen["checkpoint"])})

    saving, signals = recipe.exp_manager.checkpoints, StopSignals()
    writer = AsyncWriter(saving.in_background)
    meter, watch = ThroughputMeter(), HangWatch(folder, recipe.trainer.hang_timeout_seconds, console)
    history = History(folder / "metrics.jsonl", recipe.trainer.log_every_n_steps, meter)
    checkpoints = Checkpoints(folder / "checkpoints", saving, signals, writer, watch.long_operation)
    averaging = None
    if saving.average_last:
        averaging = CheckpointAveraging(folder / "averaging", saving.average_last, saving.every_n_train_steps, writer)
    progress = Progress(console, history, run.unigram_perplexity)
    probe = None if run.probe is None else _probe(run, run.probe, signals, watch, history, console)
    # Metrics are recorded before a checkpoint is saved.
    optional = [callback for callback in (probe, averaging) if callback is not None]
    callbacks: list[Callback] = [watch, history, progress, *optional, checkpoints]
    if recipe.restore_from_path is not None and start.checkpoint is None:
        limit = recipe.trainer.limit_val_batches
        initial = InitialValidation(limit, checkpoints.should_stop_now, watch, history, progress)
        callbacks.append(initial)  # after all others have started
    if probe is not None:
        callbacks.append(ProbeAtStart(probe))
    trainer = _trainer(recipe.trainer, callbacks, SafeCheckpointIO(writer), meter.data_wait)
    _start_experiment(trainer, recipe, folder)
    theirs = resiliency_callbacks(trainer.strategy.root_device.type, folder)
    trainer.callbacks.extend(theirs)  # type: ignore[attr-defined]

    model = _model(run, trainer, start)
    dtype = parameter_dtype(recipe.trainer.precision, trainer.strategy.root_device.type)
    model.identity = {**run.identity, "precision": PRECISION_NAMES[dtype]}
    device_type, encoder = trainer.strategy.root_device.type, recipe.model
    kernels = choose_backends(device_type, dtype, encoder.attention_dropout, encoder.head_size)
    backends = kernels.describe(recipe.optim.name)
    console.print_line(run.run_description(backends, PRECISION_NAMES[dtype], start.steps, start.first_step))

    with signals.handling(), watch.watching():
        fit_model(trainer, model, start.checkpoint)
    best = checkpoints.path(checkpoints.best_step) if checkpoints.best_step is not None else None
    return FitResult(
        model=model,
        steps=trainer.global_step,
        averaging=averaging,
        stopped_by=signals.received if trainer.global_step < recipe.trainer.max_steps else None,
        best_checkpoint=best if best and best.is_file() else None,
        seconds=history.seconds,
        initial=initial_validation(history.path),
        probe=last_probe(history.path),
        measured=meter.latest.known() if meter.latest else {},
        resumed_from_step=start.steps,
        first_step=start.first_step,
        backends=backends,
        precision=PRECISION_NAMES[dtype],
        device_name=device_name(trainer.strategy.root_device),
    )


def _probe(
    run: RunContext, probed: ProbeSet, signals: StopSignals, watch: HangWatch, history: History, console: Console
) -> Probe:
    """Build the probe. Its batches have at most the tokens of a training micro batch."""
    data, longest = run.recipe.data, run.recipe.model.seq_length
    most_tokens = data.micro_batch_tokens or (data.micro_batch_size or 1) * longest
    return Probe(probed, most_tokens, signals, watch, history, console)


def _broadcast_start(run: RunContext, console: Console) -> dict[str, Any]:
    """Return `choose_starting_checkpoint` of rank 0, broadcast: a checkpoint is verified once, not by every rank."""
    recipe = run.recipe
    start = choose_starting_checkpoint(run.folder, recipe.continue_from_path, console)
    return {**asdict(start), "checkpoint": start.checkpoint and str(start.checkpoint)}


def _model(run: RunContext, trainer: Trainer, start: StartingPoint) -> ESM1nvModel:
    recipe = run.recipe
    settings = {"encoder": recipe.model.to_dict(), "precision": recipe.trainer.precision, "seed": recipe.seed}
    model = ESM1nvModel(OmegaConf.create(settings), trainer)
    model.optim_config = recipe.optim
    model.initial_weights = recipe.restore_from_path
    model.sharding = recipe.trainer.sharding
    model.recompute = recipe.trainer.recompute
    model.provenance, model.continues = run.provenance, start.of_another_run
    model.setup_training_data(run.stream, recipe.data.num_workers)
    model.setup_validation_data(run.validation)
    return model


def _trainer(
    config: TrainerConfig, callbacks: list[Callback], checkpoint_io: SafeCheckpointIO, profiler: Profiler
) -> Trainer:
    strategy = MegatronStrategy(config.tensor_model_parallel_size, collective_timeout(config.hang_timeout_seconds))
    return build_trainer(
        strategy,
        callbacks,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        plugins=[checkpoint_io, *([slurm] if (slurm := slurm_environment()) else [])],
        profiler=profiler,
        max_steps=config.max_steps,
        val_check_interval=config.val_check_interval,
        limit_val_batches=config.limit_val_batches,
        log_every_n_steps=config.log_every_n_steps,
    )


def _start_experiment(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """Start NeMo's exp_manager for its loggers and its record of command and commit."""
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
    """Redirect the messages of NeMo and Lightning, which keep the stream of their import, to the log."""
    nemo_logging.remove_stream_handlers()
    logging.captureWarnings(True)
