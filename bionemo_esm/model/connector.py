"""How NeMo saves and restores our models: its `SaveRestoreConnector`, over our archive.

NeMo's own connector unpickles weights, changes the working directory while it restores, and refuses classes from
outside NeMo. Ours takes its place inside `nemo.core.classes.ModelPT`, handles our archives, and leaves all others to
NeMo's; so `ModelPT.restore_from(path)` works for both.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import modelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bionemo_esm.model.archive import Archive, ArchiveError, is_our_archive, read_archive, write_archive

MODEL_CLASSES: dict[str, Any] = {}
"""Our registry: the names that an archive may give, and the classes they stand for."""

_RECORDED_PACKAGES = ("bionemo_esm", "torch", "megatron-core", "nemo_toolkit")


def register_model(cls: Any) -> Any:
    """Class decorator: make a model restorable by its name."""
    MODEL_CLASSES[cls.__name__] = cls
    return cls


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters of the same names, every one accounted for on both sides.

    Raises `ArchiveError` naming the first tensor that is missing, left over, or of another shape.
    """
    parameters = dict(module.named_parameters())
    for name in sorted(parameters.keys() ^ weights.keys()):
        fault = "missing" if name in parameters else "not part of this model"
        raise ArchiveError(f"{source}: tensor {name!r} is {fault}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ArchiveError(
                f"{source}: tensor {name!r} has shape {list(weights[name].shape)}, the model {list(parameter.shape)}; "
                "it was saved from a model of another size"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


class ESMSaveRestoreConnector(SaveRestoreConnector):
    """Reads and writes archives of `bionemo_esm.model.archive`; anything else goes to NeMo's connector."""

    def save_to(self, model: Any, save_path: str) -> None:
        if type(model).__name__ not in MODEL_CLASSES:
            super().save_to(model, save_path)
        elif is_global_rank_zero():
            versions = {package: version(package) for package in _RECORDED_PACKAGES}
            provenance = {"package_versions": versions, **model.provenance}
            config, weights = model.archive_config(), model.archive_weights()
            write_archive(Path(save_path), Archive(type(model).__name__, config, weights, provenance))

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
            return super().restore_from(
                calling_cls, restore_path, override_config_path, map_location, strict, return_config, trainer,
                validate_access_integrity,
            )  # fmt: skip
        if override_config_path is not None or not strict:
            raise ArchiveError(f"{path}: override_config_path and strict=False are not supported; restore it as it is")
        archive = read_archive(path, with_weights=not return_config)
        config = OmegaConf.create(dict(archive.config))
        if return_config:
            return config
        import_module("bionemo_esm.model.esm1nv")  # fills the registry
        model_class = MODEL_CLASSES.get(archive.model_class)
        if model_class is None or not issubclass(model_class, calling_cls):
            raise ArchiveError(f"{path}: holds a model of class {archive.model_class!r}, not a {calling_cls.__name__}")
        model = model_class(config)
        load_weights(model, dict(archive.weights), str(path))
        device = map_location or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device).eval()


modelPT.SaveRestoreConnector = ESMSaveRestoreConnector  # makes the plugin known to NeMo
