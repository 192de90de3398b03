"""A recipe with its proteins at hand, and the screen that introduces it.

The folder of a run, in which one process writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bionemo_esm import files as outputs
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import TrainingBatches, ValidationBatches, unigram_perplexity
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore, SequenceSplit, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import INVERSE_SQUARE_ROOT
from bionemo_esm.pretraining.data_setup import describe_source
from bionemo_esm.pretraining.probe_config import ProbeSet, read_probe
from bionemo_esm.pretraining.recipe import Recipe

_UNFINISHED = (".*.nemo.*.partial", ".*.json*.partial", "*/.step-*.partial")


def make_folder(folder: Path) -> None:
    """Raises `ConfigError` where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {folder} cannot be made ({error.strerror}); choose another place"
        ) from error


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for the length of a block, and clear it of what a killed process left half-written.

    Raises `ConfigError`, naming the holder, where another process holds it.
    """
    with outputs.exclusive_lock(folder, "exp_manager.exp_dir", "give this run another exp_manager.name"):
        outputs.remove_unfinished(folder, *_UNFINISHED)
        yield


OUTPUT_LOG = "output.log"


@dataclass(frozen=True)
class RunContext:
    """All that a training needs: batches to learn from, batches to be asked, and what to hold the answers against."""

    recipe: Recipe
    folder: Path
    store: ProteinStore
    stream: TrainingBatches
    validation: ValidationBatches
    unigram_perplexity: float  # of the validation targets, under the residue frequencies of the training split
    probe: ProbeSet | None = None

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, store: ProteinStore) -> RunContext:
        """Deal the store's splits into batches as the recipe says."""
        max_tokens, policy = recipe.model.seq_length, recipe.data.masking
        reader = SampleReader(store.split("train"), max_tokens, policy, recipe.seed)
        queries = SampleReader(store.split("validation"), max_tokens, policy.for_evaluation(), recipe.seed)
        validation = ValidationBatches(queries, validation_batch_size(recipe, queries.num_samples))
        stream = TrainingBatches(reader, recipe.batch_plan())
        unigram = unigram_perplexity(reader.split, validation)
        if math.isnan(unigram):
            raise ConfigError("no residue of the validation set is masked; raise data.validation_sequences")
        probe = None if recipe.probe is None else read_probe(recipe.probe, recipe.model)
        return cls(recipe, folder, store, stream, validation, unigram, probe)

    @property
    def train(self) -> SequenceSplit:
        return self.store.split("train")

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights of this run come from, as its checkpoints and archives record it."""
        recipe, manifest = self.recipe, self.store.manifest
        return {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "data": describe_source(recipe),
            "data_release": manifest.get("release"),
            "data_manifest_sha256": sha256_of_file(self.store.folder / MANIFEST_NAME),
            "data_sequences": {name: split["sequences"] for name, split in manifest["splits"].items()},
            "data_samples_of_an_epoch": self.train.num_clusters,
            "restored_from": str(recipe.restore_from_path) if recipe.restore_from_path else None,
            **_of_the_weights(recipe),
        }

    @property
    def identity(self) -> dict[str, str | int]:
        """What a run must not change while it goes on: the stream of samples, and how the optimizer answers it."""
        train, optim = self.store.manifest["splits"]["train"], self.recipe.optim.to_dict()
        if self.recipe.optim.schedule == INVERSE_SQUARE_ROOT:  # which has no end, so a run may be given more steps
            del optim["max_steps"]
        return {
            "seed": self.recipe.seed,
            "samples of an epoch": self.train.num_clusters,
            "train.bin": train["bin_sha256"],
            "data.masking": self.recipe.data.masking.record,
            "data.global_batch_size": self.recipe.global_batch_size or "none",
            "data.global_batch_tokens": self.recipe.data.global_batch_tokens or "none",
            "restore_from_path": f"weights of SHA-256 {sha}" if (sha := self.recipe.restored_sha256) else "none",
            **{f"optim.{key}": str(value) for key, value in optim.items()},
        }

    def opening_screen(self, backends: str, precision: str, resumed_from_step: int, first_step: int = 0) -> str:
        """Model, data, batch, steps, device, fused kernels and where results go."""
        recipe, trainer = self.recipe, self.recipe.trainer
        batch = recipe.sequences_of_a_batch(self._mean_tokens())
        tokens = batch * self._mean_tokens()
        steps = trainer.max_steps - first_step
        lines = {
            "model": f"{describe_model(recipe)}, {recipe.model.parameters:,} parameters, up to "
            f"{recipe.model.seq_length} tokens",
            "data": f"{describe_source(recipe)}: {describe_sequences(self.train)} to train on, {self.train.residues:,} "
            f"residues; {len(self.validation.reader.split):,} to validate on",
            "batch": f"{self._batch(batch, tokens)}, packed without padding{self._dealing()}",
            "steps": f"{steps:,}, {steps * batch / self.train.num_clusters:,.1f} epochs, {steps * tokens:,.0f} tokens"
            + (f"; after the {first_step:,} of {recipe.continue_from_path}" if first_step else "")
            + (f"; going on from step {resumed_from_step:,}" if resumed_from_step > first_step else ""),
            "device": f"{trainer.world_size} x {trainer.accelerator}, {precision}{self._sharing()}",
            "fused": backends,
            "results": f"{short(self.folder)} (messages of other libraries: {short(self.folder / OUTPUT_LOG)})",
        }
        if self.probe is not None:
            lines["probe"] = self.probe.describe()
        if recipe.restore_from_path is not None and not resumed_from_step:
            lines["start"] = f"from the weights of {recipe.restore_from_path}"
        if (departure := recipe.departure()) is not None:
            lines["note"] = departure
        if batch > self.train.num_clusters:
            lines["warning"] = (
                f"a batch is more than the {self.train.num_clusters:,} samples there are; make it smaller"
            )
        return "\n".join([f"\n{recipe.name}", *(f"  {key:<8} {text}" for key, text in lines.items()), ""])

    def _sharing(self) -> str:
        trainer = self.recipe.trainer
        ranks, moments = trainer.tensor_model_parallel_size, trainer.shard_optimizer
        return (f", {ranks} share a copy of the model" if ranks > 1 else "") + (", moments sharded" if moments else "")

    def _dealing(self) -> str:
        plan = self.stream.plan
        if plan.world_size == plan.accumulation == 1:
            return ""
        ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
        if plan.accumulation is None:
            most = (
                f"{plan.micro_batch_tokens:,} tokens"
                if plan.micro_batch_tokens
                else f"{plan.micro_batch_size} sequences"
            )
            return f" (dealt to {ranks}, at most {most} at a time)"
        return f" ({ranks} x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated)"

    def _batch(self, sequences: float, tokens: float) -> str:
        if self.recipe.global_batch_size is None:
            return f"up to {self.recipe.data.global_batch_tokens:,} tokens, about {sequences:,.0f} sequences"
        return f"{sequences:,.0f} sequences, about {tokens:,.0f} tokens"

    def _mean_tokens(self) -> float:
        """Tokens of a sequence after cropping, on average over up to a million of the training set."""
        return float((self.train.some_lengths() + 2).clip(max=self.recipe.model.seq_length).mean())


def validation_batch_size(recipe: Recipe, sequences: int) -> int:
    """The micro batch, or less where it would leave a rank without a batch."""
    ranks = recipe.trainer.data_parallel_size
    if sequences < ranks:
        raise ConfigError(
            f"data.validation_sequences: {sequences} validation sequences cannot be dealt to {ranks} ranks; "
            "give at least one for each"
        )
    micro = recipe.data.micro_batch_size
    if micro is None:
        assert recipe.data.micro_batch_tokens is not None
        micro = recipe.data.micro_batch_tokens // recipe.model.seq_length
    return min(micro, sequences // ranks)


def describe_sequences(split: SequenceSplit) -> str:
    """How many there are, for a person."""
    sequences = f"{len(split):,} sequences"
    return sequences if split.num_clusters == len(split) else f"{sequences} in {split.num_clusters:,} clusters"


def describe_model(recipe: Recipe) -> str:
    """The family and the sizes of the encoder, for a person."""
    model = recipe.model
    return f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"


def _of_the_weights(recipe: Recipe) -> dict[str, Any]:
    """What a run that starts from weights records of them: their hash, and the library they were imported from."""
    if recipe.restore_from_path is None:
        return {}
    origin = ArchiveFile.open(recipe.restore_from_path).provenance.get("imported_from")
    recorded: dict[str, Any] = {"restored_weights_sha256": recipe.restored_sha256}
    return recorded | ({"imported_from": origin} if origin is not None else {})


def short(path: Path) -> str:
    """Relative to where the person is, when it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
