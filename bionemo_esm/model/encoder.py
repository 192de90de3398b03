"""The encoder: Megatron-core's BERT over one packed row of proteins.

Shape suffixes: T tokens of the row, S sequences, H hidden size, M selected places, V tokens of the alphabet, I inputs
and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn.functional import dropout as pytorch_dropout
from torch.nn.functional import embedding, gelu, pad

from bionemo_esm.alphabet import MASK_ID, PAD_ID, VOCABULARY_SIZE, padded_vocabulary_size
from bionemo_esm.compat import initialize_language_module
from bionemo_esm.model import cpu_kernels
from bionemo_esm.model.attention import MapObserver, PackedAttention, PackedRow, RotaryEmbedding, pad_rows
from bionemo_esm.model.backends import MEGATRON, ONEDNN, FusedBackends, choose_backends, default_torch_state
from bionemo_esm.model.config import LEARNED, NO_RECOMPUTE, ROTARY, EncoderConfig
from bionemo_esm.model.contact_head import ContactHead
from bionemo_esm.model.parallel import GatherLastDimension, model_groups, tensor_parallel_rank, tensor_parallel_size
from bionemo_esm.model.recompute import recomputed

NORM_NAMES = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm", "layer_norm", "embedding_layernorm")
"""Attributes of the encoder's modules that are layer norms."""
EXPECTED_MASKED = 0.15 * 0.8
"""Share of <mask> that ESM's token dropout expects in a sequence: 80% of the chosen 15%."""


def bucket_size(size: int, least_step: int = 8) -> int:
    """Return the next of at most 32 sizes per octave: on average 1.5% more, at most 3% if `least_step` permits.

    Kernels are compiled, and CUDA memory is allocated, for sizes that recur.
    """
    step = max(least_step, 2 ** (size.bit_length() - 6)) if size >= 64 else 8
    return -(-size // step) * step


# --- layers -----------------------------------------------------------------------------------------------------------


def _on_onednn(tensor: Tensor, backend: str) -> bool:
    """Whether the kernels of `cpu_kernels` compute this. They follow the tensor's device, also after `model.to()`."""
    return backend == ONEDNN and tensor.device.type == "cpu"


def linear(input_T1I: Tensor, weight_OI: Tensor, bias_O: Tensor, backend: str) -> Tensor:
    """Return input x weight^T + bias, [T, 1, O]."""
    if _on_onednn(input_T1I, backend) and input_T1I.dtype != torch.float64:  # oneDNN has no float64
        return cpu_kernels.linear(input_T1I, weight_OI, bias_O)
    is_trained = weight_OI.requires_grad
    compute = linear_with_grad_accumulation_and_async_allreduce if is_trained else linear_with_frozen_weight
    options = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
    output_T1O: Tensor = compute(input_T1I, weight_OI, bias_O, tp_group=None, **options)
    return output_T1O


class ColumnLinear(ColumnParallelLinear):
    """Megatron's linear layer that tensor parallelism splits along its outputs. Returns the output with its bias."""

    backend: str

    def __init__(self, *args: Any, backend: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.backend = backend

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, I] -> [T, 1, O], and the bias if it remains to be added (under tensor parallelism)."""
        if tensor_parallel_size() > 1:
            parts: tuple[Tensor, Tensor | None] = super().forward(input_, weight, runtime_gather_output)
            return parts
        return linear(input_, self.weight if weight is None else weight, self.bias, self.backend), None


class RowLinear(RowParallelLinear):
    """Megatron's linear layer that tensor parallelism splits along its inputs. Returns the output with its bias."""

    backend: str

    def __init__(self, *args: Any, backend: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.backend = backend

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, I] -> [T, 1, O], and the bias if it remains to be added (under tensor parallelism)."""
        if tensor_parallel_size() > 1:
            parts: tuple[Tensor, Tensor | None] = super().forward(input_)
            return parts
        return linear(input_, self.weight, self.bias, self.backend), None


class Dropout(nn.Module):
    """`torch.nn.Dropout`, on a CPU with the draws of `cpu_kernels`."""

    def __init__(self, probability: float, backend: str = ONEDNN) -> None:
        super().__init__()
        self.probability, self.backend = probability, backend

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return activations
        if not _on_onednn(activations, self.backend):
            return pytorch_dropout(activations, self.probability)
        return activations * cpu_kernels.dropout_scale(activations.shape, self.probability, activations.dtype)


def get_dropout_add(
    training: bool, fused: bool, backend: str = ONEDNN
) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Return residual + dropout(output + bias) as a function, [T, 1, H]; for Megatron's `get_bias_dropout_add`."""

    def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        if not torch.is_grad_enabled() and not training:
            return output.add_(residual)  # no other tensor uses this memory
        if not training or probability == 0:
            return residual + output
        if not _on_onednn(output, backend):
            return residual + pytorch_dropout(output, probability)
        return torch.addcmul(residual, output, cpu_kernels.dropout_scale(output.shape, probability, output.dtype))

    return add


class Block(TransformerLayer):
    """One pre-norm block: `input_layernorm`, `self_attention`, `pre_mlp_layernorm`, `mlp`, each pair with its residual.

    `recompute`: what its backward pass computes again, a name in `RECOMPUTE`.
    """

    recompute = NO_RECOMPUTE

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedRow, **_: Any) -> tuple[Tensor, None]:
        """[T, 1, H] -> [T, 1, H], or at the queries of the row only, [queries or `context_rows`, 1, H]."""
        compute = self._all_places if packed_seq_params.queries is None else self._at_queries
        return recomputed(partial(compute, packed_seq_params), hidden_states, self.recompute), None

    def _all_places(self, row: PackedRow, hidden_T1H: Tensor) -> Tensor:
        output_T1H, _ = super().forward(hidden_states=hidden_T1H, attention_mask=None, packed_seq_params=row)
        assert isinstance(output_T1H, Tensor)
        return output_T1H

    def _at_queries(self, row: PackedRow, hidden_T1H: Tensor) -> Tensor:
        """Compute keys and values of all tokens, and everything else for the queries only."""
        attended = self.self_attention(self.input_layernorm(hidden_T1H), attention_mask=None, packed_seq_params=row)
        add = self.self_attn_bda(self.training, False)
        hidden_M1H = add(attended, pad_rows(hidden_T1H[row.queries], row.context_rows), self.hidden_dropout)
        output_M1H: Tensor = add(self.mlp(self.pre_mlp_layernorm(hidden_M1H)), hidden_M1H, self.hidden_dropout)
        return output_M1H


# --- the architecture in Megatron's terms -----------------------------------------------------------------------------


def megatron_config(config: EncoderConfig, dtype: torch.dtype, initialize: bool) -> TransformerConfig:
    """Return Megatron's configuration: pre-norm blocks, exact GELU, biases, weights drawn on the CPU.

    Weights drawn on the CPU depend on the seed alone, not on the device or the parallelism. Megatron's fused bias-GELU
    is off: it is the tanh approximation, ESM's GELU is exact.
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


def dropout_add_of(backends: FusedBackends) -> Callable[[bool, bool], Any]:
    """Return what Megatron's blocks call, with (training, fused), for the function that adds to the residual."""

    def add(training: bool, fused: bool) -> Any:  # Megatron asks for a function, not a partial
        return get_dropout_add(training, fused, backends.linear)

    return add


def layer_spec(backends: FusedBackends) -> ModuleSpec:
    """Return one pre-norm block: layer norm, self-attention, layer norm, MLP, each with its residual."""
    column, row = (ModuleSpec(layer, params={"backend": backends.linear}) for layer in (ColumnLinear, RowLinear))
    add = dropout_add_of(backends)
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
    return ModuleSpec(
        module=Block,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backends.layer_norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=backends.layer_norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=add,
        ),
    )


def token_dropout_scale(tokens_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the factor of each word embedding under token dropout: float32 [T], 0 at every <mask>.

    The other embeddings of a sequence are scaled by (1 - EXPECTED_MASKED) / (1 - its share of <mask>), specials
    counted, so that their sum keeps its size; 0.88 without a <mask>. From fair-esm, `esm/model/esm1.py`.
    """
    masked_T = tokens_T == MASK_ID
    masked_before = pad(masked_T.cumsum(0), (1, 0))  # int64 [T + 1]
    masked_S = masked_before[cu_seqlens].diff()
    lengths_S = cu_seqlens.long().diff()
    scale_S = (1 - EXPECTED_MASKED) * lengths_S / (lengths_S - masked_S).float()
    scale_T = scale_S.repeat_interleave(lengths_S, output_size=len(tokens_T))  # output_size avoids a host sync
    return scale_T.masked_fill(masked_T, 0.0)


class ESMEncoder(BertModel):
    """BERT over packed proteins: tied output embedding, no binary head.

    With `embedding_layernorm` a layer norm follows the sum of word and position embeddings. With `token_dropout` word
    embeddings are multiplied by `token_dropout_scale` before it. ESM-1b has both, ESM-1v and ESM-2 only the latter,
    ESM-1nv neither. Learned positions start at row `position_offset` of their table; ESM-2's are rotary.

    In a process that works alone no process group is needed, and none is created.
    """

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, backends: FusedBackends, initialize: bool = True
    ) -> None:
        """Build on the CPU, in `dtype`.

        `initialize`: draw random weights from PyTorch's CPU generator. If False, they are uninitialised and the
        generator stays as it was.
        """
        with default_torch_state(), nullcontext() if initialize else torch.random.fork_rng(devices=[]):
            megatron, groups = megatron_config(config, dtype, initialize), model_groups()
            initialize_language_module(self, megatron, groups)
            self.backends, self.head_size = backends, config.head_size
            self._build(config, megatron, backends, groups)
            self.to(dtype)  # norms and the head's first layer are built in float32

    def _build(self, config: EncoderConfig, megatron: TransformerConfig, backends: FusedBackends, groups: Any) -> None:
        """Build the parts; their order is that in which weights are drawn."""
        hidden, vocabulary = config.hidden_size, padded_vocabulary_size()
        norm = partial(backends.layer_norm, config=megatron, hidden_size=hidden, eps=config.layernorm_epsilon)
        self.embedding = LanguageModelEmbedding(
            config=megatron,
            vocab_size=vocabulary,
            max_sequence_length=config.position_rows,
            position_embedding_type="learned_absolute" if config.position_embedding == LEARNED else "rope",
            tp_group=groups.tp,
        )
        self.embedding.embedding_dropout = Dropout(config.hidden_dropout, backends.linear)
        self.encoder = TransformerBlock(
            config=megatron,
            spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(backends)] * config.num_layers, layer_norm=backends.layer_norm
            ),
            pg_collection=groups,
        )
        self.lm_head = BertLMHead(hidden, megatron)
        self.lm_head.layer_norm = norm()  # Megatron's choice depends on what can be imported, not on the device
        self.output_layer = ColumnLinear(
            hidden,
            vocabulary,
            config=megatron,
            init_method=megatron.init_method,
            skip_weight_param_allocation=True,
            tp_group=groups.tp,
            backend=MEGATRON,  # the head is small
        )
        self.token_dropout, self.position_offset = config.token_dropout, config.position_offset
        self.pads_rows = backends.linear == ONEDNN  # its kernels are compiled for each size
        self.rotary = RotaryEmbedding(config.head_size) if config.position_embedding == ROTARY else None
        heads = config.num_layers * config.num_attention_heads
        self.contact_head = ContactHead(heads) if config.contact_head else None
        self.embedding_layernorm: Any = norm() if config.embedding_layernorm else None
        self._clear_unused_rows()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the module, as `to` and `cuda` do. Kernels follow to another kind of device."""
        before = self.device_type
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device_type not in (before, "meta"):
            self._use(choose_backends(self.device_type, self.dtype, self.config.attention_dropout, self.head_size))
        return self

    @property
    def device_type(self) -> str:
        return str(next(self.parameters()).device.type)

    @property
    def dtype(self) -> torch.dtype:
        parameter: nn.Parameter = next(self.parameters())
        return parameter.dtype

    def _use(self, backends: FusedBackends) -> None:
        """Compute by other kernels from now on. Parameters stay the same objects."""
        self.backends, self.pads_rows = backends, backends.linear == ONEDNN
        for module in list(self.modules()):
            if isinstance(module, PackedAttention):
                module.use(backends.attention)
            elif isinstance(module, ColumnLinear | RowLinear | Dropout) and module is not self.output_layer:
                module.backend = backends.linear
            elif isinstance(module, TransformerLayer):
                module.self_attn_bda = module.mlp_bda = dropout_add_of(backends)
            for name, norm in list(module.named_children()):
                if name in NORM_NAMES and norm is not None:
                    setattr(module, name, self._norm_like(norm, backends))

    def _norm_like(self, norm: nn.Module, backends: FusedBackends) -> nn.Module:
        """Return a layer norm of these backends with the parameters of another."""
        made: nn.Module = backends.layer_norm(
            config=self.config, hidden_size=self.config.hidden_size, eps=self.config.layernorm_epsilon
        )
        if type(made) is type(norm):
            return norm
        for name, parameter in norm.named_parameters():
            setattr(made, name, parameter)
        return made.train(norm.training)

    def set_recompute(self, recompute: str) -> None:
        """Choose what the backward pass of every block computes again, a name in `RECOMPUTE`."""
        for block in self.encoder.layers:
            block.recompute = recompute

    @torch.no_grad()
    def _clear_unused_rows(self) -> None:
        """Set the rows that no token reads to zero. They get no gradient and stay zero."""
        words_VH = self.embedding.word_embeddings.weight
        first = tensor_parallel_rank() * len(words_VH)
        words_VH[max(VOCABULARY_SIZE - first, 0) :] = 0
        if self.position_offset:
            self.embedding.position_embeddings.weight[: self.position_offset] = 0

    def embedded(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the input of the first block, [T, H] in the parameters' dtype."""
        if tensor_parallel_size() > 1:
            embedded_TH: Tensor = self.embedding.word_embeddings(tokens_T)
        else:
            embedded_TH = embedding(tokens_T, self.embedding.word_embeddings.weight)
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
        """Return the final hidden states [T, H], after the last layer norm, in the parameters' dtype.

        tokens_T, positions_T: int64 [T]; cu_seqlens: int32 [S + 1]; max_seqlen: tokens of the longest sequence;
        observer: is called with the attention maps of each layer, which are expensive.
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
        """Return rows of `hidden_states`, [M, H]: places int64 [M], ascending, at least one in each sequence.

        The last block computes keys and values of all tokens, and everything else for these places only.
        """
        size, selected = len(tokens_T), len(places_M)
        tokens_T, positions_T, cu_seqlens = self._padded(tokens_T, positions_T, cu_seqlens)
        if len(tokens_T) > size:
            places_M = pad(places_M, (0, 1), value=size)  # the padding is a sequence, and needs a query
        rows = self._bucket(len(places_M))
        layout = self._layout(positions_T, cu_seqlens, max_seqlen)
        hidden_T1H = self.embedded(tokens_T, positions_T, cu_seqlens).unsqueeze(1)
        *blocks, last = self.encoder.layers
        for block in blocks:
            hidden_T1H, _ = block(hidden_T1H, packed_seq_params=layout)
        hidden_M1H, _ = last(hidden_T1H, packed_seq_params=layout.query_index(places_M, rows))
        final_MH: Tensor = self.encoder.final_layernorm(hidden_M1H).squeeze(1)
        return final_MH[:selected]

    def _bucket(self, rows: int) -> int:
        """Return the rows that the last block and the head compute for a number of selected places."""
        return bucket_size(rows, 64) if self.pads_rows else rows

    def _padded(self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row with one more sequence, of <pad>, up to a bucket size. No other sequence attends to it."""
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
        """Return logits of the 33 tokens for hidden states, float32 [M, V]; the table's padding rows are left out."""
        size = len(hidden_MH)
        hidden_MH = pad_rows(hidden_MH, self._bucket(size))
        transformed_M1H = self.lm_head(hidden_MH.unsqueeze(1))
        part_M1V, _ = self.output_layer(transformed_M1H, weight=self.shared_embedding_or_output_weight())
        rows_MV: Tensor = GatherLastDimension.apply(part_M1V.squeeze(1))  # type: ignore[no-untyped-call]
        return rows_MV[:size, :VOCABULARY_SIZE].float()

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selected_M: Tensor | None = None,
    ) -> Tensor:
        """Return logits float32 [M, V] at selected places of the row (int64 [M], no <cls>), or at all T tokens.

        The last block computes the selected places only, and every <cls>: some kernels need at least one query in each
        sequence.
        """
        if selected_M is None:
            return self.logits(self.hidden_states(tokens_T, positions_T, cu_seqlens, max_seqlen))
        first_S = cu_seqlens[:-1].long()
        queries, origin = torch.cat([first_S, selected_M]).sort()
        hidden = self.hidden_states_at(tokens_T, positions_T, cu_seqlens, max_seqlen, queries)
        return self.logits(hidden[origin.argsort()[len(first_S) :]])
