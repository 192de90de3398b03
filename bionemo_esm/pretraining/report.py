"""The report of a run on one page: results, curves, settings, and how to use the model.

Inputs are `metrics.jsonl` and `summary.json` of the run directory. Equal inputs give equal bytes: no file has a date.
The HTML figure's colours come from the page's style sheet, so it follows the reader's light or dark mode.
"""

from __future__ import annotations

import html
import json
import math
import re
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from bionemo_esm.files import write_atomically
from bionemo_esm.plotting import DPI, FAINT, GRID, INK, LINE, MARK, MUTED, WIDTH, styled

FloatArray = NDArray[np.float64]  # one value per logged step; NaN if there is none, or if it is not finite

PANELS, HEADING = 6.3, 0.9  # inches
COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", LINE: "--line", FAINT: "--faint", MARK: "--mark"}
LOOK: dict[str, Any] = {
    **{"axes.facecolor": "none", "axes.grid": True, "ytick.major.size": 0},
    **{"svg.fonttype": "none", "svg.hashsalt": "bionemo_esm"},
}
LABEL: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "annotation_clip": False, "va": "center"}
LABEL |= {"color": LINE, "weight": "bold"}
# label | key in summary.json | format. Without a format: unchanged, over the whole width of the page.
FACTS = """
Validation perplexity | validation_perplexity | {:.3f};     Validation loss | validation_loss | {:.4f} nats per residue
Perplexity of residue frequencies | unigram_perplexity | {:.3f};  Masked residues named right | masked_accuracy | {:.2%}
Perplexity before training | initial_validation_perplexity | {:.3f}
Perplexity of the average | averaged_validation_perplexity | {:.3f};  Checkpoints averaged | averaged_checkpoints | {:,}
Test perplexity | test_perplexity | {:.3f};    Test perplexity of the average | averaged_test_perplexity | {:.3f}
Test, residue frequencies | test_unigram_perplexity | {:.3f};  Test, four neighbours | test_ngram_perplexity | {:.3f}
Test sequences | test_sequences | {:,}
Masked residues asked | masked_residues | {:,};             Model | model | {}
Parameters | parameters | {:,};                             Precision | precision | {}
Training sequences | train_sequences | {:,};                Validation sequences | validation_sequences | {:,}
Global batch | global_batch_size | {:,} sequences;          Optimizer steps | steps | {:,}
Global batch | global_batch_tokens | {:,} tokens
Resumed from step | resumed_from_step | {:,};               Consumed samples | consumed_samples | {:,} sequences
Epochs | epochs | {:.2f};                                   Training time | seconds | {:,.1f} s
Throughput | residues_per_second | {:,.0f} residues/s;      Device | device | {}
Model FLOPs utilization (MFU) | mfu | {:.1%};               Waiting for data | data_wait_share | {:.1%} of each step
Highest memory of a device | memory_gb | {:.2f} GB;         Tokens a second | tokens_per_second | {:,.0f}
Fused backends | fused_backends | {};                       Seed | seed | {}
Data | data | ; Probe | probe | ; Command | command | ; Model file | nemo |
Averaged model | averaged_nemo | ; Sequence store | store | ; Versions | package_versions |
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@name@</title><style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2733; --muted: #5f6b7a; --grid: #e6e9ee; --line: #1b62a5;
  --faint: #b5cde6; --mark: #b8500f; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181e; --ink: #e7eaef; --muted: #9ba6b4;
  --grid: #2a313b; --line: #6cb0f2; --faint: #2c4a69; --mark: #ee9557; } }
body { margin: 2.2rem auto; max-width: 60rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6em; } h2 { margin: 1.5em 0 .4em; font-size: 1.1em; }
.headline { margin: .3em 0 1.4em; font-size: 1.08em; color: var(--muted); } figure { margin: 0; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
dl { margin: 0; font-size: .87em; columns: 2; column-gap: 2.6em; } dd { margin: 0; font-variant-numeric: tabular-nums; }
dl div { display: flex; gap: 1em; padding: .16em 0; break-inside: avoid; border-bottom: 1px solid var(--grid); }
dt { flex: none; color: var(--muted); } dd { flex: 1; text-align: right; }
.wide { columns: 1; } .wide dt { width: 9em; } .wide dd { text-align: left; }
pre { margin: 0; padding: .6em .9em; border: 1px solid var(--grid); border-left: 3px solid var(--line);
  font: .87em/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.note { margin: .8em 0 0; font-size: .87em; color: var(--muted); } @page { margin: 12mm; }
@media screen and (max-width: 40rem) { dl { columns: 1; } }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 11px; } }
</style></head><body><h1>@name@</h1>
<p class="headline">@headline@</p><figure>@svg@</figure>
<h2>The run</h2><dl>@facts@</dl><dl class="wide">@wide@</dl>
<h2>How to use it</h2><pre><code>from bionemo_esm import ESM1nvModel
model = ESM1nvModel.restore_from(@nemo@)</code></pre>
<p class="note">Perplexity is exp of the mean cross-entropy, in nats, over the residues chosen in held-out sequences;
every chosen residue is shown as &lt;mask&gt; in validation. Residue frequencies alone: each answered with how often
every residue occurs. A residue is named right where the model finds it the likeliest.</p></body></html>
"""


class _Run(NamedTuple):
    train: dict[str, FloatArray]
    validation: dict[str, FloatArray]
    summary: dict[str, Any]
    probe: dict[str, FloatArray]
    probe_name: str  # its task and metric
    perplexity: float  # of validation; this and the next are NaN if the summary has none
    unigram_perplexity: float
    accuracy: float
    initial_perplexity: float  # before the first step, of a run that starts from weights


def write_report(folder: Path) -> Path:
    """Write `report.html` and `report.png` from metrics.jsonl and summary.json in `folder`; return the html's path.

    Both are written atomically. Raises `ValueError`, naming the file, if an input is missing or cannot be parsed.
    """
    run = _read_run(Path(folder))
    svg, png = _draw(run)
    write_atomically(Path(folder, "report.png"), png)
    write_atomically(Path(folder, "report.html"), _page(run, svg))
    return Path(folder, "report.html")


def _read_run(folder: Path) -> _Run:
    where, records = str(folder / "summary.json"), _objects(folder / "metrics.jsonl")
    summary = _objects(folder / "summary.json")[where]
    summary["name"] = _plain(summary.get("name") or "Pretraining run")
    train = _columns(records, "train", ("loss", "learning_rate", "residues_per_second"))
    validation = _columns(records, "validation", ("perplexity",))
    scores = ("validation_perplexity", "unigram_perplexity", "masked_accuracy", "initial_validation_perplexity")
    probe = _probe_of(records)
    run = _Run(train, validation, summary, *probe, *[_number(summary, key, where) for key in scores])
    same_questions = summary.get("initial_masked_residues") == summary.get("masked_residues")
    return run if same_questions else run._replace(initial_perplexity=math.nan)


def _probe_of(records: dict[str, dict[str, Any]]) -> tuple[dict[str, FloatArray], str]:
    """Return steps and scores of the last probe's task, and its task and metric."""

    def name(record: dict[str, Any]) -> str:
        return _plain(f"{record.get('task')} {record.get('metric')}")

    probes = {where: record for where, record in records.items() if record.get("kind") == "probe"}
    last = name(list(probes.values())[-1]) if probes else ""
    same = {where: record for where, record in probes.items() if name(record) == last}
    return _columns(same, "probe", ("score", "one_hot")), last


def _objects(path: Path) -> dict[str, dict[str, Any]]:
    """Return the JSON objects of a file by their location: one in a .json, one per line in a .jsonl."""
    objects, where = {}, str(path)
    try:
        text = path.read_text(encoding="utf-8")
        lines = enumerate(text.split("\n"), start=1) if path.suffix == ".jsonl" else ((0, text),)
        for number, line in lines:
            if line.strip() or not number:
                where = f"{path}, line {number}" if number else str(path)
                objects[where] = json.loads(line)
                if not isinstance(objects[where], dict):
                    raise ValueError(f"not an object: {line.strip()[:40]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: cannot be read as JSON ({error}); the report of a run is made from it") from error
    return objects


def _number(record: dict[str, Any], key: str, where: str) -> float:
    value = record.get(key)
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{where}: {key} must be a number, not {value!r}")
    return math.nan if value is None else float(value)


def _columns(records: dict[str, dict[str, Any]], kind: str, keys: tuple[str, ...]) -> dict[str, FloatArray]:
    """Return the values of one kind of line, sorted by step. A resumed run repeats steps: the last line counts."""
    rows: dict[float, list[float]] = {}
    for where, record in records.items():
        if record.get("kind") == kind:
            if not math.isfinite(step := _number(record, "step", where)):
                raise ValueError(f"{where}: step must be a finite number")
            rows[step] = [_number(record, key, where) for key in keys]
    table = np.array([[step, *rows[step]] for step in sorted(rows)], dtype=np.float64).reshape(-1, 1 + len(keys))
    table[~np.isfinite(table)] = np.nan
    return dict(zip(("step", *keys), table.T, strict=True))


def _headline(run: _Run) -> str:
    if math.isfinite(run.perplexity):
        sentence = f"Validation perplexity {run.perplexity:,.1f}"
        others = {"before training": run.initial_perplexity, "for residue frequencies alone": run.unigram_perplexity}
        baselines = [f"{value:,.1f} {words}" for words, value in others.items() if math.isfinite(value)]
        if baselines:
            sentence += f", against {' and '.join(baselines)}"
        return sentence + (f"; {run.accuracy:.1%} of masked residues named right." if run.accuracy >= 0 else ".")
    finite = np.flatnonzero(np.isfinite(run.train["loss"]))
    if not finite.size:
        return "No finite loss was recorded."
    step, loss = run.train["step"][finite[-1]], run.train["loss"][finite[-1]]
    return f"Training loss {loss:.3f} nats per masked residue at step {step:,.0f}; no validation."


def _draw(run: _Run) -> tuple[str, bytes]:
    """Return the figure as an SVG element for the page, and as a PNG with a heading."""
    with styled(**LOOK):
        height, svg, png = PANELS + HEADING, BytesIO(), BytesIO()
        figure = Figure(figsize=(WIDTH, height))
        panels, top = figure.subplots(2, 2, sharex=True), (PANELS - 0.6) / height
        figure.subplots_adjust(left=0.06, right=0.914, bottom=0.6 / height, top=top, hspace=0.36, wspace=0.28)
        _loss_panel(panels[0, 0], run.train["step"], run.train["loss"])
        _validation_panel(panels[0, 1], run)
        _rate_panel(panels[1, 0], run.train["step"], run.train["learning_rate"])
        if run.probe["step"].size:  # the page has the throughput as a number
            _probe_panel(panels[1, 1], run)
        else:
            _throughput_panel(panels[1, 1], run.train["step"], run.train["residues_per_second"])
        panels[0, 0].set_xlim(0, max([1.0, *run.train["step"], *run.validation["step"], *run.probe["step"]]))
        panels[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        panels[0, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
        for panel in panels[1]:
            panel.set_xlabel("optimizer step")
        undated, box = dict.fromkeys(("Date", "Creator", "Format", "Type")), Bbox.from_bounds(0, 0, WIDTH, PANELS)
        figure.savefig(svg, format="svg", facecolor="none", bbox_inches=box, metadata=undated)
        name = run.summary["name"] if len(run.summary["name"]) <= 70 else run.summary["name"][:69] + "…"
        figure.text(0.06, 1 - 0.45 / height, name, size=16, weight="bold", parse_math=False)
        figure.text(0.06, 1 - 0.77 / height, _headline(run), size=12, color=MUTED)
        figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return _inline(svg.getvalue().decode()), png.getvalue()


def _loss_panel(axes: Any, step: FloatArray, loss: FloatArray) -> None:
    if _curve(axes, "Training loss", "nats per masked residue", step, loss, 2 * (len(loss) // 30) + 1):
        right = axes.secondary_yaxis("right")
        right.yaxis.set_major_locator(axes.yaxis.get_major_locator())
        right.yaxis.set_major_formatter(lambda loss, _: f"{math.exp(min(loss, 700.0)):.3g}")
        right.spines["right"].set_visible(False)
        axes.annotate("perplexity", (1, 1), (30, 7), "axes fraction", "offset points", ha="right", color=MUTED)
    if lost := int(np.isnan(loss).sum()):
        note = f"{lost:,} of {len(loss):,} not finite"
        axes.annotate(note, (1, 1), (30, 23), "axes fraction", "offset points", ha="right", color=MARK)


def _validation_panel(axes: Any, run: _Run) -> None:
    step, perplexity, base = run.validation["step"], run.validation["perplexity"], run.unigram_perplexity
    if _curve(axes, "Validation perplexity", "every chosen residue shown as <mask>", step, perplexity):
        last = np.flatnonzero(np.isfinite(perplexity))[-1]
        axes.annotate(f"{perplexity[last]:,.1f}", (step[last], perplexity[last]), **LABEL)
        if math.isfinite(base):
            axes.axhline(base, color=MARK, linewidth=1.3, linestyle=(0, (5, 3)))
            side, shift = ("bottom", 4) if perplexity[last] <= base else ("top", -4)  # away from the end of the curve
            style = {"color": MARK, "ha": "right", "va": side, "xycoords": axes.get_yaxis_transform()}
            text = f"residue frequencies ({base:,.1f})"
            axes.annotate(text, (1, base), (-2, shift), textcoords="offset points", **style)


def _rate_panel(axes: Any, step: FloatArray, rate: FloatArray) -> None:
    peak = max([0.0, *rate[np.isfinite(rate)]])
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    unit = "×10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    if _curve(axes, "Learning rate", f"{unit}, peak {peak / 10.0**power:.3g}", step, rate / 10.0**power):
        axes.set_ylim(0, peak / 10.0**power * 1.12 or 1.0)


def _probe_panel(axes: Any, run: _Run) -> None:
    step, score, base = run.probe["step"], run.probe["score"], run.probe["one_hot"]
    if _curve(axes, "Probe", f"{run.probe_name}, a linear head on the states", step, score):
        last = np.flatnonzero(np.isfinite(score))[-1]
        axes.annotate(f"{score[last]:.3g}", (step[last], score[last]), **LABEL)
        if np.isfinite(base[-1]):
            axes.axhline(base[-1], color=MARK, linewidth=1.3, linestyle=(0, (5, 3)))
            style = {"color": MARK, "ha": "right", "va": "top", "xycoords": axes.get_yaxis_transform()}
            axes.annotate(f"one-hot ({base[-1]:.3g})", (1, base[-1]), (-2, -4), textcoords="offset points", **style)


def _throughput_panel(axes: Any, step: FloatArray, rate: FloatArray) -> None:
    if _curve(axes, "Throughput", "residues per second", step, rate, 2 * (len(rate) // 30) + 1):
        median = float(np.nanmedian(rate))
        axes.annotate(f"median\n{median:,.0f}", (1, median), xycoords=axes.get_yaxis_transform(), **LABEL)
        axes.set_ylim(0, float(np.nanmax(rate)) * 1.15 or 1.0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _curve(axes: Any, title: str, unit: str, step: FloatArray, values: FloatArray, window: int = 1) -> bool:
    """Draw title and curve; over faint raw values, if it is a moving mean. Return False if there is nothing to draw."""
    unit += f" ({window:,}-point mean)" if window > 1 else ""
    axes.annotate(title, (0, 1), (0, 23), "axes fraction", "offset points", weight="bold", size=12.5)
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "none recorded", transform=axes.transAxes, color=MUTED, ha="center", va="center")
        axes.yaxis.set_visible(False)
        return False
    axes.annotate(unit, (0, 1), (0, 7), "axes fraction", "offset points", color=MUTED)
    if window > 1:
        axes.plot(step, values, color=FAINT, linewidth=0.8)
    marker = "o" if len(values) < 30 else None
    axes.plot(step, _smooth(values, window), color=LINE, linewidth=2, marker=marker, markersize=4.5, clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.13)
    return True


def _smooth(values: FloatArray, window: int) -> FloatArray:
    """Return the mean of finite values in a centred window, which is narrower at the start, where a loss falls fast."""
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + np.minimum(places, window // 2), len(values) - 1) + 1
    sums = np.pad(np.cumsum([np.isfinite(values), np.nan_to_num(values)], axis=1), ((0, 0), (1, 0)))
    count, total = sums[:, end] - sums[:, first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _inline(svg: str) -> str:
    """Return Matplotlib's SVG file as an HTML element, with the colours of the style sheet."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|<!--.*?-->', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img" aria-label="Curves of the run"', svg, count=1)
    return re.sub("|".join(COLOURS), lambda found: f"var({COLOURS[found[0]]})", svg).replace("xlink:href", "href")


def _page(run: _Run, svg: str) -> str:
    parts = {"svg": svg, "name": html.escape(run.summary["name"]), "headline": html.escape(_headline(run))}
    path = json.dumps(_plain(run.summary.get("nemo") or "model.nemo"), ensure_ascii=False)
    parts |= {"nemo": html.escape(path, quote=False), "facts": "", "wide": ""}
    for fact in re.split(r"[;\n]", FACTS.strip()):
        label, key, pattern = (part.strip() for part in fact.split("|"))
        value = run.summary.get(key)
        if value is not None:
            number = type(value) in (int, float) and math.isfinite(value)
            text = pattern.format(value) if pattern and number else _plain(value)
            text += f" ({timedelta(seconds=round(value))})" if key == "seconds" and number else ""
            parts["facts" if pattern else "wide"] += f"<div><dt>{label}</dt><dd>{html.escape(text)}</dd></div>\n"
    return re.sub("@([a-z]+)@", lambda found: parts[found[1]], PAGE)


def _plain(value: Any) -> str:
    """Return a value as one line of valid Unicode text."""
    if isinstance(value, dict):
        value = [f"{key} {_plain(item)}" for key, item in value.items()]
    text = ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
    return " ".join(text.encode(errors="replace").decode().split())
