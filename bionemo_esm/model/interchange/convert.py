"""Import of models from other libraries, and export of archives to them, for scripts, notebooks and the command line.

    from bionemo_esm.model.interchange.convert import export_model, import_model

Tensors are converted one at a time. Outputs are written atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, ArchiveFile, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.export import DTYPES, SHARD_BYTES, ExportReport, Progress
from bionemo_esm.model.interchange.formats import Conversion
from bionemo_esm.model.interchange.state_dict_adapter import ImportedWeights, SourceModel, resize_positions, to_native
from bionemo_esm.model.tensor_io import LazyTensors
from bionemo_esm.model.validate import package_versions
from bionemo_esm.settings import expand_home


@dataclass(frozen=True)
class ImportReport:
    """The result of an import."""

    output: Path
    config: EncoderConfig
    precision: str  # "32" or "bf16"
    weights_sha256: str
    provenance: Mapping[str, Any]  # written to the archive
    notes: tuple[str, ...]  # omitted, added and changed contents, as messages for the user


def import_model(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    seq_length: int | None = None,
    stretch_positions: bool = False,
    precision: str | None = None,
    progress: Progress = lambda done, total: None,
    tell: Callable[[SourceModel, ImportedWeights], None] = lambda source, imported: None,
) -> ImportReport:
    """Convert a Hugging Face folder, a model on the Hub or a fair-esm `.pt` to a `.nemo`.

    Each tensor of the source is converted or listed in the report's notes; any other is an error.

    revision: a branch, tag or commit of a model on the Hub. seq_length, stretch_positions: see
    `state_dict_adapter.resize_positions`. precision: "32" or "bf16"; None keeps the precision of the source, and
    converts float16 to float32. `tell` is called after everything except the weights is read. Raises `UserError`
    (`ConfigError`, `InterchangeError`, `ArchiveError`).
    """
    conversion = Conversion.of(str(source), expand_home(output), revision, precision)
    if conversion.is_export:
        raise ConfigError(f"source: {source} is an archive of this package already; export_model exports it")
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, None)

    model = conversion.source_format.read(conversion.source, revision, count)
    imported = to_native(model.tensors, model.config, model.key_mapping)
    imported = _cast(resize_positions(imported, seq_length, stretch_positions), precision)
    notes = (*model.notes, *imported.notes)
    tell(model, replace(imported, notes=notes))
    provenance = {**model.provenance, "notes": list(notes), "package_versions": package_versions()}
    config = {"encoder": imported.config.to_dict(), "precision": imported.precision, "seed": 0}
    weights = _metered(imported.weights, progress)
    write_archive(conversion.target, Archive("ESM1nvModel", config, weights, provenance))
    sha256 = ArchiveFile.open(conversion.target).weights_sha256
    return ImportReport(conversion.target, imported.config, imported.precision, sha256, provenance, notes)


def export_model(
    source: str | Path,
    target: str | Path,
    *,
    precision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Export a `.nemo` or a `.ckpt` to a folder that `EsmForMaskedLM.from_pretrained` loads.

    The suffix of the target selects another format of `FORMATS`. precision: "32" or "bf16"; None keeps the precision of
    the archive. Raises `UserError` as `import_model` does.
    """
    conversion = Conversion.of(str(source), expand_home(target), precision=precision)
    if not conversion.is_export:
        description = conversion.source_format.description
        raise ConfigError(f"source: {source} is {description}, not an archive of ours; import_model takes it in")
    file = ArchiveFile.open(expand_home(source))
    return conversion.target_format.write(
        file, conversion.target, precision=precision, shard_bytes=shard_bytes, progress=progress
    )


def _cast(imported: ImportedWeights, precision: str | None) -> ImportedWeights:
    """Convert the weights to another precision; tensors that training does not change stay float32."""
    if precision is None or precision == imported.precision:
        return imported
    fixed, weights, dtype = dict(imported.config.fixed_tensors()), imported.weights, DTYPES[precision]
    outline = {name: item if name in fixed else item.to(dtype) for name, item in weights.outline.items()}
    cast = LazyTensors(outline, lambda name: weights[name] if name in fixed else weights[name].to(dtype))
    note = "weights rounded to bfloat16" if precision == "bf16" else "bfloat16 weights kept, exactly, as float32"
    return replace(imported, precision=precision, weights=cast, notes=(*imported.notes, note))


def _metered(weights: LazyTensors, progress: Progress) -> LazyTensors:
    """Wrap the weights so that each lookup calls `progress`."""
    total = sum(item.numel() * item.element_size() for item in weights.outline.values())
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = weights[name]
        done += tensor.numel() * tensor.element_size()
        progress(done, total)
        return tensor

    return LazyTensors(weights.outline, make)
