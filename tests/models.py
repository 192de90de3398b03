"""Small models for tests, and a padded twin: Hugging Face's ESM with the same weights."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE
from bionemo_esm.model.esm1nv import ESM1nvModel

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "seq_length": 512,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.2,  # far from zero, so that every part of the model tells
}


def tiny_model(precision: str = "32", seed: int = 1, **sizes: float) -> ESM1nvModel:
    """A 2-layer ESM-1nv with random weights, biases and layer norms included."""
    model = ESM1nvModel(OmegaConf.create({"encoder": TINY | sizes, "precision": precision, "seed": seed}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def padded_twin(model: ESM1nvModel) -> EsmForMaskedLM:
    """Hugging Face's `EsmForMaskedLM` of the same shape and weights: written by others, and padded."""
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
    missing, unexpected = twin.load_state_dict(translated(weights, config.num_attention_heads), strict=False)
    assert not unexpected
    assert all("contact_head" in name or "decoder" in name for name in missing), missing
    return twin


def translated(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Weights, or their gradients, from Megatron's names and query-key-value interleaving to Hugging Face's."""
    positions = weights["encoder.embedding.position_embeddings.weight"]
    unused = torch.zeros(PAD_ID + 1, positions.shape[1])  # Hugging Face numbers positions from the padding id on
    theirs = {
        "esm.embeddings.word_embeddings.weight": weights["encoder.embedding.word_embeddings.weight"][:VOCABULARY_SIZE],
        "esm.embeddings.position_embeddings.weight": torch.cat([unused, positions]),
        "lm_head.bias": weights["encoder.output_layer.bias"][:VOCABULARY_SIZE],
    }
    for kind in ("weight", "bias"):
        theirs[f"esm.encoder.emb_layer_norm_after.{kind}"] = weights[f"encoder.encoder.final_layernorm.{kind}"]
        theirs[f"lm_head.dense.{kind}"] = weights[f"encoder.lm_head.dense.{kind}"]
        theirs[f"lm_head.layer_norm.{kind}"] = weights[f"encoder.lm_head.layer_norm.{kind}"]
        if (before := f"encoder.embedding_layernorm.{kind}") in weights:
            theirs[f"esm.embeddings.layer_norm.{kind}"] = weights[before]
    for name, tensor in weights.items():
        if not name.startswith("encoder.encoder.layers."):
            continue
        number, part = name.removeprefix("encoder.encoder.layers.").split(".", 1)
        layer, kind = f"esm.encoder.layer.{number}", part.rsplit(".", 1)[1]
        if part.startswith("self_attention.linear_qkv"):
            mixed = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
            for index, role in enumerate(("query", "key", "value")):
                theirs[f"{layer}.attention.self.{role}.{kind}"] = mixed[:, index].reshape(-1, *tensor.shape[1:])
            continue
        place = {
            "input_layernorm": "attention.LayerNorm",
            "self_attention.linear_proj": "attention.output.dense",
            "pre_mlp_layernorm": "LayerNorm",
            "mlp.linear_fc1": "intermediate.dense",
            "mlp.linear_fc2": "output.dense",
        }[part.rsplit(".", 1)[0]]
        theirs[f"{layer}.{place}.{kind}"] = tensor
    return theirs
