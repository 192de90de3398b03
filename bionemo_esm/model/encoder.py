"""The encoder: Megatron-core's BERT over one packed row of proteins.

Shape suffixes: T tokens of the row, S sequences, H hidden size, M selected positions, V tokens of the alphabet.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import gelu

from bionemo_esm.alphabet import VOCABULARY_SIZE, padded_vocabulary_size
from bionemo_esm.model.attention import PackedAttention
from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import EncoderConfig


def megatron_config(config: EncoderConfig, dtype: torch.dtype) -> TransformerConfig:
    """Our sizes in Megatron's terms: pre-norm blocks, exact GELU, biases, weights drawn on the CPU.

    Drawing on the CPU makes the initial weights depend on the seed alone, whatever the device or the parallelism.
    Megatron's fused bias-GELU stays off: it is the tanh approximation, and ESM's GELU is the exact one.
    """
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        layernorm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        activation_func=gelu,
        add_bias_linear=True,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def layer_spec(backends: FusedBackends) -> ModuleSpec:
    """One pre-norm block: layer norm, self-attention, layer norm, MLP, each with its residual."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=PackedAttention, params={"backend": backends.attention}),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp_parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backends.layer_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backends.layer_norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class ESMEncoder(BertModel):
    """BERT over packed proteins: learned positions, tied output embedding, no binary head."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype, backends: FusedBackends) -> None:
        super().__init__(
            config=megatron_config(config, dtype),
            num_tokentypes=0,
            transformer_layer_spec=layer_spec(backends),
            vocab_size=padded_vocabulary_size(),
            max_sequence_length=config.seq_length,
            share_embeddings_and_output_weights=True,
            add_binary_head=False,
            parallel_output=False,  # every rank has the logits of the whole alphabet
        )

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        """Megatron chooses a mask layout by Transformer Engine's version; a packed row has no mask."""
        return "b1ss"

    def hidden_states(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Final hidden states [T, H], after the last layer norm, in the parameters' dtype.

        tokens_T, positions_T: int64 [T]; cu_seqlens: int32 [S + 1]; max_seqlen: tokens of the longest sequence.
        """
        layout = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        embedded_T1H = self.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
        hidden_T1H = self.encoder(hidden_states=embedded_T1H, attention_mask=None, packed_seq_params=layout)
        hidden_TH: Tensor = hidden_T1H.squeeze(1)
        return hidden_TH

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Scores of the 33 tokens for hidden states, float32 [M, V]; the padding rows of the table do not appear."""
        transformed_M1H = self.lm_head(hidden_MH.unsqueeze(1))
        logits_M1V, _ = self.output_layer(transformed_M1H, weight=self.shared_embedding_or_output_weight())
        logits_MV: Tensor = logits_M1V.squeeze(1)[:, :VOCABULARY_SIZE].float()
        return logits_MV

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selected_M: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [M, V] at the selected places of the row (int64 [M]), or at all T of them."""
        hidden_TH = self.hidden_states(tokens_T, positions_T, cu_seqlens, max_seqlen)
        return self.logits(hidden_TH if selected_M is None else hidden_TH[selected_M])
