"""Cost of a training step: floating-point operations, and memory of each device. Arithmetic only.

Symbols: L layers, H hidden size, F width of the feed-forward part, V rows of the embedding table, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.model.config import FUSED_ADAM, ROTARY, EncoderConfig
from bionemo_esm.model.optimizer_registry import OPTIMIZERS

CHOSEN_SHARE = 0.15  # share of masked tokens, which alone reach the head: the policy of both model cards
BYTES = {"32": 4, "bf16": 2}  # of a parameter, and of an activation
FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the end of a micro batch's forward pass.

    Not counted: the CUDA context and the kernels' workspaces (about 1 GB together), fragmentation of the allocator, the
    padding of rows and lengths on a CPU, and the gradients of one layer's activations during the backward pass. Leave
    room for them.
    """

    parameters: int  # in the dtype of the parameters
    masters: int  # float32 copies of bfloat16 parameters
    gradients: int  # one float32 buffer
    moments: int  # state tensors of the optimizer, float32
    activations: int  # saved by the forward pass for the backward pass

    @property
    def total(self) -> int:
        return self.parameters + self.masters + self.gradients + self.moments + self.activations


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
    layers, hidden = config.num_layers, config.hidden_size
    linear = tokens * layers * sum(part.flops for part in config.block_parts())
    attention = squared_lengths * layers * 4 * hidden
    words = config.embedding_parts()[0]  # the tied output matrix
    head = targets * (sum(part.flops for part in config.head_parts()) + 2 * math.prod(words.weight))
    return float(3 * (linear + attention + head))


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
    shard_optimizer: bool = False,
    device_type: str = "cuda",
    optimizer: str = FUSED_ADAM,
) -> Memory:
    """Return the bytes that training takes on one device.

    tokens_of_micro_batch: of one packed row, specials included; precision: "32" or "bf16"; data_parallel: replicas of
    the model, over which `shard_optimizer` splits the optimizer state; tensor_parallel: devices that share one replica;
    device_type: "cuda", or "cpu", where dropout masks have full width and attention copies its output; optimizer: a
    name in `OPTIMIZERS`.

    Attention probabilities are not stored, as in flash attention. (A CPU stores them with dropout, and in bfloat16;
    that is not counted.)
    """
    width, parameters = BYTES[precision], parameters_per_device(config, tensor_parallel)
    state = {name: _state_bytes(optimizer, name, shape) for name, shape in config.tensors()}
    moments = sum(state.values()) * parameters // config.parameters
    largest = max(state.values()) / tensor_parallel  # sharding does not split a tensor
    return Memory(
        parameters=width * parameters,
        masters=0 if precision == "32" else FLOAT32 * parameters,
        gradients=FLOAT32 * parameters,
        moments=math.ceil(max(moments / data_parallel, largest)) if shard_optimizer else moments,
        activations=_activations(config, tokens_of_micro_batch, width, tensor_parallel, device_type),
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


def _activations(config: EncoderConfig, tokens: float, width: int, tensor_parallel: int, device_type: str) -> int:
    """Return the bytes that autograd saves for a packed row; measured in tests/test_costs.py.

    For each token and layer, in units of H: the input and output of both layer norms, which every device holds whole;
    of the split parts 3 H for query, key and value, H for the context, F before and F after GELU; a float32 for each
    head's softmax; a mask for each of the two dropouts. Rotary positions add the rotated query and key (their inputs
    share the value's memory) and once the cosine and sine of the angles. In the last block everything after its
    queries, keys and values is saved for the masked positions only.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    copies, mask_bytes = (1, width) if device_type == "cpu" else (0, 1)
    masks = hidden * mask_bytes if config.hidden_dropout > 0 else 0
    rotated_tensors = 2 if config.position_embedding == ROTARY else 0  # query and key
    norm = 2 * hidden * width + 2 * FLOAT32  # input, output, mean and deviation
    projections = norm + 3 * hidden * width / tensor_parallel
    attended = (1 + copies) * hidden * width + config.num_attention_heads * FLOAT32
    after_projections = norm + (attended + 2 * ffn * width) / tensor_parallel + 2 * masks
    rotated = rotated_tensors * hidden * width / tensor_parallel
    ends = masks + 2 * 8  # embedding dropout, and int64 ids
    ends += norm - hidden * width if config.embedding_layernorm else 0
    ends += 2 * config.head_size * FLOAT32 if rotated_tensors else 0
    chosen_queries, final_norm = hidden * width / tensor_parallel, norm - hidden * width
    head = chosen_queries + after_projections + final_norm + 5 * hidden * width + VOCABULARY_SIZE * FLOAT32
    blocks = (
        (config.num_layers - 1) * (projections + rotated + after_projections) + projections + rotated / 2
    )  # last block: the keys only
    return math.ceil(tokens * (blocks + ends + CHOSEN_SHARE * head))
