"""Faults in a run: signals, kills, damaged files, full disks and NaN.

Each test resumes the run and compares it bit for bit with an undisturbed run.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from bionemo_esm.data.dataloader import BatchPlan, EpochPermutation
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.model.archive import ArchiveFile, read_archive
from faults import Fault, KillWhileSaving, Outcome, history, run, send
from runs import losses

MODEL, SAVING = "bionemo_esm.model.esm1nv.", "bionemo_esm.pretraining.checkpoints."
SIGTERM, SIGINT = functools.partial(send, signal.SIGTERM), functools.partial(send, signal.SIGINT)
SIGKILL = functools.partial(send, signal.SIGKILL)
RESULTS = ("laptop.nemo", "laptop-averaged.nemo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("faults") / "one"
    assert run(folder).codes == [0]
    return folder


@pytest.fixture(scope="module")
def unbroken_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("faults") / "two"
    assert run(folder, ranks=2).codes == [0, 0]
    return folder


def die() -> None:
    raise MemoryError("killed in the test")


def assert_whole(folder: Path) -> list[int]:
    """Check that every file under a final name is intact; return the steps of the checkpoints."""
    for path in (*folder.glob("averaging/step-*.nemo"), *folder.glob("checkpoints/step-*.ckpt")):
        ArchiveFile.open(path).verify()
    files = [ArchiveFile.open(path) for path in sorted((folder / "checkpoints").glob("step-*.ckpt"))]
    return [file.provenance["steps"] for file in files]


def assert_same(folder: Path, unbroken: Path) -> None:
    """Check that models, newest checkpoints and snapshots are equal in bytes, and that the histories are equal."""
    assert history(folder) == history(unbroken)
    for name in RESULTS:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    for part in ("checkpoints", "averaging"):
        ours, theirs = ({path.name: path for path in (run / part).iterdir()} for run in (folder, unbroken))
        newest = max(theirs)
        assert ours[newest].read_bytes() == theirs[newest].read_bytes(), newest
        assert not [name for name in ours if name.endswith(".partial")]


def goes_on(folder: Path, unbroken: Path, *overrides: str, ranks: int = 1) -> Outcome:
    """Run the same command again and check that the result equals the undisturbed run."""
    outcome = run(folder, *overrides, ranks=ranks)
    assert outcome.codes == [0] * ranks, outcome.errors
    assert_same(folder, unbroken)
    return outcome


# --- termination signals ----------------------------------------------------------------------------------------------

PHASES = {
    "reading data": ("bionemo_esm.data.dataloader.TrainingBatches.__getitem__", 4),
    "forward": (MODEL + "ESM1nvModel.forward", 2),
    "backward": (MODEL + "ESM1nvModel.manual_backward", 3),
    "reduction": ("bionemo_esm.model.optimizer.MasterWeights.clip_gradients", 3),
    "optimizer": ("bionemo_esm.model.optimizer.MasterWeights.write_back", 4),
    "validation": (MODEL + "ESM1nvModel.validation_step", 2),
    "copying for a save": (SAVING + "SafeCheckpointIO.save_checkpoint", 2),
    "ending": (SAVING + "Checkpoints.on_train_end", 1),
}
"""Phases of a run. Each has a function and the number of a call in the middle of the phase."""


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_to_one_rank_in_any_phase_saves_on_all_ranks_and_resumes_exactly(
    tmp_path: Path, unbroken_pair: Path, phase: str
) -> None:
    place, call = PHASES[phase]
    rank = 0 if phase == "copying for a save" else 1  # only rank 0 copies
    folder = tmp_path / "run"
    # validation must stop before this fault
    too_late = [Fault(place, die, call=call + 2, rank=rank)] if phase == "validation" else []
    outcome = run(folder, ranks=2, faults=[Fault(place, SIGTERM, call=call, rank=rank), *too_late])
    if phase == "ending":  # the run is complete already
        assert outcome.codes == [0, 0]
        assert_same(folder, unbroken_pair)
        return
    assert outcome.codes == [143, 143], outcome.ranks
    (*_, newest) = assert_whole(folder)
    assert f"Stopped by SIGTERM at step {newest}, state saved." in outcome.console
    assert outcome.ranks == ["", ""]
    goes_on(folder, unbroken_pair, ranks=2)


FORWARD, COPY, WRITE = MODEL + "ESM1nvModel.forward", SAVING + "StateCopies.of", SAVING + "write_archive"
"""Order of `write_archive` calls: snapshot and checkpoint (step 2), best (3), snapshot and checkpoint (4)."""
SECOND_SIGNALS = {
    "SIGTERM again and again": ([Fault(FORWARD, SIGTERM, call=4, repeated=True)], 143),
    "SIGTERM twice in a save": ([Fault(COPY, SIGTERM), Fault(WRITE, SIGTERM, call=2)], 143),
    "SIGINT in a save": ([Fault(COPY, SIGINT)], 130),
    "SIGINT twice in a save": ([Fault(COPY, SIGINT), Fault(WRITE, SIGINT, call=2)], 130),
    "SIGINT, and again in its save": ([Fault(FORWARD, SIGINT, call=2), Fault(COPY, SIGINT)], 130),
}


@pytest.mark.parametrize("signals", SECOND_SIGNALS)
@pytest.mark.parametrize("in_background", [True, False], ids=["background", "foreground"])
def test_a_second_signal_loses_no_checkpoint(tmp_path: Path, unbroken: Path, signals: str, in_background: bool) -> None:
    faults, code = SECOND_SIGNALS[signals]
    folder, setting = tmp_path / "run", f"exp_manager.checkpoints.in_background={str(in_background).lower()}"
    outcome = run(folder, setting, faults=faults)
    assert outcome.codes == [code], outcome.errors
    assert_whole(folder)
    goes_on(folder, unbroken, setting)


# --- SIGKILL and crashes ----------------------------------------------------------------------------------------------


def test_twenty_sigkills_during_saves_lose_no_finished_checkpoint(
    tmp_path: Path,
) -> None:
    settings = (
        "trainer.max_steps=30",
        "trainer.val_check_interval=30",
        "exp_manager.checkpoints.every_n_train_steps=1",
        "exp_manager.checkpoints.average_last=4",
    )
    assert run(tmp_path / "unbroken", *settings).codes == [0]
    folder, moments = tmp_path / "killed", random.Random(20)
    kills = 0
    newest = 0
    while kills < 20:
        outcome = run(folder, *settings, faults=[KillWhileSaving(moments.randrange(1, 140))])
        if outcome.codes == [0]:  # the run finished before the kill
            shutil.rmtree(folder)
            newest = 0
            continue
        assert outcome.codes == [-signal.SIGKILL], outcome.errors
        kills += 1
        steps = assert_whole(folder)
        assert (steps or [0])[-1] >= newest, "a safe checkpoint was lost"
        newest = (steps or [0])[-1]
    goes_on(folder, tmp_path / "unbroken", *settings)


CRASHES = {
    "before the snapshot": Fault(SAVING + "write_archive", SIGKILL, call=4),
    "between snapshot and checkpoint": Fault(SAVING + "write_archive", SIGKILL, call=5),
    "before the older are deleted": Fault(SAVING + "Checkpoints._delete_all_but_last_and", SIGKILL, call=2),
    "before the average": Fault("bionemo_esm.pretraining.averaging.average", SIGKILL),
    "between average and its file": Fault("bionemo_esm.pretraining.averaging.write_archive", SIGKILL),
    "between average and summary": Fault("bionemo_esm.pretraining.run._write_json", SIGKILL),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_crash_between_averaging_and_saving_resumes_exactly(tmp_path: Path, unbroken: Path, moment: str) -> None:
    folder = tmp_path / "run"
    assert run(folder, faults=[CRASHES[moment]]).codes == [-signal.SIGKILL]
    assert_whole(folder)
    assert not (folder / "summary.json").exists()
    goes_on(folder, unbroken)


# --- damaged files ----------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_checkpoint_is_skipped_with_a_message_and_having_none_is_an_error(
    tmp_path: Path, unbroken: Path, damage: functools.partial[None]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, faults=[Fault("bionemo_esm.pretraining.averaging.average", SIGKILL)]).codes == [-signal.SIGKILL]
    newest = folder / "checkpoints" / "step-000000006.ckpt"
    damage(newest)
    spoilt = newest.read_bytes()
    outcome = goes_on(folder, unbroken)
    assert "step-000000006.ckpt: " in outcome.console
    assert "resuming from step-000000004.ckpt" in outcome.console
    assert newest.with_name(newest.name + ".damaged").read_bytes() == spoilt, "evidence is kept"

    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").glob("step-*.ckpt"):
        damage(path)
    outcome = run(folder)
    assert outcome.codes == [2]
    assert outcome.errors.startswith("error: no checkpoint in ")
    assert outcome.errors.count("\n") == 1
    assert all(f"{path.name}: " in outcome.errors for path in (folder / "checkpoints").glob("step-*.ckpt"))


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 400 kB for checkpoints, with space for one checkpoint."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_with_one_line_and_keeps_the_last_checkpoint(
    small_disk: Path, unbroken: Path, unbroken_pair: Path, ranks: int
) -> None:
    folder = small_disk.parent
    outcome = run(folder, ranks=ranks)
    assert outcome.codes == [2] * ranks, outcome.ranks
    assert "cannot be written (No space left on device); free some space there" in outcome.errors
    assert "the newest that is safe is step-000000002.ckpt" in outcome.errors
    assert outcome.errors.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["step-000000002.ckpt"]
    assert assert_whole(folder) == [2]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    goes_on(folder, unbroken if ranks == 1 else unbroken_pair, ranks=ranks)


def test_a_failed_writer_stops_the_run_and_deletes_no_checkpoint(tmp_path: Path, unbroken: Path) -> None:
    folder = tmp_path / "run"
    outcome = run(folder, "exp_manager.checkpoints.keep_last=1", faults=[Fault(WRITE, die, call=3)])
    assert outcome.codes == [1]
    assert "MemoryError: killed in the test" in outcome.errors, "a bug of ours keeps its traceback"
    assert assert_whole(folder) == [2]
    goes_on(folder, unbroken)


# --- NaN --------------------------------------------------------------------------------------------------------------


def to_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def agreed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights; raise on every rank if the ranks' weights differ."""
    if distributed.is_initialized():
        mine = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
        others = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(others, mine)
        assert all(torch.equal(other, mine) for other in others), "ranks have different weights"
    return weights


@pytest.mark.parametrize("nonfinite", [0, 1])
def test_nan_on_one_rank_skips_the_step_on_all_ranks_and_names_the_samples(tmp_path: Path, nonfinite: int) -> None:
    fault = Fault(MODEL + "ESM1nvModel.forward", spoil=to_nan, call=2, rank=nonfinite)
    watch = [Fault(MODEL + "ESM1nvModel.archive_weights", spoil=agreed, rank=rank, repeated=True) for rank in (0, 1)]
    folder = tmp_path / "run"
    outcome = run(folder, "exp_manager.checkpoints.every_n_train_steps=1", "exp_manager.checkpoints.keep_last=9",
                  "trainer.val_check_interval=6", ranks=2, faults=[fault, *watch])  # fmt: skip
    assert outcome.codes == [0, 0], outcome.ranks
    before, after, later = (read_archive(folder / "checkpoints" / f"step-{s:09d}.ckpt").weights for s in (1, 2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before), "no rank may step"
    assert not all(torch.equal(before[name], later[name]) for name in before)
    (skipped,) = [line for line in history(folder) if line["kind"] == "skipped"]
    assert (skipped["step"], skipped["reason"], skipped["in_a_row"]) == (2, "its loss is nan", 1)
    (suspects,) = skipped["suspects"]
    assert suspects["rank"] == nonfinite
    expected = samples_of(folder, consumed=16, rank=nonfinite)
    assert suspects["samples"] == expected
    assert f"step 2 was skipped: its loss is nan; rank {nonfinite}, samples {expected[0]}, " in outcome.console


def samples_of(folder: Path, consumed: int, rank: int) -> list[int]:
    """Return the 8 training sequences of one of two ranks in the step after `consumed` samples."""
    _, samples = EpochPermutation(2600, seed=42).samples(np.arange(consumed, consumed + 16))
    lengths = ProteinStore.open(folder / "store").split("train").lengths[samples].astype(np.int64)
    [hand] = BatchPlan(16, 8, world_size=2).micro_batches(np.minimum(lengths + 2, 128), rank)
    return samples[hand].tolist()


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_it_can_resume(tmp_path: Path) -> None:
    folder, patience = tmp_path / "run", "optim.max_skipped_steps=2"
    fault = Fault(MODEL + "ESM1nvModel.forward", spoil=to_nan, call=3, rank=1, repeated=True)
    outcome = run(folder, patience, ranks=2, faults=[fault])
    assert outcome.codes == [3, 3], outcome.ranks
    assert "Stopped at step 4, state saved: 2 steps in a row were skipped." in outcome.console
    assert assert_whole(folder)[-1] == 4
    assert [line["in_a_row"] for line in history(folder) if line["kind"] == "skipped"] == [1, 2]
    assert run(folder, patience, ranks=2).codes == [0, 0]
    assert losses(folder)[3] is None
    assert all(losses(folder)[step] is not None for step in (1, 2, 5, 6))
    assert all(tensor.isfinite().all() for tensor in read_archive(folder / "laptop.nemo").weights.values())


# --- concurrent runs --------------------------------------------------------------------------------------------------


def test_a_second_process_on_a_run_is_refused_and_foreign_files_are_kept(tmp_path: Path, unbroken: Path) -> None:
    lock = unbroken.with_name(f".{unbroken.name}.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    again = tmp_path / "run"
    shutil.copytree(unbroken, again)
    (unbroken / "summary.json").rename(tmp_path / "summary.json")
    try:
        outcome = run(unbroken)
    finally:
        (tmp_path / "summary.json").rename(unbroken / "summary.json")
    assert outcome.codes == [2]
    assert "exp_manager.exp_dir: another process is writing" in outcome.errors
    assert "give this run another exp_manager.name" in outcome.errors
    stranger = again / "checkpoints" / "notes.ckpt"
    stranger.write_text("mine")
    (again / "summary.json").unlink()
    assert run(again).codes == [0]
    assert stranger.read_text() == "mine"
