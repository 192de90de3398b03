"""The same run on 1, 2, 3 and 4 real ranks: the same samples in the same steps, and equal losses within rounding."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults import Fault, history, run, send
from runs import ROOT, SMALL, losses

DRY = ("model.hidden_dropout=0", "model.attention_dropout=0")  # dropout differs between ranks
SEQUENCES = (*DRY, "data.micro_batch_size=2", "data.global_batch_size=24")
TOKENS = (
    *DRY,
    "data.micro_batch_size=null",
    "data.micro_batch_tokens=256",
    "data.global_batch_size=null",
    "data.global_batch_tokens=2048",
)
BATCHES = {"sequences": SEQUENCES, "tokens": TOKENS}
STOP = Fault(
    "bionemo_esm.pretraining.checkpoints.Checkpoints.on_train_batch_end", functools.partial(send, signal.SIGTERM)
)


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of six steps on one rank, by the name of their batches."""
    folders = {name: tmp_path_factory.mktemp(name) / "alone" for name in BATCHES}
    for name, folder in folders.items():
        assert run(folder, *BATCHES[name]).codes == [0]
    return folders


@pytest.fixture(params=list(BATCHES))
def alone(request: pytest.FixtureRequest, runs_alone: dict[str, Path]) -> tuple[Path, list[str]]:
    """A run on one rank, and its overrides."""
    return runs_alone[request.param], list(BATCHES[request.param])


def consumed(folder: Path) -> list[int]:
    return [line["consumed_samples"] for line in history(folder) if line["kind"] == "train"]


def assert_same_run(folder: Path, alone: Path) -> None:
    assert consumed(folder) == consumed(alone)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    residues = [[line["residues"] for line in history(each) if line["kind"] == "train"] for each in (folder, alone)]
    assert residues[0] == residues[1]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_world_size_does_not_change_the_run(tmp_path: Path, alone: tuple[Path, list[str]], ranks: int) -> None:
    folder, overrides = alone
    outcome = run(tmp_path / "run", *overrides, ranks=ranks)
    assert outcome.codes == [0] * ranks, outcome.ranks
    assert_same_run(tmp_path / "run", folder)


def test_run_resumes_from_four_ranks_on_three_and_then_on_one(tmp_path: Path, alone: tuple[Path, list[str]]) -> None:
    whole, overrides = alone
    folder = tmp_path / "moving"
    for ranks, faults, codes in ((4, [STOP], [143] * 4), (3, [STOP], [143] * 3), (1, [], [0])):
        outcome = run(folder, *overrides, ranks=ranks, faults=faults)
        assert outcome.codes == codes, outcome.ranks
    assert_same_run(folder, whole)


def test_token_batches_vary_in_sequences_and_stay_within_the_budget(alone: tuple[Path, list[str]]) -> None:
    folder, overrides = alone
    totals = consumed(folder)
    sizes = {after - before for before, after in zip([0, *totals], totals, strict=False)}
    assert len(sizes) > 1 if overrides == list(TOKENS) else sizes == {24}
    lines = [line for line in history(folder) if line["kind"] == "train"]
    if overrides == list(TOKENS):
        assert all(1_800 < line["residues"] < 2_048 for line in lines)


def test_run_started_by_torchrun_equals_a_run_on_one_process(tmp_path: Path, runs_alone: dict[str, Path]) -> None:
    """Uses the real launcher, as in docs/slurm.md."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    place = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", "trainer.devices=2")
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "pretrain_esm1nv.py"), *SMALL, *SEQUENCES, *place],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "(2 ranks x 2 sequences x 6 accumulated)" in done.stdout
    assert_same_run(tmp_path / "run", runs_alone["sequences"])
