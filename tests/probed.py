"""Labelled proteins for probe tests, made from real proteins with labels that a model can learn."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bionemo_esm.pretraining.checkpoints import StopSignals
from bionemo_esm.pretraining.hang_watch import HangWatch
from bionemo_esm.pretraining.probe import Probe
from bionemo_esm.pretraining.probe_config import ProbeSet, read_probe
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from conftest import SAMPLE
from runs import composed

RESIDUES = "{name: neighbour, level: residue, kind: classification}"
NUMBERS = "{name: share, level: sequence, kind: regression, metric: pearson}"
HYDROPHOBIC = set("AILMFVWC")
SLOW = "bionemo_esm.pretraining.probe.representations"


def sample_sequences() -> list[str]:
    """Return real proteins: most cut to 30 residues, some longer than the window of small models."""
    with gzip.open(SAMPLE / "test.fasta.gz", "rt") as stream:
        records = stream.read().split(">")[1:61]
    whole = ["".join(record.split("\n")[1:]) for record in records]
    return [sequence if place % 8 == 0 else sequence[place : place + 30] for place, sequence in enumerate(whole)]


def write_labels(folder: Path) -> Path:
    """Write two tables: per residue whether the previous one is hydrophobic; per protein the hydrophobic share."""
    residues, shares = ["sequence,target,set,validation"], ["sequence,target,set,validation"]
    for place, sequence in enumerate(sample_sequences()):
        oily = [letter in HYDROPHOBIC for letter in sequence]
        known = "".join("HP"[letter] for letter in [False, *oily[:-1]])
        validation = place % 3 == 1
        residues.append(f"{sequence},{known},train,{validation}")
        shares.append(f"{sequence},{sum(oily) / len(oily) + 5:.4f},train,{validation}")
    (folder / "residues.csv").write_text("\n".join(residues) + "\n")
    (folder / "shares.csv").write_text("\n".join(shares) + "\n")
    return folder


def asking(labels: Path, *more: str, every: int = 2) -> tuple[str, ...]:
    """Return the overrides for a per-residue probe."""
    files = f"probe.data.train={labels / 'residues.csv'}"
    return (f"probe.task={RESIDUES}", files, f"probe.every_n_train_steps={every}", *more)


def probed(labels: Path, table: str = "residues", task: str = RESIDUES, tokens: int = 128, **values: Any) -> ProbeSet:
    """Return the probe data for a model with the given maximum length in tokens."""
    chosen = [f"probe.{key}={value}" for key, value in values.items()]
    recipe = load_recipe(
        composed(
            "recipe=laptop",
            f"probe.task={task}",
            f"probe.data.train={labels / table}.csv",
            f"model.seq_length={tokens}",
            *chosen,
        )
    )
    assert recipe.probe is not None
    return read_probe(recipe.probe, recipe.model)


def recipe_of(labels: Path, *overrides: str) -> Recipe:
    return load_recipe(composed("recipe=laptop", *asking(labels), *overrides))


def stub() -> Any:
    return SimpleNamespace(global_step=0)


def probe_of(some: ProbeSet, most_tokens: int = 4096) -> Probe:
    console: Any = None
    watch = HangWatch(Path(), None, console)
    return Probe(some, most_tokens, StopSignals(), watch, console, console)
