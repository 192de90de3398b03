"""Summary of a store: contents and provenance of each split, as text, as a dictionary and as a chart.

Lengths are counted in blocks: 54 million sequences take seconds and a few megabytes.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES, STANDARD_RESIDUES, TOKENS
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit
from bionemo_esm.plotting import FAINT, FAINT_MARK, INK, LINE, MARK, MUTED, WIDTH, styled, write_png

CONTEXTS = (512, 1024)
"""Context lengths in tokens of ESM-1nv and ESM-1b, for the shares of cropping and padding."""
PERCENTILES = (5, 25, 75, 95)
NOT_RECORDED = "not recorded"

_SPECIALS = 2  # <cls> and <eos> around each sequence
_BLOCK = 2**20  # lengths counted at once
_STANDARD = slice(FIRST_RESIDUE_ID, FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES)
_SHOWN_ELSEWHERE = {"format_version", "package_version", "splits", "source", "release", "licence", "policy", "counts"}
_LINE, _LABEL = 112, 26  # characters of the text: width of a line, width of the labels

_HEIGHT = 8.2  # inches
_BINS_PER_DECADE = 20
_ON_BAR: dict[str, Any] = {"ha": "center", "va": "bottom", "size": 7.5, "xytext": (0, 2), "textcoords": "offset points"}


@dataclass(frozen=True, eq=False)
class SplitStatistics:
    """One split as its distinct lengths: int64 ascending, in residues, with the number of sequences of each.

    Statistics are None for an empty split.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    residue_counts: NDArray[np.int64]  # of each token id, [33]

    @classmethod
    def of(cls, split: SequenceSplit) -> SplitStatistics:
        """Count a split. Raises `StoreError` for a token id over 32."""
        lengths, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        # Memory for merged distinct lengths grows with their number; a table would grow with the longest length.
        for begin in range(0, len(split), _BLOCK):
            here, times = np.unique(split.lengths[begin : begin + _BLOCK].astype(np.int64), return_counts=True)
            lengths, where = np.unique(np.concatenate([lengths, here]), return_inverse=True)
            merged = np.zeros(lengths.size, np.int64)
            np.add.at(merged, where.ravel(), np.concatenate([counts, times]))
            counts = merged
        return cls(lengths, counts, split.residue_counts())

    @property
    def sequences(self) -> int:
        return int(self.counts.sum())

    @property
    def residues(self) -> int:
        return int(self.lengths @ self.counts)

    @property
    def mean(self) -> float | None:
        """Mean length in residues."""
        return self.residues / self.sequences if self.sequences else None

    def percentile(self, percent: int) -> int | None:
        """Return a percentile of the lengths, in residues; between two lengths the longer (NumPy's method "higher")."""
        rank = -(-percent * (self.sequences - 1) // 100)  # integer arithmetic: 0.05 has no exact float
        return (
            int(self.lengths[np.searchsorted(np.cumsum(self.counts), rank, side="right")]) if self.sequences else None
        )

    def share_cropped(self, tokens: int) -> float | None:
        """Return the share of sequences longer than a window of this many tokens, including special tokens."""
        longer = int(self.counts[self.lengths > tokens - _SPECIALS].sum())
        return longer / self.sequences if self.sequences else None

    def padding_waste(self, tokens: int) -> float | None:
        """Return the share of padding if every sequence is cropped and padded to this many tokens."""
        used = int(np.minimum(self.lengths + _SPECIALS, tokens) @ self.counts)
        return 1 - used / (tokens * self.sequences) if self.sequences else None

    def composition(self) -> dict[str, float]:
        """Return the share of each standard residue, in the alphabet's order, and of all others as `other`."""
        standard = self.residue_counts[_STANDARD] / max(self.residues, 1)
        other = int(self.residue_counts.sum() - self.residue_counts[_STANDARD].sum()) / max(self.residues, 1)
        return {**dict(zip(STANDARD_RESIDUES, standard.tolist(), strict=True)), "other": other}

    def unigram_perplexity(self, train: SplitStatistics) -> float | None:
        """Return the perplexity of this split's residues under the residue frequencies of `train`.

        Each count of train is increased by one, so that a letter absent from train does not make it infinite.
        """
        if not (self.residues and train.residues):
            return None
        log_frequency = np.log((train.residue_counts + 1.0) / (train.residue_counts + 1.0).sum())
        return float(np.exp(-(self.residue_counts @ log_frequency) / self.residues))

    def to_dict(self, train: SplitStatistics) -> dict[str, Any]:
        """Return all values by name, JSON-serialisable; lengths in residues, shares from 0 to 1."""
        lengths = {"shortest": self.percentile(0), "median": self.percentile(50), "mean": self.mean}
        lengths |= {"longest": self.percentile(100), **{f"percentile_{p}": self.percentile(p) for p in PERCENTILES}}
        return {
            "sequences": self.sequences,
            "residues": self.residues,
            "length_residues": lengths,
            "share_cropped": {f"{tokens}_tokens": self.share_cropped(tokens) for tokens in CONTEXTS},
            "padding_waste": {f"{tokens}_tokens": self.padding_waste(tokens) for tokens in CONTEXTS},
            "unigram_perplexity": self.unigram_perplexity(train),
            "residue_counts": {TOKENS[i]: int(n) for i, n in enumerate(self.residue_counts) if n},
        }


@dataclass(frozen=True, eq=False)
class StoreSummary:
    """Contents of a store. Only keys that exist in the manifest are shown."""

    name: str
    manifest: Mapping[str, Any]
    splits: Mapping[str, SplitStatistics]

    @classmethod
    def of(cls, store: ProteinStore) -> StoreSummary:
        """Count the contents of a store. Raises `StoreError` for a token id over 32."""
        return cls(store.folder.name, store.manifest, {name: SplitStatistics.of(store.split(name)) for name in SPLITS})

    @property
    def title(self) -> str:
        """The release, or the folder's name if no release is recorded."""
        return str(self.manifest.get("release") or self.name)

    @property
    def sequences(self) -> int:
        return sum(split.sequences for split in self.splits.values())

    @property
    def residues(self) -> int:
        return sum(split.residues for split in self.splits.values())

    @property
    def totals(self) -> str:
        """The number of proteins and residues as text."""
        return f"{self.sequences:,} protein{'s' * (self.sequences != 1)}, {self.residues:,} residues"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values: `name`, `sequences`, `residues`, `splits`, and the `manifest`."""
        splits = {name: split.to_dict(self.splits["train"]) for name, split in self.splits.items()}
        totals = {"sequences": self.sequences, "residues": self.residues}
        return {"name": self.name, **totals, "splits": splits, "manifest": dict(self.manifest)}

    def text(self) -> str:
        """Return the summary as about forty lines of plain text, without a final newline."""
        lines = [self.title, self.totals, "", *self._provenance(), "", *self._table(), "", *self._residue_lines()]
        return "\n".join(line.rstrip() for line in lines)

    def _provenance(self) -> Iterator[str]:
        manifest = self.manifest
        yield from _paragraph("store", self.name)
        for key in ("release", "licence"):
            yield from _paragraph(key, _plain(manifest.get(key)))
        source = manifest.get("source")
        for number, entry in enumerate(source if isinstance(source, list) and source else [source]):
            yield from _paragraph("" if number else "source", _source(entry))
        version = manifest.get("package_version")
        yield from _paragraph("built by", f"bionemo_esm {version}" if version else NOT_RECORDED)
        yield from _paragraph("policy", _listed(manifest.get("policy")))
        yield from _paragraph("counts", _listed(manifest.get("counts")))
        for key in sorted(manifest.keys() - _SHOWN_ELSEWHERE):
            value = manifest[key]
            yield from _paragraph(key.replace("_", " "), _listed(value) if isinstance(value, dict) else _plain(value))

    def _table(self) -> Iterator[str]:
        splits, train = self.splits.values(), self.splits["train"]
        recorded = self.manifest.get("splits")
        entries = [(recorded.get(name) or {}) if isinstance(recorded, dict) else {} for name in self.splits]
        yield _row("", [*self.splits])
        yield _row("sequences", [s.sequences for s in splits])
        clusters = [d.get("clusters") for d in entries]
        if any(count not in (None, s.sequences) for count, s in zip(clusters, splits, strict=True)):
            yield _row("clusters", clusters)
        yield _row("residues", [s.residues for s in splits])
        for kind in ("bin", "idx"):
            yield _row(f"SHA-256 of .{kind}", [_shortened(d.get(f"{kind}_sha256")) for d in entries])
        yield from ("", "length in residues")
        yield _row("  shortest", [s.percentile(0) for s in splits])
        for percent in sorted((*PERCENTILES, 50)):
            label = "  median" if percent == 50 else f"  {percent}th percentile"
            yield _row(label, [s.percentile(percent) for s in splits])
        yield _row("  longest", [s.percentile(100) for s in splits])
        yield _row("  mean", [s.mean for s in splits], "{:,.1f}")
        for tokens in CONTEXTS:
            yield _row(f"  over {tokens - _SPECIALS:,}", [s.share_cropped(tokens) for s in splits], "{:.1%}")
        yield from ("", "padding, where all are cropped and padded to")
        for tokens in CONTEXTS:
            yield _row(f"  {tokens:,} tokens", [s.padding_waste(tokens) for s in splits], "{:.1%}")
        yield ""
        yield _row("unigram perplexity", [s.unigram_perplexity(train) for s in splits], "{:.2f}")
        yield from _paragraph("", "of each split's residues, answered with the residue frequencies of train")

    def _residue_lines(self) -> Iterator[str]:
        name = next((name for name, split in self.splits.items() if split.residues), "train")
        yield f"residues of {name}, %"
        cells = [f"{letter:>5} {100 * share:5.2f}" for letter, share in self.splits[name].composition().items()]
        yield from ("  " + "  ".join(cells[begin : begin + 7]) for begin in range(0, len(cells), 7))


def _paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, _LINE, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL)


def _row(label: str, values: list[Any], pattern: str = "{:,}") -> str:
    cells = [v if isinstance(v, str) else "–" if v is None else pattern.format(v) for v in values]
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>18}" for cell in cells)


def _shortened(digest: Any) -> str:
    return f"{digest[:12]}…" if isinstance(digest, str) else NOT_RECORDED


def _plain(value: Any) -> str:
    """Return a manifest value as one line."""
    if value is None or value in ("", [], {}):
        return NOT_RECORDED
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return f"{value:,}" if type(value) is int else " ".join(str(value).split())


def _source(entry: Any) -> str:
    """Return an entry of the manifest's `source`: `file, 1,234 bytes, SHA-256 0123456789ab…`, then other keys."""
    if not isinstance(entry, dict):
        return _plain(entry)
    rest = {key: item for key, item in entry.items() if key not in ("file", "bytes", "sha256", "split")}
    parts = [_plain(entry.get("file")) + (f" ({entry['split']})" if entry.get("split") else "")]
    parts += [f"{_plain(entry['bytes'])} bytes"] if entry.get("bytes") is not None else []
    parts += [f"SHA-256 {_shortened(entry.get('sha256'))}", *([_plain(rest)] if rest else [])]
    return ", ".join(parts)


def _listed(values: Any) -> str:
    """Return `name 12, other name 3`, omitting zeros except for a seed, and including null."""
    if not isinstance(values, dict) or not values:
        return _plain(values)
    shown = {key: item for key, item in values.items() if item or item is None or key == "seed"}
    words = [
        f"{key.replace('_', ' ')} {'null' if item is None else item if key == 'seed' else _plain(item)}"
        for key, item in shown.items()
    ]
    return ", ".join(words) or "nothing"


def draw_summary(card: StoreSummary | ProteinStore, path: str | os.PathLike[str]) -> Path:
    """Draw a summary as a PNG. Replaces `path` and returns it. Equal summaries give equal bytes.

    Upper panel: lengths of train, and of validation and test together. Lower panel: their residue composition.
    """
    from matplotlib.figure import Figure  # takes a second to import, so only charts import it

    card = StoreSummary.of(card) if isinstance(card, ProteinStore) else card
    with styled(**{"axes.spines.left": False, "ytick.major.size": 0}):
        figure = Figure(figsize=(WIDTH, _HEIGHT))
        panels = figure.subplots(2, 1, height_ratios=(3, 2))
        figure.subplots_adjust(left=0.05, right=0.965, bottom=0.065, top=0.8, hspace=0.55)
        title = card.title if len(card.title) <= 70 else card.title[:69] + "…"
        figure.text(0.05, 1 - 0.52 / _HEIGHT, title, size=18, weight="bold", parse_math=False)
        figure.text(0.05, 1 - 0.86 / _HEIGHT, _headline(card), size=12, color=MUTED, parse_math=False)
        parts = _drawn_parts(card)
        _length_panel(panels[0], parts)
        _residue_panel(panels[1], parts)
        return write_png(figure, Path(path))


def _headline(card: StoreSummary) -> str:
    splits = " · ".join(f"{name} {split.sequences:,}" for name, split in card.splits.items() if split.sequences)
    return card.totals + (f"   ({splits})" if splits else "")


class _Part(NamedTuple):
    """Data drawn in one colour."""

    name: str
    colour: str
    fill: str
    split: SplitStatistics


def _drawn_parts(card: StoreSummary) -> list[_Part]:
    """Return train and the combined held-out splits, each if not empty."""
    held_out = [card.splits[name] for name in ("validation", "test") if card.splits[name].sequences]
    parts = [_Part("train", LINE, FAINT, card.splits["train"])]
    if held_out:
        name = " + ".join(name for name in ("validation", "test") if card.splits[name].sequences)
        lengths = np.concatenate([split.lengths for split in held_out])
        counts = np.concatenate([split.counts for split in held_out])
        order = np.argsort(lengths, kind="stable")
        residues = np.sum([split.residue_counts for split in held_out], axis=0)
        parts.append(_Part(name, MARK, FAINT_MARK, SplitStatistics(lengths[order], counts[order], residues)))
    return [part for part in parts if part.split.sequences]


def _heading(axes: Any, title: str, unit: str, parts: list[_Part]) -> bool:
    """Draw title and unit above a panel. Return whether there are data to draw."""
    axes.annotate(title, (0, 1), (0, 27), "axes fraction", "offset points", weight="bold", size=12.5)
    axes.tick_params(axis="y", labelcolor=MUTED)
    if not parts:
        axes.text(0.5, 0.5, "no sequences", transform=axes.transAxes, color=MUTED, ha="center", va="center")
        axes.set(xticks=[], yticks=[])
        return False
    axes.annotate(unit, (0, 1), (0, 11), "axes fraction", "offset points", color=MUTED)
    return True


def _length_panel(axes: Any, parts: list[_Part]) -> None:
    step = f"{10 ** (1 / _BINS_PER_DECADE) - 1:.0%}"
    if not _heading(axes, "Sequence length", f"% of the sequences per {step} step in length", parts):
        return
    shortest = min([20, *(int(part.split.lengths[0]) for part in parts)])
    longest = max([2000, *(int(part.split.lengths[-1]) for part in parts)])
    # Bin edges lie between integers, without duplicates: bins narrower than a residue would be empty or hold one
    # length.
    steps = int(np.ceil(np.log10(longest / shortest) * _BINS_PER_DECADE)) + 1
    edges = np.unique(np.round(np.geomspace(shortest, longest + 1, steps))) - 0.5
    highest = 0.0
    for place, (name, colour, fill, split) in enumerate(parts):
        found = np.histogram(split.lengths, edges, weights=split.counts)[0]
        height = 100 * found / split.sequences / (_BINS_PER_DECADE * np.diff(np.log10(edges)))
        highest = max(highest, float(height.max()))
        if place == 0:
            axes.stairs(height, edges, fill=True, color=fill)
        axes.stairs(height, edges, color=colour, linewidth=1.6)
        label = f"{name}: median {split.percentile(50):,}, mean {split.mean:,.0f}, longest {split.percentile(100):,}"
        axes.annotate(label, (1, 1), (0, 27 - 16 * place), "axes fraction", "offset points", color=colour, ha="right")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4) if shortest <= t <= longest]
    axes.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(0, 1.22 * highest), xlabel="residues")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    for tokens, side, shift in zip(CONTEXTS, ("right", "left"), (-5, 5), strict=True):
        axes.axvline(tokens - _SPECIALS + 0.5, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        text = f"{tokens:,} tokens\n{parts[0].split.share_cropped(tokens):.1%} longer"
        at = (tokens - _SPECIALS + 0.5, 0.985)
        axes.annotate(text, at, (shift, 0), axes.get_xaxis_transform(), "offset points", ha=side, va="top")


def _residue_panel(axes: Any, parts: list[_Part]) -> None:
    if not _heading(axes, "Residues", "% of all residues; rare: X B U Z O", parts):
        return
    width, places = 0.84 / len(parts), np.arange(NUM_STANDARD_RESIDUES + 1)
    for number, (_, colour, fill, split) in enumerate(parts):
        shares = 100 * np.array([*split.composition().values()])
        begin = places - 0.42 + number * width
        axes.bar(begin, shares, width=0.94 * width, align="edge", color=fill)
        for place, share in zip(begin, shares, strict=True):
            text = "0" if not share else "<.1" if share < 0.05 else f"{share:.1f}"
            axes.annotate(text, (place + 0.47 * width, share), color=colour, **_ON_BAR)
    axes.set_xticks(places, [*STANDARD_RESIDUES, "rare"], color=INK)
    axes.tick_params(axis="x", size=0)
    axes.set(xlim=(-0.6, places[-1] + 0.6), yticks=[])
