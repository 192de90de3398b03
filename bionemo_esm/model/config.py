"""Configuration of an encoder and its optimizer, and the one table of an encoder's tensors.

`EncoderConfig.parts` describes every linear layer, norm and embedding once. Parameter counts, tensor names and shapes,
FLOPs and memory (`model/costs.py`) are computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from bionemo_esm.alphabet import PAD_ID, padded_vocabulary_size
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Settings

SHORTEST_SEQ_LENGTH = 8
"""Tokens: <cls>, <eos> and a few residues."""
COSINE, INVERSE_SQUARE_ROOT = "CosineAnnealing", "InverseSquareRoot"
WARMUP_STABLE_DECAY = "WarmupStableDecay"
SCHEDULES = (COSINE, INVERSE_SQUARE_ROOT, WARMUP_STABLE_DECAY)
"""Names of learning-rate schedules; `model/schedule.py` has their formulas."""
LEARNED, ROTARY = "learned", "rotary"
PRECISIONS = ("auto", "32", "bf16")
"""Dtypes of the parameters; `model.backends.parameter_dtype` resolves "auto"."""
POSITION_OFFSETS = (0, PAD_ID + 1)
"""Unused rows at the top of a position table. Tables of fairseq, and so of ESM-1b, have two."""
FUSED_ADAM, MUON = "fused_adam", "muon"
NO_RECOMPUTE, SELECTIVE_RECOMPUTE, FULL_RECOMPUTE = RECOMPUTE = ("none", "selective", "full")
"""What a block's backward pass computes again; see `model/recompute.py`."""
NO_SHARDING, SHARDED_OPTIMIZER, FULL_SHARDING = SHARDINGS = ("none", "optimizer", "full")
"""What data-parallel ranks split: nothing, the optimizer's state, or parameters, gradients and state."""

COLUMN, ROW = 0, 1
"""Dimension of a weight [outputs, inputs] that tensor parallelism splits."""


class Part(NamedTuple):
    """One weight and one bias of an encoder, or one of the two."""

    name: str
    weight: tuple[int, ...] = ()  # [outputs, inputs] of a matrix, [size] of a norm; (): no weight
    bias: int = 0  # 0: no bias
    split: int | None = None  # COLUMN or ROW; None: every tensor-parallel rank holds the whole
    multiplied: bool = True  # False: a look-up table, which costs no FLOPs

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether tensor parallelism splits it. A bias is split with the outputs."""
        if self.weight:
            yield f"{self.name}.weight", self.weight, self.split is not None
        if self.bias:
            yield f"{self.name}.bias", (self.bias,), self.split == COLUMN

    @property
    def flops(self) -> int:
        """Operations of one token's matrix product in the forward pass; norms are not counted."""
        return 2 * math.prod(self.weight) if len(self.weight) == 2 and self.multiplied else 0


class EncoderConfig(Settings, section="model"):
    """A pre-norm BERT encoder over proteins. The defaults are ESM-1nv.

    Sizes are from the ESM-1nv model card (6 layers, 12 heads, hidden size 768). FFN width, initialisation and dropout
    are from NVIDIA's public ESM-1nv configuration. The keys from `embedding_layernorm` on distinguish ESM-1b, ESM-1v
    and ESM-2; `ESMEncoder` documents their effect. Raises `ConfigError` for values that do not fit together.
    """

    num_layers: PositiveInt = 6
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    ffn_hidden_size: PositiveInt = 3072
    seq_length: int = 512  # tokens of the longest sequence, with <cls> and <eos>; rows of the position table
    hidden_dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    layernorm_epsilon: PositiveFloat = 1e-5
    init_method_std: PositiveFloat = 0.02
    embedding_layernorm: bool = False  # layer norm of the embeddings, before dropout
    token_dropout: bool = False  # zero the embedding of <mask>, and rescale the others
    position_embedding: str = LEARNED  # a table of seq_length rows, or ROTARY
    position_offset: int = 0  # unused rows at the top of the table, one of POSITION_OFFSETS
    contact_head: bool = False  # the weights contain a logistic regression from attention maps to contacts

    @model_validator(mode="after")
    def _check(self) -> Self:
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
        self._check_positions()
        return self

    def _check_positions(self) -> None:
        if self.position_embedding not in (LEARNED, ROTARY):
            raise ConfigError(
                f"model.position_embedding must be {LEARNED} or {ROTARY}, not {self.position_embedding!r}"
            )
        if self.position_offset not in (POSITION_OFFSETS if self.position_embedding == LEARNED else (0,)):
            raise ConfigError(
                f"model.position_offset must be {' or '.join(map(str, POSITION_OFFSETS))}, and 0 with "
                f"position_embedding={ROTARY}, not {self.position_offset}"
            )
        if self.position_embedding == ROTARY and self.head_size % 2:
            raise ConfigError(
                f"model.hidden_size / num_attention_heads is {self.head_size}; {ROTARY} positions rotate pairs of "
                "numbers, so make it even"
            )

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the values that archives, checkpoints and the run's identity record.

        Keys that are newer than ESM-1nv are left out at their defaults: ESM-1nv's record stays what it was.
        """
        newer = ("embedding_layernorm", "token_dropout", "position_embedding", "position_offset", "contact_head")
        default = {name: field.default for name, field in type(self).model_fields.items() if name in newer}
        return {name: value for name, value in self.model_dump().items() if default.get(name) != value}

    def differences(self, archived: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return (key, archived value, own value) of every difference, except dropout rates.

        Dropout changes neither the weights nor the model's answers. Raises `ConfigError` for values that describe no
        encoder.
        """
        theirs, ours = type(self).from_config(archived).model_dump(), self.model_dump()
        free = ("hidden_dropout", "attention_dropout")
        return [(key, theirs[key], ours[key]) for key in ours if theirs[key] != ours[key] and key not in free]

    @property
    def family(self) -> str:
        """The published model with this architecture; "ESM" if there is none."""
        return _FAMILIES.get((self.position_embedding, self.token_dropout, self.embedding_layernorm), "ESM")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def position_rows(self) -> int:
        """Rows of the position table; 0 without a table."""
        return self.seq_length + self.position_offset if self.position_embedding == LEARNED else 0

    # --- the tensors ------------------------------------------------------------------------------------------------

    def embedding_parts(self) -> tuple[Part, ...]:
        hidden = self.hidden_size
        words = Part("embedding.word_embeddings", (padded_vocabulary_size(), hidden), split=COLUMN, multiplied=False)
        positions = Part("embedding.position_embeddings", (self.position_rows, hidden), multiplied=False)
        return (words, positions) if self.position_rows else (words,)

    def block_parts(self) -> tuple[Part, ...]:
        """One block; names are relative to the block."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        return (
            _norm("input_layernorm", hidden),
            _linear("self_attention.linear_qkv", hidden, 3 * hidden, COLUMN),
            _linear("self_attention.linear_proj", hidden, hidden, ROW),
            _norm("pre_mlp_layernorm", hidden),
            _linear("mlp.linear_fc1", hidden, ffn, COLUMN),
            _linear("mlp.linear_fc2", ffn, hidden, ROW),
        )

    def head_parts(self) -> tuple[Part, ...]:
        """The language-model head. Its output matrix is the word embedding, which `embedding_parts` contains."""
        hidden = self.hidden_size
        return (
            _norm("lm_head.layer_norm", hidden),
            _linear("lm_head.dense", hidden, hidden),
            Part("output_layer", bias=padded_vocabulary_size(), split=COLUMN),
        )

    def parts(self) -> Iterator[Part]:
        """All parts, in the order in which an archive lists their tensors."""
        yield from self.embedding_parts()
        for layer in range(self.num_layers):
            for part in self.block_parts():
                yield part._replace(name=f"{_BLOCKS}{layer}.{part.name}")
        if self.embedding_layernorm:
            yield _norm("embedding_layernorm", self.hidden_size)
        yield _norm("encoder.final_layernorm", self.hidden_size)
        yield from self.head_parts()

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of a model with an `ESMEncoder`, the same for all backends."""
        for part in self.parts():
            for name, shape, _ in part.tensors():
                yield f"encoder.{name}", shape

    @property
    def parameters(self) -> int:
        """Trainable parameters, the tied output embedding counted once (43.6M for ESM-1nv, 652.5M for ESM-1b)."""
        block = _elements(self.block_parts())  # counted once: a file may ask for any number of blocks
        outside = (part for part in self.replace(num_layers=1).parts() if not part.name.startswith(_BLOCKS))
        return _elements(outside) + self.num_layers * block

    def fixed_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the tensors that pretraining does not change: float32 buffers of `ESMEncoder`."""
        if self.position_embedding == ROTARY:
            yield "encoder.rotary.frequencies", (self.head_size // 2,)
        if self.contact_head:
            yield "encoder.contact_head.weight", (1, self.num_layers * self.num_attention_heads)
            yield "encoder.contact_head.bias", (1,)


TRAINING_ONLY = ("hidden_dropout", "attention_dropout", "init_method_std")
"""Keys of an encoder that affect training and none of its answers."""


_BLOCKS = "encoder.layers."


def _elements(parts: Iterable[Part]) -> int:
    return sum(math.prod(shape) for part in parts for _, shape, _ in part.tensors())


def _linear(name: str, inputs: int, outputs: int, split: int | None = None) -> Part:
    return Part(name, (outputs, inputs), outputs, split)


def _norm(name: str, size: int) -> Part:
    return Part(name, (size,), size)


_FAMILIES = {  # position_embedding, token_dropout, embedding_layernorm
    (LEARNED, False, False): "ESM-1nv",
    (LEARNED, True, True): "ESM-1b",
    (LEARNED, True, False): "ESM-1v",
    (ROTARY, True, False): "ESM-2",
}


class OptimConfig(Settings, section="optim"):
    """An optimizer with decoupled weight decay, and a schedule. The defaults are ESM-1nv's; rates are per step.

    The rate rises linearly over `warmup_steps`. With `CosineAnnealing` it then follows a cosine down to `min_lr` and
    stays there for the last `constant_steps` of `max_steps`. With `InverseSquareRoot` it falls as 1 / sqrt(step), for
    ever. With `WarmupStableDecay` it is constant until the last `decay_steps` of `max_steps`, over which it falls
    linearly to `min_lr`. `model.schedule.learning_rate` is the formula. Raises `ConfigError` for an impossible
    schedule.
    """

    lr: PositiveFloat = 2e-4
    min_lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: int = 500
    constant_steps: int = 50_000
    decay_steps: int = 0  # of WarmupStableDecay alone
    max_steps: int = 957_610
    gradient_clip_val: float = 1.0
    max_skipped_steps: PositiveInt = 10  # in a row, for a loss or gradient that is not finite; then training stops
    skip_loss_above: Annotated[float, Field(gt=1)] | None = None  # multiple of the recent mean; null: no limit
    schedule: str = COSINE  # one of SCHEDULES
    name: str = FUSED_ADAM  # one of `model.optimizer_registry.OPTIMIZERS`
    options: Mapping[str, Any] = Field(default_factory=dict)  # further settings of an optimizer of another package

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.min_lr < self.lr:
            raise ConfigError(f"optim.sched.min_lr ({self.min_lr}) must lie in [0, optim.lr = {self.lr})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}")
        for key, value in (
            ("trainer.gradient_clip_val", self.gradient_clip_val),
            ("optim.sched.warmup_steps", self.warmup_steps),
            ("optim.sched.constant_steps", self.constant_steps),
            ("optim.sched.decay_steps", self.decay_steps),
        ):
            if not value >= 0:
                raise ConfigError(f"{key} must not be negative, but is {value}")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optim.sched.name must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.schedule == WARMUP_STABLE_DECAY:
            self._check_decay()
        elif self.decay_steps:
            raise ConfigError(
                f"optim.sched.decay_steps ({self.decay_steps}) belongs to {WARMUP_STABLE_DECAY}; set name to it, or "
                "decay_steps and decay_ratio to null"
            )
        elif self.schedule == INVERSE_SQUARE_ROOT:
            if self.constant_steps or self.min_lr:
                raise ConfigError(
                    f"optim.sched: {INVERSE_SQUARE_ROOT} has no end and no minimum; set constant_steps "
                    f"({self.constant_steps}) and min_lr ({self.min_lr}) to 0, or name to {COSINE}"
                )
            if self.warmup_steps < 1:
                raise ConfigError(
                    f"optim.sched.warmup_steps must be at least 1 with {INVERSE_SQUARE_ROOT}, which starts to fall "
                    "after the warm-up"
                )
        elif self.warmup_steps + self.constant_steps >= self.max_steps:
            raise ConfigError(
                f"optim.sched: warmup_steps ({self.warmup_steps}) and constant_steps ({self.constant_steps}) leave no "
                f"step for the cosine in max_steps ({self.max_steps}); shorten them or raise optim.sched.max_steps"
            )

    def _check_decay(self) -> None:
        if self.constant_steps:
            raise ConfigError(
                f"optim.sched: {WARMUP_STABLE_DECAY} is constant between warm-up and decay; set constant_steps "
                f"({self.constant_steps}) to 0"
            )
        if self.decay_steps < 1 or self.warmup_steps + self.decay_steps > self.max_steps:
            raise ConfigError(
                f"optim.sched: {WARMUP_STABLE_DECAY} needs decay_steps of at least 1 ({self.decay_steps}) that fit "
                f"with warmup_steps ({self.warmup_steps}) into max_steps ({self.max_steps}); set decay_steps or "
                "decay_ratio"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the values that a run's identity records.

        `name`, `options` and `decay_steps` only if they are not the defaults.
        """
        values = self.model_dump()
        if not self.decay_steps:
            del values["decay_steps"]
        if self.name == FUSED_ADAM:
            del values["name"]
        if not self.options:
            del values["options"]
        return values
