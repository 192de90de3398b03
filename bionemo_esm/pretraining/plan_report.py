"""A plan as a person reads it: aligned lines, the picture's path, and what to look at.

The learning rate of a plan as a picture: over the whole schedule, with the part that this run does.
"""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from bionemo_esm.console import Console, duration
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import COSINE
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.plotting import FAINT, INK, LINE, MARK, MUTED, WIDTH, styled, write_png
from bionemo_esm.pretraining.plan import PFLOP_DAY, Plan, gather_facts, plan_of, scientific
from bionemo_esm.pretraining.plan_checks import findings
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.report import LOOK
from bionemo_esm.pretraining.run_context import describe_model, make_folder, short

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


_LINE, _LABEL = 118, 11
_PRECISIONS = {"bf16": "bfloat16 with float32 masters", "32": "float32"}


def show_plan(recipe: Recipe) -> None:
    """Print the plan of a recipe and leave the picture of its learning rate beside the run's folder.

    Nothing else is written. Raises `ConfigError` where there is nothing to plan with.
    """
    plan = plan_of(recipe, gather_facts(recipe))
    folder = recipe.run_folder
    picture = folder.with_name(f"{folder.name}-plan.png")
    make_folder(picture.parent)
    try:
        write_picture(plan, picture)
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {picture} cannot be written ({error.strerror}); choose another place"
        ) from error
    Console(sys.stdout).print_line(
        f"{screen_of(plan)}\n  {'picture':<{_LABEL - 2}}{short(picture.absolute())}\n\n{look_at(plan)}"
    )


def screen_of(plan: Plan) -> str:
    """The whole plan but for the picture and what to look at."""
    rows = {
        "model": _model(plan),
        "data": _data(plan),
        "devices": _devices(plan),
        "batch": _batch(plan),
        "steps": _steps(plan),
        "memory": _memory(plan),
        "work": _work(plan),
        "time": _time(plan),
        "disk": _disk(plan),
        "rate": _rate(plan),
    }
    lines = [line for label, text in rows.items() for line in _row(label, text)]
    return "\n".join([f"\n{plan.recipe.name}: a plan; nothing is started", *lines])


def look_at(plan: Plan) -> str:
    """What does not fit together, a paragraph each."""
    found = findings(plan)
    if not found:
        return "Nothing in it contradicts itself or the recipe's source."
    return "\n".join(["look at", *(_item(text) for text in found)])


def _item(text: str) -> str:
    return textwrap.fill(text, _LINE, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _row(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _LINE - _LABEL, break_on_hyphens=False, break_long_words=False)
    return [f"  {label if not number else '':<{_LABEL - 2}}{line}" for number, line in enumerate(wrapped)]


def _model(plan: Plan) -> str:
    model = plan.recipe.model
    return (
        f"{describe_model(plan.recipe)}, {model.parameters:,} parameters, up to {model.seq_length} tokens; "
        f"{_PRECISIONS[plan.precision]}"
    )


def _data(plan: Plan) -> str:
    data = plan.facts.data
    held_out = "" if data.validation_sequences is None else f"; {data.validation_sequences:,} to validate on"
    return (
        f"{data.train_sequences:,} sequences an epoch, {data.mean_tokens:,.1f} tokens each on average, cropped "
        f"({data.source}){held_out}"
    )


def _devices(plan: Plan) -> str:
    trainer, device, published = plan.recipe.trainer, plan.facts.device, plan.recipe.published
    nodes = f": {trainer.num_nodes} nodes x {trainer.devices}" if trainer.num_nodes > 1 else ""
    text = f"{trainer.world_size} x {device.name} ({device.source}){nodes}"
    if (split := trainer.tensor_model_parallel_size) > 1:
        text += f"; {split} hold a copy of the model together, {trainer.data_parallel_size} copies"
    if published is not None and trainer.world_size != published.gpus:
        same = "" if plan.recipe.departure() else ", which does not matter while the global batch is the same"
        text += f"; the source had {published.gpus}{same}"
    return text


def _batch(plan: Plan) -> str:
    recipe, batch = plan.recipe, plan.batch
    by_tokens = recipe.data.global_batch_tokens
    whole = (
        f"{batch.sequences:,.0f} sequences, about {batch.tokens:,.0f} tokens"
        if by_tokens is None
        else f"up to {by_tokens:,} tokens, about {batch.sequences:,.0f} sequences"
    )
    most = recipe.data.micro_batch_tokens
    micro = f"{recipe.data.micro_batch_size:,} sequences" if most is None else f"at most {most:,} tokens"
    accumulated = "1 micro batch" if batch.accumulation == 1 else f"{batch.accumulation:,.0f} micro batches"
    ranks = f"{recipe.trainer.data_parallel_size:,} ranks x " if recipe.trainer.data_parallel_size > 1 else ""
    same = "" if recipe.published is None or recipe.departure() else "; the published batch"
    return f"{whole} = {ranks}{accumulated} of {micro} (about {batch.micro_tokens:,.0f} tokens){same}"


def _steps(plan: Plan) -> str:
    start, text = plan.facts.start, f"{plan.steps:,}"
    if start.step:
        text += f", after the first {start.step:,} ({start.source}), {plan.recipe.trainer.max_steps:,} in all"
    text += (
        f": {plan.epochs:,.1f} epochs of {_number(plan.steps_per_epoch)} steps; {_count(plan.samples)} sequences, "
        f"{_count(plan.tokens)} tokens"
    )
    if start.step and start.samples is not None:
        whole = (start.samples + plan.samples) / plan.facts.data.train_sequences
        text += f"; {whole:,.1f} epochs with those before"
    return text


def _memory(plan: Plan) -> str:
    memory, most, capacity = plan.memory, plan.most_memory.total, plan.facts.device.memory_bytes
    owner = "process" if plan.recipe.trainer.accelerator == "cpu" else "GPU"
    parts = [(name, getattr(memory, name)) for name in ("parameters", "masters", "gradients", "moments", "activations")]
    text = _size(memory.total) + (f" of {_size(capacity)}" if capacity is not None else "") + f" a {owner}"
    text += ": " + ", ".join(f"{name} {_size(value)}" for name, value in parts if value)
    if most > 1.05 * memory.total:
        text += f"; {_size(most)} with a micro batch as large as can be"
    return text + ("" if owner == "process" else "; and 1 or 2 GB for CUDA itself")


def _work(plan: Plan) -> str:
    days = plan.flops / PFLOP_DAY
    return f"{scientific(plan.flops)} FLOPs" + (f", {_number(days)} PFLOP-days" if days >= 0.01 else "")


def _time(plan: Plan) -> str:
    device, seconds = plan.facts.device, plan.device_seconds
    if device.name == "CPU":
        return "not known for a CPU before it runs: the first lines of a run say how long it will take"
    peak = device.peak(plan.precision)
    if peak is None:
        return f"not known: no peak is on record for {device.name} in {_PRECISIONS[plan.precision].split()[0]}"
    tera = f"{peak / 1e12:,.4g} TFLOP/s"
    if seconds is None or plan.wall_seconds is None or plan.recipe.published is None:
        least = plan.flops / peak
        return f"at least {_number(least / 3600)} GPU hours, at the peak of {tera}; a third of that is common"
    return (
        f"{_number(seconds / 3600)} GPU hours, {duration(plan.wall_seconds)} in all, if "
        f"{plan.recipe.published.mfu:.0%} of {tera} is reached (assumed): {plan.tokens_per_second_and_device:,.0f} "
        "tokens/s a GPU"
    )


def _disk(plan: Plan) -> str:
    saving, storage = plan.recipe.exp_manager.checkpoints, plan.storage
    plural, best = "s" * (storage.checkpoints > 1), ", and the best" if saving.keep_best else ""
    text = (
        f"{storage.checkpoints:,} checkpoint{plural} of {_size(storage.checkpoint_bytes)}, one every "
        f"{saving.every_n_train_steps:,} steps; {saving.keep_last} stay{best}"
    )
    if (averaged := storage.kept_snapshots - 1) > 1:
        text += f"; the weights of the last {averaged}, {_size(storage.weights_bytes)} each, for the average"
    return f"{text}. {_size(storage.written_bytes)} written in all, {_size(storage.peak_bytes)} at most at a time"


def _rate(plan: Plan) -> str:
    return "; ".join(f"{scientific(rate)} {words}" for _, rate, words in key_rates(plan))


def key_rates(plan: Plan) -> list[tuple[int, float, str]]:
    """Step, learning rate and words for the turns of the schedule from this run's first step on, in order of steps."""
    optim, first, last = plan.recipe.optim, plan.facts.start.step, plan.recipe.trainer.max_steps
    turns = {first: "at first", optim.warmup_steps: f"at its peak (step {optim.warmup_steps:,})"}
    if optim.schedule == COSINE:
        lowest = optim.max_steps - optim.constant_steps
        turns[lowest] = f"from step {lowest:,} on"
    turns |= {step: f"{words}, after this run" for step, words in turns.items() if step > last}
    turns[last] = f"at the end (step {last:,})"
    return [(step, learning_rate(optim, step), turns[step]) for step in sorted(turns) if step >= first]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else scientific(number)


def _number(value: float) -> str:
    """Three digits that count, with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: float) -> str:
    """Bytes in the unit that suits them."""
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3)
    )
    return f"{_number(value / size)} {unit}"
