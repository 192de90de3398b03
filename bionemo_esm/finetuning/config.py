"""Configuration of fine-tuning: the parts of a fine-tuned model, as archives hold them, and the settings of
`bionemo-esm finetune`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig
from bionemo_esm.inference.engine_options import ModelSizes
from bionemo_esm.model.config import PRECISIONS
from bionemo_esm.settings import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Settings

LINEAR, MLP, CONVNET, ATTENTION = "linear", "mlp", "convnet", "attention"
MEAN, MAX = "mean", "max"
POOLINGS = (MEAN, MAX, ATTENTION)
FROZEN, FULL, LORA = "frozen", "full", "lora"
ONE_HOT, UNTRAINED, COMPOSITION = "one_hot", "untrained", "composition"
BASELINES = (ONE_HOT, UNTRAINED, COMPOSITION)
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of the linear layers of a block: query, key and value; attention's output; the two of the MLP."""

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HeadConfig(Settings, section="head"):
    """Settings of a head; a head with further ones subclasses this, see `heads.Head`.

    kind: a name in `heads.HEADS`. hidden: features within an mlp, channels of a convnet or of attention.
    kernel_size: residues that a convolution reads, odd. pooling: for tasks per protein, over residues.
    """

    kind: str = LINEAR
    hidden: int = 32
    kernel_size: int = 7
    dropout: Fraction = 0.25
    pooling: Literal["mean", "max", "attention"] = "mean"

    @model_validator(mode="after")
    def _check(self) -> HeadConfig:
        if self.hidden < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"head.hidden must be at least 1 and head.kernel_size odd, not {self.hidden} and {self.kernel_size}"
            )
        return self


class AdapterConfig(Settings, section="lora"):
    """Low-rank adapters (LoRA, Hu et al. 2021): W x + alpha / rank * B A x, of which only A and B are trained.

    rank: rows of A. targets: of `TARGETS`, in every block. dropout: of A's input, in training.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj")

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError("lora.targets must name one or more layers, each once")
        for target in self.targets:
            if target not in TARGETS:
                raise ConfigError(f"lora.targets must be one of {', '.join(TARGETS)}, not {target!r}")
        return self

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class ReadingConfig(Settings, section="reading"):
    """The hidden states that are a head's features.

    layer: 0 is the embeddings, num_layers the last block after the final layer norm. window: residues encoded at once;
    a longer protein is encoded in windows that share `overlap` residues, and their states are blended
    (`inference/batching.py`).
    """

    layer: NonNegativeInt
    window: int
    overlap: int

    @model_validator(mode="after")
    def _check(self) -> ReadingConfig:
        if not 0 <= self.overlap < self.window:
            raise ConfigError(f"an overlap of {self.overlap} does not go with windows of {self.window} residues")
        return self


@dataclass(frozen=True)
class Parts:
    """The configuration of a fine-tuned model in an archive, without encoder, precision, seed and task."""

    head: HeadConfig
    reading: ReadingConfig
    adapters: AdapterConfig | None  # None: none, or merged into the encoder's weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: keys head, reading, adapters."""
        parts = {"head": self.head, "reading": self.reading, "adapters": self.adapters}
        return {key: None if part is None else part.model_dump(mode="json") for key, part in parts.items()}


class TuningConfig(Settings, section="tuning"):
    """The trained parameters and their optimization.

    mode: frozen (the head alone), full (the encoder, too), or lora (low-rank adapters of the encoder, and the head).
    lr, encoder_lr: of the head, and of the encoder; with layer_decay below 1 each block has that times the rate of the
    block above it (Howard and Ruder 2018). Rates rise over the first warmup_epochs and then stay constant.
    class_weights: each class of a classification counts as if it were as frequent as the others.
    patience: epochs without a better validation score after which training stops; the best epoch is kept.
    """

    mode: Literal["frozen", "full", "lora"] = "frozen"
    lr: _Rate = 1e-3
    encoder_lr: _Rate = 1e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: _Strength = 0.01
    warmup_epochs: _Strength = 0.2
    gradient_clip_val: _Strength = 1.0
    class_weights: bool = False
    max_epochs: PositiveInt = 50
    patience: PositiveInt = 5
    global_batch_size: PositiveInt = 32  # proteins
    micro_batch_tokens: PositiveInt = 16384  # on a device at a time, at most
    keep_adapters: bool = False  # keep them in the archive beside the weights; else they are merged

    @model_validator(mode="after")
    def _check(self) -> TuningConfig:
        if self.keep_adapters and self.mode != LORA:
            raise ConfigError(f"tuning.keep_adapters is for tuning.mode={LORA}")
        return self


class TrainerConfig(Settings, section="trainer"):
    """The devices that compute."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    precision: str = "32"

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        return self

    @property
    def ranks(self) -> int:
        """World size."""
        return self.devices * self.num_nodes


class ReadingOptions(Settings, section="reading"):
    """`ReadingConfig` before the model is known."""

    layer: int = -1
    window: int | None = None
    overlap: int | None = None

    def resolved(self, model: ModelSizes) -> ReadingConfig:
        """Return the configuration for a model. Raises `ConfigError` for a layer or window that it does not have."""
        window = model.window if self.window is None else self.window
        if window < 1 or (model.longest is not None and window > model.longest):
            raise ConfigError(f"reading.window must be from 1 to {model.longest or 'any'} residues, not {window}")
        overlap = window // 2 if self.overlap is None else self.overlap
        return ReadingConfig(layer=model.layer(self.layer), window=window, overlap=overlap)


class FinetuneConfig(Settings):
    """The settings of `bionemo-esm finetune`; conf/finetuning/finetune.yaml explains each key."""

    model: Path
    output: Path
    task: TaskConfig
    data: DataConfig
    head: HeadConfig
    reading: ReadingOptions
    tuning: TuningConfig
    lora: AdapterConfig
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    resamples: Annotated[int, Field(ge=2)]
    cache: Path | None
    trainer: TrainerConfig

    @field_validator("seeds", "baselines", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be different numbers from 0 on, one at least, not {list(self.seeds)}")
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"baselines are {', '.join(BASELINES)}, not {name!r}")
        return self

    def parts(self, model: ModelSizes) -> Parts:
        """Return the parts of the fine-tuned model. Raises `ConfigError` if the model does not fit."""
        reading = self.reading.resolved(model)
        if self.tuning.mode == LORA and reading.layer == 0:
            raise ConfigError(f"tuning.mode={LORA} adapts blocks, and reading.layer=0 lies before all of them")
        return Parts(self.head, reading, self.lora if self.tuning.mode == LORA else None)

    @property
    def is_frozen(self) -> bool:
        return self.tuning.mode == FROZEN

    def record(self) -> dict[str, Any]:
        """Return what report and archive record of a fit: all settings that its numbers depend on, without paths."""
        recorded: dict[str, Any] = {"head": self.head.model_dump(), "tuning": self.tuning.model_dump()}
        recorded["seeds"] = list(self.seeds)
        if self.tuning.mode == LORA:
            recorded["lora"] = self.lora.model_dump(mode="json")
        return recorded | {"precision": self.trainer.precision, "resamples": self.resamples}
