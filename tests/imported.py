"""Models of Hugging Face's with random weights, brought here, for runs that start from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EsmConfig, EsmForMaskedLM

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE
from bionemo_esm.data.packing import PackedBatch, unpack
from bionemo_esm.model.archive import Archive, write_archive
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.container import Section
from bionemo_esm.model.interchange.dialects import HUGGING_FACE
from bionemo_esm.model.interchange.translation import ForeignTensors, take
from bionemo_esm.model.tensors import TensorTable
from bionemo_esm.training.run import pretrain
from runs import composed

ESM1B, ESM2 = "ESM-1b", "ESM-2"
LAYERS, HIDDEN, HEADS, FFN, TOKENS = 2, 32, 4, 64, 128
SOURCE = {"format": "Hugging Face", "source": "facebook/a_small_one", "revision": "5" * 40, "sha256": {"a": "6" * 64}}
ADAPTED = (
    "recipe=adapt",
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
"""Overrides for a run of seconds."""


def hugging_face(family: str) -> EsmForMaskedLM:
    """ESM-1b's or ESM-2's form with random weights, and rotary frequencies that are not the formula's."""
    torch.manual_seed(11)
    model = EsmForMaskedLM(
        EsmConfig(
            vocab_size=VOCABULARY_SIZE,
            mask_token_id=MASK_ID,
            pad_token_id=PAD_ID,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            max_position_embeddings=TOKENS + PAD_ID + 1,
            position_embedding_type="rotary" if family == ESM2 else "absolute",
            emb_layer_norm_before=family == ESM1B,
            token_dropout=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-5,
            initializer_range=0.2,
        )
    )
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half())
    if family == ESM1B:
        torch.nn.init.normal_(model.esm.embeddings.position_embeddings.weight)  # the two unused rows as well
    return model.eval()


def brought_here(model: EsmForMaskedLM, folder: Path) -> Path:
    """The model, saved by its own library, as an archive of ours."""
    model.save_pretrained(folder / "theirs")
    file = folder / "theirs" / "model.safetensors"
    table = TensorTable.open(file, file.name, Section(0, file.stat().st_size))
    is_rotary = model.config.position_embedding_type == "rotary"
    sizes = EncoderConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        seq_length=TOKENS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        embedding_layernorm=not is_rotary,
        token_dropout=True,
        position_embedding=ROTARY if is_rotary else LEARNED,
    )
    taken = take(ForeignTensors.of(str(folder), [table], HUGGING_FACE), sizes, HUGGING_FACE)
    config = {"encoder": taken.config.to_dict(), "precision": taken.precision, "seed": 0}
    return write_archive(
        folder / "imported.nemo", Archive("ESM1nvModel", config, taken.weights, {"imported_from": SOURCE})
    )


@torch.no_grad()
def loss_of(model: EsmForMaskedLM, batches: Iterable[PackedBatch]) -> float:
    """Their mean cross-entropy over all masked residues of our batches, which they are shown padded."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = unpack(batch.tokens, batch.cu_seqlens)
        is_real = tokens != PAD_ID
        logits = model(tokens, attention_mask=is_real.long()).logits[is_real]
        total += cross_entropy(logits[batch.target_index], batch.targets, reduction="sum").item()
        count += len(batch.targets)
    return total / count


def adapt(folder: Path, archive: Path, *overrides: str) -> dict[str, Any]:
    """Continue pretraining from the archive in this process; the run's summary."""
    place = (f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}")
    pretrain(composed(*ADAPTED, *place, f"restore_from_path={archive}", *overrides))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary
