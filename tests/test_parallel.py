"""Several ranks compute what one does: overlapped reduction, tensor parallelism, sharded moments; real gloo groups."""

from __future__ import annotations

import copy
import dataclasses
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

import bionemo_esm.model.optimizer as reduction
from bionemo_esm.alphabet import MASK_ID
from bionemo_esm.compat import mark_split
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.model.attention import PackedAttention, PackedRow
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.config import FUSED_ADAM, MUON, OptimConfig
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import load_weights
from bionemo_esm.model.optimizer import (
    MasterWeights,
    OverlappedReduction,
    build_optimizer,
    build_sharded_optimizer,
    full_state,
    load_full_state,
)
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from bionemo_esm.model.parallel import (
    copy_split,
    data_parallel_rank,
    data_parallel_sum,
    ensure_groups,
    gather_shards,
    is_split,
    local_shard,
    tensor_parallel_rank,
    tensor_parallel_rng,
    unequal_over_data_parallel,
)
from errors import refused
from faults import FORK_SERVER
from models import tiny_model

SETTINGS = OptimConfig(lr=1e-2, min_lr=0.0, weight_decay=0.1, warmup_steps=2, constant_steps=0, max_steps=10)
BACKENDS = choose_backends("cpu", torch.float32, 0.0)
Tensors = dict[str, Tensor]


def on_ranks(ranks: int, folder: Path, work: Callable[..., Tensors], *arguments: Any) -> list[Tensors]:
    """Return the result of `work(*arguments)` on each rank of a process group."""
    folder.mkdir()
    processes = [FORK_SERVER.Process(target=_rank, args=(r, ranks, folder, work, arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert not errors and not hung, f"ranks {hung} hang\n{errors}"
    return [load_file(folder / str(rank)) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, work: Callable[..., Tensors], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
        save_file({name: tensor.contiguous() for name, tensor in work(*arguments).items()}, folder / str(rank))
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)


def batch_of(seed: int, sequences: int = 3) -> PackedBatch:
    """Random residues; every fifth token is masked."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, sequences)
    batch = pack(rng.integers(4, 24, lengths.sum()).astype(np.uint8), lengths)
    places = torch.arange(1, len(batch.tokens) - 1, 5)
    shown = batch.tokens.clone()
    shown[places] = MASK_ID
    return dataclasses.replace(batch, tokens=shown, target_index=places, targets=batch.tokens[places])


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- gradient reduction during backward -------------------------------------------------------------------------------


def reduced_both_ways(precision: str) -> Tensors:
    """Reduce gradients during and after backward; record when each bucket is sent; ranks run 3 and 1 micro batches."""
    ensure_groups()
    model = tiny_model(precision).train()
    named = list(model.named_parameters())
    named.insert(8, ("unused", Parameter(torch.ones(500, dtype=named[0][1].dtype))))
    masters = MasterWeights(named, bucket_bytes=4096)
    batches = [batch_of(10 * data_parallel_rank() + index) for index in range(3 - 2 * data_parallel_rank())]

    complete, sent = set(), []
    all_reduce, is_complete = distributed.all_reduce, OverlappedReduction.gradient_is_complete

    def watched_reduce(bucket: Tensor, **options: Any) -> Any:
        sent.append((bucket.storage_offset(), len(complete)))
        return all_reduce(bucket, **options)

    def watched_complete(self: OverlappedReduction, gradient: int) -> None:
        complete.add(gradient)
        is_complete(self, gradient)

    def backward(batch: PackedBatch) -> None:
        cross_entropy(model(batch), batch.targets, reduction="sum").backward()

    for batch in batches:
        backward(batch)
    after = data_parallel_sum(masters.gradients).clone()
    masters.zero_gradients()
    for batch in batches[:-1]:
        backward(batch)
    reduction.distributed.all_reduce = watched_reduce  # never restored: this process exits after `work`
    OverlappedReduction.gradient_is_complete = watched_complete
    with masters.overlapped_reduction():
        backward(batches[-1])
    sizes = torch.tensor([bucket.numel() for bucket in masters._reduction.buckets])
    return {"during": masters.gradients, "after": after, "sent": torch.tensor(sent), "buckets": sizes}


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_overlapped_reduction_equals_reduction_after_backward_bit_for_bit(tmp_path: Path, precision: str) -> None:
    first, second = on_ranks(2, tmp_path / "ranks", reduced_both_ways, precision)
    assert_same({"gradients": first["during"]}, {"gradients": first["after"]})
    assert_same(first, second)
    places, complete = first["sent"].unbind(1)
    assert places.tolist() == [0, *first["buckets"].cumsum(0)[:-1].tolist()], "every bucket once, in order"
    assert (first["buckets"][:-1] >= 1024).all()
    assert complete.unique(return_counts=True)[1].max() < len(places) / 2, "sent one by one as backward goes"
    assert complete[0] < complete.max() / 4


def weights_of_two_ranks() -> Tensors:
    ensure_groups()
    weights = {"rounded": torch.arange(10.0).bfloat16(), "exact": torch.ones(5)}
    before = unequal_over_data_parallel(weights)
    if data_parallel_rank() == 1:
        weights["exact"][3] += 1e-7
    after = unequal_over_data_parallel(weights)
    return {"before": torch.tensor(len(before)), "after": torch.tensor(after == ["exact"])}


def test_weights_that_differ_in_one_bit_are_named_on_every_rank(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path / "ranks", weights_of_two_ranks):
        assert int(found["before"]) == 0
        assert bool(found["after"])


def test_ranks_that_begin_with_unequal_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.on_train_start()
    monkeypatch.setattr("bionemo_esm.model.packed_model.unequal_over_data_parallel", lambda tensors: list(tensors)[3:5])
    with refused("ranks.unequal-weights", list(dict(model.named_parameters()))[3]):
        model.on_train_start()


def reduced_in_opposite_orders() -> Tensors:
    ensure_groups()
    rank = data_parallel_rank()
    buffer = torch.arange(40.0) + 100 * rank
    buckets = OverlappedReduction(buffer, [4] * 10, bucket_bytes=32)
    with buckets.during_backward():
        # Gradient 9 never arrives on rank 0, gradient 0 never on rank 1.
        for gradient in (range(9), range(9, 0, -1))[rank]:
            buckets.gradient_is_complete(gradient)
    return {"sum": buffer}


def test_reduction_is_correct_if_gradients_differ_in_order_or_are_missing(tmp_path: Path) -> None:
    for rank in on_ranks(2, tmp_path / "ranks", reduced_in_opposite_orders):
        assert rank["sum"].tolist() == [2.0 * place + 100 for place in range(40)]


# --- tensor parallelism -----------------------------------------------------------------------------------------------

REPLICATED = "layernorm", "position_embeddings", "linear_proj.bias", "linear_fc2.bias", "lm_head"


def half_of_a_model(whole: Path) -> Tensors:
    """Run forward, backward with dropout, clipping, and random numbers on one of two tensor-parallel ranks."""
    ensure_groups(tensor_model_parallel_size=2)
    rank = tensor_parallel_rank()
    drawn = dict(ESM1nvModel(tiny_model(init_method_std=0.02).cfg).named_parameters())
    seen = {f"drawn/{name}": gather_shards(tensor.detach(), tensor) for name, tensor in drawn.items()}

    model = tiny_model()
    load_weights(model, load_file(whole), str(whole))
    qkv = load_file(whole)["encoder.encoder.layers.1.self_attention.linear_qkv.weight"]
    heads = qkv.reshape(4, 3, 8, 32)[2 * rank : 2 * rank + 2].reshape(48, 32)
    assert torch.equal(model.encoder.encoder.layers[1].self_attention.linear_qkv.weight, heads), "query, key, value"

    masters, batch = MasterWeights(model.named_parameters()), batch_of(1)
    cross_entropy(model(batch), batch.targets, reduction="sum").backward()
    for name, view in masters._views.items():
        assert is_split(masters.parameters[name]) != any(part in name for part in REPLICATED), name
        seen[f"gradient/{name}"] = gather_shards(view, masters.parameters[name]).clone()
    seen["norm"] = masters.clip_gradients(0.5)
    seen["clipped"] = masters._gradient_norm()
    masters.release()

    wet = tiny_model(hidden_dropout=0.3, attention_dropout=0.3).train()
    wet.encoder.load_state_dict(model.encoder.state_dict())
    masters = MasterWeights(wet.named_parameters())
    torch.manual_seed(7)
    logits = wet(batch)
    cross_entropy(logits, batch.targets, reduction="sum").backward()
    kept = [view.reshape(-1) for name, view in masters._views.items() if not is_split(masters.parameters[name])]
    seen |= {"wet/logits": logits.detach(), "wet/gradients": torch.cat(kept), "wet/next": torch.rand(3)}
    with tensor_parallel_rng(torch.device("cpu")):
        seen["own"] = torch.rand(3)
    seen["wet/after"] = torch.rand(3)
    attention = next(module for module in wet.modules() if isinstance(module, PackedAttention))
    ones = torch.ones(40, 2, 8)
    layout = PackedRow(cu_seqlens_q=torch.tensor([0, 40]), cu_seqlens_kv=torch.tensor([0, 40]))
    seen["own heads"] = attention(ones, ones, ones, None, layout)
    return seen


def test_tensor_parallel_ranks_have_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    model, batch = tiny_model(), batch_of(1)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(weights, tmp_path / "whole")
    first, second = on_ranks(2, tmp_path / "ranks", half_of_a_model, tmp_path / "whole")

    own = {name for name in first if name.startswith("own")}
    assert_same({n: t for n, t in first.items() if n not in own}, {n: t for n, t in second.items() if n not in own})
    assert all(not torch.equal(first[name], second[name]) for name in own), "ranks drop the same of different heads"

    alone = ESM1nvModel(tiny_model(init_method_std=0.02).cfg)
    drawn = {f"drawn/{name}": parameter.detach() for name, parameter in alone.named_parameters()}
    assert_same({name: first[name] for name in drawn}, drawn)

    masters = MasterWeights(model.named_parameters())
    cross_entropy(model(batch), batch.targets, reduction="sum").backward()
    for name, view in masters._views.items():
        torch.testing.assert_close(
            first[f"gradient/{name}"], view, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(first["norm"], masters.clip_gradients(0.5), atol=0, rtol=1e-5)
    assert first["norm"] > 1
    assert float(first["clipped"]) == pytest.approx(0.5, rel=1e-4)


# --- moments sharded over ranks ---------------------------------------------------------------------------------------


class CountsByGroup(torch.optim.Optimizer):
    """An optimizer like those of Apex and Transformer Engine: the step count belongs to a group that is not empty."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in (group for group in self.param_groups if group["params"]):
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter)).add_(parameter.grad)
                parameter.sub_(group["lr"] * state["exp_avg"] / group["step"])


Run = tuple[MasterWeights, Any]


def begin(build: Callable[..., Any], named: Mapping[str, Tensor], adam: str) -> Run:
    """Return new master weights with these values, and their optimizer."""
    backends = dataclasses.replace(BACKENDS, adam=CountsByGroup) if adam == "by group" else BACKENDS
    config = SETTINGS.replace(name=MUON) if adam == MUON else SETTINGS
    masters = MasterWeights((name, Parameter(tensor.detach().clone())) for name, tensor in named.items())
    return masters, build(masters, config, backends)


def train(runs: list[Run], steps: range) -> None:
    """Apply the same random gradients to each run, at a decreasing learning rate."""
    for step in steps:
        for masters, optimizer in runs:
            generator = torch.Generator().manual_seed(step)
            masters.gradients.copy_(torch.randn(len(masters.gradients), generator=generator))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)  # as a scheduler sets it
            optimizer.step()


def assert_is_state_of(state: dict[str, Any], reference: Run) -> None:
    """Assert that rank 0 has the state of an unsharded optimizer, and that the other ranks have none."""
    expected = reference[1].state_dict()
    if data_parallel_rank() != 0:
        assert state == {}
        return
    assert state["state"].keys() == expected["state"].keys()
    for saved, group in zip(state["param_groups"], expected["param_groups"], strict=True):
        assert saved == {name: value for name, value in group.items() if name != "step"}
        for place in group["params"] if expected["state"] else ():
            counted = {"step": torch.tensor(float(group["step"]))} if "step" in group else {}
            assert_same(state["state"][place], expected["state"][place] | counted)


def split_and_whole(adam: str, tensors: int | None) -> Tensors:
    """Train with sharded and whole moments, switch half-way in both directions, and count the elements held."""
    ensure_groups()
    named = dict(list(tiny_model(seq_length=64).named_parameters())[:tensors])
    family = OPTIMIZERS.get(MUON if adam == MUON else FUSED_ADAM)
    split, whole = begin(build_sharded_optimizer, named, adam), begin(build_optimizer, named, adam)
    assert_is_state_of(full_state(split[1], split[0], family), whole)  # no state before the first step
    train([split, whole], range(3))
    assert_is_state_of(full_state(split[1], split[0], family), whole)
    assert_is_state_of(full_state(whole[1], whole[0], family), whole)

    saved = copy.deepcopy(whole[1].state_dict())  # a real run loads rank 0's state from a file on all ranks
    joined = begin(build_optimizer, split[0].masters, adam)
    parted = begin(build_sharded_optimizer, whole[0].masters, adam)
    for masters, optimizer in (joined, parted):
        load_full_state(optimizer, masters, copy.deepcopy(saved), group_steps=adam == "by group")
    train([split, whole, joined, parted], range(3, 5))
    for masters, _ in (split, joined, parted):
        assert_same(masters.masters, whole[0].masters)
    assert_is_state_of(full_state(parted[1], parted[0], family), whole)

    held = sum(t.numel() for state in split[1].optim.state.values() for t in state.values() if t.ndim)
    kept = sum(t.numel() for state in whole[1].state.values() for t in state.values() if t.ndim)
    counts = {"held": torch.tensor(held), "all": torch.tensor(kept)}
    return counts | {name: master.detach() for name, master in split[0].masters.items()}


def all_split_and_whole(adams: list[str], tensors: int | None) -> Tensors:
    """Return the results of `split_and_whole` for each optimizer, in one process group."""
    results = {adam: split_and_whole(adam, tensors) for adam in adams}
    return {f"{adam}/{name}": tensor for adam, result in results.items() for name, tensor in result.items()}


@pytest.mark.parametrize(
    ("adams", "tensors"),
    [(["PyTorch", "by group", MUON], None), (["PyTorch", "by group"], 3)],
    ids=["a model", "fewer tensors than ranks"],
)
def test_sharded_moments_equal_whole_moments_and_each_rank_holds_its_shard(
    tmp_path: Path, adams: list[str], tensors: int | None
) -> None:
    ranks = 4 if tensors else 3
    results = on_ranks(ranks, tmp_path / "ranks", all_split_and_whole, adams, tensors)
    for adam in adams:
        held = [int(result.pop(f"{adam}/held")) for result in results]
        everything = int(results[0][f"{adam}/all"])
        assert sum(held) == everything
        if tensors is not None:
            assert held[-1] == 0
        elif adam == MUON:  # ranks share parameters evenly, and an embedding has twice the state of a matrix
            assert max(held) < 0.6 * everything
        else:
            assert max(held) < 1.05 * everything / ranks
    for result in results[1:]:
        assert_same(result, results[0])


# --- Muon on matrices that tensor parallelism splits ------------------------------------------------------------------


def part_of_whole(whole: Tensor, dimension: int | None) -> Parameter:
    """Return this rank's part of a tensor, marked as Megatron marks it."""
    marked = Parameter(whole)
    mark_split(marked, dimension)
    return copy_split(marked, Parameter(local_shard(whole, marked).clone()))


SPLIT = {"encoder.a.weight": ((12, 8), 0), "encoder.b.weight": ((8, 12), 1), "encoder.c.weight": ((6, 6), None)}
SPLIT |= {"encoder.embedding.weight": ((16, 4), 0), "encoder.a.bias": ((12,), 0)}


def steps_of_muon(precision: torch.dtype) -> Tensors:
    """Train split masters with known whole gradients; return the whole masters and the whole momentum."""
    if distributed.is_initialized():
        ensure_groups(tensor_model_parallel_size=2)
    generator = torch.Generator().manual_seed(3)
    masters = MasterWeights(
        (name, part_of_whole(torch.randn(shape, generator=generator).to(precision), dimension))
        for name, (shape, dimension) in SPLIT.items()
    )
    optimizer = build_optimizer(masters, SETTINGS.replace(name=MUON), BACKENDS)
    for _ in range(3):
        for name, (shape, _dimension) in SPLIT.items():
            whole = torch.randn(shape, generator=generator)
            masters._views[name].copy_(local_shard(whole, masters.parameters[name]))
        optimizer.step()
    state = full_state(optimizer, masters, OPTIMIZERS.get(MUON)).get("state", {})
    momentum = {f"momentum {i}": v["momentum_buffer"] for i, v in state.items() if "momentum_buffer" in v}
    return masters.state_dict() | momentum


def steps_in_both_precisions() -> Tensors:
    results = {str(dtype): steps_of_muon(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {f"{dtype}/{name}": tensor for dtype, result in results.items() for name, tensor in result.items()}


def test_muon_orthogonalizes_the_whole_of_a_split_matrix(tmp_path: Path) -> None:
    alone = steps_in_both_precisions()
    first, second = on_ranks(2, tmp_path / "split", steps_in_both_precisions)
    assert len(alone) == len(first) == 2 * (len(SPLIT) + 3)
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for name in second:
        assert torch.equal(first[name], second[name]), name
