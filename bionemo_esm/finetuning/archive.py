"""The archive of a fine-tuned model: its configuration and tensors beside the encoder's, checked and opened.

A `.nemo` of class `ESMFineTunedModel`. Its configuration has the further keys task, head, reading and adapters. Its
tensors are the encoder's, as in a pretrained archive, then `head.*`, and for adapters that were not merged
`encoder.….lora_a` and `lora_b`; these are float32 at any `precision`. This module is the `Extension` through which the
model layer knows the class; importing it imports no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import AdapterConfig, Parts, ReadingConfig
from bionemo_esm.finetuning.tasks import Task, from_archive
from bionemo_esm.inference.engine_options import ModelSizes, open_model_file
from bionemo_esm.model.archive import ArchiveError, ArchiveFile
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.safe_serialization import check_plain
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.validate import check_sizes

if TYPE_CHECKING:  # these import torch
    from torch import Tensor, nn

    from bionemo_esm.model.encoder import ESMEncoder

MODEL_CLASS = "ESMFineTunedModel"
CONFIG_KEYS = frozenset({"task", "head", "reading", "adapters"})
_HEAD = "head."  # of the tensors' names
_LARGEST = 1 << 20  # a size of a head or an adapter: no product of those overflows


@dataclass(frozen=True)
class FineTunedFile:
    """An archive of a fine-tuned model whose small members are read and whose tensor sizes are checked."""

    file: ArchiveFile
    sizes: EncoderConfig
    task: Task
    parts: Parts

    @classmethod
    def open(cls, path: Path) -> FineTunedFile:
        """Open an archive. Raises `ArchiveError` for another file, an inconsistent one, or a model without a head."""
        file = open_model_file(path)
        if file.model_class != MODEL_CLASS:
            raise ArchiveError(
                f"model: {file.path}: holds a model of class {quoted(file.model_class)}, which predicts nothing of a "
                "task; `bionemo-esm finetune` makes one that does"
            )
        sizes = check_sizes(file)
        return cls(file, sizes, *described(file.config, sizes))

    def head(self) -> nn.Module:
        """Return the head with its weights, float32, in evaluation mode. Raises `ArchiveError` for NaN or infinity.

        The hash of the weights is not checked here; loading the encoder does that.
        """
        import torch

        from bionemo_esm.finetuning.heads import build_head

        with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
            head = build_head(self.parts.head, self.task, self.sizes.hidden_size)
        own: dict[str, Tensor] = dict(head.named_parameters()) | dict(head.named_buffers())
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self.file.load_finite(_HEAD + name))
        return head.float().eval()


def archive_config(encoder: EncoderConfig, precision: str, seed: int, task: Task, parts: Parts) -> dict[str, Any]:
    """Return the content of model_config.yaml; `precision`, "32" or "bf16", is the encoder's.

    Raises `ConfigError` for values that could not be read again, such as a class named `${x}`: call it before training.
    """
    config = {
        "encoder": encoder.to_dict(),
        "precision": precision,
        "seed": seed,
        "task": task.to_dict(),
        **parts.to_dict(),
    }
    try:
        check_plain(config)
    except ValueError as error:
        raise ConfigError(f"{error}; an archive cannot hold it, so give it another name") from error
    described(config, encoder)
    return config


def described(config: Mapping[str, Any], sizes: EncoderConfig) -> tuple[Task, Parts]:
    """Return task and parts of a model_config.yaml, checked against the encoder.

    Raises `ConfigError`, naming the key, for a value of the wrong type or one that does not fit the encoder.
    """
    for key in ("task", "head", "reading", "adapters"):
        if not isinstance(config[key], dict) and not (key == "adapters" and config[key] is None):
            raise ConfigError(f"{key} must be a mapping, not {quoted(config[key])}", code="config.type")
    task, parts = Task.from_mapping(config["task"]), parts_of(config)
    sections = {"head": parts.head, "adapters": parts.adapters}
    for section, settings in sections.items():
        for name, value in [] if settings is None else settings.model_dump().items():
            if isinstance(value, int) and value > _LARGEST:
                raise ConfigError(f"{section}.{name} may be up to {_LARGEST:,}, not {value:,}", code="config.value")
    _check_reading(parts.reading, ModelSizes(sizes))
    return task, parts


def parts_of(config: Mapping[str, Any]) -> Parts:
    """Return the parts that `Parts.to_dict` wrote. Raises `ConfigError`, naming the key; imports torch."""
    from bionemo_esm.finetuning.heads import archived_head_config

    adapters = config["adapters"]
    return Parts(
        archived_head_config(config["head"]),
        from_archive(ReadingConfig, "reading", config["reading"]),
        None if adapters is None else from_archive(AdapterConfig, "adapters", adapters),
    )


def _check_reading(reading: ReadingConfig, model: ModelSizes) -> None:
    if reading.layer > model.layers:
        raise ConfigError(f"reading.layer is {reading.layer}, the encoder has 0 (the embeddings) to {model.layers}")
    if model.longest is not None and reading.window > model.longest:
        raise ConfigError(f"reading.window is {reading.window}, the encoder reads up to {model.longest} residues")


def extra_tensors(config: Mapping[str, Any], sizes: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of head and adapters; see `Extension`. Raises as `described`."""
    task, parts = described(config, sizes)
    from bionemo_esm.finetuning.heads import head_shapes

    shapes = head_shapes(parts.head, task, sizes.hidden_size).items()
    found = {_HEAD + name: tuple(shape) for name, shape in shapes}
    if parts.adapters is not None:
        with warnings.catch_warnings():  # Megatron's, without Apex and Transformer Engine
            warnings.simplefilter("ignore")
            from bionemo_esm.finetuning.adapters import adapter_shapes

        adapters = adapter_shapes(parts.adapters, sizes).items()
        found |= {f"encoder.{name}": tuple(shape) for name, shape in adapters}
    return found


def fill(encoder: ESMEncoder, config: Mapping[str, Any], copy: Callable[[], None]) -> None:
    """Fill a plain encoder, and add the adapters' products to its weights. See `Extension`."""
    adapters = parts_of(config).adapters
    if adapters is None:
        copy()
        return
    from bionemo_esm.finetuning.adapters import add_adapters, merge_adapters

    add_adapters(encoder, adapters)
    copy()
    merge_adapters(encoder, adapters)
