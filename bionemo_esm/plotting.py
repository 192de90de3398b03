"""One look for all pictures, and the same bytes for the same picture. matplotlib is imported when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI, WIDTH = 130, 1500 / 130  # the latter in inches
INK, MUTED, GRID = "#1d2733", "#5f6b7a", "#e6e9ee"
LINE, FAINT, MARK, FAINT_MARK = "#1b62a5", "#b5cde6", "#b8500f", "#f0c8ab"
STYLE: dict[str, Any] = {
    **{"font.family": ["DejaVu Sans"], "font.size": 10.5, "text.color": INK},  # comes with matplotlib: same everywhere
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": GRID},
}


@contextmanager
def styled(**changes: Any) -> Iterator[None]:
    """Draw within: `STYLE` and `changes` (keys of matplotlib's rcParams), whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | changes)
        yield


def write_png(figure: Figure, path: Path) -> Path:
    """Save a figure, drawn within `styled`, whole or not at all, over what is at `path`; the path."""
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path
