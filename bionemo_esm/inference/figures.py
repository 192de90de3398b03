"""Figures of inference: the heat map of a mutational scan, and a map of predicted contacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import TOKEN_IDS, decode
from bionemo_esm.inference.contacts.structures import Structure
from bionemo_esm.inference.variants.mutations import Variant, WildType
from bionemo_esm.plotting import DPI, FAINT, FAINT_MARK, GRID, INK, LINE, MARK, MUTED, WIDTH, styled, write_png

# --- a mutational scan: a column for each position, a row for each mutant residue -------------------------------------

RESIDUES = "GAVLIMFWYPSTNQHKRDEC"
"""Rows from top to bottom: small, aliphatic, aromatic, proline, polar, positive, negative, cysteine."""
MOST_POSITIONS = 2000
"""Positions of the longest scan that is drawn."""
ENOUGH_COVERED = 0.2
"""Share of the single substitutions in its region that a list of variants needs for a figure."""
_POSITIONS_IN_BAND = 100  # at most
_NARROWEST_BAND = 25  # positions; limits the width of the cells
_BAND, _TOP, _BOTTOM, _BETWEEN = 1.9, 0.85, 0.45, 0.55  # inches
_LEFT, _RIGHT = 0.035, 0.925  # share of the width
_CLIPPED = 98.0  # percentile of the absolute scores at which the colours end
_LONGEST_NAME = 60  # characters of a title's parts
_UNKNOWN = "#d8d8d8"
_COLOURS = (MARK, FAINT_MARK, "#ffffff", FAINT, LINE)


def undrawable(variants: Sequence[Variant | None]) -> str:
    """Return why these variants cannot be drawn; "" if they can."""
    sites = [variant[0].site for variant in variants if variant is not None and len(variant) == 1]
    if not sites:
        return "it shows single mutants, and there is none"
    positions = max(sites) - min(sites) + 1
    if positions > MOST_POSITIONS:
        return f"it shows {MOST_POSITIONS:,} positions at most, and these span {positions:,}"
    return ""


def grid_of(variants: Sequence[Variant | None], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return scores of single mutants as [20, P], NaN where there is none, and the site of the first of the P
    positions.

    These span from the first to the last mutated site. Of a mutant that occurs twice the first score counts.
    """
    assert not undrawable(variants)
    rows = {TOKEN_IDS[letter]: row for row, letter in enumerate(RESIDUES)}
    single = [(v[0], value) for v, value in zip(variants, scores, strict=True) if v is not None and len(v) == 1]
    first = min(one.site for one, _ in single)
    grid = np.full((len(RESIDUES), max(one.site for one, _ in single) - first + 1), np.nan)
    for one, value in reversed(single):
        if one.mutant in rows:
            grid[rows[one.mutant], one.site - first] = value
    return grid, first


def covered(grid: NDArray[np.float64]) -> float:
    """Return the share of single substitutions that a grid contains."""
    return float(np.mean(~np.isnan(grid))) * len(RESIDUES) / (len(RESIDUES) - 1)


def draw_heat_map(
    wild_type: WildType, grid: NDArray[np.float64], first: int, method: str, stream: IO[bytes], model: str = ""
) -> None:
    """Write a grid as PNG; its title names the method and the model's file. The same grid gives the same bytes.

    Colours end at 98% of the absolute scores, so that outliers do not leave the others pale.
    """
    from matplotlib.figure import Figure

    positions = grid.shape[1]
    bands = -(-positions // _POSITIONS_IN_BAND)
    across = max(positions, _NARROWEST_BAND) if bands == 1 else -(-positions // bands // 10) * 10
    height = _TOP + bands * _BAND + (bands - 1) * _BETWEEN + _BOTTOM
    limit = float(np.nanpercentile(np.abs(grid), _CLIPPED)) or 1.0
    with styled(**{"axes.spines.left": False, "axes.spines.bottom": False, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, height))
        title = f"{_shortened(wild_type.name)}: {method}{f' by {_shortened(model)}' if model else ''}"
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
        figure.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def _band(axes: Any, wild_type: WildType, grid: NDArray[np.float64], first: int, limit: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("effects", _COLOURS).with_extremes(bad=_UNKNOWN)
    letters = decode(wild_type.tokens[first : first + grid.shape[1]])
    sites = [(site, RESIDUES.index(letter)) for site, letter in enumerate(letters) if letter in RESIDUES]
    shown = grid.copy()
    for site, row in sites:
        shown[row, site] = 0.0
    mesh = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    size = min(8.0, 300 / len(letters))  # points; letters of neighbours must not touch
    if sites:
        axes.scatter(*zip(*sites, strict=True), s=min(9.0, size * 1.1), color=INK, linewidths=0)
    axes.set_yticks(range(len(RESIDUES)), list(RESIDUES), size=5.5)
    numbers = np.arange(len(letters)) + first + wild_type.offset
    labelled = np.flatnonzero((numbers % 10 == 0) | (numbers == numbers[0]) & (numbers % 10 < 7))
    axes.set_xticks(labelled, [str(numbers[index]) for index in labelled], size=7.5)
    axes.tick_params(length=2, pad=2)
    for site, letter in enumerate(letters):
        axes.text(site, -0.75, letter, size=max(size, 5.5), ha="center", va="bottom", color=MUTED)
    return mesh


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


# --- predicted contacts -----------------------------------------------------------------------------------------------

_INCHES = 7.5
_MOST_PIXELS = 1000
"""Residues of the longest protein that is drawn pair by pair; a pixel of a longer one stands for a block of pairs."""


class _Pixels(NamedTuple):
    """The content of a contact map, block by block: [P, P] each."""

    probabilities: NDArray[np.float32]  # the highest of the block; NaN where nothing is shown or known
    unseen: NDArray[np.bool_]  # shown, but no window covers a pair of the block
    unresolved: NDArray[np.bool_]  # of the half with true contacts: no pair of the block is resolved
    touching: NDArray[np.bool_]  # of that half: a pair of the block is in contact


def draw_contacts(
    path: Path,
    name: str,
    found_RR: NDArray[np.float32],
    separation: int,
    structure: Structure | None = None,
    below: float = 8.0,
) -> Path:
    """Write a PNG with the predicted contacts above the diagonal and the true ones, or the predicted again, below it.

    Pairs under `separation` apart are blank, unknown ones grey. The darkest shade is the highest probability of the
    map. Over 1,000 residues a pixel shows the highest probability of a block of pairs. Memory: up to 75 MB, whatever
    the length.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba_array
    from matplotlib.figure import Figure

    block = -(-len(found_RR) // _MOST_PIXELS)
    pixels = _in_blocks(found_RR, separation, structure, below, block)
    ends = (0.5, len(found_RR) + 0.5, len(found_RR) + 0.5, 0.5)  # numbers of residues, the first on top
    with styled(**{"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(_INCHES, _INCHES * 0.92), layout="constrained")
        axes = figure.add_subplot()
        blues = LinearSegmentedColormap.from_list("contacts", ["white", FAINT, LINE, INK])
        known = ~np.isnan(pixels.probabilities)
        highest = max(float(np.max(pixels.probabilities, where=known, initial=0.0)), 1e-6)
        shades = ScalarMappable(Normalize(0, highest), blues)
        colours = shades.to_rgba(pixels.probabilities, bytes=True)  # one image of bytes: matplotlib copies floats
        colours[~known] = (255, 255, 255, 255)
        colours[pixels.touching] = to_rgba_array(MARK)[0] * 255
        colours[pixels.unseen | pixels.unresolved] = to_rgba_array(GRID)[0] * 255
        axes.imshow(colours, extent=ends, interpolation="nearest")
        label = f"predicted probability of contact, {highest:.2g} at most"
        figure.colorbar(shades, ax=axes, label=label, shrink=0.8)
        axes.set(xlabel="residue", ylabel="residue")
        axes.set_title(_shortened(name), loc="left")
        grey = ["never seen together in a window"] * bool(pixels.unseen.any())
        notes = []
        if structure is not None:
            notes.append(f"above: predicted; below: true, nearer than {below:g} Å")
            grey += ["not resolved (below)"] * (not structure.resolved.all())
        if block > 1:
            notes.append(f"a pixel: the highest of {block} x {block} pairs")
        if grey:
            notes.append(f"grey: {', '.join(grey)}")
        if notes:
            style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 8.5, "color": MUTED}
            axes.text(1, 1.01, "\n".join(notes), ha="right", va="bottom", **style)
        return write_png(figure, path)


def _in_blocks(
    found_RR: NDArray[np.float32], separation: int, structure: Structure | None, below: float, block: int
) -> _Pixels:
    """Reduce a map to blocks of `block` x `block` pairs, one row of blocks at a time."""
    residues = len(found_RR)
    starts, columns = np.arange(0, residues, block), np.arange(residues)
    rows: list[tuple[NDArray[Any], ...]] = []
    for begin in starts.tolist():
        part = slice(begin, begin + block)
        apart = columns[None, :] - columns[part, None]
        shown = (np.abs(apart) if structure is None else apart) >= separation
        highest = np.fmax.reduceat(np.fmax.reduce(np.where(shown, found_RR[part], np.float32(np.nan))), starts)
        any_shown = np.logical_or.reduceat(shown.any(axis=0), starts)
        unresolved = touching = np.zeros(len(starts), dtype=bool)
        if structure is not None:
            lower = apart <= -separation
            near = structure.distances_from(part) < below
            resolved = structure.resolved[part, None] & structure.resolved[None, :]
            touching = np.logical_or.reduceat((near & lower).any(axis=0), starts)
            any_lower = np.logical_or.reduceat(lower.any(axis=0), starts)
            unresolved = any_lower & ~np.logical_or.reduceat((resolved & lower).any(axis=0), starts)
        rows.append((highest, any_shown & np.isnan(highest), unresolved, touching))
    return _Pixels(*(np.array(column) for column in zip(*rows, strict=True)))
