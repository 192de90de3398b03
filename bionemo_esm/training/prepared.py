"""A recipe with its proteins at hand, and the screen that introduces it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bionemo_esm.data.pretraining import SampleReader, TrainingStream, ValidationBatches, unigram_perplexity
from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore, SequenceSplit, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.training.proteins import describe_source
from bionemo_esm.training.recipe import Recipe

OUTPUT_LOG = "output.log"


@dataclass(frozen=True)
class PreparedRun:
    """All that a training needs: batches to learn from, batches to be asked, and what to hold the answers against."""

    recipe: Recipe
    folder: Path
    store: ProteinStore
    stream: TrainingStream
    validation: ValidationBatches
    unigram_perplexity: float  # of the validation targets, under the residue frequencies of the training split

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, store: ProteinStore) -> PreparedRun:
        """Deal the store's splits into batches as the recipe says."""
        max_tokens, policy = recipe.model.seq_length, recipe.data.masking
        reader = SampleReader(store.split("train"), max_tokens, policy, recipe.seed)
        questions = SampleReader(store.split("validation"), max_tokens, policy.for_evaluation(), recipe.seed)
        validation = ValidationBatches(questions, validation_batch_size(recipe, questions.num_samples))
        stream = TrainingStream(reader, recipe.batch_plan())
        unigram = unigram_perplexity(reader.split, validation)
        if math.isnan(unigram):
            raise ConfigError("no residue of the validation set is masked; raise data.validation_sequences")
        return cls(recipe, folder, store, stream, validation, unigram)

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
        }

    @property
    def identity(self) -> dict[str, str | int]:
        """What a run must not change while it goes on: the stream of samples, and how the optimizer answers it."""
        train = self.store.manifest["splits"]["train"]
        return {
            "seed": self.recipe.seed,
            "samples of an epoch": self.train.num_clusters,
            "train.bin": train["bin_sha256"],
            "data.masking": str(self.recipe.data.masking),
            "data.global_batch_size": self.recipe.global_batch_size,
            "restore_from_path": str(self.recipe.restore_from_path or "none"),
            **{f"optim.{key}": str(value) for key, value in asdict(self.recipe.optim).items()},
        }

    def opening_screen(self, backends: str, precision: str, resumed_from_step: int) -> str:
        """Model, data, batch, steps, device, fused kernels and where results go."""
        recipe, trainer, batch = self.recipe, self.recipe.trainer, self.recipe.global_batch_size
        tokens = batch * self._mean_tokens()
        lines = {
            "model": f"{describe_model(recipe)}, {recipe.model.parameters:,} parameters, up to "
            f"{recipe.model.seq_length} tokens",
            "data": f"{describe_source(recipe)}: {describe_sequences(self.train)} to train on, {self.train.residues:,} "
            f"residues; {len(self.validation.reader.split):,} to validate on",
            "batch": f"{batch:,} sequences, about {tokens:,.0f} tokens, packed without padding" + self._dealing(),
            "steps": f"{trainer.max_steps:,}, {recipe.epochs(self.train.num_clusters):,.1f} epochs, "
            f"{trainer.max_steps * tokens:,.0f} tokens"
            + (f"; going on from step {resumed_from_step:,}" if resumed_from_step else ""),
            "device": f"{trainer.world_size} x {trainer.accelerator}, {precision}",
            "fused": backends,
            "results": f"{short(self.folder)} (messages of other libraries: {short(self.folder / OUTPUT_LOG)})",
        }
        if recipe.restore_from_path is not None and not resumed_from_step:
            lines["start"] = f"from the weights of {recipe.restore_from_path}"
        return "\n".join([f"\n{recipe.name}", *(f"  {key:<8} {text}" for key, text in lines.items()), ""])

    def _dealing(self) -> str:
        plan = self.stream.plan
        if plan.world_size == plan.accumulation == 1:
            return ""
        return f" ({plan.world_size} ranks x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated)"

    def _mean_tokens(self) -> float:
        """Tokens of a sequence after cropping, on average over a slice of the training set."""
        return float((self.train.lengths[:100_000] + 2).clip(max=self.recipe.model.seq_length).mean())


def validation_batch_size(recipe: Recipe, sequences: int) -> int:
    """The micro batch, or less where it would leave a rank without a batch."""
    world_size = recipe.trainer.world_size
    if sequences < world_size:
        raise ConfigError(
            f"data.validation_sequences: {sequences} validation sequences cannot be dealt to {world_size} ranks; "
            "give at least one for each"
        )
    return min(recipe.data.micro_batch_size, sequences // world_size)


def describe_sequences(split: SequenceSplit) -> str:
    """How many there are, for a person."""
    sequences = f"{len(split):,} sequences"
    return sequences if split.num_clusters == len(split) else f"{sequences} in {split.num_clusters:,} clusters"


def describe_model(recipe: Recipe) -> str:
    """The sizes of the encoder, for a person."""
    model = recipe.model
    return f"ESM-1nv, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"


def short(path: Path) -> str:
    """Relative to where the person is, when it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
