"""Figures of inference: the heat map of a mutational scan, and predicted contacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, decode
from bionemo_esm.inference.contacts.prediction import Map
from bionemo_esm.inference.contacts.structures import Structure
from bionemo_esm.inference.variants.mutations import Variant, WildType
from bionemo_esm.plotting import DPI, FAINT, GRID, INK, LINE, MARK, MUTED, WIDTH, styled, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESIDUES = "GAVLIMFWYPSTNQHKRDEC"
"""From top to bottom, alike beside alike: small, aliphatic, aromatic, proline, polar, positive, negative, cysteine."""
MOST_POSITIONS = 2000
"""A longer scan has no picture: it would be taller than a screen by far."""
ENOUGH_COVERED = 0.2
"""Share of the single substitutions within the region that makes a picture of a list worth drawing."""
_ACROSS = 100  # positions beside one another, at most
_BAND, _TOP, _BOTTOM, _BETWEEN = 1.9, 0.85, 0.45, 0.55  # inches
_LEFT, _RIGHT = 0.035, 0.925  # share of the width
_FEWEST_ACROSS = 25  # positions a band has room for: of a few the cells are no wider than so
_CLIPPED = 98.0  # percentile of the absolute scores at which the colours end
_LONGEST_NAME = 60  # characters of a title's parts
_UNKNOWN = "#d8d8d8"
_COLOURS = (MARK, "#f0c8ab", "#ffffff", "#b5cde6", LINE)


def undrawable(variants: Sequence[Variant | None]) -> str:
    """Why there can be no picture of these variants; "" if there can."""
    places = [variant[0].place for variant in variants if variant is not None and len(variant) == 1]
    if not places:
        return "it shows single mutants, and there is none"
    positions = max(places) - min(places) + 1
    if positions > MOST_POSITIONS:
        return f"it shows {MOST_POSITIONS:,} positions at most, and these span {positions:,}"
    return ""


def grid_of(variants: Sequence[Variant | None], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Scores of the single mutants as [20, P], NaN where there is none, and the place of the first of the P positions,
    which reach from the first mutated one to the last. Of a mutant met twice the first score counts.
    """
    assert not undrawable(variants)
    rows = {TOKEN_IDS[letter]: row for row, letter in enumerate(RESIDUES)}
    single = [(v[0], value) for v, value in zip(variants, scores, strict=True) if v is not None and len(v) == 1]
    first = min(one.place for one, _ in single)
    grid = np.full((len(RESIDUES), max(one.place for one, _ in single) - first + 1), np.nan)
    for one, value in reversed(single):
        if one.mutant in rows:
            grid[rows[one.mutant], one.place - first] = value
    return grid, first


def covered(grid: NDArray[np.float64]) -> float:
    """The share of single substitutions that a grid has."""
    return float(np.mean(~np.isnan(grid))) * len(RESIDUES) / (len(RESIDUES) - 1)


def draw_heat_map(
    wild_type: WildType, grid: NDArray[np.float64], first: int, method: str, stream: IO[bytes], model: str = ""
) -> None:
    """A PNG of a grid, whose title names the method and the model's file; the same bytes for the same grid.

    Colours end where 98% of the absolute scores do, so that a few outliers do not leave the others pale.
    """
    from matplotlib.figure import Figure

    positions = grid.shape[1]
    bands = -(-positions // _ACROSS)
    across = max(positions, _FEWEST_ACROSS) if bands == 1 else -(-positions // bands // 10) * 10
    height = _TOP + bands * _BAND + (bands - 1) * _BETWEEN + _BOTTOM
    limit = float(np.nanpercentile(np.abs(grid), _CLIPPED)) or 1.0
    with styled(**{"axes.spines.left": False, "axes.spines.bottom": False, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, height))
        title = f"{_cut(wild_type.name)}: {method}{f' by {_cut(model)}' if model else ''}"
        figure.text(_LEFT, 1 - 0.3 / height, title, size=14, weight="bold", parse_math=False)
        said = "log-odds of each residue against the wild type's, which is dotted; grey: no score"
        figure.text(_LEFT, 1 - 0.52 / height, said, size=9.5, color=MUTED, parse_math=False)
        for band in range(bands):
            begin = band * across
            some = grid[:, begin : begin + across]
            bottom = height - _TOP - (band + 1) * _BAND - band * _BETWEEN
            width = (_RIGHT - _LEFT) * some.shape[1] / across
            axes = figure.add_axes((_LEFT, bottom / height, width, _BAND / height))
            mesh = _band(axes, wild_type, some, first + begin, limit)
        tall = _BAND / height
        right = _LEFT + (_RIGHT - _LEFT) * min(positions / across, 1.0)
        bar = figure.add_axes((right + 0.012, 1 - _TOP / height - tall, 0.010, tall))
        colours = figure.colorbar(mesh, cax=bar, extend="both")
        colours.ax.tick_params(labelsize=8, length=2)
        colours.set_label("log-odds (nats)", size=8)
        _save(figure, stream)


def _band(axes: Any, wild_type: WildType, grid: NDArray[np.float64], first: int, limit: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("effects", _COLOURS).with_extremes(bad=_UNKNOWN)
    letters = decode(wild_type.tokens[first : first + grid.shape[1]])
    places = [(place, RESIDUES.index(letter)) for place, letter in enumerate(letters) if letter in RESIDUES]
    shown = grid.copy()
    for place, row in places:
        shown[row, place] = 0.0
    mesh = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    size = min(8.0, 300 / len(letters))  # points; letters of neighbours must not touch
    if places:
        axes.scatter(*zip(*places, strict=True), s=min(9.0, size * 1.1), color=INK, linewidths=0)
    axes.set_yticks(range(len(RESIDUES)), list(RESIDUES), size=5.5)
    numbers = np.arange(len(letters)) + first + wild_type.offset
    told = np.flatnonzero((numbers % 10 == 0) | (numbers == numbers[0]) & (numbers % 10 < 7))
    axes.set_xticks(told, [str(numbers[index]) for index in told], size=7.5)
    axes.tick_params(length=2, pad=2)
    for place, letter in enumerate(letters):
        axes.text(place, -0.75, letter, size=max(size, 5.5), ha="center", va="bottom", color=MUTED)
    return mesh


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _save(figure: Figure, stream: IO[bytes]) -> None:
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


_INCHES = 7.5
_LONGEST_TITLE = 60  # characters of an id


def draw_contacts(
    path: Path, name: str, found_RR: Map, separation: int, structure: Structure | None = None, below: float = 8.0
) -> Path:
    """A PNG: above the diagonal what is predicted; below it the true contacts, or the same again where they are not
    known. Pairs under `separation` apart are left blank, those that nothing is known of grey. The darkest shade is the
    highest probability there is: the picture of an unsure model shows where it leans to, and its scale how little.
    """
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.figure import Figure

    places = np.arange(len(found_RR))
    apart_RR = places[None, :] - places[:, None]
    shown_RR = (np.abs(apart_RR) if structure is None else apart_RR) >= separation
    ends = (0.5, len(found_RR) + 0.5, len(found_RR) + 0.5, 0.5)  # numbers of residues, the first on top
    with styled(**{"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(_INCHES, _INCHES * 0.92), layout="constrained")
        axes = figure.add_subplot()
        blues = LinearSegmentedColormap.from_list("contacts", ["white", FAINT, LINE, INK])
        how: dict[str, Any] = {"extent": ends, "interpolation": "nearest"}
        highest = max(float(np.nanmax(found_RR, where=shown_RR, initial=0.0)), 1e-6)
        image = axes.imshow(np.where(shown_RR, found_RR, np.nan), cmap=blues, vmin=0, vmax=highest, **how)
        unknown_RR = np.isnan(found_RR) & shown_RR
        resolved = np.ones(len(found_RR), dtype=bool) if structure is None else structure.resolved
        if structure is not None:
            true_RR = structure.contacts(below) & (apart_RR <= -separation)
            axes.imshow(_only(true_RR), cmap=ListedColormap([MARK]), **how)
            unknown_RR |= ~(resolved[:, None] & resolved[None, :]) & (apart_RR <= -separation)
        axes.imshow(_only(unknown_RR), cmap=ListedColormap([GRID]), **how)
        label = f"predicted probability of contact, {highest:.2g} at most"
        figure.colorbar(image, ax=axes, label=label, shrink=0.8)
        axes.set(xlabel="residue", ylabel="residue")
        axes.set_title(name if len(name) <= _LONGEST_TITLE else name[: _LONGEST_TITLE - 1] + "…", loc="left")
        grey = ["never seen together in a window"] * bool((np.isnan(found_RR) & shown_RR).any())
        told = []
        if structure is not None:
            told.append(f"above: predicted; below: true, nearer than {below:g} Å")
            grey += ["not resolved (below)"] * (not resolved.all())
        if grey:
            told.append(f"grey: {', '.join(grey)}")
        if told:
            axes.text(
                1, 1.01, "\n".join(told), ha="right", va="bottom", transform=axes.transAxes, fontsize=8.5, color=MUTED
            )
        return write_png(figure, path)


def _only(chosen_RR: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 where chosen, nothing elsewhere."""
    return np.where(chosen_RR, 1.0, np.nan)
