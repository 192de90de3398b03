"""The settings of `bionemo-esm finetune`: a composed configuration as frozen dataclasses. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import (
    ATTENTION,
    CONVNET,
    FROZEN,
    LORA,
    AdapterConfig,
    HeadConfig,
    Parts,
    ReadingConfig,
    TuningConfig,
    adapter_config,
)
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig, load_data_config, load_task_config
from bionemo_esm.inference.model_file import ModelSizes
from bionemo_esm.model.config import PRECISIONS
from bionemo_esm.settings import integer, known, path, plain_values, typed

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
class ReadingChoice:
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
    reading: ReadingChoice
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
        reading=ReadingChoice(**typed("reading", values["reading"], ReadingChoice)),
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


def told_settings(config: FinetuneConfig) -> Mapping[str, Any]:
    """What a report and an archive say of how a model was fitted: all that its numbers depend on, no path."""
    told: dict[str, Any] = {
        "head": dict(vars(config.head)),
        "tuning": dict(vars(config.tuning)),
        "seeds": list(config.seeds),
    }
    if config.tuning.mode == LORA:
        told["lora"] = {**vars(config.lora), "targets": list(config.lora.targets)}
    return told | {"precision": config.trainer.precision, "resamples": config.resamples}
