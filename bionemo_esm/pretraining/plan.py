"""The plan of a run, before it runs: what it comes to in epochs, tokens, memory, FLOPs, hours and bytes.

`plan_of` is arithmetic over a recipe and the facts around it; `facts.py` looks those up, `checks.py` says
what does not fit together, `console.py` and `picture.py` show it.

What a run takes on disk: checkpoints, snapshots for the average, and the archives at its end. Arithmetic only.

What a plan is reckoned from, beside the recipe: data, device, where the run begins, and what is free on disk.

Each is looked up where it can be found and else taken from what the recipe's source states; it says which. Nothing is
written, and neither NeMo nor a process group is needed.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import ArrayLike

from bionemo_esm import config_directory
from bionemo_esm.alphabet import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.model.costs import FLOAT32, Memory, memory_per_device, optimizer_state_bytes, training_flops
from bionemo_esm.pretraining.data_setup import SAMPLE_FOLDER
from bionemo_esm.pretraining.hardware import memory_bytes, peak_flops
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.resume import find_parent_run


@dataclass(frozen=True)
class Storage:
    """Bytes and numbers of files. Tensors alone are counted: what stands around them is a few kilobytes a file."""

    checkpoint_bytes: int  # weights and Adam's two moments, float32
    weights_bytes: int  # of a snapshot, and of an archive
    checkpoints: int  # written on the schedule, the one at the end included
    kept_checkpoints: int  # at most at a time: the last, the best, and one more while the next is written
    kept_snapshots: int  # at most at a time, one more while the next is written; 0: nothing is averaged
    archives: int  # the model, and its average

    @classmethod
    def of(cls, recipe: Recipe, first_step: int = 0) -> Storage:
        """Of a run that begins after `first_step` optimizer steps of another."""
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
        """On disk at a time, at most."""
        weights = (self.kept_snapshots + self.archives) * self.weights_bytes
        return min(self.kept_checkpoints * self.checkpoint_bytes + weights, self.written_bytes)

    @property
    def written_bytes(self) -> int:
        """Over the whole run, by its schedule: a stop, or a validation better than all before, saves once more."""
        a_time = self.checkpoint_bytes + (self.weights_bytes if self.kept_snapshots else 0)
        return self.checkpoints * a_time + self.archives * self.weights_bytes


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder above that exists, and the bytes that are free there."""
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    return existing, shutil.disk_usage(existing).free


SPREAD = 1.4
"""Mean square of tokens over the square of their mean, where only the mean is published. It is 1.25 for the shipped
sample, cropped to 512, and 1.4, cropped to 1,024. Attention is under a tenth of the work: a tenth more or less of this
is under a hundredth of the FLOPs."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of the training data."""

    source: str  # of these numbers, for a person
    train_sequences: int  # samples of an epoch: sequences, or clusters of a clustered store
    mean_tokens: float  # of a sequence cropped to model.seq_length, specials counted
    mean_squared_tokens: float
    validation_sequences: int | None = None  # None: not known
    longest_residues: int | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """What one device can do; None: not known."""

    name: str
    source: str  # of these numbers, for a person
    auto_precision: str  # what trainer.precision=auto comes to: "bf16" or "32"
    memory_bytes: int | None = None
    bf16_flops: float | None = None  # a second, at best; None as well where it has no units for bf16
    float32_flops: float | None = None

    @property
    def multiplies_bf16(self) -> bool:
        """False only where it is known that it does not."""
        return self.bf16_flops is not None or self.float32_flops is None

    def peak(self, precision: str) -> float | None:
        """FLOP/s at best, precision "bf16" or "32"."""
        return self.bf16_flops if precision == "bf16" else self.float32_flops


@dataclass(frozen=True)
class StartFacts:
    """After which step of another run this one begins; 0 for one of its own."""

    step: int = 0
    samples: int | None = 0  # consumed until then; None: not known
    source: str = ""  # of the number, for a person
    missing: bool = False  # continue_from_path names something that is not here
    learning_rate: float | None = None  # that the other run would have taken next


@dataclass(frozen=True)
class Facts:
    """All that a plan is reckoned from, beside the recipe."""

    data: DataFacts
    device: DeviceFacts
    start: StartFacts = StartFacts()
    next_recipe: str | None = None  # the one whose run goes on with this run, if there is one
    free_bytes: int | None = None  # where results go; None: the run has a folder already


def gather_facts(recipe: Recipe) -> Facts:
    """Look up all facts. Raises `ConfigError` where nothing is known of the data; `StoreError` for a damaged store."""
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
            f"with `python examples/preprocess_uniref50.py output={folder}`, or name the folder of a store"
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
    """Of the shipped sample, which becomes a store when the run starts."""
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
    """Mean, and mean square, of the tokens of sequences of so many residues, cropped."""
    tokens = (np.asarray(residues, dtype=np.float64) + SPECIAL_TOKENS_PER_SEQUENCE).clip(max=seq_length)
    return float(tokens.mean()), float((tokens**2).mean())


def _device(recipe: Recipe) -> DeviceFacts:
    """The GPU of this machine, if it could be a node of the run; else the published one."""
    parameter_dtype(recipe.trainer.precision, "cpu")  # refuses another word than those there are
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
    """The recipe of ours that continues the one of this name."""
    for path in sorted((config_directory() / "recipe").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and (values.get("published") or {}).get("continues") == name:
            return path.stem
    return None


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
    """Return the most tokens that one rank receives; the ranks' parts differ by at most one longest sequence."""
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
            residues * recipe.data.masking.mlm_probability,
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
        optimizer=recipe.optim.name,
    )


def scientific(value: float) -> str:
    """Three digits and a power of ten, as people type it: `5.64e12`, `2e-4`, `0`."""
    digits, power = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
