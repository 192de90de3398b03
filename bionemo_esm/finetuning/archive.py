"""The archive of a fine-tuned model: what it has beside an encoder, and how it is checked and opened.

A `.nemo` of class `ESMFineTunedModel`. Its configuration says task, head, reading and adapters as well. Its weights are
the encoder's, as in a pretrained archive, then `head.*`, and where adapters were not merged `encoder.….lora_a` and
`lora_b`; these are float32, also where `precision` has the encoder in bf16. It needs no other file. This module is the
`Extension` by which the model floor knows the class; importing it is cheap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import Parts, ReadingConfig
from bionemo_esm.finetuning.tasks import Task
from bionemo_esm.inference.engine_options import ModelSizes, open_model_file
from bionemo_esm.model.archive import ArchiveError, ArchiveFile
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.safe_serialization import check_plain
from bionemo_esm.model.tar_format import quoted
from bionemo_esm.model.validate import check_sizes

if TYPE_CHECKING:  # they import torch
    from torch import Tensor, nn

    from bionemo_esm.model.encoder import ESMEncoder

MODEL_CLASS = "ESMFineTunedModel"
CONFIG_KEYS = frozenset({"task", "head", "reading", "adapters"})
_HEAD = "head."  # of the tensors' names
_LARGEST = 1 << 20  # of a number that sizes a head or an adapter: no product of those overflows


@dataclass(frozen=True)
class FineTunedFile:
    """An archive of a fine-tuned model, its small members read, and the sizes of its weights checked."""

    file: ArchiveFile
    sizes: EncoderConfig
    task: Task
    parts: Parts

    @classmethod
    def open(cls, path: Path) -> FineTunedFile:
        """Raises `ArchiveError` for a file that is none of ours, contradicts itself, or has a model without a head."""
        file = open_model_file(path)
        if file.model_class != MODEL_CLASS:
            raise ArchiveError(
                f"model: {file.path}: holds a model of class {quoted(file.model_class)}, which predicts nothing of a "
                "task; `bionemo-esm finetune` makes one that does"
            )
        sizes = check_sizes(file)
        return cls(file, sizes, *described(file.config, sizes))

    def head(self) -> nn.Module:
        """The head with its weights, float32, in evaluation mode. Raises `ArchiveError` for what is not finite.

        The weights are taken as they lie there; whoever loads the encoder has their hash checked.
        """
        import torch

        from bionemo_esm.finetuning.heads import build_head

        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
            head = build_head(self.parts.head, self.task, self.sizes.hidden_size)
        own: dict[str, Tensor] = dict(head.named_parameters()) | dict(head.named_buffers())
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self.file.load_finite(_HEAD + name))
        return head.float().eval()


def archive_config(encoder: EncoderConfig, precision: str, seed: int, task: Task, parts: Parts) -> dict[str, Any]:
    """What model_config.yaml says of a fine-tuned model; `precision`, "32" or "bf16", is the encoder's.

    Raises `ConfigError` for what could not be read again, such as a class named `${x}`: call it before training.
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
    """Task and parts that model_config.yaml describes, checked against the encoder.

    Raises `ConfigError`, naming the key, for a value of the wrong kind, and for what does not go with the encoder.
    """
    for key in ("task", "head", "reading", "adapters"):
        if not isinstance(config[key], dict) and not (key == "adapters" and config[key] is None):
            raise ConfigError(f"{key} must be a mapping, not {quoted(config[key])}")
    task, parts = Task.from_mapping(config["task"]), Parts.from_mapping(config)
    head, adapters = parts.head, parts.adapters
    rank = 0 if adapters is None else adapters.rank
    for name, value in (("head.hidden", head.hidden), ("head.kernel_size", head.kernel_size), ("adapters.rank", rank)):
        if value > _LARGEST:
            raise ConfigError(f"{name} may be up to {_LARGEST:,}, not {value:,}")
    _check_reading(parts.reading, ModelSizes(sizes))
    return task, parts


def _check_reading(reading: ReadingConfig, model: ModelSizes) -> None:
    if reading.layer > model.layers:
        raise ConfigError(f"reading.layer is {reading.layer}, the encoder has 0 (the embeddings) to {model.layers}")
    if model.longest is not None and reading.window > model.longest:
        raise ConfigError(f"reading.window is {reading.window}, the encoder reads up to {model.longest} residues")


def extra_tensors(config: Mapping[str, Any], sizes: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of head and adapters; see `Extension`. Raises `ConfigError` as `described`."""
    task, parts = described(config, sizes)
    from bionemo_esm.finetuning.heads import head_shapes

    shapes = head_shapes(parts.head, task, sizes.hidden_size).items()
    found = {_HEAD + name: tuple(shape) for name, shape in shapes}
    if parts.adapters is not None:
        with warnings.catch_warnings():  # of Megatron, where neither Apex nor Transformer Engine is installed
            warnings.simplefilter("ignore")
            from bionemo_esm.finetuning.adapters import adapter_shapes

        adapters = adapter_shapes(parts.adapters, sizes).items()
        found |= {f"encoder.{name}": tuple(shape) for name, shape in adapters}
    return found


def fill(encoder: ESMEncoder, config: Mapping[str, Any], copy: Callable[[], None]) -> None:
    """Fill a plain encoder; what adapters learned is added to its weights. See `Extension`."""
    adapters = Parts.from_mapping(config).adapters
    if adapters is None:
        copy()
        return
    from bionemo_esm.finetuning.adapters import add_adapters, merge_adapters

    add_adapters(encoder, adapters)
    copy()
    merge_adapters(encoder, adapters)
