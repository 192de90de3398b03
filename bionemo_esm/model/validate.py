"""Check that the weights of an archive belong to the model of its configuration, without torch and NeMo.

A class of models that has more than an encoder describes the rest by an `Extension`, which is imported on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, cast

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveError, ArchiveFile
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.registry import MODEL_MODULES

if TYPE_CHECKING:
    from bionemo_esm.model.encoder import ESMEncoder

_RECORDED_PACKAGES = ("bionemo_esm", "torch", "megatron-core", "nemo_toolkit")
_CONFIG_KEYS = {"encoder", "precision", "seed"}
_WEIGHT_DTYPES = {"32": {"F32"}, "bf16": {"BF16"}}  # by the precision in the configuration


class Extension(Protocol):
    """The parts of a model class beside the encoder."""

    CONFIG_KEYS: frozenset[str]
    """Keys of model_config.yaml in addition to those of every model."""

    def extra_tensors(self, config: Mapping[str, Any], sizes: EncoderConfig) -> Mapping[str, tuple[int, ...]]:
        """Return names and shapes of further tensors, float32 at any precision. Raises `ConfigError` for bad values.

        Called after the encoder has been found to be no larger than the file, which bounds all that is computed here.
        """

    def fill(self, encoder: ESMEncoder, config: Mapping[str, Any], copy: Callable[[], None]) -> None:
        """Let `copy` fill the parameters of a plain encoder, and merge into it all that changes its answers."""


def extension_of(file: ArchiveFile) -> Extension | None:
    """Return the extension of an archive's class; None if it has an encoder only."""
    modules = MODEL_MODULES.get(file.model_class)
    return cast(Extension, import_module(modules.extension)) if modules and modules.extension else None


def package_versions() -> dict[str, str]:
    """Return the versions of the software that writes an archive, for its provenance."""
    return {package: version(package) for package in _RECORDED_PACKAGES}


def check_sizes(file: ArchiveFile) -> EncoderConfig:
    """Return the configuration of the encoder in an archive.

    Raises `ArchiveError` unless the weights are those of the model in the configuration. Call it before the model is
    built: a configuration could ask for one that no memory holds.
    """
    where = f"{file.path}: model_config.yaml"
    extension = extension_of(file)
    keys = _CONFIG_KEYS | (extension.CONFIG_KEYS if extension else frozenset())
    for key in sorted(file.config.keys() ^ keys):
        raise ArchiveError(f"{where}: {quoted(key)} is {'missing' if key in keys else 'not a key of a model'}")
    encoder, precision, seed = file.config["encoder"], file.config["precision"], file.config["seed"]
    if not isinstance(encoder, dict) or str(precision) not in _WEIGHT_DTYPES or type(seed) is not int:
        raise ArchiveError(f"{where}: encoder must be a mapping, precision 32 or bf16, seed an integer")
    try:
        sizes = EncoderConfig.from_config(encoder)
        fixed = dict(sizes.fixed_tensors())
        elements = sizes.parameters + sum(map(math.prod, fixed.values()))
        extra: Mapping[str, tuple[int, ...]] = {}
        if extension is not None and elements <= file.weights.elements:
            extra = extension.extra_tensors(file.config, sizes)
            elements += sum(map(math.prod, extra.values()))
    except ConfigError as error:
        raise ArchiveError(f"{where}: {error}") from error
    if elements != file.weights.elements:
        raise ArchiveError(
            f"{where} describes a model of {elements:,} parameters, the file has {file.weights.elements:,}; "
            "one of the two is not of this model"
        )
    _check_tensors(file, sizes, extra)
    in_float32 = {**fixed, **extra}
    for name in in_float32:
        if (dtype := file.weights.infos[name].dtype) != "F32":
            raise ArchiveError(f"{file.path}: tensor {name!r} has dtype {dtype}; it is F32 at any precision")
    dtypes = {info.dtype for name, info in file.weights.infos.items() if name not in in_float32}
    if dtypes != _WEIGHT_DTYPES[str(precision)]:
        raise ArchiveError(f"{file.path}: weights have dtype {', '.join(sorted(dtypes))}, the precision is {precision}")
    return sizes


def _check_tensors(file: ArchiveFile, sizes: EncoderConfig, extra: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every tensor of the model is there in its shape, and no other; stop at the first fault."""
    unknown = set(file.weights.infos)
    for name, shape in chain(sizes.tensors(), sizes.fixed_tensors(), extra.items()):
        if name not in unknown:
            raise ArchiveError(f"{file.path}: tensor {name!r} is missing")
        if (found := file.weights.infos[name].shape) != shape:
            raise ArchiveError(f"{file.path}: tensor {name!r} has shape {list(found)}, the model {list(shape)}")
        unknown.remove(name)
    if unknown:
        raise ArchiveError(f"{file.path}: tensor {quoted(min(unknown))} is not part of this model")
