"""The figure of a fine-tuning report: contrast, axis labels and layout."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bionemo_esm.finetuning import report_figure as picture
from bionemo_esm.finetuning.metrics import Estimate
from bionemo_esm.finetuning.report import TEST, VALIDATION, Detail, Report, Row
from bionemo_esm.finetuning.tasks import METRICS, Task

NAMES = ("Cell.membrane", "Endoplasmic.reticulum", "Nucleus", "Plastid", "Cytoplasm", "Golgi.apparatus")
CLASSES = Task(name="places", level="sequence", kind="classification", metric="accuracy", classes=NAMES)
NUMBERS = Task(name="melting_point", level="sequence", kind="regression", metric="mse")


def report_of(task: Task, detail: Detail | None, rows: int = 1) -> Report:
    of = dict.fromkeys(METRICS[task.kind], Estimate(0.5, 0.4, 0.6))
    values = {name: estimate.value for name, estimate in of.items()}
    return Report(task, {}, [Row(f"row {at}", "", [values], of, of) for at in range(rows)], detail=detail)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that draws a report and returns the laid-out figure."""

    def draw(report: Report) -> Any:
        monkeypatch.setattr(picture, "write_png", lambda figure, path: figure)  # draw returns the figure
        figure: Any = picture.draw(report, Path("unused.png"))
        figure.draw_without_rendering()
        return figure

    return draw


def brightness(colour: Any) -> float:
    """Return the relative luminance (WCAG 2.1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_cell_numbers_have_contrast_on_every_blue_and_grey_is_explained(drawn: Any) -> None:
    labels = []
    for share in range(2, 100, 8):
        counts = np.zeros((6, 6), dtype=np.int64)
        counts[0, :2] = share, 100 - share
        axes = drawn(report_of(CLASSES, Detail("row 0", TEST, 1, confusion=counts))).axes[1]
        image = axes.images[0]
        for text in axes.texts[1:]:
            column, row = map(int, text.get_position())
            pair = sorted(brightness(of) for of in (text.get_color(), image.cmap(counts[row, column] / 100)[:3]))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > 3.5, (share, text.get_text())
        labels.append(axes.get_xlabel())
        assert axes.get_yticklabels()[1].get_text() == "Endoplasmic.reticulum"
    assert all("grey: a class without targets" in label for label in labels)
    whole = drawn(report_of(CLASSES, Detail("row 0", TEST, 1, confusion=np.eye(6, dtype=np.int64))))
    assert "grey" not in whole.axes[1].get_xlabel()


@pytest.mark.parametrize("size", [1.0, 1e38], ids=["usual", "huge"])
def test_regression_axes_have_labels_without_offset_text_or_overlap(drawn: Any, size: float) -> None:
    pairs = np.array([[1, 2], [3, -1], [0, 0.1]]) * size
    figure = drawn(report_of(NUMBERS, Detail("row 0", TEST, 1, pairs=pairs), rows=3))
    axes = figure.axes[1]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("melting point, measured", "melting point, predicted")
    for one in figure.axes:
        assert not one.xaxis.get_offset_text().get_text()
        assert not one.yaxis.get_offset_text().get_text()
        boxes = [label.get_window_extent() for label in one.get_xticklabels()]
        for left, right in pairwise(boxes):
            assert left.x1 < right.x0


def test_a_single_row_gives_a_low_panel(drawn: Any) -> None:
    detail = Detail("row 0", TEST, 1, pairs=np.array([[1.0, 2.0], [3.0, 1.0]]))
    heights = []
    for rows in (1, 4):
        figure = drawn(report_of(NUMBERS, detail, rows))
        heights.append([axes.get_position().height * figure.get_figheight() for axes in figure.axes])
    (low, square), (high, same) = heights
    assert low < 1.6 < 3 < high
    assert square == pytest.approx(same)


def test_without_a_test_set_validation_is_drawn_and_labelled(drawn: Any) -> None:
    report = report_of(NUMBERS, None)
    rows = [dataclasses.replace(row, test=None) for row in report.rows]
    assert "validation; there is no test set" in [
        text.get_text() for text in drawn(dataclasses.replace(report, rows=rows)).axes[0].texts
    ]
    assert VALIDATION not in [text.get_text() for text in drawn(report).axes[0].texts]
