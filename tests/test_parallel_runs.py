"""Whole runs on different parallel layouts: the same training, and any layout resumes from any other's checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.parallel import data_parallel_sum
from faults import Fault, history, run, send

pytestmark = pytest.mark.slow
DRY = ("model.hidden_dropout=0", "model.attention_dropout=0", "data.micro_batch_size=4", "optim.eps=1e-4")
DRY += ("trainer.gradient_clip_val=0.5",)
STOP = Fault(
    "bionemo_esm.pretraining.checkpoints.Checkpoints.on_train_batch_end", functools.partial(send, signal.SIGTERM)
)


def agreed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights; assert on every rank that all ranks have the same."""
    if not distributed.is_initialized():  # rank 0 at the end of the run
        return weights
    mine = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
    others = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others), "ranks have different weights"
    return weights


def held_once(held: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Return the moments; assert that no two data-parallel ranks hold the moments of one parameter."""
    holders = torch.zeros(100)
    holders[list(held)] = 1
    assert data_parallel_sum(holders).max() <= 1, "moments are held twice"
    return held


HELD_ONCE = Fault("bionemo_esm.model.optimizer._local_state", spoil=held_once, repeated=True)
AGREED = Fault("bionemo_esm.model.esm1nv.ESM1nvModel.archive_weights", spoil=agreed, repeated=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parallel layout of a run or of one stage."""

    tensor: int = 1
    data: int = 1
    split_moments: bool = False

    def train(self, folder: Path, *overrides: str, stop_after: int | None = None) -> None:
        """Train to the end, or until the last rank gets SIGTERM; assert that all ranks save the same state."""
        ranks = self.tensor * self.data
        keys = (f"tensor_model_parallel_size={self.tensor}", f"shard_optimizer={str(self.split_moments).lower()}")
        watched = (AGREED, HELD_ONCE) if self.split_moments else (AGREED,)
        faults = [dataclasses.replace(fault, rank=rank) for rank in range(ranks) for fault in watched]
        faults += [dataclasses.replace(STOP, call=stop_after, rank=ranks - 1)] if stop_after else []
        outcome = run(folder, *DRY, *(f"trainer.{key}" for key in keys), *overrides, ranks=ranks, faults=faults)
        assert outcome.codes == [143 if stop_after else 0] * ranks, outcome.ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    folder = tmp_path_factory.mktemp("parallel") / "alone"
    Layout().train(folder)
    return folder


JOURNEYS = {
    "two tensor-parallel ranks": [Layout(tensor=2)],
    "two by two": [Layout(tensor=2, data=2)],
    "from tensor- to data-parallel to one": [Layout(tensor=2), Layout(data=2, split_moments=True), Layout()],
    "from one to two by two to two": [Layout(), Layout(tensor=2, data=2, split_moments=True), Layout(tensor=2)],
}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_run_is_the_same_on_any_parallel_layout_and_resumes_on_any_other(
    tmp_path: Path, alone: Path, journey: str
) -> None:
    folder = tmp_path / "run"
    *stages, last = JOURNEYS[journey]
    for stage in stages:
        stage.train(folder, stop_after=2)
    last.train(folder)
    ours, theirs = ([line for line in history(f) if line["kind"] == "train"] for f in (folder, alone))
    for found, expected in zip(ours, theirs, strict=True):
        assert found == {
            name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            for name, value in expected.items()
        }
    assert len(ours) == 6
    assert min(line["gradient_norm"] for line in theirs) > 0.5, "clipping does nothing"
    for archive in ("laptop.nemo", "laptop-averaged.nemo"):
        model, reference = (ESM1nvModel.restore_from(str(f / archive), map_location="cpu") for f in (folder, alone))
        for (name, parameter), other in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(parameter, other[1], atol=1e-5, rtol=1e-4, msg=name)


def test_sharded_moments_change_no_bit_of_a_checkpoint(tmp_path: Path) -> None:
    wet = ("trainer.precision=bf16", "model.hidden_dropout=0.1", "model.attention_dropout=0.1")
    for split in (False, True):
        Layout(tensor=2, data=2, split_moments=split).train(tmp_path / str(split), *wet)
    newest = [tmp_path / str(split) / "checkpoints" / "step-000000006.ckpt" for split in (False, True)]
    assert newest[0].read_bytes() == newest[1].read_bytes()
