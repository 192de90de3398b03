"""Models brought in from other libraries, and taken home; the same for a script, a notebook and the command line.

    from bionemo_esm.model.interchange.convert import export_model, import_model

Tensors go from file to file one at a time. What is written is there whole or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bionemo_esm.errors import ConfigError
from bionemo_esm.files import nearest_folder
from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.export import DTYPES, SHARD_BYTES, ExportReport, Progress, export_hugging_face
from bionemo_esm.model.interchange.fair_esm import read_fair_esm
from bionemo_esm.model.interchange.format_detection import Kind, Route, route
from bionemo_esm.model.interchange.hub import fetch_from_hub
from bionemo_esm.model.interchange.huggingface import read_hugging_face
from bionemo_esm.model.interchange.state_dict_adapter import ImportedWeights, SourceModel, resize_positions, to_native
from bionemo_esm.model.tensor_io import LazyTensors
from bionemo_esm.model.validate import package_versions


@dataclass(frozen=True)
class ImportReport:
    """What was read, and what was written."""

    output: Path
    config: EncoderConfig
    precision: str  # "32" or "bf16"
    weights_sha256: str
    provenance: Mapping[str, Any]  # of the archive
    notes: tuple[str, ...]  # what was left out, filled in or changed


def import_model(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    seq_length: int | None = None,
    stretch_positions: bool = False,
    precision: str | None = None,
    progress: Progress = lambda done, total: None,
    tell: Callable[[SourceModel, ImportedWeights], None] = lambda foreign, taken: None,
) -> ImportReport:
    """Write a Hugging Face folder, a model on the Hub or a fair-esm `.pt` as a `.nemo`, every tensor accounted for.

    `revision`: a branch, tag or commit of a model on the Hub. `seq_length`, `stretch_positions`: see
    `stretching.resized`. `precision`: "32" or "bf16"; None as the source's, whose float16 becomes float32. `tell` is
    called once all is read but the weights. Raises `UserError` (`ConfigError`, `InterchangeError`, `ArchiveError`).
    """
    way = route(str(source), Path(output).expanduser())
    if way.is_export:
        raise ConfigError(f"source: {source} is an archive of ours already; export_model takes it home")
    way.check(revision, precision)
    with _read(way, revision, progress) as foreign:
        taken = to_native(foreign.tensors, foreign.config, foreign.dialect)
        taken = _cast(resize_positions(taken, seq_length, stretch_positions), precision)
        notes = (*foreign.notes, *taken.notes)
        tell(foreign, replace(taken, notes=notes))
        provenance = {**foreign.provenance, "notes": list(notes), "package_versions": package_versions()}
        config = {"encoder": taken.config.to_dict(), "precision": taken.precision, "seed": 0}
        weights = _metered(taken.weights, progress)
        write_archive(way.target, Archive("ESM1nvModel", config, weights, provenance))
    written = ArchiveFile.open(way.target)
    return ImportReport(way.target, taken.config, taken.precision, written.weights_sha256, provenance, notes)


def export_model(
    source: str | Path,
    folder: str | Path,
    *,
    precision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write a `.nemo` or a `.ckpt` of ours as a folder that `EsmForMaskedLM.from_pretrained` loads.

    `precision`: "32" or "bf16", None as the archive's. Raises `UserError` as `import_model`.
    """
    way = route(str(source), Path(folder).expanduser())
    if not way.is_export:
        raise ConfigError(f"source: {source} is {way.kind.value}, not an archive of ours; import_model takes it in")
    way.check(None, precision)
    file = ArchiveFile.open(Path(source).expanduser())
    return export_hugging_face(file, way.target, precision=precision, shard_bytes=shard_bytes, progress=progress)


@contextmanager
def _read(way: Route, revision: str | None, progress: Progress) -> Iterator[SourceModel]:
    """The foreign model, and for as long a folder on the target's disk for what a pickle is turned into."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, None)

    with _scratch(way.target) as scratch:
        if way.kind is Kind.FAIR_ESM:
            yield read_fair_esm(Path(way.source).expanduser(), scratch, tell=tell)
        elif way.kind is Kind.FOLDER:
            yield read_hugging_face(Path(way.source).expanduser(), scratch, tell=tell)
        else:
            folder, commit = fetch_from_hub(way.source, revision)
            yield read_hugging_face(folder, scratch, source=way.source, revision=commit, tell=tell)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    place = nearest_folder(target)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=place)
    except OSError as error:
        raise ConfigError(f"target: {target} cannot be made: {place}: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def _cast(taken: ImportedWeights, precision: str | None) -> ImportedWeights:
    """The model in another precision; what training leaves as it is stays float32."""
    if precision is None or precision == taken.precision:
        return taken
    fixed, weights, dtype = dict(taken.config.fixed_tensors()), taken.weights, DTYPES[precision]
    outline = {name: item if name in fixed else item.to(dtype) for name, item in weights.outline.items()}
    cast = LazyTensors(outline, lambda name: weights[name] if name in fixed else weights[name].to(dtype))
    note = "weights rounded to bfloat16" if precision == "bf16" else "bfloat16 weights kept, exactly, as float32"
    return replace(taken, precision=precision, weights=cast, notes=(*taken.notes, note))


def _metered(weights: LazyTensors, progress: Progress) -> LazyTensors:
    """The weights, progress told as they are made, to be written and hashed."""
    total = sum(item.numel() * item.element_size() for item in weights.outline.values())
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = weights[name]
        done += tensor.numel() * tensor.element_size()
        progress(done, total)
        return tensor

    return LazyTensors(weights.outline, make)
