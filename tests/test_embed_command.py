"""The embedding command: messages, refusals, and the same output after a kill, a signal or an error."""

from __future__ import annotations

import io
import signal
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bionemo_esm import console as console
from bionemo_esm.inference.embedding import embed_command as embed_job
from bionemo_esm.inference.embedding import embeddings as computation
from bionemo_esm.inference.embedding import worker as embed_on_rank
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.formats import read_about, read_embeddings
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import read_proteins
from embed_runs import Inputs, Job, Stop, content, names, run_apart

pytest_plugins = ("embed_runs",)  # fixtures: inputs, job
LONG = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 30  # 990 residues


# Output


def test_the_command_writes_the_embeddings_of_the_library_in_input_order(job: Job, inputs: Inputs) -> None:
    code, out, err = job("layers=[1,-1]", "cls=true", "residues=true", "logits=true")
    assert (code, err) == (0, "")
    engine = Engine.load(inputs.model, "cpu")
    options = EmbeddingOptions(layers=(1, 2), cls=True, residues=True, logits=True).resolved(engine)
    expected = embed_proteins(engine, list(read_proteins(inputs.proteins)), options)
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
    assert names() == ["out.npz"]


@pytest.mark.parametrize(("rule", "windows", "read", "overlap"), [("windows", 4, 300, 20), ("truncate", 1, 100, None)])
def test_the_output_records_how_long_proteins_were_read(
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


def test_long_proteins_are_refused_before_any_computation(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.fasta").write_text(f">short\nMKT\n>long\n{LONG}\n")
    monkeypatch.setattr(computation, "embed_proteins", lambda *arguments: pytest.fail("something was computed"))
    code, _, err = job("input=long.fasta", "part_proteins=1", "long_proteins=error")
    assert code == 2
    assert "record 2 (long) has 990 residues" in err
    assert names() == ["long.fasta"]


def test_standard_input_gives_the_output_of_a_file(job: Job, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job()[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(inputs.proteins.read_bytes())))
    code, out, _ = job("input=-", "output=piped.npz")
    assert code == 0
    assert out.startswith("Reading standard input\n")
    assert Path("piped.npz").read_bytes() == Path("out.npz").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nMKT\n>a\nMKT\n")))
    code, _, err = job("input=-", "output=bad.npz")
    assert code == 2
    assert err.startswith("error: standard input, record 2 (a): an earlier record has the same id")
    assert names() == ["out.npz", "piped.npz"]


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=there.h5"], "output: there.h5 exists already"),
        (["output=out.csv"], "output: out.csv ends in .csv, which is no format of embeddings"),
        (["output=out.tsv.gz"], "output: out.tsv.gz ends in .gz, which is no format"),
        (["output=out.h5ad"], "output: out.h5ad ends in .h5ad, which is no format"),
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
        (
            ["input=bad.fasta", "model=absent.nemo"],
            "model: absent.nemo: no such file",
        ),  # the input is read only after the model is found
        (["input=bad.fasta", "layers=[3]"], "layer 3: the model has 0 (the embeddings) to 2"),
        (["input=bad.fasta", "device=gpu"], "device must be auto, cpu, cuda or cuda:N, not 'gpu'"),
        (["input=bad.fasta", "precision=16"], "precision must be one of auto, 32, bf16, not '16'"),
        (["input=bad.fasta", "batch_tokens=0"], "batch_tokens must be at least 1"),
        (["devices=0"], "devices must be at least 1"),
        (["part_proteins=0"], "part_proteins must be at least 1"),
        (["devices=2", "device=cuda:1"], "device=cuda:1 names one GPU"),
        (["output=there.h5/out.npz"], "cannot be made"),
        (["output=/proc/out.npz"], "output: /proc/out.npz cannot be made: /proc is not a folder that you may write to"),
    ],
)
def test_an_invalid_job_prints_one_line_and_writes_nothing(
    job: Job, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "there.h5").write_text("there")
    (tmp_path / "bad.fasta").write_text(">a\nMKT\n>b\nM1T\n")
    code, _, err = job(*overrides)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert names() == ["bad.fasta", "there.h5"]


def test_an_output_larger_than_the_disk_is_refused_before_the_first_part(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = embed_on_rank.shutil.disk_usage("/")
    monkeypatch.setattr(embed_on_rank.shutil, "disk_usage", lambda place: usage._replace(free=50_000))
    code, _, err = job("residues=true")
    assert code == 2
    assert "GB are free there" in err
    assert names() == []
    assert job()[0] == 0  # 30 means of 32 numbers


# Interruption and resume


@pytest.mark.parametrize("output", ["out.npz", "out.h5", "out.parquet", "out"])
def test_a_job_killed_at_any_write_resumes_to_the_same_bytes(tmp_path: Path, inputs: Inputs, output: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run_apart(whole, inputs, f"output={output}") == 0
    expected = content(whole / output)
    event, done = 1, False
    while not done:  # each pass kills the process later
        code = run_apart(killed, inputs, f"output={output}", stop=Stop(signal.SIGKILL, event))
        assert code in (0, -signal.SIGKILL)
        if (killed / output).exists():
            assert content(killed / output) == expected
        done = code == 0 or (killed / output).exists()
        event = 5 if event == 1 else event + 2
    if code == 0:
        assert names(killed) == [output]
    assert event > 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_with_a_message_and_keeps_finished_parts(
    tmp_path: Path, inputs: Inputs, number: int, code: int
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_apart(folder, inputs, stop=Stop(number, 14)) == code
    assert (
        "Stopped.\n1 finished part is kept: the same command goes on from there."
        in (tmp_path / "errors.txt").read_text()
    )
    assert names(folder) == [".out.npz.partial"]
    kept = len(list((folder / ".out.npz.partial" / "records").iterdir()))
    assert kept == 1
    assert not [path for path in folder.rglob("*.partial") if path.is_file()]
    assert run_apart(folder, inputs) == 0
    assert "  resumed  1 part is there from an earlier run" in (tmp_path / "screen.txt").read_text()


def test_a_signal_before_the_first_part_reports_that_nothing_is_kept(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_apart(folder, inputs, stop=Stop(signal.SIGINT, 1)) == 130
    errors = (tmp_path / "errors.txt").read_text()
    assert errors == "\nStopped.\nNo part was finished: the same command begins anew.\n"
    assert names(folder) == []


def test_progress_starts_after_model_loading_and_its_rate_excludes_finished_parts(
    job: Job, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, inputs)
    clock, loaded = [0.0], embed_on_rank._loaded

    def tick(seconds: float = 6.0) -> float:
        clock[0] += seconds
        return clock[0]

    def slowly(*arguments: Any) -> Engine:
        tick(100)
        return loaded(*arguments)

    monkeypatch.setattr(console.time, "monotonic", tick)
    monkeypatch.setattr(embed_on_rank, "_loaded", slowly)
    code, out, _ = job()
    assert code == 0
    lines = out.splitlines()
    begun = next(place for place, line in enumerate(lines) if "resumed" in line)
    assert not [line for line in lines[:begun] if "residues/s" in line]
    rates = [int(line.split("), ")[1].split(" residues/s")[0]) for line in lines[begun + 1 :] if "residues/s" in line]
    assert len(rates) > 1
    assert 0 < min(rates) <= max(rates) < 12_875 / 6


def stopped(tmp_path: Path, inputs: Inputs, *overrides: str) -> Path:
    """Return the work folder of a job that was killed after its first part."""
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
        return embed_proteins(*arguments)

    monkeypatch.setattr(computation, "embed_proteins", counted)
    assert job()[0] == 0
    assert (kept >= 1, len(calls)) == (True, 5 - kept)


def test_parts_of_another_job_are_refused_and_kept(job: Job, tmp_path: Path, inputs: Inputs) -> None:
    work = stopped(tmp_path, inputs)
    before = content(work / "parts")
    kept = content(work / "records")
    code, _, err = job("layers=[1]")
    assert code == 2
    assert "holds parts of another job for the same output: layers was [2], now [1]. Run that job's command" in err
    (tmp_path / "fewer.fasta").write_bytes(inputs.proteins.read_bytes().rsplit(b">", 1)[0])
    code, _, err = job("input=fewer.fasta")
    assert code == 2
    assert "input_sha256 was " in err
    assert "proteins was 30, now 29" in err
    from models import reconfigured

    reconfigured(inputs.model, tmp_path / "other.nemo", layernorm_epsilon=1e-4)
    code, _, err = job("model=other.nemo")
    assert code == 2
    assert "model_identity was " in err and "weights_sha256" not in err
    assert content(work / "parts").items() <= before.items()  # half-written parts are removed
    assert content(work / "records") == kept != {}
    assert job()[0] == 0


def test_a_second_job_on_the_same_output_is_refused(job: Job, tmp_path: Path, inputs: Inputs) -> None:
    with embed_job.WorkFolder(Path("out.npz"), "npz", False).held():
        code, _, err = job()
    assert code == 2
    assert "output: another process is writing out.npz (process " in err


def test_an_input_that_changes_during_the_job_is_an_error(
    job: Job, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = tmp_path / "changing.fasta"
    changing.write_bytes(inputs.proteins.read_bytes())

    def change(*arguments: Any) -> Any:
        with changing.open("a") as stream:
            stream.write(">late\nMKT\n")
        return embed_proteins(*arguments)

    monkeypatch.setattr(computation, "embed_proteins", change)
    code, _, err = job(f"input={changing}", "part_proteins=100")
    assert code == 2
    assert "was changed while it was read" in err
    assert not Path("out.npz").exists()


def test_memory_does_not_grow_with_the_number_of_proteins(job: Job, tmp_path: Path) -> None:
    def peak(proteins: int) -> int:
        (tmp_path / "many.fasta").write_text("".join(f">{number}\nMKTAYIAKQR\n" for number in range(proteins)))
        Path("out.npz").unlink(missing_ok=True)
        tracemalloc.start()
        assert job("input=many.fasta", "part_proteins=100", "residues=true")[0] == 0
        seen = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seen

    peak(100)
    assert peak(3000) < 1.3 * peak(600)
