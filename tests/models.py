"""Small models for tests, and a padded Hugging Face ESM with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE
from bionemo_esm.model.archive import Archive, read_archive, write_archive
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.interchange.state_dict_adapter import HUGGING_FACE, from_native

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "seq_length": 512,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.2,  # far from zero, so every part of the model affects the output
}


def tiny_model(precision: str = "32", seed: int = 1, **sizes: float) -> ESM1nvModel:
    """Return a 2-layer ESM-1nv with random weights, including biases and layer norms."""
    model = ESM1nvModel(OmegaConf.create({"encoder": TINY | sizes, "precision": precision, "seed": seed}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def reconfigured(source: Path, target: Path, **encoder: Any) -> Path:
    """Write an archive with the same weight bytes as the source and other encoder settings."""
    archive = read_archive(source)
    config = {**archive.config, "encoder": {**archive.config["encoder"], **encoder}}
    return write_archive(target, Archive(archive.model_class, config, archive.weights, archive.provenance))


def padded_twin(model: ESM1nvModel) -> EsmForMaskedLM:
    """Return Hugging Face's `EsmForMaskedLM` of the same shape and weights, which uses padding."""
    config = model.encoder_config
    twin = EsmForMaskedLM(
        EsmConfig(
            vocab_size=VOCABULARY_SIZE,
            mask_token_id=MASK_ID,
            pad_token_id=PAD_ID,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.ffn_hidden_size,
            max_position_embeddings=config.seq_length + PAD_ID + 1,
            position_embedding_type="absolute",
            emb_layer_norm_before=config.embedding_layernorm,
            token_dropout=config.token_dropout,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=config.layernorm_epsilon,
        )
    ).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(translated(weights, config), strict=False)
    assert not unexpected
    assert all("contact_head" in name or "decoder" in name for name in missing), missing
    return twin


def translated(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Return weights, or their gradients, under the names and in the layouts of Hugging Face."""
    return dict(from_native(config, dict.fromkeys(tensors, torch.float32), tensors.__getitem__, HUGGING_FACE))
