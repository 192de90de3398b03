"""Models of other libraries with random weights, and their files as those libraries write them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import esm
import torch
from torch import nn
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from bionemo_esm.alphabet import MASK_ID, PAD_ID, TOKENS

State = dict[str, Any]
FairESM = esm.ESM2 | esm.ProteinBertModel
Model = TypeVar("Model", bound=nn.Module)

ALPHABET = esm.Alphabet.from_architecture("ESM-1b")
FAMILIES: dict[str, State] = {  # keys of Hugging Face's configuration
    "ESM-1nv": {"position_embedding_type": "absolute", "emb_layer_norm_before": False, "token_dropout": False},
    "ESM-1b": {"position_embedding_type": "absolute", "emb_layer_norm_before": True, "token_dropout": True},
    "ESM-1v": {"position_embedding_type": "absolute", "emb_layer_norm_before": False, "token_dropout": True},
    "ESM-2": {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "token_dropout": True},
}


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder. `spread` is the standard deviation of its random weights."""

    layers: int
    hidden: int
    heads: int
    spread: float = 0.2
    ffn: int | None = None  # None means 4 x hidden, which fair-esm's ESM-2 always uses

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads"


SMALL = Shape(2, 32, 4, ffn=64)


# --- models -----------------------------------------------------------------------------------------------------------


def hugging_face_model(family: str, shape: Shape = SMALL, tokens: int = 1024, **changes: Any) -> EsmForMaskedLM:
    """Return `EsmForMaskedLM` of one of `FAMILIES`, without dropout. `changes` are keys of its configuration.

    The two position rows that no token uses are random too, except for ESM-1nv, where they are zero.
    """
    settings: State = {
        "vocab_size": len(TOKENS),
        "mask_token_id": MASK_ID,
        "pad_token_id": PAD_ID,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn or 4 * shape.hidden,
        "max_position_embeddings": tokens + PAD_ID + 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",  # the implementation that returns attention maps
    }
    model = randomized(EsmForMaskedLM(EsmConfig(**settings | FAMILIES[family] | changes)), shape.spread)
    if family == "ESM-1nv":
        with torch.no_grad():
            model.esm.embeddings.position_embeddings.weight[: PAD_ID + 1] = 0
    return model


def fair_esm_model(family: str, shape: Shape = SMALL, tokens: int = 1024) -> FairESM:
    """Return fair-esm's class for ESM-1b, ESM-1v or ESM-2. ESM-2 accepts any number of tokens."""
    if family == "ESM-2":
        return randomized(esm.ESM2(shape.layers, shape.hidden, shape.heads, ALPHABET), shape.spread)
    sizes = {"layers": shape.layers, "embed_dim": shape.hidden, "attention_heads": shape.heads}
    sizes |= {"ffn_embed_dim": shape.ffn or 4 * shape.hidden, "max_positions": tokens}
    how = {key: FAMILIES[family][key] for key in ("token_dropout", "emb_layer_norm_before")}
    model = esm.ProteinBertModel(Namespace(arch="roberta_large", **sizes, **how), ALPHABET)
    return randomized(model, shape.spread)


@torch.no_grad()
def randomized(model: Model, spread: float) -> Model:
    """Fill every parameter with distinct random values, so that no two parameters can be confused.

    Rotary frequencies are rounded to float16, as they may be in released models.
    """
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(spread * noise)
        else:
            parameter.add_(0.2 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half())
    return model.eval()


# --- files ------------------------------------------------------------------------------------------------------------


def saved(model: EsmForMaskedLM, folder: Path, **options: Any) -> Path:
    """Write a folder as on the Hub: model by `save_pretrained(**options)` and tokenizer."""
    model.save_pretrained(folder, **options)
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def released(model: FairESM, **arguments: Any) -> tuple[State, State]:
    """Return the content of the two files of a released fair-esm model: the model and its contact regression.

    `arguments` add to or replace the fairseq arguments that follow from the model. None removes one.
    """
    weights: State = {}
    regression: State = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("contact_head."):
            regression[name] = tensor
        else:
            weights[f"encoder.{'' if name.startswith('lm_head.') else 'sentence_encoder.'}{name}"] = tensor
    if isinstance(model, esm.ESM2):
        sizes = {"layers": model.num_layers, "embed_dim": model.embed_dim, "attention_heads": model.attention_heads}
        others = {}
    else:
        made_with = vars(model.args)
        sizes = {name: made_with[name] for name in ("layers", "embed_dim", "attention_heads", "ffn_embed_dim")}
        others = {name: made_with[name] for name in ("arch", "max_positions")}
    told = {f"encoder_{name}": value for name, value in sizes.items()} | others | {"token_dropout": True} | arguments
    args = Namespace(**{name: value for name, value in told.items() if value is not None})
    head: State = {"cfg": {"model": args}} if isinstance(model, esm.ESM2) else {"args": args}
    return head | {"model": weights}, {"model": regression}
