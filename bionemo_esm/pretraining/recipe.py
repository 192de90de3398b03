"""The recipe: the whole configuration of a pretraining run as `Settings`, and its arithmetic.

`load_recipe` is the only reader of the Hydra configuration. This file imports neither NeMo nor the slow parts of torch,
so that a mistake is reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from pydantic import Field, model_validator
from typing_extensions import Self

from bionemo_esm.data.dataloader import BatchPlan, BatchWarmup
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import MANIFEST_NAME, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import (
    FULL_SHARDING,
    FUSED_ADAM,
    NO_SHARDING,
    SCHEDULES,
    SELECTIVE_RECOMPUTE,
    SHARDED_OPTIMIZER,
    EncoderConfig,
    OptimConfig,
)
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.pretraining.probe_config import ProbeConfig, load_probe_config
from bionemo_esm.pretraining.resolve_model import resolve_model
from bionemo_esm.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings, plain_values


class BatchWarmupConfig(Settings, section="data.batch_warmup"):
    """Small global batches at the start of training, which grow in stages; see `dataloader.BatchWarmup`."""

    start: PositiveInt  # sequences, or tokens with global_batch_tokens
    increment: PositiveInt
    samples: PositiveInt  # sequences consumed until the global batch is whole


class DataConfig(Settings, section="data"):
    """The proteins of a run, and the sizes of its batches."""

    fasta: Path | None = None  # a FASTA file from which the run builds a store
    store: Path | None = None  # an existing store; neither fasta nor store: the sample that ships with the package
    own: bool = Field(default=False, exclude=True)  # refuse a run without fasta and store
    max_residues: PositiveInt = 1024  # longer sequences are cut to this when a store is built
    validation_sequences: NonNegativeInt | None = None  # of `fasta`; null: 5%
    test_sequences: NonNegativeInt | None = None
    micro_batch_size: PositiveInt | None = 370  # sequences of a micro batch
    micro_batch_tokens: PositiveInt | None = None  # maximum tokens of a micro batch, instead of micro_batch_size
    global_batch_size: PositiveInt | None = None  # sequences per step; null: micro batch x ranks x accumulation
    global_batch_tokens: PositiveInt | None = None  # maximum tokens per step, instead of global_batch_size
    batch_warmup: BatchWarmupConfig | None = None  # null: every global batch is whole
    num_workers: NonNegativeInt = 1  # loader processes per rank
    masking: MaskingPolicy = Field(default_factory=MaskingPolicy)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fasta is not None and self.store is not None:
            raise ConfigError("data.fasta and data.store are both set; give one of them, and null for the other")
        if self.global_batch_size is not None and self.global_batch_tokens is not None:
            raise ConfigError("data.global_batch_size and data.global_batch_tokens are both set; let one be null")
        if (self.micro_batch_size is None) == (self.micro_batch_tokens is None):
            both = "are both set; choose one" if self.micro_batch_size else "are both null; set one"
            raise ConfigError(
                f"data.micro_batch_size (sequences) and data.micro_batch_tokens {both}, and let the other be null"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the values under the keys of the configuration; `batch_warmup` only if it is set."""
        return self.model_dump(by_alias=True, exclude=None if self.batch_warmup else {"batch_warmup"})


class TrainerConfig(Settings, section="trainer"):
    """The machine and the length of a run, in Lightning's names. Intervals are counted in optimizer steps."""

    accelerator: Literal["cpu", "gpu"] = "gpu"
    devices: PositiveInt = 8  # per node
    num_nodes: PositiveInt = 1
    precision: str = "bf16"
    max_steps: PositiveInt = 349_500
    accumulate_grad_batches: PositiveInt = 1  # micro batches per step, if no global batch is given
    gradient_clip_val: float = 1.0
    val_check_interval: PositiveInt = 1_000
    limit_val_batches: PositiveInt | None = None  # per rank; null: all
    log_every_n_steps: PositiveInt = 10
    tensor_model_parallel_size: PositiveInt = 1  # ranks that share one copy of the model
    sharding: Literal["none", "optimizer", "full"] = "none"  # what data-parallel ranks split
    shard_optimizer: bool = False  # the old key of sharding=optimizer
    recompute: Literal["none", "selective", "full"] = "none"  # activations that backward computes again
    hang_timeout_seconds: float | None = 1800.0  # without a step; then the job ends with all stacks; null: never

    @model_validator(mode="before")
    @classmethod
    def _translate_old_key(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("shard_optimizer") is not True:
            return values
        if values.get("sharding", NO_SHARDING) not in (NO_SHARDING, SHARDED_OPTIMIZER):
            raise ConfigError(
                f"trainer.shard_optimizer=true is the old key of sharding=optimizer, and trainer.sharding is "
                f"{values['sharding']!r}; leave shard_optimizer away",
                code="config.sharding",
            )
        return {**values, "sharding": SHARDED_OPTIMIZER}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hang_timeout_seconds is not None and not self.hang_timeout_seconds > 0:
            raise ConfigError(
                f"trainer.hang_timeout_seconds must be positive, or null for none, not {self.hang_timeout_seconds}"
            )
        if self.world_size % self.tensor_model_parallel_size:
            raise ConfigError(
                f"trainer.tensor_model_parallel_size ({self.tensor_model_parallel_size}) must divide the "
                f"{self.world_size} devices of trainer.num_nodes x trainer.devices"
            )
        if self.sharding == FULL_SHARDING and self.tensor_model_parallel_size > 1:
            raise ConfigError(
                "trainer.sharding=full does not work with trainer.tensor_model_parallel_size="
                f"{self.tensor_model_parallel_size}; set that to 1, or trainer.sharding=optimizer",
                code="config.sharding",
            )
        if self.recompute == SELECTIVE_RECOMPUTE and self.tensor_model_parallel_size > 1:
            raise ConfigError(
                "trainer.recompute=selective does not work with trainer.tensor_model_parallel_size="
                f"{self.tensor_model_parallel_size}, which sums saved products in place; set trainer.recompute=full",
                code="config.recompute",
            )
        return self

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model. Each takes an equal part of every global batch."""
        return self.world_size // self.tensor_model_parallel_size


class CheckpointConfig(Settings, section="exp_manager.checkpoints"):
    """The interval of checkpoints, the number that are kept, and the number that are averaged at the end."""

    every_n_train_steps: PositiveInt = 1_000
    keep_last: PositiveInt = 3
    keep_best: bool = True  # also keep the checkpoint with the lowest validation loss
    average_last: int = 47  # 0: no average
    in_background: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.average_last < 0 or self.average_last == 1:
            raise ConfigError(
                f"exp_manager.checkpoints.average_last must be 0 (no average) or at least 2, not {self.average_last}"
            )
        return self


class ExperimentConfig(Settings, section="exp_manager"):
    """Output folder and loggers: the part of NeMo's exp_manager that a pretraining run uses."""

    exp_dir: Path = Path("runs")
    name: str | None = None  # run directory in exp_dir; null: the recipe's name and its fingerprint
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise ConfigError(
                f"exp_manager.name must be the name of one folder in exp_manager.exp_dir, not {self.name!r}"
            )
        given = {key for key, value in self.wandb_logger_kwargs.items() if value is not None}
        missing = sorted({"name", "project"} - given)
        if self.create_wandb_logger and missing:
            raise ConfigError(f"exp_manager.wandb_logger_kwargs: Weights & Biases needs {' and '.join(missing)}")
        return self


class Published(Settings, section="published"):
    """Figures from the source of a recipe. A plan compares a run with them, and uses them if there is no store."""

    gpu: str  # a name of `pretraining/hardware.py`
    gpus: PositiveInt
    train_sequences: PositiveInt
    mean_tokens: PositiveFloat  # per sequence, cropped, with special tokens
    mfu: PositiveFloat  # fraction of peak FLOP/s that the plan assumes; our assumption
    steps: int | None = None
    epochs: float | None = None
    global_batch_size: int | None = None
    global_batch_tokens: int | None = None
    continues: str | None = None  # the recipe whose run this recipe continues


class ScheduleConfig(Settings, section="optim.sched"):
    """The keys of a learning-rate schedule. `OptimConfig` has the defaults and the checks."""

    name: str = SCHEDULES[0]
    warmup_steps: int | None = OptimConfig().warmup_steps
    warmup_ratio: float | None = None  # of max_steps, instead of warmup_steps
    constant_steps: int = OptimConfig().constant_steps
    decay_steps: int | None = None  # of WarmupStableDecay
    decay_ratio: float | None = None  # of max_steps, instead of decay_steps
    min_lr: float = OptimConfig().min_lr
    max_steps: int | None = None  # null: trainer.max_steps

    def resolve(self, trainer: TrainerConfig) -> dict[str, Any]:
        """Return the schedule's fields of `OptimConfig`. Raises `ConfigError` for a phase that is given twice."""
        last = self.max_steps or trainer.max_steps
        warmup = _phase("warmup", self.warmup_steps, self.warmup_ratio, last)
        if warmup is None:
            raise ConfigError("optim.sched.warmup_steps and warmup_ratio are both null; set one of them")
        return {
            "schedule": self.name,
            "warmup_steps": warmup,
            "constant_steps": self.constant_steps,
            "decay_steps": _phase("decay", self.decay_steps, self.decay_ratio, last) or 0,
            "min_lr": self.min_lr,
            "max_steps": last,
        }


def _phase(name: str, steps: int | None, ratio: float | None, last: int) -> int | None:
    """Return the steps of a phase that is given in steps or as a fraction of all; None if it is not given."""
    if ratio is None:
        return steps
    if steps is not None:
        raise ConfigError(f"optim.sched.{name}_steps and {name}_ratio are both set; set one of them to null")
    return int(ratio * last)


class EvaluateConfig(Settings, section="evaluate"):
    """The evaluation at the end of a run: `pretraining/held_out.py`."""

    test_sequences: NonNegativeInt | None = 1000  # of the test split, chosen at random; null: all; 0: none


class Sections(Settings):
    """The configuration as it is written: the sections `model` and `optim` are not resolved yet."""

    name: str
    seed: int
    restore_from_path: Path | None = None
    continue_from_path: Path | None = None
    published: Published | None = None
    plan: bool = False
    model: dict[str, Any]
    data: DataConfig
    optim: dict[str, Any]
    trainer: TrainerConfig
    exp_manager: ExperimentConfig
    probe: dict[str, Any] | None = None
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)


class Recipe(Settings):
    """The resolved configuration of a pretraining run."""

    name: str
    seed: int
    restore_from_path: Path | None
    continue_from_path: Path | None
    published: Published | None
    plan: bool  # if True, show what the run would be, and end
    model: EncoderConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    exp_manager: ExperimentConfig
    probe: ProbeConfig | None = None
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    restored_sha256: str | None = None  # of the weights in restore_from_path; None: not set, or there is no such file

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}")
        if self.restore_from_path is not None and self.continue_from_path is not None:
            raise ConfigError("restore_from_path (weights alone) and continue_from_path are both set; choose one")
        self._check_accumulation()
        self._check_parallelism()
        self._check_tokens()
        self.batch_plan()  # raises if a rank would have no sequence
        return self

    def _check_accumulation(self) -> None:
        wanted = self.trainer.accumulate_grad_batches
        if wanted != 1 and (self.data.global_batch_size or self.data.global_batch_tokens):
            raise ConfigError(
                f"trainer.accumulate_grad_batches={wanted} has no say where the global batch is given: accumulation "
                "follows from it. Leave it at 1, or set data.global_batch_size=null (another optimisation)"
            )

    def _check_parallelism(self) -> None:
        ranks = self.trainer.tensor_model_parallel_size
        for key in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(self.model, key) % ranks:
                raise ConfigError(
                    f"trainer.tensor_model_parallel_size ({ranks}) must divide model.{key} ({getattr(self.model, key)})"
                )
        if self.trainer.sharding == FULL_SHARDING:
            self._check_full_sharding()

    def _check_full_sharding(self) -> None:
        """Refuse what needs whole matrices, or a forward pass of one rank alone."""
        iterations = OPTIMIZERS.get(self.optim.name).orthogonalizing_iterations
        if any(iterations(self.optim, name, shape) for name, shape in self.model.tensors()):
            raise ConfigError(
                f"trainer.sharding=full does not work with optim.name={self.optim.name}, which needs whole matrices; "
                "set trainer.sharding=optimizer",
                code="config.sharding",
            )
        if self.probe is not None:
            raise ConfigError(
                "trainer.sharding=full does not work with a probe, which rank 0 computes alone; set probe.task=null, "
                "or trainer.sharding=optimizer",
                code="config.sharding",
            )

    def _check_tokens(self) -> None:
        longest = self.model.seq_length
        if self.data.micro_batch_tokens is not None and self.data.micro_batch_tokens < longest:
            raise ConfigError(
                f"data.micro_batch_tokens ({self.data.micro_batch_tokens}) must hold a sequence of model.seq_length "
                f"({longest}) tokens"
            )
        ranks, whole = self.trainer.data_parallel_size, self.data.global_batch_tokens
        if whole is not None and whole < ranks * longest:
            raise ConfigError(
                f"data.global_batch_tokens ({whole}) must hold a sequence of model.seq_length ({longest}) tokens for "
                f"each of {ranks} data-parallel ranks: at least {ranks * longest}, or at most {whole // longest} ranks"
            )

    @property
    def global_batch_size(self) -> int | None:
        """Sequences per optimizer step; None if the global batch is counted in tokens."""
        if self.data.global_batch_size is not None or self.data.global_batch_tokens is not None:
            return self.data.global_batch_size
        if self.data.micro_batch_size is None:
            raise ConfigError(
                "data.micro_batch_tokens needs data.global_batch_size or data.global_batch_tokens: the optimisation "
                "must not depend on how much a device holds"
            )
        return self.data.micro_batch_size * self.trainer.data_parallel_size * self.trainer.accumulate_grad_batches

    def batch_plan(self) -> BatchPlan:
        """Return how global batches are split into micro batches and over ranks, for rank 0.

        Raises `ConfigError` if a rank would have no sequence.
        """
        try:
            return BatchPlan(
                self.global_batch_size,
                self.data.micro_batch_size,
                world_size=self.trainer.data_parallel_size,
                global_batch_tokens=self.data.global_batch_tokens,
                micro_batch_tokens=self.data.micro_batch_tokens,
                warmup=self.batch_warmup,
            )
        except ValueError as error:
            key = "batch_warmup" if self.data.batch_warmup else "global_batch_size"
            raise ConfigError(f"data.{key}: {error}") from error

    @property
    def batch_warmup(self) -> BatchWarmup | None:
        """The warm-up of the global batch; None without one."""
        return None if self.data.batch_warmup is None else BatchWarmup(**self.data.batch_warmup.model_dump())

    def mean_samples(self, steps: int, mean_tokens: float, consumed: float = 0) -> float:
        """Return the samples of `steps` global batches after `consumed` samples. mean_tokens: per sequence."""
        whole = self.mean_batch_sequences(mean_tokens)
        if self.batch_warmup is None:
            return steps * whole
        return self.batch_warmup.samples_of(steps, self.batch_plan().global_batch, whole, consumed)

    def mean_batch_sequences(self, mean_tokens: float) -> float:
        """Return the sequences of a global batch: a mean if it is counted in tokens. mean_tokens: per sequence."""
        if self.data.global_batch_tokens is not None:
            return self.data.global_batch_tokens / mean_tokens
        assert self.global_batch_size is not None
        return float(self.global_batch_size)

    def batch_departure(self) -> str | None:
        """Return how the global batch differs from that of the recipe's source; None if it does not."""
        if self.published is None:
            return None
        for key, unit in (("global_batch_size", "sequences"), ("global_batch_tokens", "tokens")):
            theirs = getattr(self.published, key)
            ours = self.global_batch_size if key == "global_batch_size" else self.data.global_batch_tokens
            if theirs is not None and ours != theirs:
                what = f"{ours:,} {unit}" if ours is not None else f"not counted in {unit}"
                return (
                    f"the global batch is {what}, the recipe's {theirs:,}: this is another optimisation. "
                    f"data.{key}={theirs} keeps it, on however many devices"
                )
        return None

    @property
    def settings_text(self) -> dict[str, str]:
        """Every setting by its dotted key. All ranks of a run must have equal settings."""
        return dict(_flattened("", self.model_dump()))

    @property
    def run_folder(self) -> Path:
        """The run directory, `exp_dir/name`. Without a name, equal computations have equal directories."""
        name = self.exp_manager.name or f"{self.name}-{self.fingerprint}"
        return self.exp_manager.exp_dir / name

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of all settings that decide the result; not of machine, logging or intervals.

        A store counts by its manifest, and an archive by its weights, wherever they are.
        """
        data = self.data.to_dict() | {"num_workers": 0, "micro_batch_size": 1, "micro_batch_tokens": None}
        manifest = self.data.store and self.data.store / MANIFEST_NAME
        if manifest is not None and manifest.is_file():
            data["store"] = sha256_of_file(manifest)
        fasta = self.data.fasta
        science = {
            "seed": self.seed,
            "restore_from_path": self.restored_sha256 or self.restore_from_path,
            "continue_from_path": self.continue_from_path,
            "model": self.model.to_dict(),
            "data": data,
            "fasta_bytes": fasta.stat().st_size if fasta is not None and fasta.is_file() else None,
            "global_batch_size": self.global_batch_size,
            "optim": self.optim.to_dict(),
            "precision": self.trainer.precision,
            "max_steps": self.trainer.max_steps,
        }
        return hashlib.sha256(json.dumps(science, sort_keys=True, default=str).encode()).hexdigest()[:8]


def load_recipe(cfg: DictConfig) -> Recipe:
    """Return the recipe of a composed Hydra configuration.

    Raises `ConfigError`, naming the key, for an unknown or missing key, a value of the wrong type, or values that do
    not fit together; `ArchiveError` for weights to start from that are no archive of this package.
    """
    sections = Sections.from_config(plain_values(cfg))
    resolved = resolve_model(sections.model, sections.restore_from_path, sections.continue_from_path)
    data = sections.data
    if data.own and data.fasta is None and data.store is None:
        raise ConfigError(
            f"recipe {sections.name} trains on your own proteins: set data.fasta=... or data.store=... (data=sample "
            "for the shipped ones)"
        )
    return Recipe(
        **{
            **dict(sections),
            "model": resolved.encoder,
            "data": data.replace(own=False),
            "optim": _optim(sections.optim, sections.trainer),
            "probe": load_probe_config(sections.probe),
            "restored_sha256": resolved.weights_sha256,
        }
    )


def _optim(values: Mapping[str, Any], trainer: TrainerConfig) -> OptimConfig:
    own = {key: value for key, value in values.items() if key != "sched"}
    schedule_keys = ("schedule", "min_lr", "warmup_steps", "constant_steps", "decay_steps", "max_steps")
    known = sorted({*OptimConfig.model_fields, "sched"} - {*schedule_keys, "gradient_clip_val"})
    if unknown := sorted(own.keys() - set(known)):
        raise ConfigError(f"unknown key optim.{unknown[0]}; known are: {', '.join(known)}", code="config.unknown-key")
    family = OPTIMIZERS.get(str(own.get("name", FUSED_ADAM)))  # raises for an unknown name
    schedule = ScheduleConfig.from_config(values.get("sched", {})).resolve(trainer)
    config = OptimConfig(**own, **schedule, gradient_clip_val=trainer.gradient_clip_val)
    family.groups(config)  # raises for unknown options
    return config


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _flattened(name, value)
        else:
            yield name, str(value)
