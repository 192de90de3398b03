"""The plan of a run, before it runs: what it comes to in epochs, tokens, memory, FLOPs, hours and bytes.

`plan_of` is arithmetic over a recipe and the facts around it; `facts.py` looks those up, `checks.py` says
what does not fit together, `screen.py` and `picture.py` show it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bionemo_esm.data.packing import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.costs import Memory, memory_per_device, training_flops
from bionemo_esm.training.planning.facts import Facts
from bionemo_esm.training.recipe import Recipe
from bionemo_esm.training.storage import Storage

PFLOP_DAY = 1e15 * 86_400


@dataclass(frozen=True)
class Batch:
    """A global batch, and the part of it that a device holds at a time. Means, where numbers vary from step to step."""

    sequences: float
    tokens: float
    accumulation: float  # micro batches of a rank in a step
    micro_tokens: float  # of a micro batch
    most_micro_tokens: int  # of a micro batch, were all its sequences as long as the model takes them

    @classmethod
    def of(cls, recipe: Recipe, mean_tokens: float) -> Batch:
        dealing, longest = recipe.batch_plan(), recipe.model.seq_length
        sequences = recipe.sequences_of_a_batch(mean_tokens)
        share = sequences * mean_tokens / recipe.trainer.data_parallel_size
        if (limit := recipe.data.micro_batch_tokens) is not None:
            accumulation, most = max(math.ceil(share / limit), 1), min(limit, _most_of_a_rank(recipe))
        else:
            assert recipe.data.micro_batch_size is not None
            by_sequences = share / mean_tokens / recipe.data.micro_batch_size
            accumulation, most = max(math.ceil(by_sequences), 1), recipe.data.micro_batch_size * longest
        accumulation = dealing.accumulation or accumulation
        return cls(sequences, sequences * mean_tokens, accumulation, share / accumulation, most)

    @property
    def tokens_of_a_rank(self) -> float:
        """Of the global batch, for each data-parallel rank."""
        return self.micro_tokens * self.accumulation


def _most_of_a_rank(recipe: Recipe) -> int:
    """Tokens of a rank's share of a global batch that `deal` may come to; shares differ by one longest sequence."""
    ranks, longest = recipe.trainer.data_parallel_size, recipe.model.seq_length
    if recipe.data.global_batch_tokens is not None:
        return recipe.data.global_batch_tokens // ranks + longest
    assert recipe.global_batch_size is not None
    return -(-recipe.global_batch_size // ranks) * longest


@dataclass(frozen=True)
class Plan:
    """What a run would be. Samples, tokens and FLOPs are those of this run itself, not of one that it continues."""

    recipe: Recipe
    facts: Facts
    precision: str  # "bf16" or "32"
    batch: Batch
    samples: float
    tokens: float
    flops: float
    memory: Memory  # of a device, with a micro batch of mean size
    most_memory: Memory  # with the largest there can be
    storage: Storage

    @property
    def steps(self) -> int:
        """Optimizer steps of this run itself."""
        return self.recipe.trainer.max_steps - self.facts.start.step

    @property
    def steps_per_epoch(self) -> float:
        return self.facts.data.train_sequences / self.batch.sequences

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def device_seconds(self) -> float | None:
        """Of all devices together, at the assumed MFU; None where that or the device's peak is not known."""
        peak, published = self.facts.device.peak(self.precision), self.recipe.published
        return self.flops / (peak * published.mfu) if peak and published else None

    @property
    def wall_seconds(self) -> float | None:
        return None if self.device_seconds is None else self.device_seconds / self.recipe.trainer.world_size

    @property
    def tokens_per_second_and_device(self) -> float | None:
        return None if self.device_seconds is None else self.tokens / self.device_seconds


def plan_of(recipe: Recipe, facts: Facts) -> Plan:
    """The plan of a recipe under these facts. Raises `ConfigError` where no step is left to do."""
    start, data = facts.start, facts.data
    steps = recipe.trainer.max_steps - start.step
    if steps <= 0:
        raise ConfigError(
            f"continue_from_path: {start.source} is at step {start.step:,} already, and trainer.max_steps "
            f"({recipe.trainer.max_steps:,}) counts those steps, too; raise it"
        )
    batch = Batch.of(recipe, data.mean_tokens)
    samples = steps * batch.sequences
    residues = samples * (data.mean_tokens - SPECIAL_TOKENS_PER_SEQUENCE)
    wanted = recipe.trainer.precision
    precision = facts.device.auto_precision if wanted == "auto" else wanted
    return Plan(
        recipe=recipe,
        facts=facts,
        precision=precision,
        batch=batch,
        samples=samples,
        tokens=samples * data.mean_tokens,
        flops=training_flops(
            recipe.model,
            samples * data.mean_tokens,
            samples * data.mean_squared_tokens,
            residues * recipe.data.masking.chosen,
        ),
        memory=memory_of(recipe, precision, batch.micro_tokens),
        most_memory=memory_of(recipe, precision, batch.most_micro_tokens),
        storage=Storage.of(recipe, start.step),
    )


def memory_of(recipe: Recipe, precision: str, micro_tokens: float) -> Memory:
    """Of one device of the recipe's, with so many tokens in a micro batch."""
    trainer = recipe.trainer
    return memory_per_device(
        recipe.model,
        micro_tokens,
        precision=precision,
        data_parallel=trainer.data_parallel_size,
        tensor_parallel=trainer.tensor_model_parallel_size,
        shard_optimizer=trainer.shard_optimizer,
        device_type="cuda" if trainer.accelerator == "gpu" else "cpu",
    )


def scientific(value: float) -> str:
    """Three digits and a power of ten, as people type it: `5.64e12`, `2e-4`, `0`."""
    digits, power = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
