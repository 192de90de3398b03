"""ESM-1nv as a NeMo model: loss, optimizer step, validation, and the content of a checkpoint.

Shape suffixes: T tokens of a packed row, H hidden size, M masked positions, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from bionemo_esm.compat import fit_loop_state
from bionemo_esm.data.collate import PackedBatch
from bionemo_esm.data.dataloader import (
    RankBatch,
    TrainingBatches,
    ValidationBatches,
    training_loader,
    validation_loader,
)
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, read_archive
from bionemo_esm.model.backends import default_torch_state
from bionemo_esm.model.config import FULL_SHARDING, NO_RECOMPUTE, NO_SHARDING, SHARDED_OPTIMIZER, OptimConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.nemo_connector import describe, load_weights, register_model
from bionemo_esm.model.nonfinite_guard import NonFiniteGuard, SkippedStep, SuspectSamples
from bionemo_esm.model.optimizer import build_optimizer, build_schedule, build_sharded_optimizer
from bionemo_esm.model.packed_model import PackedModel
from bionemo_esm.model.parallel import (
    data_parallel_rank,
    data_parallel_size,
    data_parallel_sum,
    gather_shards,
)
from bionemo_esm.model.resume import adopt_checkpoint, check_compatible
from bionemo_esm.model.sharding import IGNORED_TARGET, IdleBatches, shard_encoder, with_idle_batches
from bionemo_esm.model.step_stats import StepStats, measure_step

_DROPOUT_STREAM = 6  # keeps dropout's seeds apart from the keys of order and corruption


@dataclass(frozen=True)
class StepReport:
    """Result of one optimizer step over all ranks."""

    loss: float  # nats a masked residue
    gradient_norm: float  # before clipping
    learning_rate: float
    work: StepStats
    skipped: SkippedStep | None = None  # None: the step was taken


@dataclass(frozen=True)
class Evaluation:
    """Masked-residue prediction, with every chosen residue shown as `<mask>`."""

    loss: float  # nats a masked residue
    accuracy: float  # fraction of masked residues whose most likely token is correct
    residues: int  # masked residues scored

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


@register_model
class ESM1nvModel(PackedModel):
    """A BERT-style protein language model; a micro batch is one packed row.

    `cfg`: `encoder` (the fields of `EncoderConfig`), `precision` ("32", "bf16" or "auto") and `seed`. Without a trainer
    the encoder is built at once; with one, Lightning calls `configure_model`.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        values: Any = OmegaConf.to_container(cfg)
        super().__init__(values, trainer)
        self.strict_loading = False  # on_load_checkpoint loads, and accounts for every tensor
        self.guard = NonFiniteGuard(OptimConfig())
        self.sharding = NO_SHARDING
        self.recompute = NO_RECOMPUTE
        self.continues = False  # the checkpoint to start from is another run's; its configuration may differ
        self.identity: dict[str, Any] = {}  # values that a checkpoint must share with the run that resumes from it
        self.consumed_samples = 0  # over all sessions, those of skipped steps included
        self.last_step: StepReport | None = None
        self.last_evaluation: Evaluation | None = None
        self.validation_interrupted = False
        self._resumed_masters: dict[str, Tensor] | None = None
        self._sums: Tensor | None = None  # float64 [3]: loss, correct predictions, targets of the current validation
        if trainer is None:
            self.configure_model()

    def configure_model(self) -> None:
        """Build the encoder, with weights that depend on the seed alone, or those of `initial_weights`."""
        if self.encoder is not None:
            return
        dtype = self.choose_kernels()
        assert self.backends is not None
        with default_torch_state(), torch.random.fork_rng(devices=[]):  # Lightning's default device may be a GPU
            torch.default_generator.manual_seed(self.seed)
            self.encoder = ESMEncoder(self.encoder_config, dtype, self.backends)
            if self.initial_weights is not None:
                load_weights(self, dict(read_archive(self.initial_weights).weights), str(self.initial_weights))
        self.encoder.set_recompute(self.recompute)
        if self.sharding == FULL_SHARDING and data_parallel_size() > 1:
            assert self._trainer is not None
            self.check_equal_weights()
            self.encoder.to(self._trainer.strategy.root_device)
            shard_encoder(self.encoder, dtype)

    # --- forward and loss -------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return logits float32 [M, V] at the batch's masked positions."""
        assert self.encoder is not None
        logits_MV: Tensor = self.encoder(
            batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.target_index
        )
        return logits_MV

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Return the final hidden states [T, H] of every token of the row."""
        assert self.encoder is not None
        return self.encoder.hidden_states(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Return logits float32 [T, V] at every token of the row."""
        assert self.encoder is not None
        return self.encoder.logits(self.hidden_states(batch))

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, rank_batch: RankBatch, batch_idx: int) -> None:
        """Take one optimizer step over this rank's part of a global batch.

        The loss is the sum of cross-entropies over the masked positions of the whole global batch (all ranks, all micro
        batches) divided by their number. It does not depend on how the batch is split.
        """
        assert self.masters is not None
        batches = rank_batch.micro_batches
        counts = measure_step(batches, self.device)
        targets = counts[0].clamp(min=1)
        steps = with_idle_batches(batches, self.device) if self.is_fully_sharded else batches

        def loss(batch: PackedBatch) -> Tensor:
            return cross_entropy(self(batch), batch.targets, reduction="sum") / targets

        losses = self.accumulate_gradients(steps, loss, _DROPOUT_STREAM, self.consumed_samples)
        results = [
            data_parallel_sum(losses.sum()),
            self.masters.clip_gradients(self.optim_config.gradient_clip_val),
        ]
        # the only value of a step that the host waits for; numbers up to 2^53 are exact in float64
        total, norm, *whole = torch.cat([torch.stack(results).double(), counts.double()]).tolist()
        work, skipped = StepStats(*map(int, whole)), None
        if (reason := self.guard.skip_reason(total, norm)) is not None:
            skipped = SkippedStep(reason, self.guard.in_a_row, self._suspects(losses[: len(batches)]))
        rate = self.finish_step(skip=skipped is not None)
        self.consumed_samples += rank_batch.samples
        self.last_step = StepReport(total, norm, rate, work, skipped)
        self._log_step(self.last_step)

    @property
    def epoch(self) -> float:
        """Passes through the training data so far."""
        return self.consumed_samples / self._stream.permutation.size

    @property
    def optim_config(self) -> OptimConfig:
        return self.guard.config

    @optim_config.setter
    def optim_config(self, config: OptimConfig) -> None:
        self.guard = NonFiniteGuard(config)

    @property
    def gave_up(self) -> bool:
        """Whether training must stop, after too many consecutive skipped steps."""
        return self.guard.gave_up

    def _suspects(self, losses: Tensor) -> tuple[SuspectSamples, ...]:
        """Return the micro batches of all ranks whose loss is not finite, or all micro batches if every loss is finite.

        `losses`: of this rank's micro batches, float32 [micro batches]. Collective.
        """
        rank_batches = [
            self._stream.rank_batches(self.consumed_samples, rank)[0] for rank in range(data_parallel_size())
        ]
        nonfinite = torch.zeros(len(rank_batches), max(map(len, rank_batches)), device=self.device)
        nonfinite[data_parallel_rank(), : len(losses)] = (~losses.isfinite()).float()
        nonfinite = data_parallel_sum(nonfinite)
        return tuple(
            SuspectSamples(rank, int(epochs[0]), tuple(samples.tolist()))
            for rank, micro_batches in enumerate(rank_batches)
            for index, (epochs, samples) in enumerate(micro_batches)
            if nonfinite[rank, index] or not nonfinite.any()
        )

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
        """Number of validation batches that every rank has; some ranks have one more."""
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
        """Return float64 [3]: summed cross-entropy in nats, correct predictions, masked positions."""
        logits_MV = self(batch)
        loss = cross_entropy(logits_MV, batch.targets, reduction="none").double().sum()
        right = (logits_MV.argmax(dim=-1) == batch.targets).sum()
        return torch.stack([loss, right.double(), (batch.targets != IGNORED_TARGET).sum().double()])

    def evaluate(self, batches: ValidationBatches) -> Evaluation:
        """Evaluate validation batches outside a trainer, on the model's device."""
        device = next(self.parameters()).device
        scores = [self.score(batches[index].to(device)) for index in range(len(batches))]
        return self.evaluation(torch.stack(scores).sum(0))

    @staticmethod
    def evaluation(sums: Tensor) -> Evaluation:
        """Return the evaluation of summed `score`s. Raises `ConfigError` if nothing was masked."""
        loss, right, count = sums.tolist()
        if count == 0:
            raise ConfigError("the validation set has no masked residue; give it more sequences")
        return Evaluation(loss / count, right / count, int(count))

    # --- optimizer and data, as NeMo and Lightning ask for them -----------------------------------------------------

    def configure_optimizers(self) -> Any:
        assert self.encoder is not None and self.backends is not None
        masters = self.make_masters(self.named_parameters())
        if self._resumed_masters is not None:
            masters.load_state_dict(self._resumed_masters)
            self._resumed_masters = None
        build = build_sharded_optimizer if self.sharding == SHARDED_OPTIMIZER else build_optimizer
        optimizer = build(masters, self.optim_config, self.backends)
        return [optimizer], [{"scheduler": build_schedule(optimizer, self.optim_config), "interval": "step"}]

    def setup_training_data(self, train_data_config: TrainingBatches, num_workers: int = 0) -> None:
        """Train on these batches, of which every rank takes its part, from `consumed_samples` on."""
        self._stream, self._num_workers = train_data_config, num_workers

    def setup_validation_data(self, val_data_config: ValidationBatches) -> None:
        """Validate on these batches, of which every rank takes its part."""
        self._validation = val_data_config

    def train_dataloader(self) -> DataLoader[RankBatch]:
        stream = self._stream.on_rank(data_parallel_rank())
        return training_loader(stream, self.consumed_samples, self._num_workers, self._pinned)

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        ranks = data_parallel_size()
        own = self._validation.on_rank(data_parallel_rank(), ranks)
        batches: Dataset[PackedBatch] = own
        if self.is_fully_sharded and len(own) < len(self._validation.on_rank(0, ranks)):
            batches = ConcatDataset([own, IdleBatches()])  # every rank has as many as rank 0
        return validation_loader(batches, 0, self._pinned)

    @property
    def _pinned(self) -> bool:
        return bool(self.device.type == "cuda")

    # --- what is saved ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the float32 masters as the weights; with `consumed_samples` they determine the next step.

        The state of Lightning's loops is left out. It follows from the number of steps, so the bytes do not depend on
        the moment within a step or a validation at which the checkpoint is written.
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
        checkpoint["loops"] = {"fit_loop": fit_loop_state(self.trainer, self.steps)}

    def archive_provenance(self) -> dict[str, Any]:
        """Return the origin of the weights, as an archive records it."""
        trained = {"steps": self.steps, "consumed_samples": self.consumed_samples} if self.steps else {}
        return {**self.provenance, **trained}

    def archive_config(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Return the configuration that `.nemo` records: encoder, seed, and the precision of these weights."""
        weights_dtype = next(iter(weights.values())).dtype
        return {
            "encoder": self.encoder_config.to_dict(),
            "precision": "bf16" if weights_dtype == torch.bfloat16 else "32",
            "seed": self.seed,
        }

    def archive_weights(self) -> dict[str, Tensor]:
        """Return the whole weights: the float32 masters, or the parameters without masters, and the buffers.

        Collective if parameters are split over ranks.
        """
        fixed = {name: buffer.detach() for name, buffer in self.named_buffers()}
        if self.masters is not None:
            return self.masters.state_dict() | fixed
        whole = {name: gather_shards(parameter.detach(), parameter) for name, parameter in self.named_parameters()}
        return whole | fixed
