"""A model as Hugging Face `transformers` saves it: a folder with `config.json` and weights in one file or in shards.

safetensors are preferred; a `pytorch_model.bin` is turned into them first, by another process. What an index gives to a
shard and what the shard holds must be the same. Weights that neither the usual name nor the index leads to are left
aside, with a note: `transformers` does not read them either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bionemo_esm.model.container import ArchiveError, Section, hash_section, quoted, readable
from bionemo_esm.model.interchange.dialects import HUGGING_FACE
from bionemo_esm.model.interchange.foreign import ForeignModel
from bionemo_esm.model.interchange.huggingface_config import CONFIG, HuggingFaceConfig, read_config, read_json
from bionemo_esm.model.interchange.translation import ForeignTensors, InterchangeError
from bionemo_esm.model.pickles import LFS_POINTER, PickledTensors, convert_pickle
from bionemo_esm.model.tensors import TensorTable

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "tf_model*.h5", "flax_model*.msgpack")
_PICKLE_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


@dataclass(frozen=True)
class _Weights:
    """The files to be read and, where an index says so, the names of the tensors in each."""

    files: tuple[Path, ...]
    index: Path | None = None
    names: Mapping[str, frozenset[str]] | None = None  # by the file's name

    @property
    def is_pickle(self) -> bool:
        return self.files[0].suffix == ".bin"


def read_hugging_face(
    folder: Path,
    scratch: Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    tell: Callable[[int], None] = lambda count: None,
) -> ForeignModel:
    """An ESM in a folder as `EsmForMaskedLM.save_pretrained` writes it, of any version of transformers that has ESM.

    `scratch`: an empty folder, private to us, that must last as long as the tensors are used: a `pytorch_model.bin` is
    turned into safetensors there. `source` and `revision`: where the folder is from, for the provenance; without them
    it is the folder's name. `tell` is given the bytes of each piece that has been hashed.

    Raises `InterchangeError`, `PickleError` or `ArchiveError`, naming the file and the key or tensor: for a
    configuration that our encoder cannot follow, for files that are missing, cut short or of another kind, and for an
    index that does not fit them. The tensors themselves are accounted for by `translation.take`.
    """
    if not folder.is_dir():
        raise InterchangeError(f"{folder}: no such folder; give one with config.json and model.safetensors in it")
    config = read_config(folder)
    weights, notes = _find_weights(folder)
    tables = [_open(file, scratch) for file in weights.files]
    _check_against_index(weights, tables)
    tensors = ForeignTensors.of(str(folder), tables, HUGGING_FACE)
    _check_plausible(folder, tensors, config)
    provenance = _provenance(
        source or folder.resolve().name, revision, config, [folder / CONFIG, *_read(weights)], tell
    )
    origin = {"imported_from": provenance}
    return ForeignModel(HUGGING_FACE, config.encoder, tensors, origin, (*config.notes, *notes))


# --- which files ------------------------------------------------------------------------------------------------------


def _find_weights(folder: Path) -> tuple[_Weights, tuple[str, ...]]:
    """The weights to be read, safetensors where there are any, and a note on those that are left aside."""
    for name in (SAFETENSORS, PICKLE):
        single, index = folder / name, folder / f"{name}{INDEX_SUFFIX}"
        if _is_there(single) and _is_there(index):
            raise InterchangeError(
                f"{folder}: has both {single.name} and {index.name}, and they may be two models; move away the one "
                "that is not meant"
            )
        if _is_there(single):
            return _with_notes(folder, _Weights((_regular(single),)))
        if _is_there(index):
            return _with_notes(folder, _indexed(index))
    raise _nothing_found(folder)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nothing is a broken download, not an absent file


def _regular(path: Path, index: Path | None = None) -> Path:
    if path.is_file():
        return path
    fault = "is not a file" if path.exists() else "is a link to nothing" if path.is_symlink() else "no such file"
    by = f", which {index.name} names" if index else ""
    raise InterchangeError(f"{path}: {fault}{by}; copy or download it again")


def _indexed(index: Path) -> _Weights:
    """The shards of an index, in the order of their names."""
    values = read_json(index)
    placed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise InterchangeError(f"{index}: has no weight_map from tensors to files; copy or download it again")
    suffix = PurePosixPath(index.name.removesuffix(INDEX_SUFFIX)).suffix
    names: dict[str, set[str]] = {}
    for tensor, file in placed.items():
        if "/" in file or "\\" in file or "\0" in file or not file.endswith(suffix) or file == suffix:
            raise InterchangeError(
                f"{index}: gives tensor {quoted(tensor)} to {quoted(file)}; a shard lies beside its index and is named "
                f"like {index.name.removesuffix(suffix + INDEX_SUFFIX)}-00001-of-00002{suffix}"
            )
        names.setdefault(file, set()).add(tensor)
    files = tuple(_regular(index.parent / file, index) for file in sorted(names))
    return _Weights(files, index, {file: frozenset(tensors) for file, tensors in names.items()})


def _with_notes(folder: Path, weights: _Weights) -> tuple[_Weights, tuple[str, ...]]:
    others = _weight_files(folder) - {file.name for file in weights.files}
    leader = weights.index or weights.files[0]
    return weights, tuple(f"left aside: {quoted(name)}, as {leader.name} is read" for name in sorted(others))


def _weight_files(folder: Path) -> set[str]:
    with readable(folder):
        return {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}


def _nothing_found(folder: Path) -> InterchangeError:
    there = sorted(_weight_files(folder))
    why = f"neither {SAFETENSORS} nor {PICKLE} is there, nor an index of shards"
    if any(name.startswith("adapter_model") for name in there):
        why = (
            f"{there[0]} is an adapter, not a model; merge it into its model with `merge_and_unload` of peft, and save"
        )
    elif any(name.startswith(("tf_model", "flax_model")) for name in there):
        why = f"{there[0]} is not for PyTorch; load it with transformers once (from_tf or from_flax) and save it again"
    elif there:
        why += f", only {', '.join(map(quoted, there[:3]))}: give it the usual name, or copy the index as well"
    return InterchangeError(f"{folder}: {why}")


# --- what is in them --------------------------------------------------------------------------------------------------


def _open(file: Path, scratch: Path) -> TensorTable:
    """The tensors of a file. Raises `InterchangeError` or `PickleError` for what is not as its name says."""
    if file.suffix == ".bin":
        return _converted(file, scratch / f"{file.name}.safetensors")
    with readable(file), file.open("rb") as stream:
        beginning = stream.read(64)
        size = file.stat().st_size
    try:
        return TensorTable.open(file, "it", Section(0, size))  # so that messages do not name the file twice
    except ArchiveError as error:
        why = _disguise(beginning)
        if why is None:
            raise InterchangeError(f"{error}. It may be cut short; copy or download it again") from error
        raise InterchangeError(f"{file}: {why}") from error


def _disguise(beginning: bytes) -> str | None:
    """What a file is that is no safetensors, and what to do; None where that cannot be told."""
    if not beginning:
        return "is empty; copy or download it again"
    if beginning.startswith(LFS_POINTER):
        return "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
    if beginning.startswith((b"PK\x03\x04", *_PICKLE_PROTOCOLS)):
        return (
            f"is a pickle by PyTorch and not safetensors; ask its author for safetensors, or name it {PICKLE} to have "
            "it opened with the care that pickles need"
        )
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page and not safetensors; the download went wrong, try again"
    return None


def _converted(file: Path, output: Path) -> TensorTable:
    others = convert_pickle(file, output)
    if others:
        name, value = next(iter(others.items()))
        raise InterchangeError(
            f"{file}: {quoted(name)} is no tensor but {quoted(value)}; a state dict with tensors and nothing else is "
            "expected, as save_pretrained writes it"
        )
    return PickledTensors.of(file, output)


def _check_against_index(weights: _Weights, tables: list[TensorTable]) -> None:
    """Each shard holds what the index gives it: a shard of another model or of an earlier save would be noticed."""
    if weights.names is None or weights.index is None:
        return
    for file, table in zip(weights.files, tables, strict=True):
        expected = weights.names[file.name]
        for name in sorted(expected ^ table.infos.keys()):
            fault = "does not hold" if name in expected else "holds"
            but = "gives to it" if name in expected else "does not give to it"
            raise InterchangeError(
                f"{file}: {fault} tensor {quoted(name)}, which {weights.index.name} {but}; they are not of one model, "
                "copy or download both again"
            )


def _check_plausible(folder: Path, tensors: ForeignTensors, config: HuggingFaceConfig) -> None:
    """What can be said better here than by the account of all tensors, or would make that account endless."""
    if not any(name.startswith("lm_head.") for name in tensors.places):
        raise InterchangeError(
            f"{folder}: the weights have no output head (lm_head), so they are of an EsmModel, or of a model for "
            "another task; take the EsmForMaskedLM that it was made from"
        )
    told, there = config.encoder.num_layers, tensors.layers(HUGGING_FACE)
    if told != there:
        raise InterchangeError(
            f"{folder / CONFIG}: num_hidden_layers is {told:,}, but the weights are of {there:,} layers; they do not "
            "belong together, copy or download both again"
        )


# --- where it is from -------------------------------------------------------------------------------------------------


def _read(weights: _Weights) -> list[Path]:
    return [*([weights.index] if weights.index else []), *weights.files]


def _provenance(
    source: str,
    revision: str | None,
    config: HuggingFaceConfig,
    files: list[Path],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """Plain values: what was read, from where, and its SHA-256."""
    return {
        "format": "Hugging Face",
        "source": source,
        "revision": revision,
        "transformers_version": config.transformers_version,
        "sha256": {file.name: hash_section(file, Section(0, _size(file)), tell) for file in files},
    }


def _size(file: Path) -> int:
    with readable(file):
        return file.stat().st_size
