"""An evaluation as plain values (the JSON file), as lines of text, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bionemo_esm.inference.evaluation.baselines import BASELINES, FREQUENCIES
from bionemo_esm.inference.evaluation.evaluation import PartResult
from bionemo_esm.inference.evaluation.tally import SIZES, Estimates, table_rows
from bionemo_esm.plotting import FAINT, INK, LINE, MARK, MUTED, WIDTH, styled, write_png
from bionemo_esm.statistics import percentile_interval, resampled_counts

MODEL, REFERENCE = "model", "reference"
_NAME_WIDTH = 22
_FEWEST_IN_A_BIN = 50  # masked residues, of a bin of confidence that is drawn


def figures_of(result: PartResult, resamples: int = 1000, seed: int = 1) -> dict[str, Any]:
    """Return every figure of an evaluation as plain values. Losses are in nats a masked residue.

    `predictors` has the figures of each model and baseline; `differences` the loss of the model less that of each
    other, with a paired interval: below 0 the model is better.
    """
    estimates = Estimates(result.counts, result.tallies, resamples, seed)
    others = [name for name in result.tallies if name != MODEL]
    return {
        "proteins": len(result.lengths),
        "residues": int(result.lengths.sum()),
        "masked_residues": int(result.counts.sum()),
        "bootstrap": {"resamples": resamples, "seed": seed, "interval": 0.95, "unit": "protein"},
        "predictors": {name: _predictor(name, result, estimates) for name in result.tallies},
        "differences": {name: _difference(estimates, name) for name in others},
    }


def without_tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of all residues together."""
    predictors = {
        name: {key: value for key, value in one.items() if key not in SIZES}
        for name, one in figures["predictors"].items()
    }
    return {**figures, "predictors": predictors}


def _predictor(name: str, result: PartResult, estimates: Estimates) -> dict[str, Any]:
    loss, interval = estimates.mean(name), estimates.interval(name)
    figures: dict[str, Any] = {
        "loss": loss,
        "loss_interval": list(interval),
        "perplexity": math.exp(loss),
        "perplexity_interval": [math.exp(end) for end in interval],
        "accuracy": estimates.mean(name, 1),
        "accuracy_interval": list(estimates.interval(name, 1)),
        "expected_calibration_error": result.tallies[name].calibration_error,
    }
    if name in result.pseudo:
        figures |= _pseudo(result, name, estimates)
    return figures | {kind: table_rows(kind, result.tallies[name].tables[kind]) for kind in SIZES}


def _pseudo(result: PartResult, name: str, estimates: Estimates) -> dict[str, Any]:
    """Return figures with each residue masked alone: of all residues together, and the mean over proteins."""
    losses, lengths = result.pseudo[name], result.lengths.astype(np.float64)
    drawn = [
        block @ np.column_stack([losses, lengths])
        for block in resampled_counts(len(lengths), estimates.resamples, estimates.seed)
    ]
    totals = np.concatenate(drawn)
    loss, interval = float(losses.sum() / lengths.sum()), percentile_interval(totals[:, 0] / totals[:, 1])
    return {
        "pseudo_loss": loss,
        "pseudo_loss_interval": list(interval),
        "pseudo_perplexity": math.exp(loss),
        "mean_pseudo_perplexity_of_proteins": float(np.exp(losses / lengths).mean()),
    }


def _difference(estimates: Estimates, other: str) -> dict[str, Any]:
    difference, interval = estimates.difference(MODEL, other)
    return {"loss": difference, "interval": list(interval)}


# --- text -------------------------------------------------------------------------------------------------------------


def lines_of(figures: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the figures as a screen of text. names: what to call the predictors, of those that are renamed."""
    lines = [f"  {'':<{_NAME_WIDTH}}{'loss':>8}{'95% interval':>19}{'perplexity':>12}{'accuracy':>10}{'ECE':>8}"]
    for name, one in figures["predictors"].items():
        low, high = one["loss_interval"]
        lines.append(
            f"  {names.get(name, name)[:_NAME_WIDTH]:<{_NAME_WIDTH}}{one['loss']:>8.4f}"
            f"{f'{low:.4f} to {high:.4f}':>19}{one['perplexity']:>12.3f}{one['accuracy']:>10.2%}"
            f"{one['expected_calibration_error']:>8.4f}"
        )
    for name, one in figures["predictors"].items():
        if "pseudo_perplexity" in one:
            lines.append(
                f"  {names.get(name, name)}: pseudo-perplexity {one['pseudo_perplexity']:.3f} over all residues, "
                f"{one['mean_pseudo_perplexity_of_proteins']:.3f} on average of proteins"
            )
    for other, one in figures["differences"].items():
        low, high = one["interval"]
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference that these proteins show"
        lines.append(
            f"  {names.get(MODEL, MODEL)} less {names.get(other, other)}: {one['loss']:+.4f} nats "
            f"({low:+.4f} to {high:+.4f}), {verdict}"
        )
    return lines


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(figures: Mapping[str, Any], names: Mapping[str, str], title: str, path: Path) -> Path:
    """Draw losses with intervals, calibration, and losses by residue, by length and by position; return the path."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
        axes = figure.subplots(2, 3).ravel()
        _draw_losses(axes[0], figures["predictors"], names)
        _draw_calibration(axes[1], figures["predictors"])
        _draw_groups(axes[2], figures["predictors"], "by_residue", "residue")
        _draw_groups(axes[3], figures["predictors"], "by_length", "residues of the protein")
        _draw_groups(axes[4], figures["predictors"], "from_start", "residues before it")
        _draw_groups(axes[5], figures["predictors"], "from_end", "residues after it")
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        return write_png(figure, path)


_COLOURS = {MODEL: LINE, REFERENCE: MARK, FREQUENCIES: MUTED}


def _draw_losses(axes: Any, predictors: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for row, (name, one) in enumerate(predictors.items()):
        low, high = one["loss_interval"]
        axes.plot([low, high], [row, row], color=_COLOURS.get(name, FAINT), linewidth=3)
        axes.plot(one["loss"], row, "o", color=_COLOURS.get(name, FAINT))
        axes.annotate(f" {one['perplexity']:.2f}", (high, row), va="center", color=INK)
    axes.set_yticks(range(len(predictors)), [names.get(name, name)[:_NAME_WIDTH] for name in predictors])
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.2)
    axes.set_title("loss, nats a masked residue; perplexity beside it", loc="left", fontsize=10)
    axes.grid(axis="x")


def _draw_calibration(axes: Any, predictors: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
    for name in (name for name in (MODEL, REFERENCE) if name in predictors):
        rows = [row for row in predictors[name]["by_confidence"] if row["masked_residues"] >= _FEWEST_IN_A_BIN]
        axes.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], "o-", ms=4, color=_COLOURS[name])
    axes.set_title("accuracy over confidence", loc="left", fontsize=10)
    axes.grid()


def _draw_groups(axes: Any, predictors: Mapping[str, Any], kind: str, label: str) -> None:
    shown = [name for name in (*_COLOURS, *BASELINES[1:]) if name in predictors]
    for name in shown:
        rows = predictors[name][kind]
        axes.plot(range(len(rows)), [row["loss"] for row in rows], "o-", ms=3, color=_COLOURS.get(name, FAINT))
    rows = predictors[MODEL][kind]
    ticks = [row.get("residue", f"{row.get('from')}") for row in rows]
    axes.set_xticks(range(len(rows)), ["?" if tick == "other" else tick for tick in ticks], fontsize=8)
    axes.set_title(f"loss by {label}", loc="left", fontsize=10)
    axes.grid(axis="y")
