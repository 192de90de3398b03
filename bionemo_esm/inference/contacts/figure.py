"""A picture of predicted contacts, with the true ones in its other half where they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.inference.contacts.prediction import Map
from bionemo_esm.inference.contacts.structures import Structure
from bionemo_esm.plotting import FAINT, GRID, INK, LINE, MARK, MUTED, styled, write_png

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
