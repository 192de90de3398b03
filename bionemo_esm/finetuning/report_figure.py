"""The figure of a report: each row's score with its interval, and the predictions of the first row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bionemo_esm.finetuning.metrics import decimal_places, format_score
from bionemo_esm.finetuning.report import VALIDATION, Detail, Report, cut
from bionemo_esm.finetuning.tasks import LOWER_IS_BETTER
from bionemo_esm.plotting import FAINT, GRID, INK, LINE, MARK, MUTED, STYLE, WIDTH, styled, write_png

MOST_CLASSES = 30  # of a confusion matrix; more could not be read
_MOST_WRITTEN = 12  # classes whose cells have room for a number
_MOST_POINTS = 5000
_LONGEST_NAME = 22  # characters
_FEW_CLASSES = 5  # whose cells stay large beside long names
_LABELS = {"accuracy": "Accuracy", "f1": "Macro F1", "mcc": "Matthews' correlation", "mse": "Mean squared error"}
_LABELS |= {"spearman": "Spearman's correlation", "pearson": "Pearson's correlation"}
_TICKS = "{x:.6g}"  # whole numbers, without a power of ten set apart, which would stand in the title
_TOP, _BOTTOM, _RIGHT, _SQUARE, _DETAIL = 1.35, 0.6, 0.35, 4.2, 6.75  # inches; the last: where the right half begins
_CHARACTER, _ROW = 0.085, 0.85  # inches: of a label, at most of a row
_DARK = 0.85  # of the colours of shares, from where white can be read better than ink


def draw(report: Report, path: Path) -> Path:
    """Write a PNG, whole, over an existing one; equal reports give equal bytes."""
    from matplotlib.figure import Figure

    detail = report.detail if _is_drawable(report) else None
    tall, below = 0.75 * len(report.rows) + 0.5, 0.0
    if detail is not None:
        beside = _room_for_classes(report) if detail.confusion is not None else 0.35  # what stands left of a square
        side = min(_SQUARE, WIDTH - _DETAIL - beside - _RIGHT)
        tall = max(tall, min(side, _ROW * len(report.rows) + 0.5))  # a single row in a tall panel is lost
        below = side + (beside + 0.25 if detail.confusion is not None else 0.0)
    height = _TOP + max(tall, below) + _BOTTOM
    with styled(**{"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, height))
        name = cut(report.task.name.replace("_", " "), 60)
        figure.text(0.03, 1 - 0.42 / height, name, size=16, weight="bold", parse_math=False)
        figure.text(0.03, 1 - 0.70 / height, _subtitle(report), size=10.5, color=MUTED, parse_math=False)
        left = min(max(len(cut(row.name, _LONGEST_NAME)) for row in report.rows) * _CHARACTER + 0.5, 2.6)
        right = WIDTH - 0.8 if detail is None else _DETAIL - 0.75
        bottom = height - _TOP - tall
        axes = figure.add_axes((left / WIDTH, bottom / height, (right - left) / WIDTH, tall / height))
        _scores(axes, report)
        if detail is not None:
            bottom, begin = height - _TOP - side, _DETAIL + beside
            square = figure.add_axes((begin / WIDTH, bottom / height, side / WIDTH, side / height))
            _detail(square, report, detail)
        return write_png(figure, path)


def _is_drawable(report: Report) -> bool:
    detail = report.detail
    if detail is None:
        return False
    if detail.confusion is not None:
        return report.task.outputs <= MOST_CLASSES
    return detail.pairs is not None and bool(np.isfinite(detail.pairs).all(axis=1).any())


def _subtitle(report: Report) -> str:
    mean = f"mean over {report.runs} training runs" if report.runs > 1 else "one training run"
    return f"dots: {mean}; lines: 95% interval over the proteins of the set"


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(axes: Any, report: Report) -> None:
    """Draw a band for each row; the first set in full colour, validation beside a test set faint."""
    metric, sets = report.task.metric, report.measured_on
    for at, which in enumerate(sets):
        colour, text = (LINE, INK) if at == 0 else (FAINT, MUTED)
        axes.plot([], [], "o", color=colour, label=which)
        shift = 0.0 if len(sets) == 1 else (-0.16, 0.16)[at]
        for place, row in enumerate(report.rows):
            of = row.on(which)
            if of is None or np.isnan(of[metric].value):
                continue
            value, low, high, _ = of[metric]
            if not np.isnan(low):
                axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=2.4, solid_capstyle="round")
            axes.plot(value, place + shift, "o", color=colour, markersize=7)
            end = (value if np.isnan(high) else high, place + shift)
            text_of = format_score(value, decimal_places(metric, value, low, high))
            axes.annotate(text_of, end, (8, 0), textcoords="offset points", va="center", size=9, color=text)
    axes.set_yticks(range(len(report.rows)), [cut(row.name, _LONGEST_NAME) for row in report.rows], color=INK)
    _without_formulas(axes.get_yticklabels())
    axes.set_ylim(len(report.rows) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.xaxis.set_major_formatter(_TICKS)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if metric in LOWER_IS_BETTER:
        axes.set_xlabel("lower is better", size=9.5)
    axes.annotate(_LABELS[metric], (0, 1), (0, 10), "axes fraction", "offset points", weight="bold", size=12)
    if len(sets) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.02, 1.0), ncols=2, handletextpad=0.2)
    elif sets[0] == VALIDATION:
        style = {"ha": "right", "color": MUTED, "size": 9.5}
        axes.annotate("validation; there is no test set", (1, 1), (0, 10), "axes fraction", "offset points", **style)


# --- detail -----------------------------------------------------------------------------------------------------------


def _room_for_classes(report: Report) -> float:
    """Return the inches that names beside and under a confusion matrix take."""
    names, size = _classes(report)
    return max(map(len, names)) * _CHARACTER * size / float(STYLE["font.size"])


def _classes(report: Report) -> tuple[list[str], float]:
    """Return the names in a confusion matrix, and their size in points."""
    classes = report.task.classes
    size = 9.0 if len(classes) <= _MOST_WRITTEN else 6.5
    longest = 22 if _FEW_CLASSES < len(classes) <= _MOST_WRITTEN else 30  # where cells are large, or letters small
    return [cut(name, longest) for name in classes], size


def _detail(axes: Any, report: Report, detail: Detail) -> None:
    title = f"{cut(detail.row, _LONGEST_NAME)} on {detail.on}, seed {detail.seed}"
    style = {"weight": "bold", "size": 12, "parse_math": False}
    axes.annotate(title, (0, 1), (0, 10), "axes fraction", "offset points", **style)
    if detail.confusion is not None:
        _confusion(axes, report, detail)
    else:
        _scatter(axes, report, detail)


def _confusion(axes: Any, report: Report, detail: Detail) -> None:
    """Draw the shares of each true class, as percent if there is room."""
    from matplotlib.colors import LinearSegmentedColormap

    assert detail.confusion is not None
    counts = detail.confusion.astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    colours = LinearSegmentedColormap.from_list("shares", ("#ffffff", FAINT, LINE)).with_extremes(bad=GRID)
    axes.imshow(share, cmap=colours, vmin=0, vmax=1, interpolation="none")
    names, size = _classes(report)
    axes.set_yticks(range(len(names)), names, size=size, color=INK)
    axes.set_xticks(range(len(names)), names, size=size, color=INK, rotation=90 if max(map(len, names)) > 3 else 0)
    _without_formulas([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set(visible=True, color=GRID)
    axes.set_ylabel("true class", size=9.5)
    label = "predicted class, % of the true one" if len(names) <= _MOST_WRITTEN else "predicted class"
    axes.set_xlabel(label if totals.all() else f"{label}\ngrey: a class without targets", size=9.5)
    if len(names) <= _MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(share):
            if value > 0:
                ink = "white" if value > _DARK else INK
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size=size, color=ink)


def _scatter(axes: Any, report: Report, detail: Detail) -> None:
    """Draw predicted against measured values on the same scale; of very many, an even selection."""
    assert detail.pairs is not None
    pairs = detail.pairs[np.isfinite(detail.pairs).all(axis=1)]
    every = -(-len(pairs) // _MOST_POINTS)
    shown = pairs[::every]
    low, high = float(pairs.min()), float(pairs.max())
    margin = 0.04 * (high - low or 1.0)
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=MARK, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.scatter(*shown.T, s=float(np.clip(6000 / len(shown), 4, 22)), color=LINE, alpha=0.35, linewidths=0)
    axes.set(xlim=limits, ylim=limits)
    name = cut(report.task.name.replace("_", " "), _LONGEST_NAME)
    part = f" ({len(shown):,} of {len(pairs):,} shown)" if every > 1 else ""
    axes.set_xlabel(f"{name}, measured{part}", parse_math=False)
    axes.set_ylabel(f"{name}, predicted", parse_math=False)
    axes.xaxis.set_major_formatter(_TICKS)
    axes.yaxis.set_major_formatter(_TICKS)
    axes.locator_params(nbins=5)
    axes.grid(True)


def _without_formulas(labels: Any) -> None:
    """Turn off formulas in names with dollar signs."""
    for label in labels:
        label.set_parse_math(False)
