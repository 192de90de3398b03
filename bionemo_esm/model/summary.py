"""Summary of a model or a checkpoint as text and as JSON: architecture, training, data. Used by `bionemo-esm inspect`.

Only small members and headers are read, without torch and NeMo. Provenance is untrusted free text: values of any type
are accepted, and control characters never reach a terminal.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bionemo_esm.console import Console, ProgressBar, run_to_exit_code
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import STATE, WEIGHTS, ArchiveError, ArchiveFile
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.safe_serialization import parse_json
from bionemo_esm.model.tar_format import read_section

_LINE, _LABEL = 112, 26  # characters of the text: width of a line, width of the labels
_LONGEST_TEXT = 600  # maximum characters printed per entry; `to_dict` has all
_FILES_AT_AN_END = 4  # shown at each end of a long list of averaged files
_MOST_OTHERS = 20  # maximum number of other provenance entries, and of packages
_LARGEST_STATE = 1 << 22  # maximum bytes of a state.json read for the summary; that of ESM-1b has 2**19
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
_SIZES = {
    "num_layers": "layers", "hidden_size": "hidden size", "num_attention_heads": "attention heads",
    "ffn_hidden_size": "FFN size", "seq_length": "longest sequence, tokens", "hidden_dropout": "dropout, hidden",
    "attention_dropout": "dropout, attention",
}  # fmt: skip
_OTHER_PARTS = {  # shown if present in the archive; ESM-1nv has none
    "position_embedding": "position embedding", "position_offset": "position offset",
    "embedding_layernorm": "embedding layer norm", "token_dropout": "token dropout", "contact_head": "contact head",
}  # fmt: skip
_ORIGIN = ("source", "format", "sha256")  # of an imported model
_SPLITS = ("train", "validation", "test")
_DATA = ("data", "data_release", "data_sequences", "data_manifest_sha256")
_START = ("restored_from", "restored_weights_sha256", "imported_from", "converted_from")
_TRAINING = ("recipe", "seed", "steps", "consumed_samples", *_DATA, *_START)
_KNOWN = {
    *(*_TRAINING, "continued_from", "data_samples_of_an_epoch", "averaged_from", "checkpoint", "package_versions"),
    "contact_head", "finetuning",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ArchiveSummary:
    """Contents of the records in a `.nemo` or a `.ckpt`. The text shows only entries that are present."""

    name: str  # of the file
    size: int  # bytes
    is_checkpoint: bool
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    parameters_by_dtype: Mapping[str, int]  # by stored dtype, without buffers
    state: Mapping[str, Any]  # training state without tensors; empty for a `.nemo`

    @classmethod
    def of(cls, file: ArchiveFile) -> ArchiveSummary:
        """Return the summary of an open file. Raises `ArchiveError` for a checkpoint with a damaged state.json."""
        fixed = _fixed_tensors(file.config)
        infos = [info for name, info in file.weights.infos.items() if name not in fixed]
        elements = {name: sum(i.elements for i in infos if i.dtype == dtype) for dtype, name in _DTYPES.items()}
        counts = {name: number for name, number in elements.items() if number}
        path, state = file.path, _state(file)
        return cls(path.name, path.stat().st_size, file.is_checkpoint, file.manifest, file.config, counts, state)

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_dtype.values())

    @property
    def epochs(self) -> float | None:
        """Consumed samples divided by the samples of an epoch; None if either is unknown."""
        consumed, samples = _count(self._recorded("consumed_samples")), self._samples_of_an_epoch
        return consumed / samples if consumed is not None and samples else None

    @property
    def packages(self) -> dict[str, dict[str, Any]]:
        """Packages by name, with the version `recorded` in the file and the version `installed` here, or None."""
        recorded = self._recorded("package_versions")
        names = sorted(recorded)[:_MOST_OTHERS] if isinstance(recorded, dict) else []
        return {name: {"recorded": recorded[name], "installed": _installed(name)} for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for JSON: always the same keys, null for missing records.

        `provenance` and `config` are complete copies from the file; NaN and infinity become null.
        """
        card = {
            "name": self.name,
            "kind": "checkpoint" if self.is_checkpoint else "archive",
            "bytes": self.size,
            "model_class": _at(self.manifest, "model_class"),
            "architecture": {name: _at(self.config, "encoder", name) for name in _SIZES},
            "parameters": self.parameters,
            "parameters_by_dtype": dict(self.parameters_by_dtype),
            "training": {key: self._recorded(key) for key in _TRAINING} | {"epochs": self.epochs},
            "averaged_from": self._recorded("averaged_from") or [],
            "checkpoint": {key: self._recorded("checkpoint", key) for key in ("on_schedule", "every_n_train_steps")}
            | self._progress,
            "packages": self.packages,
            "weights_sha256": _at(self.manifest, "files", WEIGHTS, "sha256"),
            "provenance": self._recorded(),
            "config": dict(self.config),
        }
        return dict(json.loads(json.dumps(card), parse_constant=lambda name: None))

    def text(self) -> str:
        """Return the summary as about thirty lines of plain text, without a final newline."""
        kind = "checkpoint of a training" if self.is_checkpoint else "model archive"
        totals = f"{kind}, {self.parameters:,} parameters, {self.size:,} bytes"
        head = {"contact head fitted on": _contact_head(self._recorded("contact_head"))}
        blocks = [self._model(), self._finetuning(), self._training(), self._averaged(), head]
        return _text(self.name, totals, [*blocks, self._packages(), self._others()])

    def _model(self) -> dict[str, Any]:
        return {
            "class": _at(self.manifest, "model_class"),
            **{label: _at(self.config, "encoder", name) for name, label in _SIZES.items()},
            **{label: _part(_at(self.config, "encoder", name)) for name, label in _OTHER_PARTS.items()},
            "parameters": ", ".join(f"{number:,} in {dtype}" for dtype, number in self.parameters_by_dtype.items()),
            "SHA-256 of the weights": _at(self.manifest, "files", WEIGHTS, "sha256"),
        }

    def _finetuning(self) -> dict[str, Any]:
        """Return task, parts and fine-tuning record of a fine-tuned model, by label."""
        task, record = _at(self.config, "task"), self._recorded("finetuning")
        parts = {key: _at(self.config, key) for key in ("head", "reading", "adapters")}
        return {"task": _task(task), "classes": _at(task, "classes"), **parts, "fine-tuning": _entries(record)}

    def _training(self) -> dict[str, Any]:
        shown = {key.replace("_", " "): self._recorded(key) for key in _TRAINING}
        if type(seed := shown["seed"]) is int:
            shown["seed"] = str(seed)  # as text: no thousands separators
        if self.epochs is not None:
            epochs = f"{self.epochs:,.2f}" if self.epochs >= 0.1 else f"{self.epochs:.2g}"
            shown["consumed samples"] = (
                f"{shown['consumed samples']:,}, {epochs} epochs of {self._samples_of_an_epoch:,}"
            )
        if isinstance(splits := shown["data sequences"], dict):
            shown["data sequences"] = {key: splits[key] for key in (*_SPLITS, *splits) if key in splits}
        rate, loss, step = self._progress.values()
        lowest = None if loss is None else f"{loss:.4f}" + ("" if step is None else f", at step {step:,}")
        shown["continued from"] = self._origin()
        shown["imported from"] = _imported(shown["imported from"])
        return shown | {"saved": self._schedule(), "next learning rate": rate, "lowest validation loss": lowest}

    def _origin(self) -> Any:
        """Return a description of the run that this one continues; an entry of unknown form unchanged."""
        origin = self._recorded("continued_from")
        steps, samples, recipe = (
            _count(_at(origin, "steps")),
            _count(_at(origin, "consumed_samples")),
            _at(origin, "recipe"),
        )
        if steps is None or samples is None or not isinstance(recipe, str):
            return origin
        return f"step {steps:,} of a run of {recipe}, after {samples:,} samples"

    def _schedule(self) -> Any:
        """Return a description of when the checkpoint was saved; an entry of unknown form unchanged."""
        schedule = self._recorded("checkpoint")
        on_schedule, interval = _at(schedule, "on_schedule"), _count(_at(schedule, "every_n_train_steps"))
        if not isinstance(on_schedule, bool):
            return schedule
        every = "" if interval is None else f" of every {interval:,} step{'s' * (interval != 1)}"
        return f"on the schedule{every}" if on_schedule else f"off the schedule{every}: at a stop or a good validation"

    def _averaged(self) -> dict[str, Any]:
        sources = self._recorded("averaged_from")
        if not isinstance(sources, list) or not sources:
            return {"averaged from": sources}
        steps = [step for source in sources if (step := _count(_at(source, "steps"))) is not None]
        span = f", steps {min(steps):,} to {max(steps):,}" if steps else ""
        lines = _shortened([*map(_averaged_file, sources)])
        return {"averaged from": (f"{len(sources):,} file{'s' * (len(sources) != 1)}{span}", *lines)}

    def _packages(self) -> dict[str, Any]:
        differ = {name: p["installed"] for name, p in self.packages.items() if p["installed"] != p["recorded"]}
        differing = ", ".join(f"{name} {here or 'is not installed'}" for name, here in differ.items())
        return {"written with": self._recorded("package_versions"), "differs here": differing}

    def _others(self) -> dict[str, Any]:
        others = [key for key in sorted(self._recorded() or {}) if key not in _KNOWN]
        more = f"{len(others) - _MOST_OTHERS:,}; --json has all" if len(others) > _MOST_OTHERS else ""
        return {key.replace("_", " "): self._recorded(key) for key in others[:_MOST_OTHERS]} | {"and more": more}

    def _recorded(self, *path: str) -> Any:
        return _at(self.manifest, "provenance", *path)

    @property
    def _samples_of_an_epoch(self) -> int | None:
        """Number of sequences in the training split, or of clusters in a clustered store."""
        return _count(self._recorded("data_samples_of_an_epoch"))

    @property
    def _progress(self) -> dict[str, float | int | None]:
        """Learning rate and best validation of a checkpoint; None for values of unknown form."""
        return {
            "next_learning_rate": _real(_at(self.state, "lr_schedulers", 0, "_last_lr", 0)),
            "lowest_validation_loss": _real(_at(self.state, "callbacks", "Checkpoints", "best_loss")),
            "lowest_validation_step": _count(_at(self.state, "callbacks", "Checkpoints", "best_step")),
        }


def _text(name: str, kind: str, blocks: Sequence[Mapping[str, Any]]) -> str:
    rows = [[line for entry in block.items() for line in _labelled(*entry)] for block in blocks]
    return "\n\n".join("\n".join(lines) for lines in [[*_row(name, ""), kind], *rows] if lines)


def escaped(text: str, longest: int = 2_000) -> str:
    """Return a text on one line, at most `longest` characters, with control characters escaped as `\\x1b`."""
    clipped = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in clipped)


def _fixed_tensors(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of tensors that are not parameters; empty if the configuration describes no encoder."""
    sizes = _at(config, "encoder")
    try:
        encoder = EncoderConfig.from_config(sizes) if isinstance(sizes, dict) else None
    except ConfigError:
        encoder = None
    return frozenset(name for name, _ in encoder.fixed_tensors()) if encoder else frozenset()


def _state(file: ArchiveFile) -> Mapping[str, Any]:
    if not file.is_checkpoint or file.sections[STATE].size > _LARGEST_STATE:
        return {}
    file.verify(STATE)
    try:
        state = parse_json(read_section(file.path, file.sections[STATE]))
    except ValueError as error:
        raise ArchiveError(f"{file.path}: {STATE} cannot be used: {error}") from error
    return state if isinstance(state, dict) else {}


def _installed(name: str) -> str | None:
    try:
        return version(name) if re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) else None
    except PackageNotFoundError:
        return None


def _at(value: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices; None if the path ends early."""
    for key in path:
        is_place = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if not is_place and not (isinstance(value, Mapping) and key in value):
            return None
        value = value[key]
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _real(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # excludes NaN and infinity


def _shown(value: Any) -> str:
    """Return a value as one line; "" for a missing value."""
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item) or 'null'}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(item) or "null" for item in value)
    return f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else str(value)


def _part(value: Any) -> Any:
    """Return "yes" for a part that exists, None for a part that does not, and any other value unchanged."""
    return "yes" if value is True else None if value is False else value


def _task(task: Any) -> Any:
    """Return a description of a fine-tuned model's task; an entry of unknown form unchanged."""
    name, kind, level, classes = (_at(task, key) for key in ("name", "kind", "level", "classes"))
    if not isinstance(classes, list) or not all(isinstance(word, str) for word in (name, kind, level)):
        return task
    return f"{name}: {kind} per {level}" + (f", {len(classes):,} classes" if classes else "")


def _entries(record: Any) -> Any:
    """Return a line for each entry of a mapping; any other value unchanged."""
    if not isinstance(record, Mapping) or not record:
        return record
    lines = [f"{key.replace('_', ' ')}: {_shown(value) or 'none'}" for key, value in record.items()]
    more = [f"… {len(lines) - _MOST_OTHERS:,} more; --json has all"] if len(lines) > _MOST_OTHERS else []
    return (*lines[:_MOST_OTHERS], *more)


def _imported(origin: Any) -> Any:
    """Return lines on the imported model and its files; an entry of unknown form unchanged."""
    source, library, files = (_at(origin, key) for key in ("source", "format", "sha256"))
    if not isinstance(source, str) or not isinstance(library, str):
        return origin
    lines = [
        f"{key.replace('_', ' ')} {text}" for key in origin if key not in _ORIGIN and (text := _shown(origin[key]))
    ]
    hashes = files if isinstance(files, dict) else {}
    lines += [f"SHA-256 {_shown(digest)[:12]}…, {name}" for name, digest in hashes.items()]
    return (f"{source}, {library}", *_shortened(lines))


def _contact_head(record: Any) -> Any:
    """Return lines on the structures of the fit and the precision on others; an entry of unknown form unchanged."""
    ids, rows = _at(record, "fitted_on"), _at(record, "precision", "model")
    if not isinstance(ids, list):
        return record
    keys = [key for key in ("contact", "separation", "C", "solver") if _at(record, key) is not None]
    settings = [f"{key} {_shown(_at(record, key))}" for key in keys]
    means = [
        f"{_shown(_at(row, 'range'))} {_shown(_at(row, 'top'))} {mean:.3f}"
        for row in (rows if isinstance(rows, list) else [])
        if (mean := _real(_at(row, "mean"))) is not None
    ]
    held_out = f"on {_shown(_at(record, 'held_out_structures'))} others: {', '.join(means)}" if means else ""
    return (f"{len(ids):,} structures: {_shown(ids)}", ", ".join(settings), *([held_out] if held_out else []))


def _shortened(lines: list[str]) -> tuple[str, ...]:
    """Return the first and last few lines of a long list."""
    if (more := len(lines) - 2 * _FILES_AT_AN_END) <= 0:
        return tuple(lines)
    return (*lines[:_FILES_AT_AN_END], f"… {more:,} more; --json has all", *lines[-_FILES_AT_AN_END:])


def _averaged_file(source: Any) -> str:
    step, digest, name = (_at(source, key) for key in ("steps", "weights_sha256", "file"))
    parts = [step is not None and f"step {_shown(step)}", isinstance(digest, str) and f"SHA-256 {digest[:12]}…"]
    return ", ".join(part for part in [*parts, _shown(name)] if part) if isinstance(source, dict) else _shown(source)


def _labelled(label: str, value: Any) -> list[str]:
    """Return `label   value` as wrapped lines, with a line for each part of a tuple; nothing for a missing value."""
    first, *others = value if isinstance(value, tuple) else (_shown(value),)
    start = f"{escaped(label, _LABEL - 1):<{_LABEL - 1}} "
    return (_row(first, start) if first else []) + [line for other in others for line in _row(other)]


def _row(text: str, start: str = " " * _LABEL) -> list[str]:
    """Return the wrapped lines of an untrusted text."""
    wrapped = textwrap.wrap(escaped(text, _LONGEST_TEXT), _LINE - len(start), break_on_hyphens=False)
    return [(" " * len(start) if number else start) + line for number, line in enumerate(wrapped)]


def inspect(arguments: Sequence[str]) -> None:
    """Run `bionemo-esm inspect FILE [--verify] [--json]` for a `.nemo` or a `.ckpt`."""
    parser = argparse.ArgumentParser("bionemo-esm inspect", description="Show what a model or a checkpoint is.")
    parser.add_argument("file", type=Path, help="a model (.nemo) or a checkpoint (.ckpt)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its hash with the manifest")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    run_to_exit_code(lambda: _inspect(options), "Interrupted.")


def _inspect(options: argparse.Namespace) -> int:
    file, console = ArchiveFile.open(options.file), Console(sys.stdout)
    card = ArchiveSummary.of(file)
    console.print_line(json.dumps(card.to_dict(), indent=2) if options.json else card.text())
    if options.verify:
        file.verify(every_hash=True, progress=ProgressBar(Console(sys.stdout, silent=options.json), "read"))
        if not options.json:
            console.print_line("\nEvery member matches its hash in the manifest.")
    return 0
