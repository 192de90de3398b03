"""Saving and restoring models through NeMo: its `SaveRestoreConnector`, over our archive.

NeMo's own connector unpickles weights, changes the working directory while it restores, and refuses classes from
outside NeMo. Ours takes its place inside `nemo.core.classes.ModelPT`, handles our archives, and leaves all others to
NeMo's; so `ModelPT.restore_from(path)` works for both.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bionemo_esm.compat import replace_nemo_connector
from bionemo_esm.model.archive import Archive, ArchiveError, ArchiveFile, is_our_archive, write_archive
from bionemo_esm.model.backends import default_torch_state
from bionemo_esm.model.parallel import held_part, is_fully_sharded, local_shard
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.validate import check_sizes, package_versions
from bionemo_esm.registry import MODEL_MODULES

MODEL_CLASSES: dict[str, Any] = {}
"""Imported classes of models, by the name that an archive gives. `MODEL_MODULES` names the modules of all."""

_UNSAFE_TORCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def register_model(cls: Any) -> Any:
    """Class decorator: let archives name this class."""
    MODEL_CLASSES[cls.__name__] = cls
    return cls


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters and buffers of the same names.

    Raises `ArchiveError`, naming the first tensor that is missing, unknown, or of another shape.
    """
    parameters: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in sorted(parameters.keys() ^ weights.keys()):
        fault = "missing" if name in parameters else "not part of this model"
        raise ArchiveError(f"{source}: tensor {name!r} is {fault}")
    shards = {name: local_shard(weights[name], parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found = weights[name].shape if is_fully_sharded(parameter) else shards[name].shape
        if parameter.shape != found:
            raise ArchiveError(
                f"{source}: tensor {name!r} has shape {list(found)}, the model {list(parameter.shape)}; "
                "it was saved from a model of another size"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            held_part(parameter).copy_(shards[name])


def describe(model: Any) -> Archive:
    """Return the archive of a model, of its float32 masters if it has any. Collective if weights are sharded."""
    provenance = {"package_versions": package_versions(), **model.archive_provenance()}
    weights = model.archive_weights()
    return Archive(type(model).__name__, model.archive_config(weights), weights, provenance)


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
        """Return the restored model, in evaluation mode, or its configuration with `return_config`.

        Raises `ArchiveError` if the configuration is overridden or `strict` is False.
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
        if file.model_class in MODEL_MODULES:
            import_module(MODEL_MODULES[file.model_class].model)  # registers the class
        model_class = MODEL_CLASSES.get(file.model_class)
        if model_class is None or not issubclass(model_class, calling_cls):
            raise ArchiveError(
                f"{path}: holds a model of class {quoted(file.model_class)}, not a {calling_cls.__name__}"
            )
        with default_torch_state():
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


replace_nemo_connector(ESMSaveRestoreConnector)  # makes the plugin known to NeMo
