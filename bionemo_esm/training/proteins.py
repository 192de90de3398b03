"""The proteins of a run: the store it names, or one built beside it from a FASTA file or from the shipped sample."""

from __future__ import annotations

import time
from pathlib import Path

from bionemo_esm.data.store import MANIFEST_NAME, ProteinStore, StoreError
from bionemo_esm.data.uniref50 import BuildPolicy, build_store, build_store_from_splits
from bionemo_esm.training.recipe import Recipe
from bionemo_esm.training.screen import Screen, duration

SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "data" / "sample"
_SECONDS_BETWEEN_LINES = 10.0


def open_proteins(recipe: Recipe, run_folder: Path, screen: Screen, is_rank_zero: bool) -> ProteinStore:
    """Open the recipe's store, building it first where it is to be built: by rank 0, while others wait for it.

    Raises `FastaError` or `StoreError` when the FASTA file or the store cannot be used.
    """
    folder = recipe.data.store or run_folder / "store"
    if recipe.data.store is None and not (folder / MANIFEST_NAME).is_file():
        if is_rank_zero:
            _build(recipe, folder, screen)
        else:
            _wait_for(folder)
    store = ProteinStore.open(folder)
    _check_source(recipe, store, folder)
    return store


def describe_source(recipe: Recipe) -> str:
    """Where the proteins come from, for a person."""
    if recipe.data.store is not None:
        return f"store {recipe.data.store}"
    return str(recipe.data.fasta) if recipe.data.fasta else "the shipped sample (UniProt, CC BY 4.0)"


def _build(recipe: Recipe, folder: Path, screen: Screen) -> None:
    policy = BuildPolicy(
        max_residues=recipe.data.max_residues,
        validation_sequences=recipe.data.validation_sequences,
        test_sequences=recipe.data.test_sequences,
        seed=recipe.seed,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    if recipe.data.fasta is not None:
        screen.say(f"Building a store from {recipe.data.fasta} ...")
        build_store(recipe.data.fasta, folder, policy, progress=_BuildProgress(screen))
    else:
        train, validation, test = (SAMPLE_FOLDER / f"{part}.fasta.gz" for part in ("train", "validation", "test"))
        build_store_from_splits(train, validation, test, folder, policy, licence="CC BY 4.0")


class _BuildProgress:
    """A line now and then while a large FASTA file is read."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._started = self._shown = time.monotonic()

    def __call__(self, records: int, bytes_read: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            seconds, megabytes = now - self._started, bytes_read / 1e6
            rate = megabytes / seconds
            self.screen.progress(f"  {records:,} records, {megabytes:,.0f} MB, {rate:,.0f} MB/s, {duration(seconds)}")


def _wait_for(folder: Path, limit_seconds: float = 24 * 3600) -> None:
    """Until rank 0 has renamed the store into place (a store never exists half-written)."""
    deadline = time.monotonic() + limit_seconds
    while not (folder / MANIFEST_NAME).is_file():
        if time.monotonic() > deadline:
            raise StoreError(f"{folder}: rank 0 has not built the store within {duration(limit_seconds)}")
        time.sleep(0.5)


def _check_source(recipe: Recipe, store: ProteinStore, folder: Path) -> None:
    """A FASTA file that changed after its store was built would silently not be what is trained on."""
    if recipe.data.fasta is None:
        return
    built_from = {source["bytes"] for source in store.manifest["source"]}
    if recipe.data.fasta.stat().st_size not in built_from:
        raise StoreError(
            f"{folder} was built from another version of {recipe.data.fasta} (its size has changed since); "
            "remove the run's folder to start anew, or give the run another exp_manager.name"
        )
