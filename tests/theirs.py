"""Models as other libraries make and save them, with random weights, for tests of what becomes of them here."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from esm.model.esm2 import ESM2
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from bionemo_esm.alphabet import MASK_ID, PAD_ID, TOKENS

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQXBLEERUZO"
FAMILIES: dict[str, dict[str, Any]] = {
    "ESM-1b": {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "token_dropout": True},
    "ESM-1nv": {"position_embedding_type": "absolute", "emb_layer_norm_before": False, "token_dropout": False},
    "ESM-2": {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "token_dropout": True},
}


def theirs(family: str, tokens: int = 64, **options: Any) -> EsmForMaskedLM:
    """Hugging Face's model of a family, every tensor random."""
    config = EsmConfig(
        vocab_size=len(TOKENS), mask_token_id=MASK_ID, pad_token_id=PAD_ID, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=tokens + 2, layer_norm_eps=1e-5,
        **FAMILIES[family], **options,
    )  # fmt: skip
    torch.manual_seed(3)
    model = EsmForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
            if "position" in name and family == "ESM-1nv":
                parameter[:2] = 0
    return model


def saved(folder: Path, family: str = "ESM-1b", dtype: torch.dtype = torch.float32) -> Path:
    theirs(family).to(dtype).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def fair_esm(path: Path) -> ESM2:
    """A fair-esm ESM-2 with random weights, saved as fair-esm's are, its contact regression beside it."""
    torch.manual_seed(5)
    model = ESM2(num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b", token_dropout=True).eval()
    tensors = model.state_dict()
    regression = {name: tensors.pop(name) for name in list(tensors) if name.startswith("contact_head")}
    arguments = Namespace(encoder_layers=2, encoder_embed_dim=32, encoder_attention_heads=4, token_dropout=True)
    files = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in tensors.items() if "lm_head" not in name}
    files |= {f"encoder.{name}": tensor for name, tensor in tensors.items() if "lm_head" in name}
    torch.save({"cfg": {"model": arguments}, "model": files}, path)
    torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return model
