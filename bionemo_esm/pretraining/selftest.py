"""One real training step of a tiny model on this machine's device, and an all-reduce among its ranks."""

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
from bionemo_esm.model.parallel import ensure_groups

TINY = EncoderConfig(
    num_layers=2,
    hidden_size=128,  # heads of 64, as in ESM-1nv: fused kernels are made for some sizes
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
    """The device computes something else than it should; the message says what."""


@dataclass(frozen=True)
class SelfTest:
    """A step that went as it should."""

    device: str
    precision: str
    backends: str
    loss: float  # nats a residue; about ln 33 = 3.5 for a model that knows nothing
    packing_difference: float  # of logits, between a packed row and its sequences one by one
    seconds: float


def self_test(device: torch.device, precision: str = "auto") -> SelfTest:
    """Forward, backward and Adam on the device, in the precision that a run would use.

    Raises `SelfTestError` when the loss is not finite, weights stay as they are, or packed sequences see one another.
    """
    started = time.perf_counter()
    ensure_groups()
    dtype = parameter_dtype(precision, device.type)
    backends = choose_backends(device.type, dtype, TINY.attention_dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ESMEncoder(TINY, dtype, backends).to(device=device, dtype=dtype)
    masters = MasterWeights(encoder.named_parameters())
    optimizer = build_optimizer(masters, OptimConfig(lr=1e-3, min_lr=1e-4), backends)
    batch = _batch().to(device)
    difference = _difference_by_packing(encoder, batch)
    if not difference < TOLERANCE[dtype]:
        raise SelfTestError(
            f"a packed row gives other logits than its sequences one by one, by {difference:.2g}: attention "
            f"({backends.attention}) is wrong on this device"
        )
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    masters.zero_gradients()
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
    """What the network between ranks gives."""

    ranks: int
    megabytes: float
    milliseconds: float
    bus_gb_per_second: float  # 2 (n - 1) / n x bytes / seconds: what each link carries, as in NVIDIA's nccl-tests


def all_reduce(device: torch.device) -> AllReduce:
    """Sum a buffer over all ranks, several times. Raises `SelfTestError` when the sum is wrong. Collective."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    size = (_MEBIBYTES if device.type == "cuda" else _MEBIBYTES // 4) * 2**20
    buffer = torch.full((size // 4,), float(rank + 1), device=device)
    distributed.all_reduce(buffer)  # also sets up the connections
    if not bool((buffer == ranks * (ranks + 1) / 2).all()):
        raise SelfTestError(f"an all-reduce over {ranks} ranks gives a wrong sum: the network between them fails")
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        distributed.all_reduce(buffer)
    _wait_for(device)
    seconds = (time.perf_counter() - started) / _REPEATS
    return AllReduce(ranks, size / 1e6, seconds * 1e3, 2 * (ranks - 1) / ranks * size / seconds / 1e9)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch() -> PackedBatch:
    """Four sequences of random residues; every seventh token is asked for."""
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
    """The largest between logits of the row, and of each of its sequences in a row of its own."""
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


def described(result: SelfTest | AllReduce) -> dict[str, float | int | str]:
    """As plain values, rounded to what is worth reading."""
    return {name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in asdict(result).items()}
