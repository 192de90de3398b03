"""The plan of a run: epochs, tokens, memory, FLOPs, hours and disk space, and what does not fit together.

`gather_facts` looks up data, device, start and free space, or takes them from the recipe's source. `plan_of` computes
the plan from recipe and facts. `findings` lists choices that would run, but that may be mistakes. `plan_report.py`
prints it. Nothing is written; neither NeMo nor a process group is needed.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import ArrayLike

from bionemo_esm import config_directory
from bionemo_esm.alphabet import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.dataloader import divisors
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.model.config import INVERSE_SQUARE_ROOT, RECOMPUTE, SHARDINGS
from bionemo_esm.model.costs import (
    FLOAT32,
    Memory,
    memory_per_device,
    newton_schulz_flops,
    optimizer_state_bytes,
    recomputed_flops,
    training_flops,
)
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.hardware import memory_bytes, peak_flops
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.resume import find_parent_run
from bionemo_esm.pretraining.run_context import SAMPLE_FOLDER, validation_batch_size

PFLOP_DAY = 1e15 * 86_400
SPREAD = 1.4
"""Mean of the squared lengths over the square of the mean, if only the mean is published. For the shipped sample it is
1.25, cropped to 512 tokens, and 1.4, cropped to 1,024. Attention is under 10% of the work, so an error of 10% changes
the FLOPs by less than 1%."""
USABLE = 0.9
"""Fraction of a device's memory. The rest is for the CUDA context, work space and fragmentation."""

_SLACK = 0.02  # tolerated relative difference of steps or epochs
_EVEN_SHARE = 4.0  # longest sequences per rank and batch from which the ranks' work is about even


@dataclass(frozen=True)
class Storage:
    """Bytes and numbers of files on disk. Only tensors are counted; the rest is a few kilobytes per file."""

    checkpoint_bytes: int  # weights and optimizer state, float32
    weights_bytes: int  # of a snapshot or an archive
    checkpoints: int  # written on the schedule, with the final one
    kept_checkpoints: int  # at most at a time: the last, the best, and the one being written
    kept_snapshots: int  # at most at a time, with the one being written; 0: no average
    archives: int  # the model and its average

    @classmethod
    def of(cls, recipe: Recipe, first_step: int = 0) -> Storage:
        """Compute the storage of a run that continues another after `first_step` steps."""
        saving, weights = recipe.exp_manager.checkpoints, FLOAT32 * recipe.model.parameters
        every, last = saving.every_n_train_steps, recipe.trainer.max_steps
        checkpoints = max(last // every - first_step // every, 0) + (last % every > 0)
        return cls(
            checkpoint_bytes=weights + optimizer_state_bytes(recipe.model, recipe.optim.name),
            weights_bytes=weights,
            checkpoints=checkpoints,
            kept_checkpoints=saving.keep_last + 1 + saving.keep_best,
            kept_snapshots=min(saving.average_last, checkpoints) + 1 if saving.average_last else 0,
            archives=1 + (saving.average_last > 0),
        )

    @property
    def peak_bytes(self) -> int:
        """Bytes on disk at a time, at most."""
        weights = (self.kept_snapshots + self.archives) * self.weights_bytes
        return min(self.kept_checkpoints * self.checkpoint_bytes + weights, self.written_bytes)

    @property
    def written_bytes(self) -> int:
        """Bytes written over the whole run, without the additional saves of stops and best validations."""
        a_time = self.checkpoint_bytes + (self.weights_bytes if self.kept_snapshots else 0)
        return self.checkpoints * a_time + self.archives * self.weights_bytes


def free_space(folder: Path) -> tuple[Path, int]:
    """Return the nearest existing parent folder and its free bytes."""
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    return existing, shutil.disk_usage(existing).free


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    """Statistics of the training data."""

    source: str  # of these numbers, for the screen
    train_sequences: int  # samples per epoch: sequences, or clusters of a clustered store
    mean_tokens: float  # per sequence, cropped to model.seq_length, with special tokens
    mean_squared_tokens: float
    validation_sequences: int | None = None  # None: not known
    longest_residues: int | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """Memory and peak FLOP/s of a device; None: unknown."""

    name: str
    source: str  # of these numbers, for the screen
    auto_precision: str  # resolved trainer.precision=auto: "bf16" or "32"
    memory_bytes: int | None = None
    bf16_flops: float | None = None  # per second, peak; None, too, if it has no bf16 units
    float32_flops: float | None = None

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device has bf16 units, or is unknown."""
        return self.bf16_flops is not None or self.float32_flops is None

    def peak(self, precision: str) -> float | None:
        """Return the peak FLOP/s. precision: "bf16" or "32"."""
        return self.bf16_flops if precision == "bf16" else self.float32_flops


@dataclass(frozen=True)
class StartFacts:
    """The step of the parent run at which this run starts; 0 without a parent run."""

    step: int = 0
    samples: int | None = 0  # consumed by then; None: unknown
    source: str = ""  # of the number, for the screen
    missing: bool = False  # continue_from_path does not exist
    learning_rate: float | None = None  # of the parent run's next step


@dataclass(frozen=True)
class Facts:
    """The inputs of a plan besides the recipe."""

    data: DataFacts
    device: DeviceFacts
    start: StartFacts = StartFacts()
    next_recipe: str | None = None  # the recipe that continues this run, if there is one
    free_bytes: int | None = None  # in the output folder; None: the run directory exists


def gather_facts(recipe: Recipe) -> Facts:
    """Look up all facts. Raises `ConfigError` if the data are unknown, `StoreError` for a damaged store."""
    return Facts(
        data=_data(recipe),
        device=_device(recipe),
        start=_start(recipe),
        next_recipe=_next_recipe(recipe.name),
        free_bytes=None if recipe.run_folder.exists() else free_space(recipe.run_folder)[1],
    )


def _data(recipe: Recipe) -> DataFacts:
    folder = recipe.data.store or recipe.run_folder / "store"
    if (folder / MANIFEST_NAME).is_file():
        return _of_store(folder, recipe.model.seq_length)
    if recipe.data.fasta is not None:
        raise ConfigError(
            f"plan: what {recipe.data.fasta} holds is known when it is a store: bionemo-esm preprocess "
            f"{shlex.quote(f'input={recipe.data.fasta}')} output=data/mine split.validation=null split.test=null, then "
            "plan with data.fasta=null data.store=data/mine"
        )
    if recipe.data.store is None:
        return _of_sample(recipe)
    published = recipe.published
    if published is None:
        raise ConfigError(
            f"plan: data.store: {folder} is not here, and recipe {recipe.name} does not say what is in it; build it "
            f"with `bionemo-esm preprocess output={shlex.quote(str(folder))}`, or name the folder of a store"
        )
    mean = published.mean_tokens
    return DataFacts(f"published, as there is no store in {folder}", published.train_sequences, mean, SPREAD * mean**2)


def _of_store(folder: Path, seq_length: int) -> DataFacts:
    store = ProteinStore.open(folder)
    train = store.split("train")
    if not len(train):
        raise ConfigError(f"plan: {folder} has no sequence to train on; build it from more of them")
    mean, squared = _moments(train.some_lengths(), seq_length)
    held_out = len(store.split("validation"))
    return DataFacts(f"store {folder}", train.num_clusters, mean, squared, held_out, train.summary.longest)


def _of_sample(recipe: Recipe) -> DataFacts:
    """Return the statistics of the shipped sample, from which the run will build a store."""
    train, validation = (
        [
            min(len(record.sequence), recipe.data.max_residues)
            for record in read_fasta(SAMPLE_FOLDER / f"{part}.fasta.gz")
        ]
        for part in ("train", "validation")
    )
    mean, squared = _moments(train, recipe.model.seq_length)
    return DataFacts("the shipped sample", len(train), mean, squared, len(validation), max(train))


def _moments(residues: ArrayLike, seq_length: int) -> tuple[float, float]:
    """Return mean and mean square of the cropped sequences' tokens."""
    tokens = (np.asarray(residues, dtype=np.float64) + SPECIAL_TOKENS_PER_SEQUENCE).clip(max=seq_length)
    return float(tokens.mean()), float((tokens**2).mean())


def _device(recipe: Recipe) -> DeviceFacts:
    """Return this machine's GPU if it has enough for a node of the run; else the published one."""
    parameter_dtype(recipe.trainer.precision, "cpu")  # raises for an unknown precision
    here, published = torch.cuda.device_count(), recipe.published
    if recipe.trainer.accelerator == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // recipe.trainer.devices
        return DeviceFacts("CPU", "of this machine", _auto("cpu"), memory)
    if here >= recipe.trainer.devices or (here and published is None):
        properties = torch.cuda.get_device_properties(0)
        return _known_device(properties.name, "of this machine", _auto("cuda"), properties.total_memory)
    if published is not None:
        has_bf16 = peak_flops(published.gpu, "bf16") is not None
        return _known_device(published.gpu, "published", "bf16" if has_bf16 else "32", memory_bytes(published.gpu))
    return DeviceFacts("GPU", "of a kind that the recipe does not name", "bf16")


def _auto(device_type: str) -> str:
    return "bf16" if parameter_dtype("auto", device_type) == torch.bfloat16 else "32"


def _known_device(name: str, source: str, auto_precision: str, memory: int | None) -> DeviceFacts:
    return DeviceFacts(name, source, auto_precision, memory, peak_flops(name, "bf16"), peak_flops(name, "32"))


def _start(recipe: Recipe) -> StartFacts:
    path, published = recipe.continue_from_path, recipe.published
    if path is not None and path.exists() and (origin := find_parent_run(recipe)) is not None:
        name = f"{origin.file.path.name} of {path}" if path.is_dir() else str(path)
        return StartFacts(origin.steps, origin.samples, name, learning_rate=origin.learning_rate)
    if published is None or published.continues is None or published.steps is None:
        return StartFacts(missing=path is not None)
    step = max(recipe.trainer.max_steps - published.steps, 0)
    return StartFacts(
        step, None, f"as published for {published.continues}; continue_from_path will tell", missing=path is not None
    )


def _next_recipe(name: str) -> str | None:
    """Return the recipe that continues the one of this name, if there is one."""
    for path in sorted((config_directory() / "recipe").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and (values.get("published") or {}).get("continues") == name:
            return path.stem
    return None


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sizes of a global batch and of its micro batches; means, if they vary from step to step."""

    sequences: float
    tokens: float
    accumulation: float  # micro batches per rank and step
    micro_tokens: float  # of a micro batch
    most_micro_tokens: int  # of a micro batch, if all its sequences have seq_length tokens

    @classmethod
    def of(cls, recipe: Recipe, mean_tokens: float) -> Batch:
        dealing, longest = recipe.batch_plan(), recipe.model.seq_length
        sequences = recipe.mean_batch_sequences(mean_tokens)
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
        """Tokens of the global batch per data-parallel rank."""
        return self.micro_tokens * self.accumulation


def _most_of_a_rank(recipe: Recipe) -> int:
    """Return the most tokens that one rank receives; the ranks' parts differ by at most one longest sequence."""
    ranks, longest = recipe.trainer.data_parallel_size, recipe.model.seq_length
    if recipe.data.global_batch_tokens is not None:
        return recipe.data.global_batch_tokens // ranks + longest
    assert recipe.global_batch_size is not None
    return -(-recipe.global_batch_size // ranks) * longest


@dataclass(frozen=True)
class Plan:
    """The plan of a run. Samples, tokens and FLOPs are those of this run, without its parent run."""

    recipe: Recipe
    facts: Facts
    precision: str  # "bf16" or "32"
    batch: Batch
    samples: float
    tokens: float
    flops: float  # of the model, as MFU counts them
    recomputed_flops: float  # in addition, by the backward pass
    memory: Memory  # per device, with a micro batch of mean size
    most_memory: Memory  # with the largest possible micro batch
    storage: Storage

    @property
    def steps(self) -> int:
        """Optimizer steps of this run, without its parent run."""
        return self.recipe.trainer.max_steps - self.facts.start.step

    @property
    def steps_per_epoch(self) -> float:
        return self.facts.data.train_sequences / self.batch.sequences

    @property
    def epochs(self) -> float:
        return self.samples / self.facts.data.train_sequences

    @property
    def device_seconds(self) -> float | None:
        """Seconds of all devices together; None if the assumed MFU or the peak is unknown.

        The MFU is that of a run without recomputation, which takes time, too.
        """
        peak, published = self.facts.device.peak(self.precision), self.recipe.published
        return (self.flops + self.recomputed_flops) / (peak * published.mfu) if peak and published else None

    @property
    def wall_seconds(self) -> float | None:
        return None if self.device_seconds is None else self.device_seconds / self.recipe.trainer.world_size

    @property
    def tokens_per_second_and_device(self) -> float | None:
        return None if self.device_seconds is None else self.tokens / self.device_seconds


def plan_of(recipe: Recipe, facts: Facts) -> Plan:
    """Compute the plan of a recipe. Raises `ConfigError` if no step is left."""
    start, data = facts.start, facts.data
    steps = recipe.trainer.max_steps - start.step
    if steps <= 0:
        raise ConfigError(
            f"continue_from_path: {start.source} is at step {start.step:,} already, and trainer.max_steps "
            f"({recipe.trainer.max_steps:,}) counts those steps, too; raise it"
        )
    batch = Batch.of(recipe, data.mean_tokens)
    samples = recipe.mean_samples(steps, data.mean_tokens, start.samples or 0)
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
            residues * recipe.data.masking.mlm_probability,
        ),
        recomputed_flops=recomputed_flops(
            recipe.model,
            samples * data.mean_tokens,
            samples * data.mean_squared_tokens,
            recipe.trainer.recompute,
        ),
        memory=memory_of(recipe, precision, batch.micro_tokens),
        most_memory=memory_of(recipe, precision, batch.most_micro_tokens),
        storage=Storage.of(recipe, start.step),
    )


def memory_of(recipe: Recipe, precision: str, micro_tokens: float) -> Memory:
    """Return the memory of a device with a micro batch of `micro_tokens`."""
    trainer = recipe.trainer
    return memory_per_device(
        recipe.model,
        micro_tokens,
        precision=precision,
        data_parallel=trainer.data_parallel_size,
        tensor_parallel=trainer.tensor_model_parallel_size,
        sharding=trainer.sharding,
        device_type="cuda" if trainer.accelerator == "gpu" else "cpu",
        optimizer=recipe.optim.name,
        recompute=trainer.recompute,
    )


@dataclass(frozen=True)
class Orthogonalization:
    """Work of one optimizer step besides forward and backward, for an optimizer that orthogonalizes matrices."""

    flops: float  # of all matrices, once
    gathered_bytes: float  # received by a rank from the others that share its replica

    @classmethod
    def of(cls, recipe: Recipe) -> Orthogonalization:
        """Compute it; both are 0 for other optimizers."""
        family, ranks = OPTIMIZERS.get(recipe.optim.name), recipe.trainer.tensor_model_parallel_size
        flops = gathered = 0.0
        for part in recipe.model.parts():
            for name, shape, split in part.tensors():
                if iterations := family.orthogonalizing_iterations(recipe.optim, name, shape):
                    flops += iterations * newton_schulz_flops(*shape)
                    gathered += FLOAT32 * math.prod(shape) * (ranks - 1) / ranks if split else 0
        return cls(flops, gathered)


def scientific(value: float) -> str:
    """Return three digits and a power of ten: `5.64e12`, `2e-4`, `0`."""
    digits, power = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


# --- findings ---------------------------------------------------------------------------------------------------------


def findings(plan: Plan) -> list[str]:
    """Return a line for each choice that may be a mistake, with what to do."""
    return [text for check in CHECKS if (text := check(plan)) is not None]


def _global_batch(plan: Plan) -> str | None:
    return plan.recipe.batch_departure()


def _origin(plan: Plan) -> str | None:
    path = plan.recipe.continue_from_path
    if not plan.facts.start.missing:
        return None
    return f"continue_from_path: there is no {path} here; its number of steps is not known, {_assumed(plan)}"


def _assumed(plan: Plan) -> str:
    step = plan.facts.start.step
    return f"and taken as {step:,}, as published" if step else "and the plan begins at step 0"


def _length(plan: Plan) -> str | None:
    published = plan.recipe.published
    if published is None or published.steps is None or published.steps == plan.steps:
        return None
    last = published.steps + plan.facts.start.step
    return (
        f"trainer.max_steps: the run is {plan.steps:,} steps long, the published one {published.steps:,}; "
        f"trainer.max_steps={last} makes them alike"
    )


def _another_rate(plan: Plan) -> str | None:
    start = plan.facts.start
    if start.learning_rate is None:
        return None
    rate = learning_rate(plan.recipe.optim, start.step)
    if math.isclose(rate, start.learning_rate, rel_tol=0.01):
        return None
    return (
        f"the rate goes from {start.learning_rate:.2e}, where the run before left it, to {rate:.2e} at step "
        f"{start.step:,}: the schedule is another one; optim.lr, min_lr and max_steps of optim.sched decide it"
    )


def _published_epochs(plan: Plan) -> str | None:
    """Compare the published epochs with those of the published steps over the data of this run."""
    published, sequences = plan.recipe.published, plan.facts.data.train_sequences
    if published is None or not (published.steps and published.epochs and published.global_batch_size):
        return None
    epochs = published.steps * published.global_batch_size / sequences
    if abs(epochs / published.epochs - 1) <= _SLACK:
        return None
    steps = round(published.epochs * sequences / published.global_batch_size)
    return (
        f"the source's {published.steps:,} steps of {published.global_batch_size:,} make {epochs:,.0f} epochs of "
        f"{sequences:,} sequences; it says about {published.epochs:,.0f}. Steps are what counts here; "
        f"trainer.max_steps={steps + plan.facts.start.step} would make {published.epochs:,.0f}"
    )


def _less_than_an_epoch(plan: Plan) -> str | None:
    if plan.epochs >= 1:
        return None
    return (
        f"the run sees {plan.epochs:.1%} of the training sequences; trainer.max_steps="
        f"{plan.facts.start.step + -int(-plan.steps_per_epoch // 1)} would show it all of them once"
    )


def _more_than_the_data(plan: Plan) -> str | None:
    if plan.steps_per_epoch >= 1:
        return None
    return (
        f"a global batch of {plan.batch.sequences:,.0f} sequences is more than the "
        f"{plan.facts.data.train_sequences:,} there are: a step shows the same ones more than once; make it smaller"
    )


def _warm_up(plan: Plan) -> str | None:
    trainer, optim = plan.recipe.trainer, plan.recipe.optim
    if trainer.max_steps > optim.warmup_steps:
        return None
    return (
        f"optim.sched.warmup_steps ({optim.warmup_steps:,}) are not over when the run ends, at step "
        f"{trainer.max_steps:,}; give it fewer, or warmup_ratio in their place"
    )


def _horizon(plan: Plan) -> str | None:
    last, optim = plan.recipe.trainer.max_steps, plan.recipe.optim
    if optim.schedule == INVERSE_SQUARE_ROOT:
        return None
    if optim.max_steps < last:
        return (
            f"optim.sched.max_steps ({optim.max_steps:,}): the rate stays at its minimum for the "
            f"{last - optim.max_steps:,} steps after it; null ends the schedule with the run"
        )
    if optim.max_steps > (1 + _SLACK) * last and plan.facts.next_recipe is None:
        return (
            f"optim.sched.max_steps ({optim.max_steps:,}): the run ends at step {last:,}, at a rate of "
            f"{learning_rate(optim, last):.2g} still, and no recipe continues it; null ends the schedule with the run"
        )
    return None


def _positions(plan: Plan) -> str | None:
    longest, seq_length, key = plan.facts.data.longest_residues, plan.recipe.model.seq_length, "the store's longest"
    if longest is None or plan.recipe.data.max_residues < longest:
        longest, key = plan.recipe.data.max_residues, "data.max_residues"
    needed = longest + SPECIAL_TOKENS_PER_SEQUENCE
    if needed >= seq_length or not plan.recipe.model.position_rows:  # rotary positions have no parameters
        return None
    return (
        f"model.seq_length ({seq_length:,}): no sequence is so long ({key}: {longest:,}), and its last "
        f"{seq_length - needed:,} positions are never trained; {needed} would do"
    )


def _evenness(plan: Plan) -> str | None:
    share, longest, ranks = (
        plan.batch.tokens_of_a_rank,
        plan.recipe.model.seq_length,
        plan.recipe.trainer.data_parallel_size,
    )
    if ranks == 1 or share >= _EVEN_SHARE * longest:
        return None
    fewer = max(int(plan.batch.tokens // (_EVEN_SHARE * longest)), 1)
    even = f"{fewer:,} ranks or fewer" if fewer > 1 else "one rank"
    return (
        f"a rank's share of a batch is {share:,.0f} tokens, about {share / plan.facts.data.mean_tokens:,.1f} sequences "
        f"of up to {longest:,}: ranks with short ones wait for others. Even shares want {even}"
    )


def _tensor_parallel(plan: Plan) -> str | None:
    trainer = plan.recipe.trainer
    if trainer.devices % trainer.tensor_model_parallel_size == 0:
        return None
    return (
        f"trainer.tensor_model_parallel_size ({trainer.tensor_model_parallel_size}) does not divide trainer.devices "
        f"({trainer.devices}): some copies of the model lie on two nodes, and every layer waits for the network between"
    )


def _memory(plan: Plan) -> str | None:
    capacity = plan.facts.device.memory_bytes
    if capacity is None or plan.most_memory.total <= USABLE * capacity:
        return None
    name = "micro_batch_tokens" if plan.recipe.data.micro_batch_tokens else "micro_batch_size"
    of = f"GB of the {capacity / 1e9:,.1f} that {plan.facts.device.name} has"
    if plan.memory.total > USABLE * capacity:
        said = f"data.{name} takes {plan.memory.total / 1e9:,.1f} {of}, and CUDA a few"
    else:
        said = (
            f"data.{name} takes {plan.memory.total / 1e9:,.1f}, but would take {plan.most_memory.total / 1e9:,.1f} "
            f"{of} if all its sequences were {plan.recipe.model.seq_length:,} tokens long; lengths are balanced, "
            "so that is unlikely"
        )
    return f"{said}; {_smaller(plan, USABLE * capacity)}"


def _smaller(plan: Plan, room: float) -> str:
    """Return the largest micro batch that always fits, with the same optimisation."""
    recipe = plan.recipe
    fixed = memory_of(recipe, plan.precision, 0).total
    tokens = int((room - fixed) / ((plan.most_memory.total - fixed) / plan.batch.most_micro_tokens))
    if recipe.data.micro_batch_tokens is not None and tokens >= recipe.model.seq_length:
        return (
            f"micro_batch_tokens={max(tokens // 512 * 512, recipe.model.seq_length)} fits, with the same optimisation"
        )
    if recipe.data.micro_batch_size is not None and recipe.global_batch_size is not None:
        share = recipe.global_batch_size // recipe.trainer.data_parallel_size
        sizes = [size for size in divisors(share) if size * recipe.model.seq_length <= tokens]
        kept = "" if recipe.data.global_batch_size else f" and global_batch_size={recipe.global_batch_size}"
        if sizes:
            return f"micro_batch_size={sizes[-1]}{kept} always fits, with the same optimisation"
    for choice in sharding_choices(plan):
        if choice.memory_bytes <= room:
            more = f", {choice.more_operations:.0%} more operations" if choice.more_operations else ""
            return (
                f"trainer.sharding={choice.sharding} trainer.recompute={choice.recompute} fits: "
                f"{choice.memory_bytes / 1e9:,.1f} GB{more}"
            )
    return "more devices with trainer.sharding=full, or trainer.tensor_model_parallel_size, take some off each device"


@dataclass(frozen=True)
class ShardingChoice:
    """A combination of trainer.sharding and trainer.recompute that works for a recipe."""

    sharding: str
    recompute: str
    memory_bytes: int  # of a device, with the largest micro batch
    more_operations: float  # computed again, as a fraction of the model's


def sharding_choices(plan: Plan) -> list[ShardingChoice]:
    """Return the combinations that work, those with the least work and the least traffic first."""
    found = []
    for sharding in SHARDINGS:
        for recompute in RECOMPUTE:
            settings = {"sharding": sharding, "recompute": recompute, "shard_optimizer": False}
            try:
                recipe = plan.recipe.replace(trainer=plan.recipe.trainer.replace(**settings))
            except ConfigError:  # they do not work together
                continue
            data, model = plan.facts.data, recipe.model
            again = recomputed_flops(
                model, plan.samples * data.mean_tokens, plan.samples * data.mean_squared_tokens, recompute
            )
            memory = memory_of(recipe, plan.precision, plan.batch.most_micro_tokens).total
            found.append(ShardingChoice(sharding, recompute, memory, again / plan.flops))
    return sorted(found, key=lambda choice: choice.more_operations)


def _precision(plan: Plan) -> str | None:
    device = plan.facts.device
    if plan.recipe.trainer.accelerator == "cpu" or plan.precision != "bf16" or device.multiplies_bf16:
        return None
    return f"trainer.precision=bf16: {device.name} has no units for it; auto trains in float32 there"


def _validation(plan: Plan) -> str | None:
    if plan.facts.data.validation_sequences is None:
        return None
    try:
        validation_batch_size(plan.recipe, plan.facts.data.validation_sequences)
    except ConfigError as error:
        return str(error)
    return None


def _validation_interval(plan: Plan) -> str | None:
    every = plan.recipe.trainer.val_check_interval
    if every <= plan.steps:
        return None
    return (
        f"trainer.val_check_interval ({every:,}) is more than the run's {plan.steps:,} steps: only its end is validated"
    )


def _checkpoints(plan: Plan) -> str | None:
    every = plan.recipe.exp_manager.checkpoints.every_n_train_steps
    if plan.storage.checkpoints > 1 or every <= plan.steps:
        return None
    return (
        f"exp_manager.checkpoints.every_n_train_steps ({every:,}) is more than the run's {plan.steps:,} steps: there "
        "is no checkpoint to resume from before its end"
    )


def _average(plan: Plan) -> str | None:
    saving, written = plan.recipe.exp_manager.checkpoints, plan.storage.checkpoints
    if not saving.average_last or saving.average_last <= written:
        return None
    return (
        f"exp_manager.checkpoints.average_last ({saving.average_last}) x every_n_train_steps "
        f"({saving.every_n_train_steps:,}) reach back beyond the run's {plan.steps:,} steps: "
        + (f"{written} checkpoints are averaged" if written > 1 else "there is one checkpoint and no average")
    )


def _disk(plan: Plan) -> str | None:
    free, needed = plan.facts.free_bytes, plan.storage.peak_bytes
    if free is None or free >= needed:
        return None
    return (
        f"exp_manager.exp_dir: the run takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free; choose another place, "
        "or lower exp_manager.checkpoints.keep_last or average_last"
    )


CHECKS: tuple[Callable[[Plan], str | None], ...] = (
    *(_origin, _another_rate, _global_batch, _length, _published_epochs, _less_than_an_epoch, _more_than_the_data),
    *(_warm_up, _horizon),
    *(_positions, _evenness, _tensor_parallel, _memory, _precision),
    *(_validation, _validation_interval, _checkpoints, _average, _disk),
)
