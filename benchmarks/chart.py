"""Chart of the table: our speedup over each other side, by benchmark, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks.comparison import Measured
from benchmarks.report import figure, titled
from benchmarks.table import Entry, Table
from bionemo_esm.plotting import GRID, INK, LINE, MARK, MUTED, WIDTH, styled, write_png

_BAR, _GAP, _TOP, _BOTTOM = 0.285, 0.2, 1.6, 0.15  # inches: bar, gap between two benchmarks, margins
_MARGIN, _LEFT, _NAMES = 0.25, 3.75, 4.35  # inches: left edge of titles, left edge of the axis, space for names
_FURTHEST = 1000.0  # end of the axis, as a ratio: longer bars are cut here and labelled with their ratio
_LONGEST, _LINE = 44, 35  # characters: name of a side, line of a title
_MOST_SIDES = 2  # per benchmark: the side with our smallest speedup, then sides with a target, then the next smallest


def draw(table: Table, path: Path) -> Path:
    """Write a PNG to `path` atomically, replacing it. Equal tables give equal bytes."""
    from matplotlib.figure import Figure

    groups = [(entry, sides) for entry in table.entries.values() if (sides := shown(entry))]
    inside = max(sum(_height(entry, sides) for entry, sides in groups), 1.0)
    height = _TOP + inside + _BOTTOM
    with styled(**{"axes.grid": False, "font.size": 12}):
        figure_ = Figure(figsize=(WIDTH, height))
        figure_.text(_MARGIN / WIDTH, 1 - 0.45 / height, "Side by side with what people use", size=20, weight="bold")
        said = "ours is so many times as fast: medians and ranges of alternated turns; all sides are in the table"
        said = "A QUICK RUN, which says nothing of speed" if table.quick else said
        figure_.text(_MARGIN / WIDTH, 1 - 0.78 / height, said, size=12.5, color=MUTED)
        where = "; ".join(_machine(table.machines[name]) for name in dict.fromkeys(e.machine for e, _ in groups))
        figure_.text(_MARGIN / WIDTH, 1 - 1.08 / height, where, size=12.5, color=MUTED, parse_math=False)
        box = (_LEFT / WIDTH, _BOTTOM / height, (WIDTH - _LEFT - _NAMES) / WIDTH, inside / height)
        axes = figure_.add_axes(box)
        _bars(axes, groups, inside)
        return write_png(figure_, path)


def shown(entry: Entry) -> list[Measured]:
    """Return at most `_MOST_SIDES` valid sides of a row to draw, in ascending order of our speedup."""
    others = sorted((side for side in entry.result.sides if side.ratio is not None and side.counts), key=_ratio)
    wanted = {target.side for target in entry.result.row.targets}
    by_interest = others[:1] + sorted(others[1:], key=lambda side: side.name not in wanted)
    return sorted(by_interest[:_MOST_SIDES], key=_ratio)


def _ratio(side: Measured) -> float:
    assert side.ratio is not None
    return side.ratio[0]


def _machine(machine: Mapping[str, Any]) -> str:
    if machine["gpu"]:
        return str(machine["gpu"])
    threads = machine["threads"]
    return f"{machine['processor']}, {threads} thread{'s' if threads != 1 else ''}, no GPU"


def _lines(entry: Entry) -> list[str]:
    return wrap(titled(entry.result.row), _LINE)


def _height(entry: Entry, sides: Sequence[Measured]) -> float:
    """Height of a benchmark in inches: the larger of its title and its bars, plus the gap below."""
    return max(len(_lines(entry)), len(sides)) * _BAR + _GAP


def _bars(axes: Any, groups: Sequence[tuple[Entry, list[Measured]]], inside: float) -> None:
    """Draw the benchmarks from the top, with a bar for each side. Heights are in inches."""
    ends = [value for _, sides in groups for side in sides if side.ratio is not None for value in side.ratio]
    low, high = min([1.0, *ends]), min(max([2.0, *ends]), _FURTHEST)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(inside, 0)
    at = _GAP / 2
    for entry, sides in groups:
        for place, line in enumerate(_lines(entry)):
            where = (
                (0, at + (place + 0.5) * _BAR),
                ((_MARGIN - _LEFT) * 72, 0),
                ("axes fraction", "data"),
                "offset points",
            )
            axes.annotate(line, *where, va="center", weight="bold", parse_math=False, annotation_clip=False)
        for place, side in enumerate(sides):
            _bar(axes, side, at + (place + 0.5) * _BAR)
        at += _height(entry, sides)
    _grid(axes, low, high)


def _grid(axes: Any, low: float, high: float) -> None:
    """Draw the grid: powers of ten, with labels at the top."""
    values = [10.0**power for power in range(-6, 7) if power == 0 or low <= 10.0**power <= high]
    axes.set_xticks(values, [f"{value:,g}×" for value in values])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.grid(axis="x", color=GRID)
    axes.axvline(1, color=MUTED, linewidth=1.0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _bar(axes: Any, side: Measured, at: float) -> None:
    """Draw a bar from 1 to the ratio (to the left if the other side is faster), the ratio and the side's name."""
    assert side.ratio is not None
    ratio, least, most = side.ratio
    colour = LINE if ratio >= 1 else MARK
    axes.barh(at, min(ratio, _FURTHEST) - 1, left=1, height=0.76 * _BAR, color=colour, linewidth=0)
    if most <= _FURTHEST:
        axes.plot([least, most], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt", clip_on=False)
    else:
        axes.plot([_FURTHEST], [at], marker=5, markersize=11, color=colour, clip_on=False)  # marks a cut bar
        most = 1.25 * _FURTHEST
    style = {"textcoords": "offset points", "va": "center", "parse_math": False, "annotation_clip": False}
    value = axes.annotate(f"{figure(ratio)}×", (max(most, 1), at), (7, 0), weight="bold", color=colour, **style)
    name = side.name if len(side.name) <= _LONGEST else f"{side.name[: _LONGEST - 1]}…"
    axes.annotate(name, (1, 0), (6, 0), xycoords=value, color=INK, **style | {"va": "bottom"})
