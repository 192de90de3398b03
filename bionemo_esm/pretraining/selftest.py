"""Self-test: one training step of a tiny model on this machine's device, and an all-reduce over its ranks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.errors import UserError
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig, OptimConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer

TINY = EncoderConfig(
    num_layers=2,
    hidden_size=128,  # heads of size 64, as in ESM-1nv: fused kernels support some sizes only
    num_attention_heads=2,
    ffn_hidden_size=256,
    seq_length=128,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
LENGTHS = (100, 7, 62, 31)  # residues
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of logits of order 1
_MEBIBYTES, _REPEATS = 64, 5


class SelfTestError(UserError):
    """A wrong result of the device; the message names it."""


@dataclass(frozen=True)
class SelfTest:
    """Result of a training step without errors."""

    device: str
    precision: str
    backends: str
    loss: float  # nats per residue; about ln 33 = 3.5 before training
    packing_difference: float  # largest, of logits, between a packed row and single sequences
    seconds: float


def self_test(device: torch.device, precision: str = "auto", dropout: float = 0.0) -> SelfTest:
    """Run forward, backward and the optimizer on the device, in the precision and with the dropout of a run.

    Both select the attention kernel. Raises `SelfTestError` if the loss is not finite, no weight changes, or packed
    sequences attend to each other.
    """
    started = time.perf_counter()
    dtype = parameter_dtype(precision, device.type)
    config = TINY.replace(hidden_dropout=dropout, attention_dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = ESMEncoder(config, dtype, choose_backends("cpu", dtype, dropout, config.head_size)).to(device)
    backends = encoder.backends
    masters = MasterWeights(encoder.named_parameters())
    optimizer = build_optimizer(masters, OptimConfig(lr=1e-3, min_lr=1e-4), backends)
    batch = random_row().to(device)
    difference = _difference_by_packing(encoder.eval(), batch)
    encoder.train()
    if not difference < TOLERANCE[dtype]:
        raise SelfTestError(
            f"a packed row gives other logits than its sequences one by one, by {difference:.2g}: attention "
            f"({backends.attention}) is wrong on this device"
        )
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    masters.zero_gradients()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        loss = cross_entropy(_logits(encoder, batch), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = float(masters.clip_gradients(1.0))
    optimizer.step()
    masters.write_back()
    if not (np.isfinite(float(loss)) and np.isfinite(norm)):
        raise SelfTestError(f"a training step has loss {float(loss)} and gradient norm {norm}, which are not finite")
    still = [name for name, parameter in encoder.named_parameters() if torch.equal(parameter, before[name])]
    if len(still) == len(before):
        raise SelfTestError(f"a training step changed no weight: Adam ({backends.adam_name}) does nothing here")
    seconds = time.perf_counter() - started
    return SelfTest(str(device), str(dtype)[6:], backends.describe(), float(loss), difference, seconds)


@dataclass(frozen=True)
class AllReduce:
    """Speed of the network between ranks."""

    ranks: int
    megabytes: float
    milliseconds: float
    bus_gb_per_second: float  # 2 (n - 1) / n x bytes / seconds, as in NVIDIA's nccl-tests


def all_reduce(device: torch.device) -> AllReduce:
    """Measure all-reduces of a buffer. Raises `SelfTestError` for a wrong sum. Collective."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    size = (_MEBIBYTES if device.type == "cuda" else _MEBIBYTES // 4) * 2**20
    buffer = torch.full((size // 4,), float(rank + 1), device=device)
    distributed.all_reduce(buffer)  # sets up the connections, too
    if not bool((buffer == ranks * (ranks + 1) / 2).all()):
        raise SelfTestError(f"an all-reduce over {ranks} ranks gives a wrong sum: the network between them fails")
    wait_for(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        distributed.all_reduce(buffer)
    wait_for(device)
    seconds = (time.perf_counter() - started) / _REPEATS
    return AllReduce(ranks, size / 1e6, seconds * 1e3, 2 * (ranks - 1) / ranks * size / seconds / 1e9)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_row() -> PackedBatch:
    """Return four sequences of random residues; every seventh token is a target."""
    generator = np.random.default_rng(0)
    last = FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES
    batch = pack(generator.integers(FIRST_RESIDUE_ID, last, sum(LENGTHS)).astype(np.uint8), np.array(LENGTHS))
    asked = torch.arange(1, len(batch.tokens), 7)
    return replace(batch, target_index=asked, targets=batch.tokens[asked])


def _logits(encoder: ESMEncoder, batch: PackedBatch) -> Tensor:
    logits: Tensor = encoder(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.target_index)
    return logits


@torch.no_grad()
def _difference_by_packing(encoder: ESMEncoder, batch: PackedBatch) -> float:
    """Return the largest difference between the logits of the row and of each sequence alone."""
    everything = replace(batch, target_index=torch.arange(len(batch.tokens), device=batch.tokens.device))
    packed, bounds = _logits(encoder, everything), batch.cu_seqlens.tolist()
    largest = 0.0
    for start, end in pairwise(bounds):
        alone = PackedBatch(
            tokens=batch.tokens[start:end],
            positions=batch.positions[start:end],
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32, device=batch.tokens.device),
            max_seqlen=end - start,
            target_index=everything.target_index[: end - start],
            targets=batch.tokens[start:end],
        )
        largest = max(largest, float((_logits(encoder, alone) - packed[start:end]).abs().max()))
    return largest


def to_dict(result: SelfTest | AllReduce) -> dict[str, float | int | str]:
    """Return the values by name, rounded to three digits."""
    return {name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in asdict(result).items()}
