"""What a step of training costs: floating-point operations, and memory on each device. Arithmetic only.

Symbols: L layers, H hidden size, F width of the feed-forward part, V rows of the embedding table, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bionemo_esm.alphabet import VOCABULARY_SIZE, padded_vocabulary_size
from bionemo_esm.model.config import ROTARY, EncoderConfig

CHOSEN_SHARE = 0.15  # of the tokens, which the head answers: the masking policy of both model cards
BYTES = {"32": 4, "bf16": 2}  # of a parameter, and of an activation
_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the end of a micro batch's forward pass.

    Not counted, and to be left free: the CUDA context and the kernels' work space (about 1 GB together), the gaps of
    the allocator, and the gradients of activations that one layer holds for a moment in the backward pass.
    """

    parameters: int  # in the precision that the layers multiply in
    masters: int  # float32 copies, where parameters are bfloat16
    gradients: int  # one float32 buffer
    moments: int  # Adam's two, float32
    activations: int  # kept from the forward pass for the backward pass

    @property
    def total(self) -> int:
        return self.parameters + self.masters + self.gradients + self.moments + self.activations


def training_flops(config: EncoderConfig, tokens: float, squared_lengths: float, targets: float) -> float:
    """Floating-point operations of forward and backward over packed rows: no padding, and nothing counted twice.

    tokens: all of them, `<cls>` and `<eos>` included; squared_lengths: the sum over sequences of their tokens squared;
    targets: masked positions, as only they reach the head. A multiplication and an addition are two operations; the
    backward pass takes twice the forward pass, for the gradients of weights and of inputs. Forward:

        tokens x L x (8 H^2 + 4 H F)    query, key, value and output projections; the feed-forward part
      + squared_lengths x L x 4 H       attention scores, and values weighted by them
      + targets x (2 H^2 + 2 H V)       the head

    These are the model's operations, as MFU counts them. Training takes fewer: its last block answers at the masked
    positions only (`ESMEncoder.forward`), which spares up to 1 / L of them and is not deducted.
    Layer norms, GELU, softmax, embeddings and the optimizer are left out. After Kaplan et al. 2020 (arXiv:2001.08361,
    table 1) and Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B, which has the attention term and MFU).
    """
    layers, hidden, ffn = config.num_layers, config.hidden_size, config.ffn_hidden_size
    linear = tokens * layers * (8 * hidden**2 + 4 * hidden * ffn)
    attention = squared_lengths * layers * 4 * hidden
    head = targets * (2 * hidden**2 + 2 * hidden * padded_vocabulary_size())
    return float(3 * (linear + attention + head))


def memory_per_device(
    config: EncoderConfig,
    tokens_of_micro_batch: float,
    *,
    precision: str,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    shard_optimizer: bool = False,
    device_type: str = "cuda",
) -> Memory:
    """Bytes that training takes on one device.

    tokens_of_micro_batch: of one packed row, specials included; precision: "32" or "bf16"; data_parallel: copies of the
    model, over which `shard_optimizer` splits Adam's moments; tensor_parallel: devices that share one copy;
    device_type: "cuda", or "cpu", where dropout keeps its masks in full width and attention copies its output.

    Attention keeps no weights, as flash attention does not. (On a CPU it does with dropout, and in bfloat16; that
    is not counted.)
    """
    width, parameters = BYTES[precision], parameters_per_device(config, tensor_parallel)
    largest = max(math.prod(shape) for _, shape in config.tensors()) / tensor_parallel  # tensors are not cut further
    moments = 2 * _FLOAT32 * parameters
    return Memory(
        parameters=width * parameters,
        masters=0 if precision == "32" else _FLOAT32 * parameters,
        gradients=_FLOAT32 * parameters,
        moments=math.ceil(max(moments / data_parallel, 2 * _FLOAT32 * largest)) if shard_optimizer else moments,
        activations=_activations(config, tokens_of_micro_batch, width, tensor_parallel, device_type),
    )


def parameters_per_device(config: EncoderConfig, tensor_parallel: int = 1) -> int:
    """P, or a device's part of it: Megatron splits the embedding table and the projections of attention and MLP."""
    whole = config.parameters
    if tensor_parallel == 1:
        return whole
    hidden, ffn, vocabulary = config.hidden_size, config.ffn_hidden_size, padded_vocabulary_size()
    layer = 4 * hidden**2 + 3 * hidden + 2 * hidden * ffn + ffn  # the bias of what is split along its input stays whole
    split = config.num_layers * layer + vocabulary * hidden + vocabulary
    return whole - split + split // tensor_parallel


def _activations(config: EncoderConfig, tokens: float, width: int, tensor_parallel: int, device_type: str) -> int:
    """Bytes that autograd saves for a packed row; measured in tests/test_costs.py.

    A token and layer keep, of H: the input and output of both layer norms, which every device holds whole; of the
    split part 3 H for query, key, value, H for the context, F before and F after GELU; a float32 for the softmax of
    each head; and a mask for each of the two dropouts. Rotary positions keep the turned query and key beside the ones
    that they were made from, which the value's memory holds, and once the angles' cosine and sine. Of the last block,
    what comes after its queries, keys and values is kept for the masked positions alone.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    copies, mask_bytes = (1, width) if device_type == "cpu" else (0, 1)
    masks = hidden * mask_bytes if config.hidden_dropout > 0 else 0
    turned = 2 if config.position_embedding == ROTARY else 0  # query and key
    norm = 2 * hidden * width + 2 * _FLOAT32  # its input, its output, mean and deviation
    asking = norm + 3 * hidden * width / tensor_parallel
    attended = (1 + copies) * hidden * width + config.num_attention_heads * _FLOAT32
    answering = norm + (attended + 2 * ffn * width) / tensor_parallel + 2 * masks
    rotated = turned * hidden * width / tensor_parallel
    ends = masks + 2 * 8  # with dropout of the embedding, and int64 ids
    ends += norm - hidden * width if config.embedding_layernorm else 0
    ends += 2 * config.head_size * _FLOAT32 if turned else 0
    chosen_queries, final_norm = hidden * width / tensor_parallel, norm - hidden * width
    head = chosen_queries + answering + final_norm + 5 * hidden * width + VOCABULARY_SIZE * _FLOAT32
    blocks = (config.num_layers - 1) * (asking + rotated + answering) + asking + rotated / 2  # of the last, the keys
    return math.ceil(tokens * (blocks + ends + CHOSEN_SHARE * head))
