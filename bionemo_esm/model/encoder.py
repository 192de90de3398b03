"""The encoder: Megatron-core's BERT over one packed row of proteins.

Shape suffixes: T tokens of the row, S sequences, H hidden size, M selected places, V tokens of the alphabet.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, distributed
from torch.nn.functional import gelu, pad

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE, padded_vocabulary_size
from bionemo_esm.model.attention import MapObserver, PackedAttention, PackedRow, RotaryEmbedding
from bionemo_esm.model.backends import FusedBackends
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.contact_head import ContactHead
from bionemo_esm.model.cpu_kernels import ColumnLinear, Dropout, RowLinear, get_dropout_add
from bionemo_esm.model.parallel import tensor_parallel_rank, tensor_parallel_size

EXPECTED_MASKED = 0.15 * 0.8
"""Share of <mask> in a sequence that ESM's token dropout takes for usual: 80% of the chosen 15%."""


def megatron_config(config: EncoderConfig, dtype: torch.dtype, initialize: bool = True) -> TransformerConfig:
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
        perform_initialization=initialize,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


LAYERS: dict[str, tuple[Any, Any, Any]] = {
    "Megatron": (ColumnParallelLinear, RowParallelLinear, get_bias_dropout_add),
    "oneDNN": (ColumnLinear, RowLinear, get_dropout_add),
}
"""Linear layers split along their outputs and along their inputs, and what adds them to the residual."""


def layer_spec(backends: FusedBackends) -> ModuleSpec:
    """One pre-norm block: layer norm, self-attention, layer norm, MLP, each with its residual."""
    column, row, add = LAYERS[backends.linear]
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ModuleSpec(module=PackedAttention, params={"backend": backends.attention}),
            linear_proj=row,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp_parts = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backends.layer_norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=backends.layer_norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_parts),
            mlp_bda=add,
        ),
    )


def token_dropout_scale(tokens_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What token dropout multiplies each word embedding by: float32 [T], 0 at every <mask>.

    A sequence's other embeddings are scaled by (1 - EXPECTED_MASKED) / (1 - its share of <mask>), specials counted, so
    that their sum keeps its size whatever was masked; 0.88 where nothing was. From fair-esm, `esm/model/esm1.py`.
    """
    masked_T = tokens_T == MASK_ID
    masked_before = pad(masked_T.cumsum(0), (1, 0))  # int64 [T + 1]
    masked_S = masked_before[cu_seqlens].diff()
    lengths_S = cu_seqlens.long().diff()
    scale_S = (1 - EXPECTED_MASKED) * lengths_S / (lengths_S - masked_S).float()
    scale_T = scale_S.repeat_interleave(lengths_S, output_size=len(tokens_T))  # the size spares a GPU a wait
    return scale_T.masked_fill(masked_T, 0.0)


def bucket_size(size: int, least_step: int = 8) -> int:
    """The next of at most 32 sizes an octave: on average 1.5%, at most 3% over `size` where `least_step` permits.

    Kernels are compiled, and CUDA memory is allocated, for sizes that come back.
    """
    step = max(least_step, 2 ** (size.bit_length() - 6)) if size >= 64 else 8
    return -(-size // step) * step


class _WholeOutput(torch.autograd.Function):
    """Every tensor-parallel rank's part of the output [M, V / ranks] -> all of it [M, V], on each of them.

    The alphabet is so short that the whole goes through one softmax, over exactly its 33 tokens. Megatron's own gather
    allocates on CUDA even on a CPU. All ranks then compute the same loss; so the gradient of a part is a slice.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        if tensor_parallel_size() == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(tensor_parallel_size())]
        distributed.all_gather(parts, part.contiguous(), group=get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(tensor_parallel_size(), dim=-1)[tensor_parallel_rank()]


class ESMEncoder(BertModel):
    """BERT over packed proteins: tied output embedding, no binary head.

    With `embedding_layernorm` a layer norm follows the sum of word and position embeddings; with `token_dropout` word
    embeddings go through `token_dropout_scale` before it. ESM-1b has both, ESM-1v and ESM-2 the latter, ESM-1nv
    neither. Positions are learned, the first token's in row `position_offset` of their table; in ESM-2 they are rotary.
    """

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, backends: FusedBackends, initialize: bool = True
    ) -> None:
        """`initialize`: draw random weights; False leaves what lies in memory, for who brings weights anyway."""
        super().__init__(
            config=megatron_config(config, dtype, initialize),
            num_tokentypes=0,
            transformer_layer_spec=layer_spec(backends),
            vocab_size=padded_vocabulary_size(),
            max_sequence_length=config.position_rows,
            position_embedding_type="learned_absolute" if config.position_embedding == LEARNED else "rope",
            share_embeddings_and_output_weights=True,
            add_binary_head=False,
            parallel_output=True,  # see `logits`
        )
        self.token_dropout, self.position_offset = config.token_dropout, config.position_offset
        self.rotary, self.contact_head = None, None
        if config.position_embedding == ROTARY:
            del self.rotary_pos_emb  # Megatron's walks over sequences one by one, and knows one set of frequencies
            self.rotary = RotaryEmbedding(config.head_size)
        if config.contact_head:
            self.contact_head = ContactHead(config.num_layers * config.num_attention_heads)
        self.embedding_layernorm: Any = None
        if config.embedding_layernorm:
            self.embedding_layernorm = backends.layer_norm(
                config=self.config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if backends.linear == "oneDNN":
            self.embedding.embedding_dropout = Dropout(config.hidden_dropout)
        self.pads_rows = backends.linear == "oneDNN"  # its kernels are compiled for each size
        self._clear_unused_rows()

    @torch.no_grad()
    def _clear_unused_rows(self) -> None:
        """Rows that no token reaches are zeros, and stay so: a model is the same with and without them."""
        words_VH = self.embedding.word_embeddings.weight
        first = tensor_parallel_rank() * len(words_VH)
        words_VH[max(VOCABULARY_SIZE - first, 0) :] = 0
        if self.position_offset:
            self.embedding.position_embeddings.weight[: self.position_offset] = 0

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        """Megatron chooses a mask layout by Transformer Engine's version; a packed row has no mask."""
        return "b1ss"

    def embedded(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the first block reads, [T, H] in the parameters' dtype.

        Megatron's embedding module has no place for what ESM does between its parts, so they are called one by one.
        """
        embedded_TH: Tensor = self.embedding.word_embeddings(tokens_T)
        if self.token_dropout:
            scaled_TH = embedded_TH * token_dropout_scale(tokens_T, cu_seqlens)[:, None]  # in float32
            embedded_TH = scaled_TH.to(embedded_TH.dtype)
        if self.rotary is None:
            rows_T = positions_T + self.position_offset if self.position_offset else positions_T
            embedded_TH = embedded_TH + self.embedding.position_embeddings(rows_T)
        if self.embedding_layernorm is not None:
            embedded_TH = self.embedding_layernorm(embedded_TH)
        dropped_TH: Tensor = self.embedding.embedding_dropout(embedded_TH)
        return dropped_TH

    def hidden_states(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        observer: MapObserver | None = None,
    ) -> Tensor:
        """Final hidden states [T, H], after the last layer norm, in the parameters' dtype.

        tokens_T, positions_T: int64 [T]; cu_seqlens: int32 [S + 1]; max_seqlen: tokens of the longest sequence;
        observer: is shown the attention maps of each layer, which costs much and is otherwise left out.
        """
        size = len(tokens_T)
        if observer is None:
            tokens_T, positions_T, cu_seqlens = self._padded(tokens_T, positions_T, cu_seqlens)
        layout = self._layout(positions_T, cu_seqlens, max_seqlen, observer)
        embedded_T1H = self.embedded(tokens_T, positions_T, cu_seqlens).unsqueeze(1)
        hidden_T1H = self.encoder(hidden_states=embedded_T1H, attention_mask=None, packed_seq_params=layout)
        hidden_TH: Tensor = hidden_T1H.squeeze(1)
        return hidden_TH[:size]

    def hidden_states_at(
        self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, places_M: Tensor
    ) -> Tensor:
        """Rows of `hidden_states` at some places, [M, H]: int64 [M], ascending, one or more in each sequence.

        The last block answers for those alone: all tokens give keys and values, and what follows attention, most of a
        block, is left out for the others.
        """
        size, selected = len(tokens_T), len(places_M)
        tokens_T, positions_T, cu_seqlens = self._padded(tokens_T, positions_T, cu_seqlens)
        if len(tokens_T) > size:
            places_M = pad(places_M, (0, 1), value=size)  # the padding is a sequence, too, and needs a query
        rows = self._bucket(len(places_M))
        layout = self._layout(positions_T, cu_seqlens, max_seqlen)
        hidden_T1H = self.embedded(tokens_T, positions_T, cu_seqlens).unsqueeze(1)
        *blocks, last = self.encoder.layers
        for block in blocks:
            hidden_T1H, _ = block(hidden_states=hidden_T1H, attention_mask=None, packed_seq_params=layout)
        attended = last.self_attention(
            last.input_layernorm(hidden_T1H), attention_mask=None, packed_seq_params=layout.query_index(places_M, rows)
        )
        add = last.self_attn_bda(self.training, False)
        residual_M1H = pad(hidden_T1H[places_M], (0, 0, 0, 0, 0, rows - len(places_M)))
        hidden_M1H = add(attended, residual_M1H, last.hidden_dropout)
        hidden_M1H = add(last.mlp(last.pre_mlp_layernorm(hidden_M1H)), hidden_M1H, last.hidden_dropout)
        final_MH: Tensor = self.encoder.final_layernorm(hidden_M1H).squeeze(1)
        return final_MH[:selected]

    def _bucket(self, rows: int) -> int:
        """Rows of the last block and the head for so many selected places."""
        return bucket_size(rows, 64) if self.pads_rows else rows

    def _padded(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The row with one more sequence, of <pad>, up to a bucket size. No other sequence attends to it."""
        missing = bucket_size(len(tokens_T)) - len(tokens_T) if self.pads_rows else 0
        if missing == 0:
            return tokens_T, positions_T, cu_seqlens
        end = cu_seqlens[-1:] + missing
        return pad(tokens_T, (0, missing), value=PAD_ID), pad(positions_T, (0, missing)), torch.cat([cu_seqlens, end])

    def _layout(
        self, positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, observer: MapObserver | None = None
    ) -> PackedRow:
        return PackedRow(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            rotation=None if self.rotary is None else self.rotary(positions_T),
            observer=observer,
        )

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Scores of the 33 tokens for hidden states, float32 [M, V]; the padding rows of the table do not appear."""
        size = len(hidden_MH)
        hidden_MH = pad(hidden_MH, (0, 0, 0, self._bucket(size) - size))
        transformed_M1H = self.lm_head(hidden_MH.unsqueeze(1))
        part_M1V, _ = self.output_layer(transformed_M1H, weight=self.shared_embedding_or_output_weight())
        rows_MV: Tensor = _WholeOutput.apply(part_M1V.squeeze(1))  # type: ignore[no-untyped-call]
        return rows_MV[:size, :VOCABULARY_SIZE].float()

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selected_M: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [M, V] at the selected places of the row (int64 [M], no <cls>), or at all T of them.

        The last block answers at the selected places alone, and at each <cls>, so that no sequence asks nothing, which
        not every kernel takes.
        """
        if selected_M is None:
            return self.logits(self.hidden_states(tokens_T, positions_T, cu_seqlens, max_seqlen))
        first_S = cu_seqlens[:-1].long()
        asked, origin = torch.cat([first_S, selected_M]).sort()
        hidden = self.hidden_states_at(tokens_T, positions_T, cu_seqlens, max_seqlen, asked)
        return self.logits(hidden[origin.argsort()[len(first_S) :]])
