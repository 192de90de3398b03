"""Counts of the work of a training step. Unlike seconds, counts are the same on every machine.

Each number is an upper bound. If you lower a count, write the lower number here. If you need a higher one, explain why.
"""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import dataclass, fields
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bionemo_esm.alphabet import PAD_ID
from bionemo_esm.data.collate import PackedBatch, SampleReader
from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore, SequenceSplit
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.config import OptimConfig
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer
from models import tiny_model

BF16 = pytest.mark.skipif(
    choose_backends("cpu", torch.bfloat16, 0.0).linear != "oneDNN", reason="a CPU that does not multiply bfloat16"
)
PACKING_PEAK = 1.3
COPIES = ("copy_", "_to_copy", "clone", "cat", "index", "gather")


class Counted(TorchDispatchMode):
    """Count the operators that are called, the bytes that copies write, and the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, int] = {}
        self.copied = self.allocated = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        written = [tensor for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [tensor for tensor in written if tensor.untyped_storage().data_ptr() not in known]
        if new or function._schema.is_mutable:  # otherwise it is a view, which runs no kernel
            self.operators[name] = self.operators.get(name, 0) + 1
        if name in COPIES:
            self.copied += sum(tensor.nbytes for tensor in written)
        self.allocated += sum(tensor.untyped_storage().nbytes() for tensor in new)
        return result

    @property
    def calls(self) -> int:
        return sum(self.operators.values())


@pytest.fixture
def stream(tiny_split: SequenceSplit) -> TrainingBatches:
    return TrainingBatches(SampleReader(tiny_split, 128, MaskingPolicy(), seed=3), BatchPlan(6, 6))


def counts_of_a_step(batch: PackedBatch, precision: str, **sizes: float) -> Counted:
    """Return the counts of forward pass, backward pass, gradient clipping and optimizer step."""
    model = tiny_model(precision, **sizes).train()
    masters = MasterWeights(model.named_parameters())
    optimizer = build_optimizer(masters, OptimConfig(), choose_backends("cpu", torch.float32, 0.0))
    for counted in (Counted(), Counted()):  # the second step finds the optimizer state allocated
        masters.zero_gradients()
        with counted:
            cross_entropy(model(batch), batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
            masters.clip_gradients(1.0)
            optimizer.step()
            masters.write_back()
    return counted


PRODUCTS = ("_linear_pointwise", "bmm", "gelu", "gelu_backward")
SHAPES = 700  # oneDNN caches 1,024 compiled kernels


class ProductShapes(TorchDispatchMode):
    """Collect the distinct shapes of bfloat16 operands. oneDNN compiles one kernel for each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        operands = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        if name in PRODUCTS and operands[0].dtype == torch.bfloat16:
            self.seen.add((name, *(tensor.shape for tensor in operands)))
        return function(*args, **(kwargs or {}))


@BF16
@pytest.mark.slow
def test_200_steps_of_the_laptop_recipe_use_few_product_shapes(sample_store: ProteinStore) -> None:
    """Eight new proteins per step, as in conf/recipe/laptop.yaml. Without length buckets there are 12,000 shapes."""
    stream = TrainingBatches(SampleReader(sample_store.split("train"), 512, MaskingPolicy(), seed=42), BatchPlan(8, 8))
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "seq_length": 512}
    model = tiny_model("bf16", **sizes, hidden_dropout=0.1, attention_dropout=0.1).train()
    found = ProductShapes()
    for step in range(200):
        (batch,) = stream[8 * step].micro_batches
        with found:
            cross_entropy(model(batch), batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert len(found.seen) <= SHAPES


@dataclass(frozen=True)
class Ceiling:
    """Upper bounds for a step over six proteins with two layers of width 32, and for what a third layer adds.

    Padding rows and lengths to sizes that recur costs 17 to 80 small operators, and spares the compilation of kernels,
    which takes longer than the step (`test_200_steps_of_the_laptop_recipe_present_few_shapes_to_products`).
    """

    calls: int
    calls_a_layer: int
    copied: int  # bytes per token
    allocated: int  # bytes per token


@pytest.mark.parametrize(
    ("precision", "dropout", "ceiling"),
    [
        ("32", 0.0, Ceiling(calls=206, calls_a_layer=58, copied=1670, allocated=9120)),
        ("32", 0.1, Ceiling(calls=396, calls_a_layer=138, copied=2686, allocated=28202)),
        pytest.param("bf16", 0.1, Ceiling(calls=462, calls_a_layer=160, copied=3160, allocated=19787), marks=BF16),
    ],
)
def test_step_stays_within_the_bounds_of_operators_copies_and_memory(
    stream: TrainingBatches, precision: str, dropout: float, ceiling: Ceiling
) -> None:
    (batch,) = stream[0].micro_batches
    dropouts = {"hidden_dropout": dropout, "attention_dropout": dropout}
    two, three = (counts_of_a_step(batch, precision, num_layers=layers, **dropouts) for layers in (2, 3))
    assert two.calls <= ceiling.calls
    assert three.calls - two.calls <= ceiling.calls_a_layer
    assert two.copied <= ceiling.copied * len(batch.tokens)
    assert two.allocated <= ceiling.allocated * len(batch.tokens)


def test_batch_contains_no_padding(stream: TrainingBatches) -> None:
    """Padding efficiency is 100%: each protein has its residues, <cls> and <eos>, with nothing between or after."""
    (batch,) = stream[0].micro_batches
    _, samples = stream.permutation.samples(np.arange(6))
    residues = np.minimum(stream.reader.split.lengths[samples], 126)
    assert len(batch.tokens) == residues.sum() + 2 * 6
    assert not (batch.tokens == PAD_ID).any()


def test_batch_in_tokens_has_no_room_for_the_next_protein(tiny_split: SequenceSplit) -> None:
    plan = BatchPlan(global_batch_tokens=1000, micro_batch_tokens=1000)
    stream = TrainingBatches(SampleReader(tiny_split, 128, MaskingPolicy(), seed=3), plan)
    consumed = 0
    for _ in range(5):
        share = stream[consumed]
        (batch,) = share.micro_batches
        epochs, samples = stream.permutation.samples(np.arange(consumed + share.samples, consumed + share.samples + 1))
        (following,) = stream.reader.token_counts(epochs, samples)
        assert 1000 - following < len(batch.tokens) <= 1000
        consumed += share.samples


def test_pickled_batch_takes_two_bytes_per_token(stream: TrainingBatches) -> None:
    """The batch is sent as bytes in the pipe. A shared-memory file per tensor would take a millisecond to open."""
    (batch,) = stream[6].micro_batches
    travelling = ForkingPickler.dumps(batch)
    assert len(travelling) < 2.1 * len(batch.tokens)
    arrived = pickle.loads(travelling)
    for field in fields(batch):
        mine, theirs = getattr(batch, field.name), getattr(arrived, field.name)
        same = torch.equal(mine, theirs) and mine.dtype == theirs.dtype if torch.is_tensor(mine) else mine == theirs
        assert same, field.name


def test_packing_makes_no_copy(stream: TrainingBatches) -> None:
    """Peak memory is the returned batch plus the unused capacity for targets."""
    many = TrainingBatches(stream.reader, BatchPlan(370, 370))  # ten epochs
    many[0]  # compile first
    tracemalloc.start()
    (batch,) = many[370].micro_batches
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensors = (getattr(batch, field.name) for field in fields(batch))
    returned = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert peak < PACKING_PEAK * returned
