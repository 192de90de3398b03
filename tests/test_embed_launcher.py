"""Embedding with several processes, started by the command or by a launcher: output bytes and exit codes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.inference.embedding import worker
from bionemo_esm.inference.embedding.formats import read_about, read_embeddings
from embed_runs import PROTEINS, Inputs, Job, content, ended, names, overrides_of, run_apart, settings_of, started
from faults import FORK_SERVER
from runs import ROOT

pytest_plugins = ("embed_runs",)  # fixtures: inputs, job
LONG = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 30  # 990 residues


def test_two_processes_write_the_bytes_of_one_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers are forked with the imports done; `test_stopping_the_command…` starts them as the command does."""
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda how: FORK_SERVER)
    for output in ("one", "two"):
        assert job(f"output={output}", f"devices={1 + (output == 'two')}")[0] == 0
    assert content(Path("one")) == content(Path("two"))


@pytest.mark.slow
def test_stopping_the_command_stops_its_worker_processes(tmp_path: Path, inputs: Inputs) -> None:
    big = tmp_path / "big.fasta"
    big.write_text("".join(f">{number}\n{LONG}\n" for number in range(3000)))
    overrides = overrides_of(inputs, f"input={big}", "devices=2", f"output={tmp_path / 'out.npz'}", "part_proteins=5")
    command = [sys.executable, str(ROOT / "examples" / "extract_embeddings.py"), *overrides]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    records = tmp_path / ".out.npz.partial" / "records"
    limit = time.monotonic() + 90
    while not (records.is_dir() and len(list(records.iterdir())) > 3) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "the same command goes on from there" in errors
    finished = len(list(records.iterdir()))
    time.sleep(1)
    assert len(list(records.iterdir())) == finished > 3
    assert not (tmp_path / "out.npz").exists()


RANKS: tuple[Callable[[int], dict[str, str]], ...] = (
    lambda rank: {"RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": "2"},
    lambda rank: {"SLURM_PROCID": f"{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
)


@pytest.mark.parametrize("environment", RANKS)
@pytest.mark.parametrize("output", ["out.npz", "out"])
def test_launched_processes_split_the_parts_and_one_process_writes_the_output(
    tmp_path: Path, inputs: Inputs, environment: Callable[[int], dict[str, str]], output: str
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    assert run_apart(alone, inputs, f"output={output}") == 0
    assert run_apart(together, inputs, f"output={output}", environment=environment(1)) == 0
    assert (tmp_path / "screen.txt").read_text() == ""
    records = together / f".{output}.partial" / "records"
    assert sorted(path.name for path in records.iterdir()) == ["part-00001.json", "part-00003.json"]
    assert run_apart(together, inputs, f"output={output}", environment=environment(0)) == 0
    assert f"Wrote {output}" in (tmp_path / "screen.txt").read_text()
    assert content(together / output) == content(alone / output)
    assert names(together) == [output]
    # a late process of the same job exits with 0; a process of another job is refused
    assert run_apart(together, inputs, f"output={output}", environment=environment(1)) == 0
    assert run_apart(together, inputs, f"output={output}", "cls=true", environment=environment(0)) == 2
    assert "exists already, and is of another job" in (tmp_path / "errors.txt").read_text()
    assert names(together) == [output]


def test_simultaneous_processes_write_one_output(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "run").mkdir()
    both = [started(tmp_path / "run", settings_of(inputs), None, RANKS[0](rank)) for rank in range(2)]
    assert [ended(process) for process in both] == [0, 0]
    assert names(tmp_path / "run") == ["out.npz"]
    assert len(list(read_embeddings(tmp_path / "run" / "out.npz"))) == PROTEINS


def test_environment_variables_of_launchers_are_parsed() -> None:
    assert worker.launched({}) is None
    assert worker.launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert worker.launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script outside a job step
    slurm = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    assert worker.launched(slurm | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == (9, 16, 1, 8)
    with pytest.raises(ValueError, match=r"process 4 \(RANK\) of 4"):
        worker.launched({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="are not whole numbers"):
        worker.launched({"RANK": "x", "WORLD_SIZE": "4"})


def test_a_killed_process_ends_the_job_with_exit_1_and_keeps_finished_parts(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda how: fork)

    embed_on_rank = worker.embed_on_rank

    def share(task: Any, own: worker.WorkerRank, tell: worker.ProgressCallbacks) -> bool:
        if own.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed_on_rank(task, own, tell)

    monkeypatch.setattr(worker, "embed_on_rank", share)
    code, _, err = job("devices=2")
    assert code == 1
    assert "process 1 was killed by SIGKILL. 3 finished parts are kept" in err
    assert not Path("out.npz").exists()
    assert job()[0] == 0
    assert read_about("out.npz")["proteins"] == PROTEINS
