"""What a plan is reckoned from, beside the recipe: data, device, where the run begins, and what is free on disk.

Each is looked up where it can be found and else taken from what the recipe's source states; it says which. Nothing is
written, and neither NeMo nor a process group is needed.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import ArrayLike

from bionemo_esm import config_directory
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.packing import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.backends import parameter_dtype
from bionemo_esm.training.hardware import memory_bytes, peak_flops
from bionemo_esm.training.origin import find_origin
from bionemo_esm.training.proteins import SAMPLE_FOLDER
from bionemo_esm.training.recipe import Recipe
from bionemo_esm.training.storage import free_space

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
    if path is not None and path.exists() and (origin := find_origin(recipe)) is not None:
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
