"""How NeMo saves and restores our models: its `SaveRestoreConnector`, over our archive.

NeMo's own connector unpickles weights, changes the working directory while it restores, and refuses classes from
outside NeMo. Ours takes its place inside `nemo.core.classes.ModelPT`, handles our archives, and leaves all others to
NeMo's; so `ModelPT.restore_from(path)` works for both.
"""

from __future__ import annotations

import math
import os
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import modelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, is_our_archive, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.container import quoted
from bionemo_esm.model.parallel import own_shard

MODEL_CLASSES: dict[str, Any] = {}
"""Our registry: the names that an archive may give, and the classes they stand for."""

_RECORDED_PACKAGES = ("bionemo_esm", "torch", "megatron-core", "nemo_toolkit")
_UNSAFE_TORCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CONFIG_KEYS = {"encoder", "precision", "seed"}
_WEIGHT_DTYPES = {"32": {"F32"}, "bf16": {"BF16"}}  # by the precision that the configuration gives


def register_model(cls: Any) -> Any:
    """Class decorator: make a model restorable by its name."""
    MODEL_CLASSES[cls.__name__] = cls
    return cls


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters and buffers of the same names, every one accounted for on both sides.

    Raises `ArchiveError` naming the first tensor that is missing, left over, or of another shape.
    """
    parameters: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in sorted(parameters.keys() ^ weights.keys()):
        fault = "missing" if name in parameters else "not part of this model"
        raise ArchiveError(f"{source}: tensor {name!r} is {fault}")
    shards = {name: own_shard(weights[name], parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if parameter.shape != shards[name].shape:
            raise ArchiveError(
                f"{source}: tensor {name!r} has shape {list(shards[name].shape)}, the model {list(parameter.shape)}; "
                "it was saved from a model of another size"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shards[name])


def describe(model: Any) -> Archive:
    """What a model writes of itself, its float32 masters where there are; collective where weights are sharded."""
    versions = {package: version(package) for package in _RECORDED_PACKAGES}
    provenance = {"package_versions": versions, **model.archive_provenance()}
    weights = model.archive_weights()
    return Archive(type(model).__name__, model.archive_config(weights), weights, provenance)


def check_sizes(file: ArchiveFile) -> None:
    """Raises `ArchiveError` unless the weights are those of the model that the configuration describes.

    Checked before that model is built: a configuration could ask for one that no memory holds.
    """
    where = f"{file.path}: model_config.yaml"
    for key in sorted(file.config.keys() ^ _CONFIG_KEYS):
        raise ArchiveError(f"{where}: {quoted(key)} is {'missing' if key in _CONFIG_KEYS else 'not a key of a model'}")
    encoder, precision, seed = file.config["encoder"], file.config["precision"], file.config["seed"]
    if not isinstance(encoder, dict) or str(precision) not in _WEIGHT_DTYPES or type(seed) is not int:
        raise ArchiveError(f"{where}: encoder must be a mapping, precision 32 or bf16, seed an integer")
    try:
        sizes = EncoderConfig.from_mapping(encoder)
    except ConfigError as error:
        raise ArchiveError(f"{where}: {error}") from error
    fixed = dict(sizes.fixed_tensors())
    elements = sizes.parameters + sum(map(math.prod, fixed.values()))
    if elements != file.weights.elements:
        raise ArchiveError(
            f"{where} describes a model of {elements:,} parameters, the file has {file.weights.elements:,}; "
            "one of the two is not of this model"
        )
    _check_tensors(file, sizes)
    for name in fixed:
        if (dtype := file.weights.infos[name].dtype) != "F32":
            raise ArchiveError(f"{file.path}: tensor {name!r} has dtype {dtype}; it is F32 at any precision")
    dtypes = {info.dtype for name, info in file.weights.infos.items() if name not in fixed}
    if dtypes != _WEIGHT_DTYPES[str(precision)]:
        raise ArchiveError(f"{file.path}: weights have dtype {', '.join(sorted(dtypes))}, the precision is {precision}")


def _check_tensors(file: ArchiveFile, sizes: EncoderConfig) -> None:
    """Every tensor of the model there, in its shape, and no other; ends at the first fault, as sizes have no bound."""
    unknown = set(file.weights.infos)
    for name, shape in chain(sizes.tensors(), sizes.fixed_tensors()):
        if name not in unknown:
            raise ArchiveError(f"{file.path}: tensor {name!r} is missing")
        if (found := file.weights.infos[name].shape) != shape:
            raise ArchiveError(f"{file.path}: tensor {name!r} has shape {list(found)}, the model {list(shape)}")
        unknown.remove(name)
    if unknown:
        raise ArchiveError(f"{file.path}: tensor {quoted(min(unknown))} is not part of this model")


class ESMSaveRestoreConnector(SaveRestoreConnector):
    """Reads and writes archives of `bionemo_esm.model.archive`; anything else goes to NeMo's connector."""

    def save_to(self, model: Any, save_path: str) -> None:
        if type(model).__name__ not in MODEL_CLASSES:
            super().save_to(model, save_path)
            return
        archive = describe(model)
        if is_global_rank_zero():
            write_archive(Path(save_path), archive)

    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """The restored model, in evaluation mode, or its config with `return_config`.

        Overriding the configuration or loading weights in part is refused: an archive is restored as it is.
        """
        path = Path(restore_path)
        if not (is_our_archive(path) or calling_cls.__name__ in MODEL_CLASSES):
            _check_that_torch_is_safe(path)
            return super().restore_from(
                calling_cls, restore_path, override_config_path, map_location, strict, return_config, trainer,
                validate_access_integrity,
            )  # fmt: skip
        if override_config_path is not None or not strict:
            raise ArchiveError(f"{path}: override_config_path and strict=False are not supported; restore it as it is")
        file = ArchiveFile.open(path)
        config = OmegaConf.create(dict(file.config))
        check_sizes(file)
        if return_config:
            return config
        import_module("bionemo_esm.model.esm1nv")  # fills the registry
        model_class = MODEL_CLASSES.get(file.model_class)
        if model_class is None or not issubclass(model_class, calling_cls):
            raise ArchiveError(
                f"{path}: holds a model of class {quoted(file.model_class)}, not a {calling_cls.__name__}"
            )
        weights = file.load_weights()
        model = model_class(config)
        model.provenance = {key: value for key, value in file.provenance.items() if key != "package_versions"}
        load_weights(model, weights, str(path))
        device = map_location or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device).eval()


def _check_that_torch_is_safe(path: Path) -> None:
    """NeMo unpickles archives that are not ours, and relies on torch's safe reader, which this variable turns off."""
    if os.environ.get(_UNSAFE_TORCH, "0").lower() in ("1", "y", "yes", "true"):
        raise ArchiveError(f"{path}: is not an archive of bionemo_esm, and {_UNSAFE_TORCH} is set; unset it")


modelPT.SaveRestoreConnector = ESMSaveRestoreConnector  # makes the plugin known to NeMo
