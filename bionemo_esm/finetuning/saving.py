"""A fitted model as an archive of its own: what was trained over what it was trained from, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bionemo_esm.finetuning.adapters import ADAPTER_NAMES, LORA_A, LORA_B, merged_weights
from bionemo_esm.finetuning.config import FROZEN, Parts
from bionemo_esm.finetuning.model import CONTACT_HEAD
from bionemo_esm.finetuning.model_file import MODEL_CLASS, archive_config
from bionemo_esm.finetuning.task import Task
from bionemo_esm.model.archive import WEIGHTS, Archive, ArchiveFile, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.consistency import package_versions
from bionemo_esm.model.tensors import LazyTensors

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_ENCODER = "encoder."


def write_fine_tuned(
    path: Path,
    base: ArchiveFile,
    trained: Mapping[str, Tensor],
    task: Task,
    parts: Parts,
    mode: str,
    seed: int,
    provenance: Mapping[str, Any],
) -> Path:
    """Write the model, whole or not at all. Raises `ArchiveError`, also where the pretrained archive is damaged.

    trained: float32, by name; where `parts` have no adapters, there are none among them (see `merged`). If the encoder
    was trained, all of it is float32; a frozen one, and one beside its adapters, stays as it was, bit for bit.
    """
    base.verify(WEIGHTS)
    encoder = EncoderConfig.from_mapping(base.config["encoder"])
    names = [name for name in base.weights.infos if name.startswith(_ENCODER)]
    if mode != FROZEN and encoder.contact_head:  # it was fitted to other weights
        encoder = EncoderConfig.from_mapping({**encoder.to_dict(), "contact_head": False})
        names = [name for name in names if not name.startswith(_ENCODER + CONTACT_HEAD)]
    as_it_was = mode == FROZEN or parts.adapters is not None
    outline = {name: _outline(base, name, as_it_was) for name in names}
    outline |= {name: torch.empty(tensor.shape, device="meta") for name, tensor in trained.items()}

    def make(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        tensor = base.load_finite(name)
        return tensor if as_it_was else tensor.float()

    precision = "bf16" if outline[names[0]].dtype == torch.bfloat16 else "32"
    config = archive_config(encoder, precision, seed, task, parts)
    told = {**provenance, "package_versions": package_versions()}
    return write_archive(path, Archive(MODEL_CLASS, config, LazyTensors(outline, make), told))


def merged(base: ArchiveFile, trained: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """What was trained, with the encoder's adapted weights in the place of their adapters: float32."""
    assert parts.adapters is not None
    found = {name: tensor for name, tensor in trained.items() if not name.endswith(ADAPTER_NAMES)}
    for name in trained:
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            adapted = {layer + "weight": base.load_finite(layer + "weight").float()}
            adapted |= {layer + kind: trained[layer + kind] for kind in (LORA_A, LORA_B)}
            found |= merged_weights(adapted, parts.adapters)
    return found


def _outline(base: ArchiveFile, name: str, as_it_was: bool) -> Tensor:
    info = base.weights.infos[name]
    return torch.empty(info.shape, dtype=_DTYPES[info.dtype] if as_it_was else torch.float32, device="meta")
