"""The shape of an encoder and the settings of its optimizer, checked where they are written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bionemo_esm.alphabet import PAD_ID, padded_vocabulary_size
from bionemo_esm.errors import ConfigError

SHORTEST_SEQ_LENGTH = 8  # <cls>, <eos> and a few residues to tell from each other
COSINE, INVERSE_SQUARE_ROOT = "CosineAnnealing", "InverseSquareRoot"
SCHEDULES = (COSINE, INVERSE_SQUARE_ROOT)
"""Names of learning-rate schedules; `model/schedule.py` has their formulas."""
LEARNED, ROTARY = "learned", "rotary"
PRECISIONS = ("auto", "32", "bf16")
"""What parameters are computed in; `model.backends.parameter_dtype` has what "auto" is."""
POSITION_OFFSETS = (0, PAD_ID + 1)
"""Rows of a position table before that of the first token: fairseq's, and so ESM-1b's, begins with two unused ones."""


@dataclass(frozen=True)
class EncoderConfig:
    """A pre-norm BERT encoder over proteins; the defaults are ESM-1nv.

    Sizes: the ESM-1nv model card (6 layers, 12 heads, hidden 768); FFN width, initialisation and dropout: NVIDIA's
    public ESM-1nv configuration. What stands after them tells ESM-1b, ESM-1v and ESM-2 from it; `ESMEncoder` says what
    it does. Raises `ConfigError` when the values do not fit together.
    """

    num_layers: int = 6
    hidden_size: int = 768
    num_attention_heads: int = 12
    ffn_hidden_size: int = 3072
    seq_length: int = 512  # tokens of the longest sequence, <cls> and <eos> counted; rows of the position table
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    embedding_layernorm: bool = False  # a layer norm over words and positions together, before dropout
    token_dropout: bool = False  # <mask> gives no embedding, and the others make up for it
    position_embedding: str = LEARNED  # a table of seq_length rows, or ROTARY: queries and keys turned by position
    position_offset: int = 0  # unused rows before the first of the table, one of POSITION_OFFSETS
    contact_head: bool = False  # a logistic regression from attention maps to contacts comes with the model

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size ({self.hidden_size}) is not divisible by model.num_attention_heads "
                f"({self.num_attention_heads}); make hidden_size a multiple of it"
            )
        if self.seq_length < SHORTEST_SEQ_LENGTH:
            raise ConfigError(
                f"model.seq_length is {self.seq_length} tokens; with <cls> and <eos> counted it must be at least "
                f"{SHORTEST_SEQ_LENGTH}"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("layernorm_epsilon", "init_method_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name} must be positive, not {getattr(self, name)}")
        self._check_positions()

    def _check_positions(self) -> None:
        if self.position_embedding not in (LEARNED, ROTARY):
            raise ConfigError(
                f"model.position_embedding must be {LEARNED} or {ROTARY}, not {self.position_embedding!r}"
            )
        if self.position_offset not in (POSITION_OFFSETS if self.position_embedding == LEARNED else (0,)):
            raise ConfigError(
                f"model.position_offset must be {' or '.join(map(str, POSITION_OFFSETS))}, and 0 where "
                f"position_embedding is {ROTARY}, not {self.position_offset}"
            )
        if self.position_embedding == ROTARY and self.head_size % 2:
            raise ConfigError(
                f"model.hidden_size / num_attention_heads is {self.head_size}; {ROTARY} positions turn pairs of "
                "numbers, so make it even"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """From parsed YAML; raises `ConfigError` for an unknown key or a value of another kind than the key's.

        What is not there has its default: archives from before ESM-1b have none of what came with it.
        """
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            raise ConfigError(f"unknown key model.{unknown[0]}; known are: {', '.join(known)}")
        checked: dict[str, Any] = {name: _typed(name, value, str(known[name].type)) for name, value in values.items()}
        return cls(**checked)

    def to_dict(self) -> dict[str, int | float | str]:
        """What archives and checkpoints record, and a run's identity goes by. What ESM-1nv does without is left out, so
        that it is described as it was before there were other models.
        """
        return {name: value for name, value in asdict(self).items() if _LATER_DEFAULTS.get(name) != value}

    def differences(self, archived: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Key, value there and value here, of whatever makes the archived encoder another one than this.

        Rates of dropout may differ: they leave the weights, and what the model answers, alone. Raises `ConfigError`
        for values that describe no encoder.
        """
        theirs = EncoderConfig.from_mapping(archived)
        pairs = [(item.name, getattr(theirs, item.name), getattr(self, item.name)) for item in fields(self)]
        free = ("hidden_dropout", "attention_dropout")
        return [(name, there, here) for name, there, here in pairs if there != here and name not in free]

    @property
    def family(self) -> str:
        """The published model whose parts these are; plain ESM where there is none."""
        return _FAMILIES.get((self.position_embedding, self.token_dropout, self.embedding_layernorm), "ESM")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def position_rows(self) -> int:
        """Rows of the position table; 0 where there is none."""
        return self.seq_length + self.position_offset if self.position_embedding == LEARNED else 0

    @property
    def parameters(self) -> int:
        """Trainable parameters, tied output embedding counted once (43.6M for ESM-1nv, 652.5M for ESM-1b)."""
        hidden, ffn, vocabulary = self.hidden_size, self.ffn_hidden_size, padded_vocabulary_size()
        norm = 2 * hidden
        attention = 4 * hidden * hidden + 4 * hidden
        mlp = 2 * hidden * ffn + ffn + hidden
        embedding = (vocabulary + self.position_rows) * hidden + norm * self.embedding_layernorm
        head = hidden * hidden + hidden + norm + vocabulary
        return embedding + self.num_layers * (attention + mlp + 2 * norm) + norm + head

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, as `ESMEncoder` has them on any backend."""
        hidden, ffn, vocabulary = self.hidden_size, self.ffn_hidden_size, padded_vocabulary_size()
        yield "encoder.embedding.word_embeddings.weight", (vocabulary, hidden)
        if self.position_rows:
            yield "encoder.embedding.position_embeddings.weight", (self.position_rows, hidden)
        for layer in range(self.num_layers):
            for part, outputs, inputs in (
                ("input_layernorm", hidden, None),
                ("self_attention.linear_qkv", 3 * hidden, hidden),
                ("self_attention.linear_proj", hidden, hidden),
                ("pre_mlp_layernorm", hidden, None),
                ("mlp.linear_fc1", ffn, hidden),
                ("mlp.linear_fc2", hidden, ffn),
            ):
                yield f"encoder.encoder.layers.{layer}.{part}.weight", (outputs, inputs) if inputs else (outputs,)
                yield f"encoder.encoder.layers.{layer}.{part}.bias", (outputs,)
        embedding = ["embedding_layernorm"] if self.embedding_layernorm else []
        for part in (*embedding, "encoder.final_layernorm", "lm_head.layer_norm"):
            yield f"encoder.{part}.weight", (hidden,)
            yield f"encoder.{part}.bias", (hidden,)
        yield "encoder.lm_head.dense.weight", (hidden, hidden)
        yield "encoder.lm_head.dense.bias", (hidden,)
        yield "encoder.output_layer.bias", (vocabulary,)

    def fixed_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of what pretraining leaves as it is: buffers of `ESMEncoder`, float32 at any precision."""
        if self.position_embedding == ROTARY:
            yield "encoder.rotary.frequencies", (self.head_size // 2,)
        if self.contact_head:
            yield "encoder.contact_head.weight", (1, self.num_layers * self.num_attention_heads)
            yield "encoder.contact_head.bias", (1,)


TRAINING_ONLY = ("hidden_dropout", "attention_dropout", "init_method_std")
"""Keys of an encoder that change how it is trained, and none of its answers."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam with decoupled weight decay, and a schedule; the defaults are ESM-1nv's, rates per step.

    The rate climbs linearly over `warmup_steps`. With `CosineAnnealing` it falls along a cosine to `min_lr` and stays
    there for the last `constant_steps` of `max_steps`; with `InverseSquareRoot`, which has no end, as 1 / sqrt(step).
    `model.schedule.learning_rate` is the formula. Raises `ConfigError` for a schedule that cannot be.
    """

    lr: float = 2e-4
    min_lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 500
    constant_steps: int = 50_000
    max_steps: int = 957_610
    gradient_clip_val: float = 1.0
    max_skipped_steps: int = 10  # in a row, for a loss or gradient that is not finite; then training stops
    skip_loss_above: float | None = None  # times the recent mean; null: no finite loss is too high
    schedule: str = COSINE  # one of SCHEDULES

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be positive, not {self.lr}")
        if not 0 <= self.min_lr < self.lr:
            raise ConfigError(f"optim.sched.min_lr ({self.min_lr}) must lie in [0, optim.lr = {self.lr})")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}")
        for key, value in (
            ("optim.eps", self.eps),
            ("optim.weight_decay", self.weight_decay),
            ("trainer.gradient_clip_val", self.gradient_clip_val),
            ("optim.sched.warmup_steps", self.warmup_steps),
            ("optim.sched.constant_steps", self.constant_steps),
        ):
            if value < 0:
                raise ConfigError(f"{key} must not be negative, but is {value}")
        if self.max_skipped_steps < 1:
            raise ConfigError(f"optim.max_skipped_steps must be at least 1, not {self.max_skipped_steps}")
        if self.skip_loss_above is not None and not self.skip_loss_above > 1:
            raise ConfigError(f"optim.skip_loss_above must be over 1 times the mean loss, not {self.skip_loss_above}")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optim.sched.name must be {' or '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.schedule == INVERSE_SQUARE_ROOT:
            if self.constant_steps or self.min_lr:
                raise ConfigError(
                    f"optim.sched: {INVERSE_SQUARE_ROOT} falls without end, to no minimum; set constant_steps "
                    f"({self.constant_steps}) and min_lr ({self.min_lr}) to 0, or name to {COSINE}"
                )
            if self.warmup_steps < 1:
                raise ConfigError(
                    f"optim.sched.warmup_steps must be at least 1 with {INVERSE_SQUARE_ROOT}: its fall begins where "
                    "the warm-up ends"
                )
        elif self.warmup_steps + self.constant_steps >= self.max_steps:
            raise ConfigError(
                f"optim.sched: warmup_steps ({self.warmup_steps}) and constant_steps ({self.constant_steps}) leave no "
                f"step for the cosine in max_steps ({self.max_steps}); shorten them or raise optim.sched.max_steps"
            )


_FAMILIES = {  # position_embedding, token_dropout, embedding_layernorm
    (LEARNED, False, False): "ESM-1nv",
    (LEARNED, True, True): "ESM-1b",
    (LEARNED, True, False): "ESM-1v",
    (ROTARY, True, False): "ESM-2",
}
_LATER_DEFAULTS = {
    field.name: field.default
    for field in fields(EncoderConfig)
    if field.name in ("embedding_layernorm", "token_dropout", "position_embedding", "position_offset", "contact_head")
}


def _typed(name: str, value: Any, kind: str) -> int | float | str:
    if kind == "str":
        if not isinstance(value, str):
            raise ConfigError(f"model.{name} must be a word, not {value!r}")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"model.{name} must be true or false, not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind == "int" and value != int(value)):
        raise ConfigError(f"model.{name} must be {'an integer' if kind == 'int' else 'a number'}, not {value!r}")
    return int(value) if kind == "int" else float(value)
