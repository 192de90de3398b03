"""What other libraries call the parts of an ESM, beside what they are called here.

Hugging Face: `transformers/models/esm/modeling_esm.py`, `transformers/conversion_mapping.py`. fair-esm:
`esm/model/esm1.py`, `esm/model/esm2.py`, `esm/modules.py`, and `esm/pretrained.py` for the prefixes in its files. `{}`
stands for the number of a layer, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyMapping:
    """Another library's names, without `.weight` and `.bias`."""

    library: str  # its name, for people
    word_embeddings: str
    tied_output: str  # the word embeddings again, as the output's weight; some files have it, equal
    position_embeddings: str
    output_bias: str  # the whole name
    contact_head: str
    parts: Mapping[str, str]  # ours to theirs, of what a model has once
    layer_parts: Mapping[str, str]  # ours to theirs, of what each layer has
    query_key_value: tuple[str, str, str]  # of each layer; one tensor here, three there
    frequencies: tuple[str, ...]  # whole names that rotary frequencies have had; the first with a {} is written
    respelt: tuple[tuple[str, str], ...]  # patterns of names in files, and what stands for them in the names above
    position_ids: str | None = None  # a buffer of 0, 1, 2, ... in old files

    def name_of(self, stored: str) -> str:
        """The name that a tensor of a file goes by."""
        for pattern, replacement in self.respelt:
            stored = re.sub(pattern, replacement, stored)
        return stored


HUGGING_FACE = KeyMapping(
    library="Hugging Face",
    word_embeddings="esm.embeddings.word_embeddings",
    tied_output="lm_head.decoder",
    position_embeddings="esm.embeddings.position_embeddings",
    output_bias="lm_head.bias",
    contact_head="esm.contact_head.regression",
    parts={
        "embedding_layernorm": "esm.embeddings.layer_norm",
        "encoder.final_layernorm": "esm.encoder.emb_layer_norm_after",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    },
    layer_parts={
        "input_layernorm": "esm.encoder.layer.{}.attention.LayerNorm",
        "self_attention.linear_proj": "esm.encoder.layer.{}.attention.output.dense",
        "pre_mlp_layernorm": "esm.encoder.layer.{}.LayerNorm",
        "mlp.linear_fc1": "esm.encoder.layer.{}.intermediate.dense",
        "mlp.linear_fc2": "esm.encoder.layer.{}.output.dense",
    },
    query_key_value=(
        "esm.encoder.layer.{}.attention.self.query",
        "esm.encoder.layer.{}.attention.self.key",
        "esm.encoder.layer.{}.attention.self.value",
    ),
    frequencies=(
        "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq",
        "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq",  # as transformers 5 writes it, star and all
        "esm.rotary_embeddings.inv_freq",
    ),
    respelt=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),  # transformers 5
    position_ids="esm.embeddings.position_ids",
)

FAIR_ESM = KeyMapping(
    library="fair-esm",
    word_embeddings="embed_tokens",
    tied_output="lm_head",
    position_embeddings="embed_positions",
    output_bias="lm_head.bias",
    contact_head="contact_head.regression",
    parts={
        "embedding_layernorm": "emb_layer_norm_before",
        "encoder.final_layernorm": "emb_layer_norm_after",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    },
    layer_parts={
        "input_layernorm": "layers.{}.self_attn_layer_norm",
        "self_attention.linear_proj": "layers.{}.self_attn.out_proj",
        "pre_mlp_layernorm": "layers.{}.final_layer_norm",
        "mlp.linear_fc1": "layers.{}.fc1",
        "mlp.linear_fc2": "layers.{}.fc2",
    },
    query_key_value=(
        "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj",
    ),
    frequencies=("layers.{}.self_attn.rot_emb.inv_freq",),
    respelt=((r"^encoder\.(sentence_encoder\.)?", ""),),
)
