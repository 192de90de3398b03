"""The learning rate of a plan as a picture: over the whole schedule, with the part that this run does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from bionemo_esm.drawing import FAINT, INK, LINE, MARK, MUTED, WIDTH, styled, write_png
from bionemo_esm.model.config import COSINE
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.training.planning.plan import Plan, scientific
from bionemo_esm.training.report import LOOK

_HEIGHT, _BOTTOM, _TOP = 5.5, 0.75, 1.9  # of the figure, below and above the curve; inches
_POINTS = 2_000
_VISIBLE, _ROOM = 0.03, 0.15  # of the width: under one a warm-up gets an inset, under the other a run no epochs


def write_picture(plan: Plan, path: Path) -> None:
    """Draw the plan's learning rate as a PNG. The file is there in whole or not at all; equal plans, equal bytes."""
    with styled(**LOOK):
        write_png(_draw(plan), path)


def _draw(plan: Plan) -> Figure:
    recipe, optim = plan.recipe, plan.recipe.optim
    first, last = plan.facts.start.step, recipe.trainer.max_steps
    end = max(last, optim.max_steps) if optim.schedule == COSINE else last
    scale = 10.0 ** math.floor(math.log10(optim.lr))
    figure = Figure(figsize=(WIDTH, _HEIGHT))
    axes = figure.add_axes((0.06, _BOTTOM / _HEIGHT, 0.88, (_HEIGHT - _BOTTOM - _TOP) / _HEIGHT))
    axes.set_xlim(0, end)
    axes.set_ylim(0, optim.lr / scale * 1.12)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    known = plan.facts.start.learning_rate
    same = known is None or math.isclose(known, learning_rate(optim, first), rel_tol=0.01)
    _curve(axes, plan, (0 if same else first, end), scale)  # of another schedule before this run nothing is known
    _phases(axes, plan, end)
    _epochs(axes, plan)
    if first < optim.warmup_steps < _VISIBLE * end:
        _warm_up(axes, plan, scale)
    unit = f"×10{str(round(math.log10(scale))).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    figure.text(0.06, 1 - 0.42 / _HEIGHT, recipe.name, size=16, weight="bold", parse_math=False)
    figure.text(0.06, 1 - 0.74 / _HEIGHT, _headline(plan), size=12, color=MUTED)
    figure.text(0.06, 1 - 1.2 / _HEIGHT, "Learning rate", size=12.5, weight="bold")
    figure.text(0.06 + 1.42 / WIDTH, 1 - 1.2 / _HEIGHT, unit, color=MUTED)
    return figure


def _headline(plan: Plan) -> str:
    start = plan.facts.start.step
    span = f"Steps {start:,} to {plan.recipe.trainer.max_steps:,}" if start else f"{plan.steps:,} steps"
    return f"{span}, {plan.epochs:,.1f} epochs of {plan.facts.data.train_sequences:,} sequences."


def _rates(plan: Plan, first: float, last: float, scale: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    optim = plan.recipe.optim
    steps = np.unique(np.append(np.linspace(first, last, _POINTS).astype(np.int64), np.int64(optim.warmup_steps)))
    steps = steps[(steps >= first) & (steps <= last)]
    return steps, np.array([learning_rate(optim, int(step)) for step in steps]) / scale


def _curve(axes: Any, plan: Plan, whole: tuple[int, int], scale: float) -> None:
    """Faint over the whole schedule, strong where this run is, with a point and the rate at either end of it."""
    first, last = plan.facts.start.step, plan.recipe.trainer.max_steps
    axes.plot(*_rates(plan, *whole, scale), color=FAINT, linewidth=2)
    axes.plot(*_rates(plan, first, last, scale), color=LINE, linewidth=2.4, solid_capstyle="round")
    optim = plan.recipe.optim
    for step in sorted({first, last, min(max(optim.warmup_steps, first), last)}):
        rate = learning_rate(optim, step)
        axes.plot([step], [rate / scale], "o", color=LINE, markersize=5.5, clip_on=False, zorder=5)
        if step >= min(optim.warmup_steps, last):
            near_end = step > 0.9 * axes.get_xlim()[1]
            axes.annotate(
                scientific(rate),
                (step, rate / scale),
                (-2 if near_end else 8, 7),
                textcoords="offset points",
                ha="right" if near_end else "left",
                color=LINE,
                weight="bold",
            )


def _phases(axes: Any, plan: Plan, end: int) -> None:
    """This run's part in colour, with names for it and for what lies before and after it."""
    first, last, published = plan.facts.start.step, plan.recipe.trainer.max_steps, plan.recipe.published
    if (first, last) == (0, end):
        return
    axes.axvspan(first, last, color=FAINT, alpha=0.28, linewidth=0)
    before = published.continues if published and published.continues else "the run before"
    after = plan.facts.next_recipe or "no run"
    style = {"va": "bottom", "ha": "center", "textcoords": "offset points", "annotation_clip": False}
    for begin, finish, text, colour, weight in (
        (0, first, before, MUTED, "normal"),
        (first, last, "this run", INK, "bold"),
        (last, end, after, MUTED, "normal"),
    ):
        if finish - begin > 0.06 * end:
            axes.annotate(text, ((begin + finish) / 2, 0), (0, 6), color=colour, weight=weight, **style)
    for step in (first, last):
        if 0 < step < end:
            axes.axvline(step, color=MARK, linewidth=1.2, linestyle=(0, (5, 3)))


def _epochs(axes: Any, plan: Plan) -> None:
    """Epochs of this run on top, counted from its first step; not where there is no room for their numbers."""
    first, per_epoch = plan.facts.start.step, plan.steps_per_epoch
    if plan.steps < _ROOM * axes.get_xlim()[1]:
        return
    top = axes.secondary_xaxis("top", functions=(lambda s: (s - first) / per_epoch, lambda e: e * per_epoch + first))
    last = plan.epochs
    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, last) if 0 <= tick <= last * 1.0001]
    top.set_xticks(ticks)
    top.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, pad=2)
    middle, place = first + last * per_epoch / 2, axes.get_xaxis_transform()
    style = {"ha": "center", "textcoords": "offset points", "color": MUTED}
    axes.annotate("epochs of this run", (middle, 1), (0, 24), xycoords=place, **style)


def _warm_up(axes: Any, plan: Plan, scale: float) -> None:
    """The first steps, wide enough to be seen."""
    first, last, steps = plan.facts.start.step, plan.recipe.trainer.max_steps, plan.recipe.optim.warmup_steps
    inset = axes.inset_axes((0.73, 0.56, 0.26, 0.36))
    inset.set_facecolor("white")
    inset.plot(*_rates(plan, 0, 3 * steps, scale), color=FAINT, linewidth=1.7)
    inset.plot(*_rates(plan, first, min(3 * steps, last), scale), color=LINE, linewidth=2)
    inset.set_xlim(0, 3 * steps)
    inset.set_ylim(0, axes.get_ylim()[1])
    inset.set_xticks([0, steps, 2 * steps, 3 * steps])
    inset.set_yticks([])
    inset.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    inset.tick_params(labelsize=9)
    inset.set_title(f"warm-up, {steps:,} steps", size=10, color=MUTED, loc="left")
