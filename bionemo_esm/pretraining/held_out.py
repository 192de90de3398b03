"""The evaluation at the end of a pretraining run: its models on the test split, beside baselines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.files import write_atomically
from bionemo_esm.inference.engine_options import EngineConfig
from bionemo_esm.inference.evaluation.baselines import FOUR_NEIGHBOURS, FREQUENCIES, NeighbourCounts
from bionemo_esm.inference.evaluation.evaluate_command import split_input
from bionemo_esm.inference.evaluation.evaluation import (
    EvaluationOptions,
    Predictors,
    evaluate_parts,
    load_engines,
    one_by_one,
    parts_of,
)
from bionemo_esm.inference.evaluation.figures import MODEL, draw, figures_of, without_tables
from bionemo_esm.pretraining.run_context import RunContext

AVERAGED = "averaged"
_MOST_TRAINING_RESIDUES = 5_000_000  # that the n-grams are counted over: seconds


def evaluate_test_split(run: RunContext, archives: dict[str, Path], console: Console) -> dict[str, Any]:
    """Evaluate the archives, write `test.json` and `test.png`, and return their part of the summary.

    archives: by `MODEL` and `AVERAGED`. Without a test split, or with `evaluate.test_sequences=0`, nothing is done.
    """
    split, wanted = run.store.split("test"), run.recipe.evaluate.test_sequences
    if wanted == 0 or not len(split):
        return {}
    proteins = split_input(split, "the test split", wanted, run.recipe.seed)
    options = EvaluationOptions(masked=run.recipe.data.masking.mlm_probability, seed=run.recipe.seed)
    counts = NeighbourCounts.of(run.train, run.store.split("validation"), _MOST_TRAINING_RESIDUES)
    device = "cpu" if run.recipe.trainer.accelerator == "cpu" else "auto"
    engines = load_engines({name: EngineConfig(model=path, device=device) for name, path in archives.items()})
    bar, done = ProgressBar(console, "test split", RESIDUES), 0

    def finished(residues: int) -> None:
        nonlocal done
        done += residues
        bar(done, proteins.residues)

    compute = partial(one_by_one, Predictors(engines, counts, options))
    result = evaluate_parts(parts_of(proteins.read()), compute, finished=finished)
    if not result.counts.any():
        console.print_line("warning: no residue of the test split is masked; nothing is evaluated on it")
        return {}
    figures = figures_of(result)
    write_atomically(run.folder / "test.json", json.dumps(figures, indent=2) + "\n")
    draw(
        figures, {}, f"{run.recipe.name} on {figures['proteins']:,} proteins of the test split", run.folder / "test.png"
    )
    return _summary(without_tables(figures))


def _summary(figures: dict[str, Any]) -> dict[str, Any]:
    predictors = figures["predictors"]
    own, averaged = predictors[MODEL], predictors.get(AVERAGED)
    return {
        "test_sequences": figures["proteins"],
        "test_loss": own["loss"],
        "test_perplexity": own["perplexity"],
        "test_unigram_perplexity": predictors[FREQUENCIES]["perplexity"],
        "test_ngram_perplexity": predictors[FOUR_NEIGHBOURS]["perplexity"],
        **({"averaged_test_perplexity": averaged["perplexity"]} if averaged else {}),
        "test": figures,
    }
