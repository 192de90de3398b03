"""The proteins of a run: the store it names, or one built beside it from a FASTA file or from the shipped sample."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from bionemo_esm.console import Console, ProgressBar
from bionemo_esm.data.preprocess import BuildPolicy, build_store, build_store_from_splits
from bionemo_esm.data.store import MANIFEST_NAME, SPLITS, ProteinStore, StoreError
from bionemo_esm.pretraining.recipe import Recipe

SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "data" / "sample"


def build_proteins(recipe: Recipe, run_folder: Path, console: Console) -> None:
    """Build the recipe's store, if it is one to be built beside the run and is not there; for one process of a run.

    Raises `FastaError` or `StoreError` when the FASTA file cannot be used.
    """
    folder = _store_folder(recipe, run_folder)
    if recipe.data.store is None and not (folder / MANIFEST_NAME).is_file():
        _build(recipe, folder, console)


def open_proteins(recipe: Recipe, run_folder: Path) -> ProteinStore:
    """Open the recipe's store. Raises `StoreError` when it cannot be used, or was built of something else."""
    folder = _store_folder(recipe, run_folder)
    store = ProteinStore.open(folder)
    _check_source(recipe, store, folder)
    return store


def _store_folder(recipe: Recipe, run_folder: Path) -> Path:
    return recipe.data.store or run_folder / "store"


def describe_source(recipe: Recipe) -> str:
    """Where the proteins come from, for a person."""
    if recipe.data.store is not None:
        return f"store {recipe.data.store}"
    return str(recipe.data.fasta) if recipe.data.fasta else "the shipped sample (UniProt, CC BY 4.0)"


def _policy(recipe: Recipe) -> BuildPolicy:
    return BuildPolicy(
        max_residues=recipe.data.max_residues,
        validation_sequences=recipe.data.validation_sequences,
        test_sequences=recipe.data.test_sequences,
        seed=recipe.seed if recipe.data.fasta is not None else 0,  # the sample comes split
    )


def _sources(recipe: Recipe) -> list[Path]:
    """The FASTA files that a store is built from: one to be split, or train, validation and test."""
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
    """A store that this recipe would have built otherwise must not pass for it."""
    if recipe.data.store is not None:
        return
    wanted = [(path.name, path.stat().st_size) for path in _sources(recipe)]
    found = [(source["file"], source["bytes"]) for source in store.manifest["source"]]
    if found != wanted or store.manifest["policy"] != asdict(_policy(recipe)):
        names = ", ".join(name for name, _ in found)
        raise StoreError(
            f"{folder} was built from other files ({names}), another version of them, or with other data.* settings; "
            "give this run another exp_manager.name, or remove the run's folder"
        )
