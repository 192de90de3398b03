"""The embedding command: what it says and refuses, and that killed, stopped or shared out it gives the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bionemo_esm.inference import embed_job, embed_share, processes
from bionemo_esm.inference import embeddings as computation
from bionemo_esm.inference.embedding_reader import read_about, read_embeddings
from bionemo_esm.inference.embeddings import EmbeddingChoice, embed_together
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import read_proteins
from conftest import SAMPLE
from models import tiny_model
from runs import ROOT, composed

PROTEINS = 30
LONG = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 30  # 990 residues
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["test_embed_command"])


class Inputs(NamedTuple):
    model: Path
    proteins: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model and thirty real proteins; not to be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(seq_length=128).save_to(str(folder / "tiny.nemo"))
    records = gzip.decompress((SAMPLE / "test.fasta.gz").read_bytes()).decode().split(">")[1 : PROTEINS + 1]
    (folder / "proteins.fasta").write_text("".join(f">{record}" for record in records))
    return Inputs(folder / "tiny.nemo", folder / "proteins.fasta")


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Runs the job in this process, composed as the command line composes it: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return _code(_overrides(inputs, *overrides)), *capfd.readouterr()

    return run


def _overrides(inputs: Inputs, *overrides: str) -> list[str]:
    usual = {"model": str(inputs.model), "input": str(inputs.proteins), "output": "out.npz", "device": "cpu"}
    usual |= {"part_proteins": "7"} | dict(override.split("=", 1) for override in overrides)
    return [f"{key}={value}" for key, value in usual.items()]


def _code(overrides: list[str]) -> int:
    try:
        embed_job.embed(composed(*overrides, config="embed"))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


# What comes out


def test_the_embeddings_are_those_of_the_library_in_the_order_of_the_input(job: Job, inputs: Inputs) -> None:
    code, out, err = job("layers=[1,-1]", "cls=true", "residues=true", "logits=true")
    assert (code, err) == (0, "")
    engine = Engine.load(inputs.model, "cpu")
    choice = EmbeddingChoice((1, 2), cls=True, residues=True, logits=True).resolved(engine)
    expected = embed_together(engine, list(read_proteins(inputs.proteins)), choice)
    found = list(read_embeddings("out.npz"))
    assert [embedding[:4] for embedding in found] == [embedding[:4] for embedding in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_allclose(array, other.arrays[name], rtol=0, atol=1e-5)
    lines = out.splitlines()
    assert lines[1].startswith("  input    30 proteins, ")
    assert lines[2].startswith("  model    ESM-1nv, 2 layers, hidden 32")
    assert lines[3] == "           layers 1, 2; proteins over 126 residues in windows that share 63"
    assert lines[-1] == f"Wrote out.npz, {Path('out.npz').stat().st_size:,} bytes"
    assert os.listdir() == ["out.npz"]


@pytest.mark.parametrize(("rule", "windows", "read", "overlap"), [("windows", 4, 300, 20), ("truncate", 1, 100, None)])
def test_the_output_says_how_long_proteins_were_read(
    job: Job, tmp_path: Path, rule: str, windows: int, read: int, overlap: int | None
) -> None:
    (tmp_path / "long.fasta").write_text(f">long\n{LONG[:300]}\n>short\nMKT\n")
    settings = ("input=long.fasta", "output=out.h5", "dtype=float16", "window=100", "overlap=20")
    assert job(*settings, f"long_proteins={rule}")[0] == 0
    long, short = read_embeddings("out.h5")
    assert (long.residues, long.read, long.windows) == (300, read, windows)
    assert (short.residues, short.read, short.windows) == (3, 3, 1)
    about = read_about("out.h5")
    assert (about["long_proteins"], about["window"], about["overlap"], about["dtype"]) == (
        rule,
        100,
        overlap,
        "float16",
    )
    assert (about["layers"], about["mean"], about["residues"], about["proteins"]) == ([2], True, False, 2)


def test_long_proteins_are_refused_before_anything_is_computed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.fasta").write_text(f">short\nMKT\n>long\n{LONG}\n")
    monkeypatch.setattr(computation, "embed_together", lambda *arguments: pytest.fail("something was computed"))
    code, _, err = job("input=long.fasta", "part_proteins=1", "long_proteins=error")
    assert code == 2
    assert "record 2 (long) has 990 residues" in err
    assert os.listdir() == ["long.fasta"]


def test_standard_input_serves_as_a_file_does(job: Job, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job()[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(inputs.proteins.read_bytes())))
    code, out, _ = job("input=-", "output=piped.npz")
    assert code == 0
    assert out.startswith("Reading standard input into")
    assert Path("piped.npz").read_bytes() == Path("out.npz").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nMKT\n>a\nMKT\n")))
    code, _, err = job("input=-", "output=bad.npz")
    assert code == 2
    assert err.startswith("error: standard input, record 2 (a): an earlier record has the same id")
    assert sorted(os.listdir()) == ["out.npz", "piped.npz"]


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=there.h5"], "output: there.h5 exists already"),
        (["format=csv"], "format must be one of"),
        (["layers=[3]"], "layer 3: the model has 0 (the embeddings) to 2"),
        (["layers=[]"], "layers: name one at least"),
        (["layers=[last]"], "layers must be an integer, not 'last'"),
        (["mean=false"], "nothing is asked for"),
        (["dtype=int8"], "dtype must be one of"),
        (["window=500"], "window=500: the model reads up to 126 residues"),
        (["input=absent.fasta"], "absent.fasta"),
        (["input=bad.fasta"], "bad.fasta, record 2 (b): residue 2 is '1'"),
        (["model=absent.nemo"], "model: absent.nemo: no such file"),
        (["devices=0"], "devices must be at least 1"),
        (["part_proteins=0"], "part_proteins must be at least 1"),
        (["devices=2", "device=cuda:1"], "device=cuda:1 names one GPU"),
        (["output=there.h5/out.npz"], "cannot be made"),
    ],
)
def test_what_cannot_work_is_one_clear_line_and_leaves_nothing(
    job: Job, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "there.h5").write_text("there")
    (tmp_path / "bad.fasta").write_text(">a\nMKT\n>b\nM1T\n")
    code, _, err = job(*overrides)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir()) == ["bad.fasta", "there.h5"]


def test_an_output_too_large_for_the_disk_is_refused_before_the_first_part(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = embed_share.shutil.disk_usage("/")
    monkeypatch.setattr(embed_share.shutil, "disk_usage", lambda place: usage._replace(free=50_000))
    code, _, err = job("residues=true")
    assert code == 2
    assert "GB are free there" in err
    assert os.listdir() == []
    assert job()[0] == 0  # 30 means of 32 numbers


# Killed, and gone on with


class Stop(NamedTuple):
    """Send this process a signal at the n-th of the events by which parts come to be."""

    number: int
    event: int

    def install(self) -> None:
        seen = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == self.event:
                    os.kill(os.getpid(), self.number)
                return original(*arguments, **keywords)

            return call

        for owner, name in (
            (os, "fsync"), (Path, "replace"), (Path, "rename"), (embed_job.shutil, "rmtree"),
            (computation, "embed_together"),
        ):  # fmt: skip
            setattr(owner, name, counted(getattr(owner, name)))


def _apart(folder: str, overrides: list[str], stop: Stop | None, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.stdout = open("../screen.txt", "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open("../errors.txt", "w", encoding="utf-8")  # noqa: SIM115
    if stop is not None:
        stop.install()
    sys.exit(_code(overrides))


def run_apart(
    folder: Path, inputs: Inputs, *overrides: str, stop: Stop | None = None, environment: dict[str, str] | None = None
) -> int:
    """The exit code of the job in a process of its own; negative where a signal killed it."""
    arguments = (str(folder), _overrides(inputs, *overrides), stop, environment or {})
    process = _SERVER.Process(target=_apart, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def content(place: Path) -> dict[str, bytes]:
    """Every file of an output, or of a folder, by its name."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


@pytest.mark.parametrize("output", ["out.npz", "out.h5", "out.parquet", "out"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, inputs: Inputs, output: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run_apart(whole, inputs, f"output={output}") == 0
    expected = content(whole / output)
    event, done = 1, False
    while not done:  # killed again and again, each time further on
        code = run_apart(killed, inputs, f"output={output}", stop=Stop(signal.SIGKILL, event))
        assert code in (0, -signal.SIGKILL)
        if (killed / output).exists():
            assert content(killed / output) == expected
        done = code == 0 or (killed / output).exists()
        event = 5 if event == 1 else event + 2
    if code == 0:
        assert os.listdir(killed) == [output]
    assert event > 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_message_and_keeps_what_is_finished(
    tmp_path: Path, inputs: Inputs, number: int, code: int
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_apart(folder, inputs, stop=Stop(number, 14)) == code
    assert "the same command goes on from there" in (tmp_path / "errors.txt").read_text()
    assert os.listdir(folder) == [".out.npz.partial"]
    kept = len(list((folder / ".out.npz.partial" / "records").iterdir()))
    assert kept >= 1
    assert not [path for path in folder.rglob("*.partial") if path.is_file()]
    assert run_apart(folder, inputs) == 0
    assert f"  resumed  {kept} parts are there from an earlier run" in (tmp_path / "screen.txt").read_text()


def stopped(tmp_path: Path, inputs: Inputs, *overrides: str) -> Path:
    """A folder with what a job left that was killed after its first part."""
    assert run_apart(tmp_path, inputs, *overrides, stop=Stop(signal.SIGKILL, 12)) == -signal.SIGKILL
    return tmp_path / ".out.npz.partial"


def test_finished_parts_are_not_computed_again(
    job: Job, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stopped(tmp_path, inputs)
    kept = len(list((work / "records").iterdir()))
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return embed_together(*arguments)

    monkeypatch.setattr(computation, "embed_together", counted)
    assert job()[0] == 0
    assert (kept >= 1, len(calls)) == (True, 5 - kept)


def test_another_jobs_parts_are_not_gone_on_with(job: Job, tmp_path: Path, inputs: Inputs) -> None:
    work = stopped(tmp_path, inputs)
    before = content(work)
    code, _, err = job("layers=[1]")
    assert code == 2
    assert "holds parts of another job for the same output: layers was [2], now [1]. Run that job's command" in err
    (tmp_path / "fewer.fasta").write_bytes(inputs.proteins.read_bytes().rsplit(b">", 1)[0])
    code, _, err = job("input=fewer.fasta")
    assert code == 2
    assert "input_sha256 was " in err
    assert "proteins was 30, now 29" in err
    assert content(work) == before
    assert job()[0] == 0


def test_two_jobs_at_once_on_one_output_are_one_too_many(job: Job, tmp_path: Path, inputs: Inputs) -> None:
    with embed_job.WorkFolder(Path("out.npz"), "npz", False).held():
        code, _, err = job()
    assert code == 2
    assert "another process is at work on this output" in err


def test_an_input_that_changes_while_it_is_read_is_noticed(
    job: Job, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = tmp_path / "changing.fasta"
    changing.write_bytes(inputs.proteins.read_bytes())

    def change(*arguments: Any) -> Any:
        with changing.open("a") as stream:
            stream.write(">late\nMKT\n")
        return embed_together(*arguments)

    monkeypatch.setattr(computation, "embed_together", change)
    code, _, err = job(f"input={changing}", "part_proteins=100")
    assert code == 2
    assert "was changed while it was read" in err
    assert not Path("out.npz").exists()


# Several processes


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(job: Job) -> None:
    for output in ("one", "two"):
        assert job(f"output={output}", f"devices={1 + (output == 'two')}")[0] == 0
    assert content(Path("one")) == content(Path("two"))


@pytest.mark.slow
def test_stopping_the_command_stops_its_processes(tmp_path: Path, inputs: Inputs) -> None:
    big = tmp_path / "big.fasta"
    big.write_text("".join(f">{number}\n{LONG}\n" for number in range(3000)))
    overrides = _overrides(inputs, f"input={big}", "devices=2", f"output={tmp_path / 'out.npz'}", "part_proteins=5")
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
def test_processes_of_a_launcher_share_the_work_and_one_finishes(
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
    assert os.listdir(together) == [output]
    # one that comes when all is done finds nothing to do; one of another job is told
    assert run_apart(together, inputs, f"output={output}", environment=environment(1)) == 0
    assert run_apart(together, inputs, f"output={output}", "cls=true", environment=environment(0)) == 2
    assert "exists already, and is of another job" in (tmp_path / "errors.txt").read_text()
    assert os.listdir(together) == [output]


def test_processes_at_the_same_time_leave_one_output(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "run").mkdir()
    arguments = [(str(tmp_path / "run"), _overrides(inputs), None, RANKS[0](rank)) for rank in range(2)]
    started = [_SERVER.Process(target=_apart, args=each) for each in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    assert os.listdir(tmp_path / "run") == ["out.npz"]
    assert len(list(read_embeddings(tmp_path / "run" / "out.npz"))) == PROTEINS


def test_what_launchers_say_is_understood() -> None:
    assert processes.launched({}) is None
    assert processes.launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert processes.launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, not a step of it
    slurm = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    assert processes.launched(slurm | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == (9, 16, 1, 8)
    with pytest.raises(ValueError, match=r"process 4 \(RANK\) of 4"):
        processes.launched({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="are not whole numbers"):
        processes.launched({"RANK": "x", "WORLD_SIZE": "4"})


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Processes that are forked, not spawned, so that the second can be made to die."""
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda how: multiprocessing.get_context("fork"))
    yield []


def test_a_process_that_dies_leaves_the_parts_of_the_others_and_exit_1(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda how: fork)

    def share(task: Any, own: embed_share.Share, tell: embed_share.Tell) -> bool:
        if own.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed_share.embed_share(task, own, tell)

    monkeypatch.setattr(processes, "embed_share", share)
    code, _, err = job("devices=2")
    assert code == 1
    assert "process 1 was killed by SIGKILL. 3 finished parts are kept" in err
    assert not Path("out.npz").exists()
    assert job()[0] == 0
    assert json.loads(json.dumps(read_about("out.npz")))["proteins"] == PROTEINS
