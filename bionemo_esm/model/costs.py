"""Cost of a training step: floating-point operations, and memory of each device. Arithmetic only.

Symbols: L layers, H hidden size, F width of the feed-forward part, V rows of the embedding table, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.model.config import (
    FULL_RECOMPUTE,
    FULL_SHARDING,
    FUSED_ADAM,
    NO_RECOMPUTE,
    NO_SHARDING,
    ROTARY,
    SELECTIVE_RECOMPUTE,
    SHARDED_OPTIMIZER,
    EncoderConfig,
)
from bionemo_esm.model.optimizer_registry import OPTIMIZERS

CHOSEN_SHARE = 0.15  # share of masked tokens, which alone reach the head: the policy of both model cards
BYTES = {"32": 4, "bf16": 2}  # of a parameter, and of an activation
FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the end of a micro batch's forward pass, or where its first recomputed block is whole.

    Not counted: the CUDA context and the kernels' workspaces (about 1 GB together), fragmentation of the allocator, the
    padding of rows and lengths on a CPU, and the gradients of one layer's activations during the backward pass. Leave
    room for them.
    """

    parameters: int  # in the dtype of the parameters
    masters: int  # float32 copies of bfloat16 parameters
    gradients: int  # one float32 buffer
    moments: int  # state tensors of the optimizer, float32
    activations: int  # saved by the forward pass for the backward pass
    recomputed: int = 0  # activations of one block, which its backward pass computes again

    @property
    def total(self) -> int:
        return self.parameters + self.masters + self.gradients + self.moments + self.activations + self.recomputed


def training_flops(config: EncoderConfig, tokens: float, squared_lengths: float, targets: float) -> float:
    """Return the floating-point operations of forward and backward over packed rows.

    tokens: all tokens, `<cls>` and `<eos>` included; squared_lengths: sum over sequences of their squared tokens;
    targets: masked positions, which alone reach the head. A multiplication and an addition are two operations. The
    backward pass takes twice the forward pass: gradients of weights and of inputs. Forward:

        tokens x L x (8 H^2 + 4 H F)    query, key, value and output projections; feed-forward part
      + squared_lengths x L x 4 H       attention scores, and the weighted sum of values
      + targets x (2 H^2 + 2 H V)       head

    These are the model's operations, as MFU counts them. Training needs fewer: the last block is computed at the masked
    positions only (`ESMEncoder.forward`), which saves up to 1 / L and is not deducted. Layer norms, GELU, softmax,
    embeddings and the optimizer are not counted. After Kaplan et al. 2020 (arXiv:2001.08361, table 1) and Chowdhery et
    al. 2022 (PaLM, arXiv:2204.02311, appendix B: the attention term and MFU).
    """
    words = config.embedding_parts()[0]  # the tied output matrix
    head = targets * (sum(part.flops for part in config.head_parts()) + 2 * math.prod(words.weight))
    return float(3 * (_block_flops(config, tokens, squared_lengths) + head))


def recomputed_flops(config: EncoderConfig, tokens: float, squared_lengths: float, recompute: str) -> float:
    """Return the operations that backward computes again: the forward pass of all blocks with "full", else 0.

    MFU does not count them (Chowdhery et al. 2022, appendix B). Selective recomputation repeats no matrix product and
    no fused attention; a CPU without fused attention computes attention again.
    """
    if recompute != FULL_RECOMPUTE:
        return 0.0
    return _block_flops(config, tokens, squared_lengths)


def _block_flops(config: EncoderConfig, tokens: float, squared_lengths: float) -> float:
    """Return the operations of the forward pass of all blocks."""
    linear = tokens * config.num_layers * sum(part.flops for part in config.block_parts())
    return float(linear + squared_lengths * config.num_layers * 4 * config.hidden_size)


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Return the operations of one Newton-Schulz iteration on a matrix: three products, of the smaller side."""
    short, long = sorted((rows, columns))
    return float(2 * short * short * long * 2 + 2 * short**3)


def memory_per_device(
    config: EncoderConfig,
    tokens_of_micro_batch: float,
    *,
    precision: str,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    sharding: str = NO_SHARDING,
    device_type: str = "cuda",
    optimizer: str = FUSED_ADAM,
    recompute: str = NO_RECOMPUTE,
) -> Memory:
    """Return the bytes that training takes on one device.

    tokens_of_micro_batch: of one packed row, specials included; precision: "32" or "bf16"; data_parallel: replicas of
    the model, over which `sharding` (a name in `SHARDINGS`) splits its state; tensor_parallel: devices that share one;
    device_type: "cuda", or "cpu", where dropout masks have full width and attention copies its output; optimizer: a
    name in `OPTIMIZERS`; recompute: a name in `RECOMPUTE`.

    Attention probabilities are not stored, as in flash attention. (A CPU stores them with dropout, and in bfloat16;
    that is not counted.)
    """
    width, parameters = BYTES[precision], parameters_per_device(config, tensor_parallel)
    state = {name: _state_bytes(optimizer, name, shape) for name, shape in config.tensors()}
    moments = sum(state.values()) * parameters // config.parameters
    largest = max(state.values()) / tensor_parallel  # sharding does not split a tensor
    saved, again = _activations(config, width, tensor_parallel, device_type, recompute)
    activations = {
        "activations": math.ceil(tokens_of_micro_batch * saved),
        "recomputed": math.ceil(tokens_of_micro_batch * again),
    }
    if sharding == FULL_SHARDING and data_parallel > 1:
        return _fully_sharded(config, width, data_parallel, moments, activations)
    return Memory(
        parameters=width * parameters,
        masters=0 if precision == "32" else FLOAT32 * parameters,
        gradients=FLOAT32 * parameters,
        moments=math.ceil(max(moments / data_parallel, largest)) if sharding == SHARDED_OPTIMIZER else moments,
        **activations,
    )


def _fully_sharded(config: EncoderConfig, width: int, ranks: int, moments: int, activations: dict[str, int]) -> Memory:
    """Return the memory where `ranks` split masters, gradients and moments and gather one block at a time.

    Gathered at a time: two blocks, of which one is prefetched, and embedding and head. Gradients of one block are whole
    in the dtype of the parameters, and in float32 while they are summed over ranks.
    """
    block = sum(math.prod(shape) for part in config.block_parts() for _, shape, _ in part.tensors())
    ends = config.parameters - config.num_layers * block
    return Memory(
        parameters=width * (min(config.num_layers, 2) * block + ends),
        masters=math.ceil(FLOAT32 * config.parameters / ranks),
        gradients=math.ceil(FLOAT32 * config.parameters / ranks) + (width + FLOAT32) * max(block, ends),
        moments=math.ceil(moments / ranks),
        **activations,
    )


def optimizer_state_bytes(config: EncoderConfig, optimizer: str = FUSED_ADAM) -> int:
    """Return the bytes of the optimizer's float32 state tensors, over all devices; a checkpoint contains them."""
    return sum(_state_bytes(optimizer, name, shape) for name, shape in config.tensors())


def _state_bytes(optimizer: str, name: str, shape: tuple[int, ...]) -> int:
    return FLOAT32 * math.prod(shape) * len(OPTIMIZERS.get(optimizer).state(name, shape))


def parameters_per_device(config: EncoderConfig, tensor_parallel: int = 1) -> int:
    """Return P, or a device's share: Megatron splits the embedding table and the projections of attention and MLP."""
    sizes = [(math.prod(shape), split) for part in config.parts() for _, shape, split in part.tensors()]
    whole = sum(size for size, split in sizes if not split)
    return whole + sum(size for size, split in sizes if split) // tensor_parallel


@dataclass(frozen=True)
class _Saved:
    """Bytes for each token that one block saves: for all tokens, and for its queries, the masked tokens of the last."""

    tokens: float
    queries: float

    def of_blocks(self, layers: int) -> float:
        """Return the bytes for each token over all blocks; the last has queries at the masked positions only."""
        return layers * self.tokens + (layers - 1 + CHOSEN_SHARE) * self.queries


def _activations(
    config: EncoderConfig, width: int, tensor_parallel: int, device_type: str, recompute: str
) -> tuple[float, float]:
    """Return bytes for each token: saved by the forward pass, and computed again by a block's backward pass.

    Measured in tests/test_costs.py and tests/test_recompute.py.
    """
    hidden = config.hidden_size * width
    whole = _saved_by_block(config, width, tensor_parallel, device_type)
    kept, again = whole, 0.0
    if recompute != NO_RECOMPUTE:
        kept = _saved_when_recomputed(config, width, tensor_parallel, recompute)
        share = CHOSEN_SHARE if config.num_layers == 1 else 1.0
        again = whole.tokens - kept.tokens + share * (whole.queries - kept.queries)
    norm, is_rotary = _norm_bytes(config, width), config.position_embedding == ROTARY
    ends: float = _mask_bytes(config, width, device_type) + 2 * 8  # embedding dropout, and int64 ids
    ends += norm - hidden if config.embedding_layernorm else 0
    ends += 2 * config.head_size * FLOAT32 if is_rotary else 0  # cosine and sine
    head: float = norm + 4 * hidden + VOCABULARY_SIZE * FLOAT32  # final norm's input; 5 H
    if recompute == NO_RECOMPUTE:  # last block: the chosen queries, and of the rotated tensors the keys only
        head += hidden / tensor_parallel
        ends -= hidden / tensor_parallel if is_rotary else 0
    return kept.of_blocks(config.num_layers) + ends + CHOSEN_SHARE * head, again


def _norm_bytes(config: EncoderConfig, width: int) -> int:
    """Return the bytes of input, output, mean and deviation for each token."""
    return 2 * config.hidden_size * width + 2 * FLOAT32


def _mask_bytes(config: EncoderConfig, width: int, device_type: str) -> int:
    """Return the bytes of one dropout mask for each token."""
    return config.hidden_size * (width if device_type == "cpu" else 1) if config.hidden_dropout > 0 else 0


def _saved_by_block(config: EncoderConfig, width: int, tensor_parallel: int, device_type: str) -> _Saved:
    """Return what autograd saves of a block without recomputation.

    In units of H: the input and output of both layer norms, which every device holds whole; of the split parts 3 H for
    query, key and value, H for the context (twice on a CPU), F before and F after GELU; a float32 for each head's
    softmax; a mask for each of the two dropouts. Rotary positions add the rotated query and key (their inputs share the
    value's memory). In the last block everything after its queries, keys and values is for the masked positions only.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    copies = 1 if device_type == "cpu" else 0
    norm = _norm_bytes(config, width)
    rotated_tensors = 2 if config.position_embedding == ROTARY else 0
    attended = (1 + copies) * hidden * width + config.num_attention_heads * FLOAT32
    return _Saved(
        tokens=norm + (3 + rotated_tensors) * hidden * width / tensor_parallel,
        queries=norm + (attended + 2 * ffn * width) / tensor_parallel + 2 * _mask_bytes(config, width, device_type),
    )


def _saved_when_recomputed(config: EncoderConfig, width: int, tensor_parallel: int, recompute: str) -> _Saved:
    """Return what a recomputed block saves: its input, and if selective the results of products and of attention."""
    hidden, ffn = config.hidden_size * width, config.ffn_hidden_size * width
    if recompute != SELECTIVE_RECOMPUTE:
        return _Saved(tokens=hidden, queries=0)
    attended = hidden + config.num_attention_heads * FLOAT32
    return _Saved(
        tokens=hidden + 3 * hidden / tensor_parallel,
        queries=2 * hidden + (attended + ffn) / tensor_parallel,  # 2 H: the products that are added to the residual
    )
