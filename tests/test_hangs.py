"""A rank that hangs: the ranks write their stacks and exit together, and the run can resume."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bionemo_esm.console import Console
from bionemo_esm.pretraining import hang_watch as hangs
from bionemo_esm.pretraining.hang_watch import EXIT_HANG, HangWatch
from faults import Fault, run, send

STEP = "bionemo_esm.model.esm1nv.ESM1nvModel.training_step"
VALIDATION = "bionemo_esm.model.esm1nv.ESM1nvModel.validation_step"
WRITE = "bionemo_esm.pretraining.checkpoints.write_archive"
SETTINGS = ("data.micro_batch_size=4", "trainer.val_check_interval=6")


def sleep_for_ever() -> None:
    time.sleep(3600)


def take_a_while() -> None:
    time.sleep(0.4)


def take_longer_than_the_timeout() -> None:
    time.sleep(4)


def stop_this_process() -> None:
    send(signal.SIGSTOP)


def stacks(folder: Path) -> dict[int, str]:
    return {int(path.stem.split("-")[-1]): path.read_text() for path in folder.glob("hang-rank-*.txt")}


def test_a_sleeping_rank_ends_all_ranks_with_stacks_and_the_run_can_resume(tmp_path: Path) -> None:
    folder, overrides = tmp_path / "run", (*SETTINGS, "trainer.hang_timeout_seconds=3")
    outcome = run(folder, *overrides, ranks=2, faults=[Fault(STEP, sleep_for_ever, rank=1, call=4)])
    assert outcome.codes == [EXIT_HANG, EXIT_HANG]
    written = stacks(folder)
    assert "sleep_for_ever" in written[1]
    assert "rank 1: no progress for 0:03, at step 4" in written[1]
    assert "training_step" in written[0]
    assert "is MainThread" in written[0]
    (line,) = [line for line in outcome.console.splitlines() if "hangs" in line]
    assert "no progress for 0:03, at step 4" in line
    assert "Stacks of ranks 0 and 1 are in" in line
    assert "The same command resumes from the last checkpoint" in line

    assert run(folder, *overrides, ranks=2).codes == [0, 0]
    assert json.loads((folder / "summary.json").read_text())["resumed_from_step"] == 2
    assert stacks(folder) == written  # old reports remain and do not end the resumed run


def test_when_a_rank_is_stopped_the_other_rank_exits_and_names_it(tmp_path: Path) -> None:
    """Stop rank 0, which normally reports for all ranks."""
    folder, fault = tmp_path / "run", Fault(STEP, stop_this_process, rank=0, call=3)
    outcome = run(folder, *SETTINGS, "trainer.hang_timeout_seconds=3", ranks=2, faults=[fault], stopped=[0])
    assert outcome.codes == [-signal.SIGKILL, EXIT_HANG]
    assert list(stacks(folder)) == [1]
    assert "no report from rank 0: look there first" in outcome.screens[1]


def test_slow_steps_slow_validation_and_long_saves_are_not_hangs(tmp_path: Path) -> None:
    faults = [
        Fault(STEP, take_a_while, rank=1, repeated=True),
        Fault(VALIDATION, take_a_while, rank=0, repeated=True),
        Fault(WRITE, take_longer_than_the_timeout, call=2),
    ]
    timeout, saving = "trainer.hang_timeout_seconds=3", "exp_manager.checkpoints.in_background=false"
    outcome = run(tmp_path / "run", *SETTINGS, timeout, saving, ranks=2, faults=faults)
    assert outcome.codes == [0, 0]
    assert not stacks(tmp_path / "run")


# --- HangWatch on its own ---------------------------------------------------------------------------------------------


class Moments:
    """Replace the event between two checks: allow a number of checks, then stop."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def wait(self, seconds: float) -> bool:
        self.looks -= 1
        return self.looks < 0


def ends(watch: HangWatch, monkeypatch: pytest.MonkeyPatch, between_looks: list[float]) -> bool:
    """Return whether a watch ends the process, given the seconds between its checks."""
    ended: list[bool] = []
    clock = iter([sum(between_looks[:count]) for count in range(len(between_looks) + 1)])
    monkeypatch.setattr(hangs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(watch, "_end", lambda: ended.append(True))
    monkeypatch.setattr(watch, "_over", Moments(len(between_looks)))
    watch._watch()
    return bool(ended)


def watch_in(folder: Path, after_a_step: bool = True) -> HangWatch:
    watch = HangWatch(folder, 30.0, Console(sys.stdout))
    if after_a_step:
        watch.on_train_batch_end(SimpleNamespace(global_step=1), Any)  # type: ignore[arg-type]
    return watch


def test_the_process_ends_after_the_timeout_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ends(watch_in(tmp_path), monkeypatch, [3.0] * 10)
    assert ends(watch_in(tmp_path), monkeypatch, [3.0] * 11)


def test_time_while_the_process_was_stopped_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ends(watch_in(tmp_path), monkeypatch, [3.0, 100_000.0, 3.0])


def test_the_first_step_and_a_save_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = watch_in(tmp_path, after_a_step=False)
    assert not ends(first, monkeypatch, [3.0] * 299)
    assert ends(first, monkeypatch, [3.0] * 2)
    watch = watch_in(tmp_path)
    with watch.long_operation():
        assert not ends(watch, monkeypatch, [3.0] * 1199)
    assert not ends(watch, monkeypatch, [3.0] * 10)
    assert ends(watch, monkeypatch, [3.0])


def test_the_process_ends_early_after_another_rank_reports_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hang-rank-0.txt").write_text("of an earlier session\n")
    watch = watch_in(tmp_path)
    watch._reports = watch._sizes()
    assert not ends(watch, monkeypatch, [3.0] * 6)
    (tmp_path / "hang-rank-1.txt").write_text("stacks\n")
    assert ends(watch, monkeypatch, [3.0])


def fail_because_others_have_given_up(folder: Path) -> None:
    watch = HangWatch(folder, 2.0, Console(sys.stdout))
    watch.rank = 1
    (folder / "hang-rank-0.txt").write_text("stacks\n")
    watch.on_exception(Any, Any, RuntimeError("connection closed by peer"))  # type: ignore[arg-type]


def test_an_error_caused_by_ended_ranks_is_reported_as_a_hang(tmp_path: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    process = server.Process(target=fail_because_others_have_given_up, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_HANG
    assert "connection closed by peer" in stacks(tmp_path)[1]


def test_an_unrelated_error_is_not_reported_as_a_hang(tmp_path: Path) -> None:
    watch_in(tmp_path).on_exception(Any, Any, RuntimeError("no such file"))  # type: ignore[arg-type]
    assert not stacks(tmp_path)


def test_long_lists_of_ranks_are_shortened() -> None:
    assert hangs._named([3]) == "rank 3"
    assert hangs._named([0, 1, 2]) == "ranks 0, 1 and 2"
    assert hangs._named(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
