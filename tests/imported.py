"""Hugging Face models with random weights, imported as archives, for runs that start from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EsmForMaskedLM

from bionemo_esm.alphabet import PAD_ID
from bionemo_esm.data.collate import PackedBatch, unpack
from bionemo_esm.model.interchange.convert import import_model
from bionemo_esm.pretraining.run import pretrain
from runs import composed
from theirs import hugging_face_model, saved

ESM1B, ESM2 = "ESM-1b", "ESM-2"
TOKENS = 128
ADAPTED = (
    "recipe=adapt",
    "data=sample",
    "data.micro_batch_tokens=1024",
    "data.global_batch_tokens=2048",
    "trainer.precision=32",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=4",
    "trainer.log_every_n_steps=1",
    "exp_manager.checkpoints.every_n_train_steps=1",
    "exp_manager.create_tensorboard_logger=false",
)
"""Overrides for a run of a few seconds."""


def source_model(family: str) -> EsmForMaskedLM:
    """Return the model of a family. It is the same on every call."""
    return hugging_face_model(family, tokens=TOKENS)


def brought_here(model: EsmForMaskedLM, folder: Path) -> Path:
    """Save the model with its own library and import it. Return the archive."""
    return import_model(saved(model, folder / "a_small_one"), folder / "imported.nemo").output


@torch.no_grad()
def loss_of(model: EsmForMaskedLM, batches: Iterable[PackedBatch]) -> float:
    """Return the mean cross-entropy of a Hugging Face model over all masked residues of our batches, with padding."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = unpack(batch.tokens, batch.cu_seqlens)
        is_real = tokens != PAD_ID
        logits = model(tokens, attention_mask=is_real.long()).logits[is_real]
        total += cross_entropy(logits[batch.target_index], batch.targets, reduction="sum").item()
        count += len(batch.targets)
    return total / count


def adapt(folder: Path, archive: Path, *overrides: str) -> dict[str, Any]:
    """Continue pretraining from the archive in this process and return the summary of the run."""
    place = (f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}")
    pretrain(composed(*ADAPTED, *place, f"restore_from_path={archive}", *overrides))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary
