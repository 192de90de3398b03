"""A run before training: its directory, its store, its batches, and the description printed at its start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bionemo_esm import files as outputs
from bionemo_esm.console import Console, ProgressBar
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import TrainingBatches, ValidationBatches, unigram_perplexity
from bionemo_esm.data.preprocess import BuildPolicy, build_store, build_store_from_splits
from bionemo_esm.data.store import MANIFEST_NAME, SPLITS, ProteinStore, SequenceSplit, StoreError, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.config import FULL_SHARDING, INVERSE_SQUARE_ROOT, NO_SHARDING, SHARDED_OPTIMIZER
from bionemo_esm.pretraining.probe_config import ProbeSet, read_probe
from bionemo_esm.pretraining.recipe import Recipe

OUTPUT_LOG = "output.log"
SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "data" / "sample"
_UNFINISHED = (".*.partial", "*/.step-*.partial")


@contextmanager
def run_directory(folder: Path) -> Iterator[None]:
    """Hold the name of the run directory during the block, make it, and remove what a killed process left unfinished.

    Raises `ConfigError` if another process holds it, naming that process, or if it cannot be made.
    """
    otherwise = "give this run another exp_manager.name"
    with outputs.hold_name("exp_manager.exp_dir", folder, otherwise=otherwise):
        make_folder(folder)
        outputs.remove_unfinished(folder, *_UNFINISHED)
        yield


def make_folder(folder: Path) -> None:
    """Create a folder. Raises `ConfigError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {folder} cannot be made ({error.strerror}); choose another place"
        ) from error


@dataclass(frozen=True)
class RunContext:
    """A recipe with its open store: training and validation batches, and the perplexity of residue frequencies."""

    recipe: Recipe
    folder: Path
    store: ProteinStore
    stream: TrainingBatches
    validation: ValidationBatches
    unigram_perplexity: float  # of the validation targets, under the residue frequencies of the training split
    probe: ProbeSet | None = None

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, store: ProteinStore) -> RunContext:
        """Build the batches of the recipe over the splits of a store."""
        max_tokens, policy = recipe.model.seq_length, recipe.data.masking
        reader = SampleReader(store.split("train"), max_tokens, policy, recipe.seed)
        masked = SampleReader(store.split("validation"), max_tokens, policy.for_evaluation(), recipe.seed)
        validation = ValidationBatches(masked, validation_batch_size(recipe, masked.num_samples))
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
        """The origin of this run's weights, as its checkpoints and archives record it."""
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
            **_weights_provenance(recipe),
        }

    @property
    def identity(self) -> dict[str, str | int]:
        """The settings that a resumed run must not change: the stream of samples and the optimization."""
        train, optim = self.store.manifest["splits"]["train"], self.recipe.optim.to_dict()
        if self.recipe.optim.schedule == INVERSE_SQUARE_ROOT:  # has no end: a run may be extended
            del optim["max_steps"]
        return {
            "seed": self.recipe.seed,
            "samples of an epoch": self.train.num_clusters,
            "train.bin": train["bin_sha256"],
            "data.masking": self.recipe.data.masking.record,
            "data.global_batch_size": self.recipe.global_batch_size or "none",
            "data.global_batch_tokens": self.recipe.data.global_batch_tokens or "none",
            **({"data.batch_warmup": str(warmup)} if (warmup := self.recipe.batch_warmup) else {}),
            "restore_from_path": f"weights of SHA-256 {sha}" if (sha := self.recipe.restored_sha256) else "none",
            **{f"optim.{key}": str(value) for key, value in optim.items()},
        }

    def run_description(self, backends: str, precision: str, resumed_from_step: int, first_step: int = 0) -> str:
        """Return the lines printed at the start: model, data, batch, steps, device, fused kernels, results."""
        recipe, trainer, warmup = self.recipe, self.recipe.trainer, self.recipe.batch_warmup
        batch = recipe.mean_batch_sequences(self._mean_tokens())
        tokens = batch * self._mean_tokens()
        steps = trainer.max_steps - first_step
        samples = recipe.mean_samples(trainer.max_steps, self._mean_tokens()) * steps / trainer.max_steps
        lines = {
            "model": f"{describe_model(recipe)}, {recipe.model.parameters:,} parameters, up to "
            f"{recipe.model.seq_length} tokens",
            "data": f"{describe_source(recipe)}: {describe_sequences(self.train)} to train on, {self.train.residues:,} "
            f"residues; {len(self.validation.reader.split):,} to validate on",
            "batch": f"{self._batch(batch, tokens)}, packed without padding{self._accumulation_text()}"
            + (f"; from {warmup.start:,} on, for {warmup.samples:,} sequences" if warmup else ""),
            "steps": f"{steps:,}, {samples / self.train.num_clusters:,.1f} epochs, "
            f"{samples * self._mean_tokens():,.0f} tokens"
            + (f"; after the {first_step:,} of {recipe.continue_from_path}" if first_step else "")
            + (f"; resuming from step {resumed_from_step:,}" if resumed_from_step > first_step else ""),
            "device": f"{trainer.world_size} x {trainer.accelerator}, {precision}{self._parallelism_text()}",
            "fused": backends,
            "results": f"{short(self.folder)} (messages of other libraries: {short(self.folder / OUTPUT_LOG)})",
        }
        if self.probe is not None:
            lines["probe"] = self.probe.describe()
        if recipe.restore_from_path is not None and not resumed_from_step:
            lines["start"] = f"from the weights of {recipe.restore_from_path}"
        if (batch_departure := recipe.batch_departure()) is not None:
            lines["note"] = batch_departure
        if recipe.trainer.shard_optimizer:
            lines["old key"] = "trainer.shard_optimizer=true is now trainer.sharding=optimizer"
        if batch > self.train.num_clusters:
            lines["warning"] = (
                f"a batch is more than the {self.train.num_clusters:,} samples there are; make it smaller"
            )
        return "\n".join([f"\n{recipe.name}", *(f"  {key:<8} {text}" for key, text in lines.items()), ""])

    def _parallelism_text(self) -> str:
        trainer = self.recipe.trainer
        ranks = trainer.tensor_model_parallel_size
        sharded = {NO_SHARDING: "", SHARDED_OPTIMIZER: ", moments sharded", FULL_SHARDING: ", all state sharded"}
        return (f", {ranks} share a copy of the model" if ranks > 1 else "") + sharded[trainer.sharding]

    def _accumulation_text(self) -> str:
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
            return f" (over {ranks}, at most {most} at a time)"
        return f" ({ranks} x {plan.micro_batch_size} sequences x {plan.accumulation} accumulated)"

    def _batch(self, sequences: float, tokens: float) -> str:
        if self.recipe.global_batch_size is None:
            return f"up to {self.recipe.data.global_batch_tokens:,} tokens, about {sequences:,.0f} sequences"
        return f"{sequences:,.0f} sequences, about {tokens:,.0f} tokens"

    def _mean_tokens(self) -> float:
        """Return the mean tokens of a cropped sequence, over up to a million of the training set."""
        return float((self.train.some_lengths() + 2).clip(max=self.recipe.model.seq_length).mean())


def validation_batch_size(recipe: Recipe, sequences: int) -> int:
    """Return the micro batch size, or less if a rank would have no batch."""
    ranks = recipe.trainer.data_parallel_size
    if sequences < ranks:
        raise ConfigError(
            f"data.validation_sequences: {sequences} validation sequences cannot be divided among {ranks} ranks; "
            "give at least one for each"
        )
    micro = recipe.data.micro_batch_size
    if micro is None:
        assert recipe.data.micro_batch_tokens is not None
        micro = recipe.data.micro_batch_tokens // recipe.model.seq_length
    return min(micro, sequences // ranks)


def describe_sequences(split: SequenceSplit) -> str:
    """Return the number of sequences, and of clusters if they differ."""
    sequences = f"{len(split):,} sequences"
    return sequences if split.num_clusters == len(split) else f"{sequences} in {split.num_clusters:,} clusters"


def describe_model(recipe: Recipe) -> str:
    """Return family and sizes of the encoder in one line."""
    model = recipe.model
    return f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"


def _weights_provenance(recipe: Recipe) -> dict[str, Any]:
    """Return the provenance of the weights to start from: their hash, and the library they were imported from."""
    if recipe.restore_from_path is None:
        return {}
    origin = ArchiveFile.open(recipe.restore_from_path).provenance.get("imported_from")
    recorded: dict[str, Any] = {"restored_weights_sha256": recipe.restored_sha256}
    return recorded | ({"imported_from": origin} if origin is not None else {})


def short(path: Path) -> str:
    """Return the path relative to the working directory, if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# --- the store --------------------------------------------------------------------------------------------------------


def build_run_store(recipe: Recipe, run_folder: Path, console: Console) -> None:
    """Build the store in the run directory, if the recipe needs one and it is missing. Call it on rank 0 only.

    Raises `FastaError` or `StoreError` for an unusable FASTA file.
    """
    folder = _store_folder(recipe, run_folder)
    if recipe.data.store is None and not (folder / MANIFEST_NAME).is_file():
        _build(recipe, folder, console)


def open_run_store(recipe: Recipe, run_folder: Path) -> ProteinStore:
    """Open the recipe's store. Raises `StoreError` if it is unusable or was built from other data or settings."""
    folder = _store_folder(recipe, run_folder)
    store = ProteinStore.open(folder)
    _check_source(recipe, store, folder)
    return store


def _store_folder(recipe: Recipe, run_folder: Path) -> Path:
    return recipe.data.store or run_folder / "store"


def describe_source(recipe: Recipe) -> str:
    """Return the source of the proteins in a few words."""
    if recipe.data.store is not None:
        return f"store {recipe.data.store}"
    return str(recipe.data.fasta) if recipe.data.fasta else "the shipped sample (UniProt, CC BY 4.0)"


def _policy(recipe: Recipe) -> BuildPolicy:
    return BuildPolicy(
        max_residues=recipe.data.max_residues,
        validation_sequences=recipe.data.validation_sequences,
        test_sequences=recipe.data.test_sequences,
        seed=recipe.seed if recipe.data.fasta is not None else 0,  # the sample is split already
    )


def _sources(recipe: Recipe) -> list[Path]:
    """Return the FASTA files of the store: one to be split, or train, validation and test."""
    if recipe.data.fasta is not None:
        return [recipe.data.fasta]
    return [SAMPLE_FOLDER / f"{part}.fasta.gz" for part in SPLITS]


def _build(recipe: Recipe, folder: Path, console: Console) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if recipe.data.fasta is not None:
        console.print_line(f"Building a store from {recipe.data.fasta} ...")
        meter = ProgressBar(console, "read")
        build_store(
            recipe.data.fasta,
            folder,
            _policy(recipe),
            progress=lambda records, done, total: meter(done, total, f", {records:,} records"),
        )
    else:
        train, validation, test = _sources(recipe)
        build_store_from_splits(train, validation, test, folder, _policy(recipe), licence="CC BY 4.0")


def _check_source(recipe: Recipe, store: ProteinStore, folder: Path) -> None:
    """Raise `StoreError` if the store was not built from this recipe's data and settings."""
    if recipe.data.store is not None:
        return
    wanted = [(path.name, path.stat().st_size) for path in _sources(recipe)]
    found = [(source["file"], source["bytes"]) for source in store.manifest["source"]]
    if found != wanted or store.manifest["policy"] != _policy(recipe).model_dump():
        names = ", ".join(name for name, _ in found)
        raise StoreError(
            f"{folder} was built from other files ({names}), another version of them, or with other data.* settings; "
            "give this run another exp_manager.name, or remove the run's folder"
        )
