"""A recipe: the whole configuration of a run as frozen dataclasses, and its arithmetic.

The Hydra configuration enters here once and is checked as it does; nothing further down sees a DictConfig. This file
imports neither NeMo nor torch's heavier parts, so that a mistake is answered at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bionemo_esm.data.dataloader import BatchPlan
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import MANIFEST_NAME, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import FUSED_ADAM, SCHEDULES, EncoderConfig, OptimConfig
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.pretraining.probe_config import ProbeConfig, load_probe_config
from bionemo_esm.pretraining.resolve_model import resolve_model
from bionemo_esm.settings import Settings, boolean, integer, known, number, path, plain_values, typed

ACCELERATORS = ("cpu", "gpu")
_OPTIM_KEYS = ("name", "options", "lr", "betas", "eps", "weight_decay", "max_skipped_steps", "skip_loss_above", "sched")
_TOP_KEYS = {"name", "seed", "restore_from_path", "continue_from_path", "published", "plan"}
_TOP_KEYS |= {"model", "data", "optim", "trainer", "exp_manager", "probe"}
_BATCH_KEYS = ("micro_batch_size", "micro_batch_tokens", "global_batch_size", "global_batch_tokens")
_SCHEDULE_KEYS = ("name", "warmup_steps", "warmup_ratio", "constant_steps", "min_lr", "max_steps")


@dataclass(frozen=True)
class DataConfig:
    """Where proteins come from, and how many go into a batch."""

    fasta: Path | None = None  # a FASTA file to build a store from
    store: Path | None = None  # a store built before; neither: the sample that ships with the package
    max_residues: int = 1024  # longer sequences are cut to this when a store is built
    validation_sequences: int | None = None  # of `fasta`; null: 5%
    test_sequences: int | None = None
    micro_batch_size: int | None = 370  # sequences a device sees at a time
    micro_batch_tokens: int | None = None  # in place of micro_batch_size: the most tokens a device sees at a time
    global_batch_size: int | None = None  # sequences an optimizer step; null: micro batch x ranks x accumulation
    global_batch_tokens: int | None = None  # in place of global_batch_size: the most tokens of an optimizer step
    num_workers: int = 1  # loader processes a rank
    masking: MaskingPolicy = field(default_factory=MaskingPolicy)

    def __post_init__(self) -> None:
        if self.fasta is not None and self.store is not None:
            raise ConfigError("data.fasta and data.store are both set; give one of them, and null for the other")
        for name in ("max_residues", *_BATCH_KEYS):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {value}")
        for name in ("validation_sequences", "test_sequences", "num_workers"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"data.{name} must not be negative, but is {getattr(self, name)}")
        if self.global_batch_size is not None and self.global_batch_tokens is not None:
            raise ConfigError("data.global_batch_size and data.global_batch_tokens are both set; let one be null")
        if (self.micro_batch_size is None) == (self.micro_batch_tokens is None):
            both = "are both set; choose one" if self.micro_batch_size else "are both null; set one"
            raise ConfigError(
                f"data.micro_batch_size (sequences) and data.micro_batch_tokens {both}, and let the other be null"
            )


@dataclass(frozen=True)
class TrainerConfig:
    """The machine and the length of a run, in Lightning's names; intervals are counted in optimizer steps."""

    accelerator: str = "gpu"
    devices: int = 8  # a node
    num_nodes: int = 1
    precision: str = "bf16"
    max_steps: int = 349_500
    accumulate_grad_batches: int = 1  # micro batches a device runs for each step, where global_batch_size is null
    gradient_clip_val: float = 1.0
    val_check_interval: int = 1_000
    limit_val_batches: int | None = None  # of each rank; null: all
    log_every_n_steps: int = 10
    tensor_model_parallel_size: int = 1  # devices that share one copy of the model
    shard_optimizer: bool = False  # Adam's moments are split over the data-parallel ranks
    hang_timeout_seconds: float | None = 1800.0  # without a step, until the job ends with the stacks of all threads

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS:
            raise ConfigError(f"trainer.accelerator must be one of {', '.join(ACCELERATORS)}, not {self.accelerator!r}")
        for name in (item.name for item in fields(self) if item.type == "int"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} must be at least 1, not {getattr(self, name)}")
        if self.hang_timeout_seconds is not None and not self.hang_timeout_seconds > 0:
            raise ConfigError(
                f"trainer.hang_timeout_seconds must be positive, or null for none, not {self.hang_timeout_seconds}"
            )
        if self.world_size % self.tensor_model_parallel_size:
            raise ConfigError(
                f"trainer.tensor_model_parallel_size ({self.tensor_model_parallel_size}) must divide the "
                f"{self.world_size} devices of trainer.num_nodes x trainer.devices"
            )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model, each of which takes its share of every global batch."""
        return self.world_size // self.tensor_model_parallel_size


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the state of a run is written, which of the files stay, and how many are averaged at the end."""

    every_n_train_steps: int = 1_000
    keep_last: int = 3
    keep_best: bool = True  # as well: the one with the lowest validation loss
    average_last: int = 47  # 0: no average
    in_background: bool = True

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"exp_manager.checkpoints.{name} must be at least 1, not {getattr(self, name)}")
        if self.average_last < 0 or self.average_last == 1:
            raise ConfigError(
                f"exp_manager.checkpoints.average_last must be 0 (no average) or at least 2, not {self.average_last}"
            )


@dataclass(frozen=True)
class ExperimentConfig:
    """Where results go and who is told: the part of NeMo's exp_manager that a pretraining run uses."""

    exp_dir: Path = Path("runs")
    name: str | None = None  # folder of the run; null: the recipe's name and a hash of what it computes
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise ConfigError(
                f"exp_manager.name must be the name of one folder in exp_manager.exp_dir, not {self.name!r}"
            )
        given = {key for key, value in self.wandb_logger_kwargs.items() if value is not None}
        missing = sorted({"name", "project"} - given)
        if self.create_wandb_logger and missing:
            raise ConfigError(f"exp_manager.wandb_logger_kwargs: Weights & Biases needs {' and '.join(missing)}")


@dataclass(frozen=True)
class Published:
    """What the source of a recipe states: a run is held against it, and planned by it where no store is at hand."""

    gpu: str  # as in `pretraining/hardware.py`
    gpus: int
    train_sequences: int
    mean_tokens: float  # of a sequence, cropped, specials counted
    mfu: float  # share of the GPUs' peak that the plan reckons with: our assumption
    steps: int | None = None
    epochs: float | None = None
    global_batch_size: int | None = None
    global_batch_tokens: int | None = None
    continues: str | None = None  # the recipe whose run this one goes on with

    def __post_init__(self) -> None:
        for name in ("gpus", "train_sequences", "mean_tokens", "mfu"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"published.{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that a pretraining run is told."""

    name: str
    seed: int
    restore_from_path: Path | None
    continue_from_path: Path | None
    published: Published | None
    plan: bool  # show what the run would be, and end
    model: EncoderConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    exp_manager: ExperimentConfig
    probe: ProbeConfig | None = None
    restored_sha256: str | None = None  # of the weights in restore_from_path; None: not set, or no such file

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}")
        if self.restore_from_path is not None and self.continue_from_path is not None:
            raise ConfigError("restore_from_path (weights alone) and continue_from_path are both set; choose one")
        self._check_accumulation()
        self._check_parallelism()
        self._check_tokens()
        self.batch_plan()  # refuses what cannot be dealt evenly

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
        """Sequences an optimizer step; None where it is so many tokens."""
        if self.data.global_batch_size is not None or self.data.global_batch_tokens is not None:
            return self.data.global_batch_size
        if self.data.micro_batch_size is None:
            raise ConfigError(
                "data.micro_batch_tokens needs data.global_batch_size or data.global_batch_tokens: the optimisation "
                "must not depend on how much a device holds"
            )
        return self.data.micro_batch_size * self.trainer.data_parallel_size * self.trainer.accumulate_grad_batches

    def batch_plan(self) -> BatchPlan:
        """How global batches are cut and dealt, as rank 0 sees it.

        Raises `ConfigError` when they cannot be dealt evenly.
        """
        try:
            return BatchPlan(
                self.global_batch_size,
                self.data.micro_batch_size,
                world_size=self.trainer.data_parallel_size,
                global_batch_tokens=self.data.global_batch_tokens,
                micro_batch_tokens=self.data.micro_batch_tokens,
            )
        except ValueError as error:
            raise ConfigError(f"data.global_batch_size: {error}") from error

    def sequences_of_a_batch(self, mean_tokens: float) -> float:
        """Sequences of a global batch, on average where it is counted in tokens; `mean_tokens` of a sequence."""
        if self.data.global_batch_tokens is not None:
            return self.data.global_batch_tokens / mean_tokens
        assert self.global_batch_size is not None
        return float(self.global_batch_size)

    def departure(self) -> str | None:
        """How the optimisation differs from the one that the recipe's source describes; None where it does not."""
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
    def told(self) -> dict[str, str]:
        """Every setting by its dotted name: what all ranks of a run must have been told alike."""
        values = asdict(self)
        values["data"]["masking"] = self.data.masking.to_dict()
        return dict(_flattened("", values))

    @property
    def run_folder(self) -> Path:
        """`exp_dir/name`. Without a name the same computation finds the same folder, and another one another."""
        name = self.exp_manager.name or f"{self.name}-{self.fingerprint}"
        return self.exp_manager.exp_dir / name

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of what the configuration says of the result; not of machine, logging or intervals.

        A store counts by its manifest, and an archive by its weights, wherever it lies, once it is there.
        """
        manifest = self.data.store and self.data.store / MANIFEST_NAME
        data = replace(self.data, num_workers=0, micro_batch_size=1, micro_batch_tokens=None)
        if manifest is not None and manifest.is_file():
            data = replace(data, store=Path(sha256_of_file(manifest)))
        science = {
            "seed": self.seed,
            "restore_from_path": self.restored_sha256 or self.restore_from_path,
            "continue_from_path": self.continue_from_path,
            "model": self.model.to_dict(),
            "data": asdict(data) | {"masking": data.masking.to_dict()},
            "fasta_bytes": fasta.stat().st_size if (fasta := self.data.fasta) and fasta.is_file() else None,
            "global_batch_size": self.global_batch_size,
            "optim": self.optim.to_dict(),
            "precision": self.trainer.precision,
            "max_steps": self.trainer.max_steps,
        }
        return hashlib.sha256(json.dumps(science, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Settings):
            value = value.to_dict() if isinstance(value, OptimConfig) else value.model_dump()
        if isinstance(value, Mapping):
            yield from _flattened(name, value)
        else:
            yield name, str(value)


def load_recipe(cfg: DictConfig) -> Recipe:
    """The recipe in a composed Hydra configuration.

    Raises `ConfigError`, naming the key, for one that is unknown or missing, a value of the wrong kind, or values that
    cannot work together; `ArchiveError` for weights to start from that are no archive of ours.
    """
    values = plain_values(cfg)
    top = known("", values, _TOP_KEYS)
    trainer = TrainerConfig(**typed("trainer", top["trainer"], TrainerConfig))
    origins = [path(key, top.get(key)) for key in ("restore_from_path", "continue_from_path")]
    architecture = resolve_model(top["model"], *origins)
    return Recipe(
        name=str(top["name"]),
        seed=integer("seed", top["seed"]),
        restore_from_path=origins[0],
        continue_from_path=origins[1],
        published=_published(top.get("published")),
        plan=boolean("plan", top.get("plan", False)),
        model=architecture.encoder,
        data=_data(top["data"], str(top["name"])),
        optim=_optim(top["optim"], trainer),
        trainer=trainer,
        exp_manager=_experiment(top["exp_manager"]),
        probe=load_probe_config(top.get("probe")),
        restored_sha256=architecture.weights_sha256,
    )


def _published(values: Any) -> Published | None:
    if values is None:
        return None
    missing = [item.name for item in fields(Published) if item.default is MISSING and item.name not in values]
    if missing:
        raise ConfigError(f"published.{missing[0]} is missing; set published=null for a recipe without a source")
    return Published(**typed("published", values, Published))


def _data(values: dict[str, Any], recipe: str) -> DataConfig:
    values = dict(values)
    is_own = boolean("data.own", values.pop("own", False))
    if is_own and values.get("fasta") is None and values.get("store") is None:
        raise ConfigError(
            f"recipe {recipe} trains on your own proteins: set data.fasta=... or data.store=... (data=sample for the "
            "shipped ones)"
        )
    policy = MaskingPolicy.from_config(values.get("masking", {}))
    return DataConfig(**typed("data", {k: v for k, v in values.items() if k != "masking"}, DataConfig), masking=policy)


def _optim(values: dict[str, Any], trainer: TrainerConfig) -> OptimConfig:
    values = known("optim", values, set(_OPTIM_KEYS))
    name = str(values.get("name", FUSED_ADAM))
    OPTIMIZERS.get(name)  # raises for an unknown name
    schedule = known("optim.sched", values["sched"], set(_SCHEDULE_KEYS))
    flat = {key: value for key, value in (values | schedule).items() if key != "sched"} | {"name": name}
    flat["schedule"] = schedule.get("name", SCHEDULES[0])
    flat["max_steps"] = flat.get("max_steps") or trainer.max_steps
    if (ratio := flat.pop("warmup_ratio", None)) is not None:
        if flat.get("warmup_steps") is not None:
            raise ConfigError("optim.sched.warmup_steps and warmup_ratio are both set; set one of them to null")
        flat["warmup_steps"] = int(number("optim.sched.warmup_ratio", ratio) * flat["max_steps"])
    return OptimConfig.from_config(flat | {"gradient_clip_val": trainer.gradient_clip_val})


def _experiment(values: dict[str, Any]) -> ExperimentConfig:
    kept = typed("exp_manager.checkpoints", values.get("checkpoints") or {}, CheckpointConfig)
    rest = {key: value for key, value in values.items() if key != "checkpoints"}
    return ExperimentConfig(**typed("exp_manager", rest, ExperimentConfig), checkpoints=CheckpointConfig(**kept))
