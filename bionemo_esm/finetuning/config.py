"""What a fine-tuned model is made of, as an archive says it and a job's configuration asks for it. No torch.

The settings of `bionemo-esm finetune`: a composed configuration as frozen dataclasses. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig, load_data_config, load_task_config
from bionemo_esm.inference.engine_options import ModelSizes
from bionemo_esm.model.config import PRECISIONS
from bionemo_esm.settings import integer, known, path, plain_values, typed

LINEAR, MLP, CONVNET, ATTENTION = "linear", "mlp", "convnet", "attention"
HEADS = (LINEAR, MLP, CONVNET, ATTENTION)
MEAN, MAX = "mean", "max"
POOLINGS = (MEAN, MAX, ATTENTION)
FROZEN, FULL, LORA = "frozen", "full", "lora"
MODES = (FROZEN, FULL, LORA)
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of the linear layers of a block: query, key and value; attention's output; the two of the MLP."""


@dataclass(frozen=True)
class HeadConfig:
    """What turns the features of residues into predictions; `finetuning/heads.py` has the shapes.

    kind: linear; mlp; convnet (Dallago et al. 2021, FLIP: two convolutions along the protein); attention (a weight of
    each residue is learned; Stark et al. 2021, light attention), for tasks per sequence only.
    hidden: features within an mlp, channels of a convnet. kernel_size: residues that a convolution sees, odd.
    pooling: of tasks per sequence: mean, max or attention over residues; the head `attention` brings its own.
    """

    kind: str = LINEAR
    hidden: int = 32
    kernel_size: int = 7
    dropout: float = 0.25
    pooling: str = MEAN

    def __post_init__(self) -> None:
        _one_of("head.kind", self.kind, HEADS)
        _one_of("head.pooling", self.pooling, POOLINGS)
        if self.hidden < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"head.hidden must be at least 1 and head.kernel_size odd, not {self.hidden} and {self.kernel_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head.dropout must lie in [0, 1), not {self.dropout}")

    def check_for(self, task: str, per_residue: bool) -> None:
        """Raises `ConfigError` for a head that such a task cannot have."""
        if self.kind == ATTENTION and per_residue:
            raise ConfigError(
                f"head.kind {ATTENTION} weighs the residues of a protein, and {task} asks about each of them; "
                f"take {LINEAR}, {MLP} or {CONVNET}"
            )


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021): W x + alpha / rank * B A x, of which A and B alone are trained.

    rank: rows of A. targets: of `TARGETS`, in every block. dropout: of what A is given, in training.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"lora.rank and lora.alpha must be positive, not {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in [0, 1), not {self.dropout}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError("lora.targets must name one or more layers, each once")
        for target in self.targets:
            _one_of("lora.targets", target, TARGETS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class ReadingConfig:
    """How the encoder reads a protein: which layer's states are the features, and how those over the window are read.

    layer: 0 is what goes into the first block, num_layers what comes out of the last one, after the final layer norm.
    window: residues read at once; longer proteins are looked at through windows with `overlap` residues in common,
    and what they show is blended (`inference/windows.py`).
    """

    layer: int
    window: int
    overlap: int

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ConfigError(f"layer must be 0 or more, not {self.layer}")
        if not 0 <= self.overlap < self.window:
            raise ConfigError(f"an overlap of {self.overlap} does not go with windows of {self.window} residues")


@dataclass(frozen=True)
class Parts:
    """All that an archive's configuration has of a fine-tuned model beside encoder, precision, seed and task."""

    head: HeadConfig
    reading: ReadingConfig
    adapters: AdapterConfig | None  # None: none, or merged into the encoder's weights

    def to_dict(self) -> dict[str, Any]:
        """As plain values: keys head, reading, adapters."""
        adapters = None if self.adapters is None else {**asdict(self.adapters), "targets": list(self.adapters.targets)}
        return {"head": asdict(self.head), "reading": asdict(self.reading), "adapters": adapters}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Parts:
        """From what `to_dict` gave. Raises `ConfigError`, naming the key, for what is missing, unknown or mistyped."""
        adapters = values["adapters"]
        return cls(
            HeadConfig(**_complete("head", values["head"], HeadConfig)),
            ReadingConfig(**_complete("reading", values["reading"], ReadingConfig)),
            None if adapters is None else adapter_config("adapters", adapters),
        )


@dataclass(frozen=True)
class TuningConfig:
    """What is trained, how, and for how long.

    mode: frozen (the head alone), full (the encoder, too), or lora (low-rank adapters of the encoder, and the head).
    lr, encoder_lr: of the head, and of what is trained in the encoder; with layer_decay below 1 each block has that
    times the rate of the block above it (Howard and Ruder 2018). Rates rise over the first warmup_epochs and then
    stay as they are: how many epochs are made is found by early stopping.
    class_weights: each class of a classification counts as if it were as frequent as the others.
    patience: epochs without a better validation score after which training ends; the best epoch is what is kept.
    """

    mode: str = FROZEN
    lr: float = 1e-3
    encoder_lr: float = 1e-4
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_epochs: float = 0.2
    gradient_clip_val: float = 1.0
    class_weights: bool = False
    max_epochs: int = 50
    patience: int = 5
    global_batch_size: int = 32  # proteins
    micro_batch_tokens: int = 16384  # the most that a device sees at a time
    keep_adapters: bool = False  # in the archive, beside the weights that they were made for; else they are merged

    def __post_init__(self) -> None:
        _one_of("tuning.mode", self.mode, MODES)
        for key in ("lr", "encoder_lr", "layer_decay"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"tuning.{key} must be positive and finite, not {getattr(self, key)}")
        for key in ("weight_decay", "warmup_epochs", "gradient_clip_val"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(f"tuning.{key} must be 0 or more, not {getattr(self, key)}")
        for key in ("max_epochs", "patience", "global_batch_size", "micro_batch_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"tuning.{key} must be at least 1, not {getattr(self, key)}")
        if self.layer_decay > 1:
            raise ConfigError(f"tuning.layer_decay must be at most 1, not {self.layer_decay}")
        if self.keep_adapters and self.mode != LORA:
            raise ConfigError(f"tuning.keep_adapters is for tuning.mode={LORA}")


def adapter_config(section: str, values: Any) -> AdapterConfig:
    """Raises `ConfigError`, naming the key."""
    checked = _complete(section, values, AdapterConfig)
    if not isinstance(checked["targets"], list) or not all(isinstance(name, str) for name in checked["targets"]):
        raise ConfigError(f"{section}.targets must be a list of names, not {checked['targets']!r}")
    return AdapterConfig(**{**checked, "targets": tuple(checked["targets"])})


def _complete(section: str, values: Any, kind: Any) -> dict[str, Any]:
    checked = typed(section, values, kind)
    if missing := sorted(set(kind.__dataclass_fields__) - set(checked)):
        raise ConfigError(f"{section}.{missing[0]} is missing")
    return checked


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {value!r}")


ONE_HOT, UNTRAINED, COMPOSITION = "one_hot", "untrained", "composition"
BASELINES = (ONE_HOT, UNTRAINED, COMPOSITION)
ACCELERATORS = ("auto", "cpu", "gpu")
_KEYS = {
    *("restore_from_path", "output", "task", "data", "head", "reading", "tuning", "lora", "seeds", "baselines"),
    *("resamples", "cache", "trainer"),
}


@dataclass(frozen=True)
class TrainerConfig:
    """What computes. Raises `ConfigError`, naming the key."""

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32"

    def __post_init__(self) -> None:
        for key, allowed in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"trainer.{key} must be one of {', '.join(allowed)}, not {getattr(self, key)!r}")
        for key in ("devices", "num_nodes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"trainer.{key} must be at least 1, not {getattr(self, key)}")

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class ReadingOptions:
    """`ReadingConfig` before the model is known."""

    layer: int = -1
    window: int | None = None
    overlap: int | None = None

    def resolved(self, model: ModelSizes) -> ReadingConfig:
        """In terms of a model. Raises `ConfigError` for a layer or window that it does not have."""
        window = model.window if self.window is None else self.window
        if window < 1 or (model.longest is not None and window > model.longest):
            raise ConfigError(f"reading.window must be from 1 to {model.longest or 'any'} residues, not {window}")
        overlap = window // 2 if self.overlap is None else self.overlap
        return ReadingConfig(model.layer(self.layer), window, overlap)


@dataclass(frozen=True)
class FinetuneConfig:
    """What is fine-tuned to which data, and compared with what; conf/finetuning/finetune.yaml has what keys mean."""

    restore_from_path: Path
    output: Path
    task: TaskConfig
    data: DataConfig
    head: HeadConfig
    reading: ReadingOptions
    tuning: TuningConfig
    lora: AdapterConfig
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    resamples: int
    cache: Path | None
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be different numbers from 0 on, one at least, not {list(self.seeds)}")
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"baselines are {', '.join(BASELINES)}, not {name!r}")
        if self.resamples < 2:
            raise ConfigError(f"resamples must be at least 2, not {self.resamples}")
        self.head.check_for(self.task.name, self.task.is_per_residue)

    def parts(self, model: ModelSizes) -> Parts:
        """Of the model that is fitted. Raises `ConfigError`."""
        reading = self.reading.resolved(model)
        if self.tuning.mode == LORA and reading.layer == 0:
            raise ConfigError(f"tuning.mode={LORA} adapts blocks, and reading.layer=0 lies before all of them")
        return Parts(self.head, reading, self.lora if self.tuning.mode == LORA else None)

    @property
    def is_frozen(self) -> bool:
        return self.tuning.mode == FROZEN


def load_finetune_config(cfg: DictConfig) -> FinetuneConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), _KEYS)
    source, output = path("restore_from_path", values["restore_from_path"]), path("output", values["output"])
    if source is None or output is None:
        raise ConfigError("restore_from_path and output must be given: restore_from_path=....nemo output=...")
    task = load_task_config(values["task"])
    seeds, baselines = values["seeds"], values["baselines"]
    trainer = typed("trainer", values["trainer"], TrainerConfig)
    return FinetuneConfig(
        restore_from_path=source,
        output=output,
        task=task,
        data=load_data_config(values["data"]),
        head=_head(values["head"], task),
        reading=ReadingOptions(**typed("reading", values["reading"], ReadingOptions)),
        tuning=TuningConfig(**typed("tuning", values["tuning"], TuningConfig)),
        lora=adapter_config("lora", values["lora"]),
        seeds=tuple(integer("seeds", seed) for seed in (seeds if isinstance(seeds, list) else [seeds])),
        baselines=tuple(map(str, baselines if isinstance(baselines, list) else [baselines])),
        resamples=integer("resamples", values["resamples"]),
        cache=path("cache", values["cache"]),
        trainer=TrainerConfig(**trainer),
    )


def _head(values: Any, task: TaskConfig) -> HeadConfig:
    checked = known("head", values, {field.name for field in fields(HeadConfig)})
    usual = CONVNET if task.is_per_residue else ATTENTION
    return HeadConfig(**typed("head", {**checked, "kind": checked.get("kind") or usual}, HeadConfig))


def settings_text(config: FinetuneConfig) -> Mapping[str, Any]:
    """What a report and an archive say of how a model was fitted: all that its numbers depend on, no path."""
    told: dict[str, Any] = {
        "head": dict(vars(config.head)),
        "tuning": dict(vars(config.tuning)),
        "seeds": list(config.seeds),
    }
    if config.tuning.mode == LORA:
        told["lora"] = {**vars(config.lora), "targets": list(config.lora.targets)}
    return told | {"precision": config.trainer.precision, "resamples": config.resamples}
