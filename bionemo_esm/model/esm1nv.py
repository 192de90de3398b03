"""ESM-1nv as a NeMo model: the encoder, its loss, one optimizer step, and what a checkpoint holds.

Shape suffixes: T tokens of a packed row, H hidden size, M masked positions, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.data.dataloader import (
    RankBatch,
    TrainingBatches,
    ValidationBatches,
    training_loader,
    validation_loader,
)
from bionemo_esm.data.hashing import derive_key
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, read_archive
from bionemo_esm.model.backends import FusedBackends, choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig, OptimConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.nemo_connector import ESMSaveRestoreConnector, describe, load_weights, register_model
from bionemo_esm.model.nonfinite_guard import NonFiniteGuard, SkippedStep, SuspectSamples
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer, build_schedule, build_sharded_optimizer
from bionemo_esm.model.parallel import (
    data_parallel_rank,
    data_parallel_size,
    data_parallel_sum,
    ensure_groups,
    gather_shards,
)
from bionemo_esm.model.resume import adopt_checkpoint, check_compatible, loops_after
from bionemo_esm.model.step_stats import StepStats, Stopwatch, measure_step

_DROPOUT_STREAM = 6  # keeps dropout's seeds apart from the keys of order and corruption


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, over all ranks."""

    loss: float  # nats a masked residue
    gradient_norm: float  # before clipping
    learning_rate: float
    work: StepStats
    skipped: SkippedStep | None = None  # then no rank has changed its weights


@dataclass(frozen=True)
class Evaluation:
    """Masked-residue prediction with every chosen residue shown as `<mask>`."""

    loss: float  # nats a masked residue
    accuracy: float  # fraction of masked residues whose likeliest token is right
    residues: int  # masked residues scored

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


@register_model
class ESM1nvModel(ModelPT):
    """A BERT-style protein language model, pretrained with one packed row a micro batch.

    `cfg`: `encoder` (the fields of `EncoderConfig`), `precision` ("32", "bf16" or "auto") and `seed`. With a trainer
    the encoder is built when the trainer has brought the process groups up; without one it is built at once.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        self.encoder_config = EncoderConfig.from_config(OmegaConf.to_container(cfg.encoder))  # type: ignore[arg-type]
        super().__init__(OmegaConf.create(OmegaConf.to_container(cfg)), trainer=trainer)
        self._save_restore_connector = ESMSaveRestoreConnector()
        self.automatic_optimization = False  # a batch is a whole optimizer step: see training_step
        self.strict_loading = False  # on_load_checkpoint loads, and accounts for every tensor
        self.seed = int(cfg.get("seed", 0))
        self.encoder: ESMEncoder | None = None
        self.backends: FusedBackends | None = None
        self.masters: MasterWeights | None = None
        self.guard = NonFiniteGuard(OptimConfig())
        self.initial_weights: Path | None = None
        self.provenance: dict[str, Any] = {}
        self.shard_optimizer = False
        self.continues = False  # the checkpoint to begin with is another run's, and the configuration may differ
        self.identity: dict[str, Any] = {}  # what a checkpoint must share with the run that goes on from it
        self.steps = self.consumed_samples = 0  # trained, over all sessions; skipped steps count
        self.last_step: StepReport | None = None
        self.stopwatch = Stopwatch()  # of forward and backward passes
        self.last_evaluation: Evaluation | None = None
        self.validation_interrupted = False
        self._resumed_masters: dict[str, Tensor] | None = None
        self._sums: Tensor | None = None  # float64 [3]: loss, right answers, targets of the validation under way
        if trainer is None:
            ensure_groups()
            self.configure_model()

    def configure_model(self) -> None:
        """Build the encoder, with weights that depend on the seed alone, or those of `initial_weights`."""
        if self.encoder is not None:
            return
        device_type = self._trainer.strategy.root_device.type if self._trainer else "cpu"
        if self._trainer is None and torch.cuda.is_available():
            device_type = "cuda"
        dtype = parameter_dtype(str(self.cfg.get("precision", "32")), device_type)
        self.backends = choose_backends(device_type, dtype, self.encoder_config.attention_dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.encoder = ESMEncoder(self.encoder_config, dtype, self.backends).to(dtype)  # norms and head, too
        if self.initial_weights is not None:
            load_weights(self, dict(read_archive(self.initial_weights).weights), str(self.initial_weights))

    # --- forward and loss -------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits float32 [M, V] at the batch's masked positions."""
        assert self.encoder is not None
        logits_MV: Tensor = self.encoder(
            batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.target_index
        )
        return logits_MV

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states [T, H] of every token of the row."""
        assert self.encoder is not None
        return self.encoder.hidden_states(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits float32 [T, V] at every token of the row."""
        assert self.encoder is not None
        return self.encoder.logits(self.hidden_states(batch))

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, share: RankBatch, batch_idx: int) -> None:
        """One optimizer step over this rank's share of a global batch.

        The loss is the sum of cross-entropies over the masked positions of the whole global batch, all ranks and all
        micro batches, divided by their number; so it does not depend on how the batch was dealt.
        """
        assert self.masters is not None and self.encoder is not None
        batches = share.micro_batches
        self._seed_dropout()
        work = measure_step(batches, self.device)
        self.masters.zero_gradients()
        parts = torch.zeros(len(batches), device=self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self.masters.overlapped_reduction() if last else nullcontext(), self.stopwatch.running(self.device):
                part = cross_entropy(self(batch), batch.targets, reduction="sum") / max(work.targets, 1)
                self.manual_backward(part)
            parts[index] = part.detach()
        norm = float(self.masters.clip_gradients(self.optim_config.gradient_clip_val))
        loss = float(data_parallel_sum(parts.sum()))

        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        rate, skipped = optimizer.param_groups[0]["lr"], None
        if (reason := self.guard.skip_reason(loss, norm)) is None:
            optimizer.step()
            self.masters.write_back()
        else:
            skipped = SkippedStep(reason, self.guard.in_a_row, self._suspects(parts))
            self._count_a_step_not_taken()
        schedule.step()
        self.steps += 1
        self.consumed_samples += share.samples
        self.last_step = StepReport(loss, norm, rate, work, skipped)
        self._log_step(self.last_step)

    @property
    def epoch(self) -> float:
        """How often training has gone through its data."""
        return self.consumed_samples / self._stream.permutation.size

    @property
    def optim_config(self) -> OptimConfig:
        return self.guard.config

    @optim_config.setter
    def optim_config(self, config: OptimConfig) -> None:
        self.guard = NonFiniteGuard(config)

    @property
    def gave_up(self) -> bool:
        """Whether too many steps in a row could not be taken."""
        return self.guard.gave_up

    def _suspects(self, parts: Tensor) -> tuple[SuspectSamples, ...]:
        """The micro batches of all ranks whose loss is not finite, or all of them where each has a finite one.

        `parts`: float32 [micro batches], the losses of this rank's. Collective.
        """
        rank_batches = [
            self._stream.rank_batches(self.consumed_samples, rank)[0] for rank in range(data_parallel_size())
        ]
        nonfinite = torch.zeros(len(rank_batches), max(map(len, rank_batches)), device=self.device)
        nonfinite[data_parallel_rank(), : len(parts)] = (~parts.isfinite()).float()
        nonfinite = data_parallel_sum(nonfinite)
        return tuple(
            SuspectSamples(rank, int(epochs[0]), tuple(samples.tolist()))
            for rank, micro_batches in enumerate(rank_batches)
            for index, (epochs, samples) in enumerate(micro_batches)
            if nonfinite[rank, index] or not nonfinite.any()
        )

    def _count_a_step_not_taken(self) -> None:
        """In Lightning's count, by which checkpoints, validation and the end of training go."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def _seed_dropout(self) -> None:
        """Dropout depends on (seed, consumed samples, rank): an interrupted run needs no generator state to go on.

        The data-parallel rank: ranks that share a copy of the model must drop the same activations.
        """
        key = derive_key(self.seed, _DROPOUT_STREAM, self.consumed_samples, data_parallel_rank())
        torch.manual_seed(int(key[0] >> 1))

    def _log_step(self, report: StepReport) -> None:
        self.log_dict(
            {
                "train_loss": report.loss,
                "lr": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "consumed_samples": float(self.consumed_samples),
                "epoch": self.epoch,
            },
            batch_size=1,
        )

    # --- validation -------------------------------------------------------------------------------------------------

    @property
    def shared_validation_batches(self) -> int:
        """Validation batches that every rank has; some ranks have one more."""
        ranks = data_parallel_size()
        return len(self._validation.on_rank(ranks - 1, ranks))

    def on_validation_epoch_start(self) -> None:
        self.validation_interrupted = False
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        assert self._sums is not None
        self._sums += self.score(batch)

    def on_validation_epoch_end(self) -> None:  # type: ignore[override]
        assert self._sums is not None
        if self.validation_interrupted:
            return
        self.last_evaluation = self.evaluation(data_parallel_sum(self._sums))
        self.log_dict(
            {
                "val_loss": self.last_evaluation.loss,
                "val_perplexity": self.last_evaluation.perplexity,
                "val_masked_accuracy": self.last_evaluation.accuracy,
            },
            batch_size=1,
        )

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        """float64 [3]: summed cross-entropy in nats, right answers, and number of the batch's masked positions."""
        logits_MV = self(batch)
        loss = cross_entropy(logits_MV, batch.targets, reduction="none").double().sum()
        right = (logits_MV.argmax(dim=-1) == batch.targets).sum()
        return torch.stack([loss, right.double(), torch.tensor(len(batch.targets), device=loss.device).double()])

    def evaluate(self, batches: ValidationBatches) -> Evaluation:
        """Score validation batches outside a trainer, on the model's device."""
        device = next(self.parameters()).device
        scores = [self.score(batches[index].to(device)) for index in range(len(batches))]
        return self.evaluation(torch.stack(scores).sum(0))

    @staticmethod
    def evaluation(sums: Tensor) -> Evaluation:
        """From summed `score`s. Raises `ConfigError` when nothing was masked."""
        loss, right, count = sums.tolist()
        if count == 0:
            raise ConfigError("the validation set has no masked residue; give it more sequences")
        return Evaluation(loss / count, right / count, int(count))

    # --- optimizer and data, as NeMo and Lightning ask for them -----------------------------------------------------

    def configure_optimizers(self) -> Any:
        assert self.encoder is not None and self.backends is not None
        if self.masters is not None:
            self.masters.release()
        self.masters = MasterWeights(self.named_parameters())
        if self._resumed_masters is not None:
            self.masters.load_state_dict(self._resumed_masters)
            self._resumed_masters = None
        build = build_sharded_optimizer if self.shard_optimizer else build_optimizer
        optimizer = build(self.masters, self.optim_config, self.backends)
        return [optimizer], [{"scheduler": build_schedule(optimizer, self.optim_config), "interval": "step"}]

    def setup_training_data(self, train_data_config: TrainingBatches, num_workers: int = 0) -> None:
        """Train on this stream (dealt to the ranks there are), from `consumed_samples` on."""
        self._stream, self._num_workers = train_data_config, num_workers

    def setup_validation_data(self, val_data_config: ValidationBatches) -> None:
        """Validate on these batches (dealt to the ranks there are)."""
        self._validation = val_data_config

    def train_dataloader(self) -> DataLoader[RankBatch]:
        stream = self._stream.on_rank(data_parallel_rank())
        return training_loader(stream, self.consumed_samples, self._num_workers, self._pinned)

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        batches = self._validation.on_rank(data_parallel_rank(), data_parallel_size())
        return validation_loader(batches, 0, self._pinned)

    @property
    def _pinned(self) -> bool:
        return bool(self.device.type == "cuda")

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """None: weights are files that people bring; nothing is fetched from a catalogue."""
        return []

    # --- what is saved ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The float32 masters are the weights; with them and `consumed_samples`, the next step is determined.

        Lightning's account of its loops is left out: it follows from the number of steps, at whatever moment of a step
        or a validation the checkpoint is written.
        """
        for key in ("state_dict", "loops", "hyper_parameters", "hparams_name", "hparams_type"):
            checkpoint.pop(key, None)
        checkpoint["model"] = describe(self)
        checkpoint["steps"], checkpoint["consumed_samples"] = self.steps, self.consumed_samples
        checkpoint["identity"] = self.identity
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        archive: Archive = checkpoint["model"]
        check_compatible(checkpoint, self.encoder_config, self.identity, self.continues)
        if self.continues:
            self.provenance["continued_from"] = adopt_checkpoint(checkpoint, self.optim_config)
        elif origin := archive.provenance.get("continued_from"):
            self.provenance["continued_from"] = origin
        fixed = dict(self.named_buffers())
        self._resumed_masters = {name: tensor for name, tensor in archive.weights.items() if name not in fixed}
        load_weights(self, dict(archive.weights), "checkpoint")
        self.guard.load_state_dict(checkpoint["guard"])
        self.steps, self.consumed_samples = int(checkpoint["steps"]), int(checkpoint["consumed_samples"])
        checkpoint["loops"] = {"fit_loop": loops_after(self.steps, self.trainer.fit_loop.state_dict())}

    def archive_provenance(self) -> dict[str, Any]:
        """Where the weights come from: what a reader of the archive can trust and cite."""
        trained = {"steps": self.steps, "consumed_samples": self.consumed_samples} if self.steps else {}
        return {**self.provenance, **trained}

    def archive_config(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """What `.nemo` says of the model: its sizes, its seed, and the precision of the weights beside it."""
        weights_dtype = next(iter(weights.values())).dtype
        return {
            "encoder": self.encoder_config.to_dict(),
            "precision": "bf16" if weights_dtype == torch.bfloat16 else "32",
            "seed": self.seed,
        }

    def archive_weights(self) -> dict[str, Tensor]:
        """The float32 masters where there are, else the parameters, whole, and what training leaves as it is.

        Collective where parameters are sharded.
        """
        fixed = {name: buffer.detach() for name, buffer in self.named_buffers()}
        if self.masters is not None:
            return self.masters.state_dict() | fixed
        whole = {name: gather_shards(parameter.detach(), parameter) for name, parameter in self.named_parameters()}
        return whole | fixed
