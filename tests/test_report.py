"""The report of a run: its text, its plots, and atomic writes."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from bionemo_esm.pretraining import report
from bionemo_esm.pretraining.report import write_report

SUMMARY = {
    "name": "esm1nv_2m on the sample",
    "model": "4 layers, hidden 256, 4 heads",
    "parameters": 3217408,
    "train_sequences": 5400,
    "global_batch_size": 64,
    "steps": 400,
    "validation_perplexity": 15.9123,
    "unigram_perplexity": 17.7004,
    "masked_accuracy": 0.1343,
    "fused_backends": [],
    "seed": 42,
    "seconds": 4870.2,
    "residues_per_second": 9812.3,
    "nemo": "runs/esm1nv_2m/esm1nv.nemo",
    "package_versions": {"torch": "2.10.0"},
}
INPUTS = {"metrics.jsonl", "summary.json"}


def train_line(step: int, loss: float | None = 2.9, rate: float = 1e-4, speed: float = 9800.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": rate, "residues_per_second": speed}


def validation_line(step: int, perplexity: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "loss": math.log(perplexity), "perplexity": perplexity, "accuracy": 0.1}


def curve() -> list[dict[str, Any]]:
    lines = [train_line(step, 2.8 + math.exp(-step / 50), speed=9000.0 + step) for step in range(10, 410, 10)]
    return lines + [validation_line(step, 15.9 + math.exp(-step / 50)) for step in range(100, 500, 100)]


def put(folder: Path, lines: list[dict[str, Any]], **summary: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **summary}, indent=2))
    return folder


class Page(HTMLParser):
    """Text and tags of a page, and every attribute that a browser would fetch or execute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text, self.reaches_out = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("href", "src", "xlink:href") and not (value or "").startswith("#")):
                self.reaches_out.append((tag, name, value))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_report_writes_one_page_and_one_picture(tmp_path: Path) -> None:
    put(tmp_path, curve())
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == {*INPUTS, "report.html", "report.png"}


def test_page_states_results_settings_and_how_to_load_the_model(tmp_path: Path) -> None:
    lines = Page(page_of(put(tmp_path, curve()))).text
    text = " ".join(lines.split())
    assert (
        "Validation perplexity 15.9, against 17.7 for residue frequencies alone; 13.4% of masked residues named right."
        in text
    )
    for fact in ("3,217,408", "64 sequences", "4,870.2 s (1:21:10)", "9,812 residues/s", "torch 2.10.0", "13.43%"):
        assert fact in text
    assert "every chosen residue is shown as <mask> in validation" in text
    assert (
        'from bionemo_esm import ESM1nvModel\nmodel = ESM1nvModel.restore_from("runs/esm1nv_2m/esm1nv.nemo")' in lines
    )
    assert "residue frequencies (17.7)" in text  # in the SVG figure, which keeps text as text
    assert "9,205" in text, "the median of the throughput stands beside its curve"
    assert "peak 1" in text


def test_missing_summary_keys_leave_no_row(tmp_path: Path) -> None:
    text = Page(page_of(put(tmp_path, curve(), steps=None))).text
    assert "Epochs" not in text
    assert "Optimizer steps" not in text
    assert "None" not in text


def test_file_contents_are_escaped_in_html(tmp_path: Path) -> None:
    attack = '<script>alert("1")</script>'
    versions = {attack: attack}
    text = page_of(
        put(tmp_path, curve(), name=attack, command=attack, nemo=attack, model=attack, package_versions=versions)
    )
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count("<script>") == 8  # title, heading, command, file, its use, model, and two in the versions
    assert "&lt;script&gt;" in text


def test_page_is_self_contained(tmp_path: Path) -> None:
    text = page_of(put(tmp_path, curve()))
    page = Page(text)
    assert "svg" in page.tags
    assert page.reaches_out == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_figure_uses_the_colours_of_the_page(tmp_path: Path) -> None:
    text = page_of(put(tmp_path, curve()))
    figure = text[text.index("<svg") : text.index("</svg>")]
    used = set(re.findall(r"var\((--\w+)\)", figure))
    assert used == {"--ink", "--muted", "--grid", "--line", "--faint", "--mark"}
    dark = re.search(r"prefers-color-scheme: dark\) \{ :root \{(.*?)\}", text, re.DOTALL)
    assert dark is not None
    assert used <= set(re.findall(r"--\w+", dark[1]))
    assert not re.search(r"(fill|stroke): #", figure), "a colour that dark mode cannot change"


def test_picture_is_a_png_1500_pixels_wide(tmp_path: Path) -> None:
    write_report(put(tmp_path, curve()))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(tmp_path / "report.png")
    height, width = pixels.shape[:2]
    assert 1490 <= width <= 1510
    assert 0.5 < height / width < 0.8
    paper, ink = pixels[0, 0, :3], pixels[:, :, :3].reshape(-1, 3)
    assert paper.tolist() == [1.0, 1.0, 1.0]
    assert 0.01 < float(np.mean(ink.min(axis=1) < 0.9)) < 0.2


def test_equal_inputs_give_equal_bytes_under_any_matplotlib_settings(tmp_path: Path) -> None:
    first, second = put(tmp_path / "first", curve()), put(tmp_path / "second", curve())
    write_report(first)
    with matplotlib.rc_context({"axes.labelsize": 30, "xtick.major.size": 20, "savefig.transparent": True}):
        before = dict(matplotlib.rcParams)
        write_report(second)
        assert dict(matplotlib.rcParams) == before
    for name in ("report.html", "report.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="no lines"),
        pytest.param([train_line(10)], id="one point"),
        pytest.param([train_line(10, rate=0.0, speed=0.0)], id="all zero"),
        pytest.param([train_line(step, math.nan) for step in range(10, 60, 10)], id="never finite"),
        pytest.param([train_line(step, 1e300) for step in (10, 20)], id="diverged"),
        pytest.param([validation_line(100, 16.0)], id="validation alone"),
        pytest.param([{"kind": "train", "step": 1}, {"kind": "test", "step": "?"}], id="keys absent, a kind unknown"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_short_or_failed_runs_still_have_a_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    assert "</html>" in page_of(put(tmp_path, lines))


def test_nonfinite_losses_are_counted_and_the_rest_is_plotted(tmp_path: Path) -> None:
    lines = [train_line(10, math.nan), train_line(20, None), train_line(30, math.inf), train_line(40, 2.75)]
    text = Page(page_of(put(tmp_path, lines, validation_perplexity=None))).text
    assert "3 of 4 not finite" in text
    assert "Training loss 2.750 nats per masked residue at step 40; no validation." in text


def test_resumed_run_shows_the_last_values_of_each_step(tmp_path: Path) -> None:
    abandoned = [train_line(10), train_line(20, speed=1.0), train_line(30, 9.0, speed=1.0)]
    resumed = [train_line(20), train_line(30, 2.5)]
    folder = put(tmp_path, abandoned + resumed, validation_perplexity=None)
    text = Page(page_of(folder)).text
    assert "Training loss 2.500 nats per masked residue at step 30" in text
    assert "9,800" in text


def test_smoothing_keeps_the_first_value_and_skips_gaps() -> None:
    values = np.array([8.0, 4.0, np.nan, 2.0, 2.0, 5.0])
    assert report._smooth(values, 3) == pytest.approx([8.0, 6.0, 3.0, 2.0, 3.0, 3.5])
    assert report._smooth(values, 1) == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("summary.json", None, "summary.json"),
        ("metrics.jsonl", b'{"kind": "train", "step": 1}\n{"kind": "tra', "metrics.jsonl, line 2"),
        ("metrics.jsonl", b"\n[1]\n", "metrics.jsonl, line 2"),
        ("metrics.jsonl", b'{"kind": "train", "step": 1, "loss": "2.9"}\n', "metrics.jsonl, line 1: loss"),
        ("metrics.jsonl", b'{"kind": "validation", "perplexity": 9.0}\n', "metrics.jsonl, line 1: step"),
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl"),
        ("summary.json", b"", "summary.json"),
        ("summary.json", b"[]", "summary.json"),
        ("summary.json", b'{"validation_perplexity": true}', "summary.json: validation_perplexity"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = put(tmp_path, curve()) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / says))):
        write_report(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} <= INPUTS


def test_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, curve())
    write_report(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    put(tmp_path, curve(), name="another")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(old)
    assert all((tmp_path / name).read_bytes() == old[name] for name in ("report.html", "report.png"))
