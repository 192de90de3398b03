"""The predict command: output formats, rejected settings, and output that is complete or absent."""

from __future__ import annotations

import csv
import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from bionemo_esm import FineTunedPredictor
from bionemo_esm import __main__ as command_line
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.finetuning import predict_command as predict_job
from bionemo_esm.finetuning import predictor as tables
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.inputs import Protein
from fine_tuned import LETTERS, NUMBER, PLACES, PROTEINS, TASKS, WORDS, fine_tuned, predictor
from models import tiny_model
from runs import ROOT, composed

Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Run the command in this process as the command line would; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))

    def run(*overrides: str) -> tuple[int, str, str]:
        given = {word.split("=")[0] for word in overrides}
        usual = {
            "model": "tuned.nemo",
            "input": "in.fasta",
            "output": "out.csv",
            "device": "cpu",
            "batch_tokens": "200",
        }
        settings = [f"{key}={value}" for key, value in usual.items() if key not in given]
        code = 0
        capfd.readouterr()
        try:
            predict_job.predict(composed(*settings, *overrides, config="predict", part="finetuning"))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return run


def rows_of(path: str, separator: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines(), delimiter=separator))


def test_command_writes_the_predictions_of_the_library(job: Job, tmp_path: Path) -> None:
    model = predictor(tmp_path, PLACES)
    code, out, err = job()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "Reading in.fasta",
        "  input    5 proteins, 389 residues, the longest of 264",
        "  model    ESM-1nv, 2 layers, hidden 32, 38,880 parameters, float32 on cpu",
        "  task     location, one of 4 classes for each protein",
        "           proteins over 100 residues in windows that share 40",
        f"Wrote out.csv, 5 proteins, {Path('out.csv').stat().st_size:,} bytes",
    ]
    rows, table = rows_of("out.csv"), model.predict_table(PROTEINS)
    assert list(rows[0]) == list(table.columns)
    for row, expected in zip(rows, table.to_dict("records"), strict=True):
        assert row == {key: value if isinstance(value, str) else f"{value:.6f}" for key, value in expected.items()}
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.nemo", "in.fasta", "out.csv"}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_all_formats_agree_and_repeated_runs_give_equal_bytes(job: Job, task: Task, tmp_path: Path) -> None:
    model = predictor(tmp_path, task)
    by_residue = [None, True] if task is LETTERS else [None]
    for residues in by_residue:
        expected = model.predict_table(PROTEINS, residues)
        more = [] if residues is None else ["residues=true"]
        for ending in (".csv", ".tsv", ".csv.gz", ".TSV.GZ", ".parquet"):
            for folder in ("one", "other"):
                assert job(f"output={folder}/{residues}{ending}", *more)[0] == 0
            assert Path(f"one/{residues}{ending}").read_bytes() == Path(f"other/{residues}{ending}").read_bytes()
        text = Path(f"one/{residues}.csv").read_bytes()
        assert gzip.decompress(Path(f"one/{residues}.csv.gz").read_bytes()) == text
        rows = rows_of(f"one/{residues}.csv")
        assert rows == rows_of(f"one/{residues}.tsv", "\t")
        assert [row["prediction"] for row in rows] == [
            value if isinstance(value, str) else f"{value:.6g}" for value in expected["prediction"]
        ]
        read = parquet.read_table(f"one/{residues}.parquet").to_pandas()
        assert list(read.columns) == list(expected.columns) == list(rows[0])
        for name in expected.columns:
            assert read[name].tolist() == expected[name].tolist()


def test_parquet_row_groups_do_not_follow_protein_boundaries(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = predictor(tmp_path, WORDS).predict_table(PROTEINS)
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 100)
    assert job("output=blocks.parquet")[0] == 0
    blocks = parquet.ParquetFile("blocks.parquet")
    assert [blocks.metadata.row_group(number).num_rows for number in range(blocks.num_row_groups)] == [
        100,
        100,
        100,
        89,
    ]
    assert blocks.read().to_pandas()["id"].tolist() == table["id"].tolist()


@pytest.mark.parametrize("name", ["out.fasta", "out.fa.gz"])
def test_letters_can_be_written_as_fasta(job: Job, name: str, tmp_path: Path) -> None:
    table = predictor(tmp_path, LETTERS).predict_table(PROTEINS)
    assert job(f"output={name}")[0] == 0
    found = [(record.id, record.sequence.decode()) for record in read_fasta(name)]
    assert found == list(zip(table["id"], table["prediction"], strict=True))


def test_probabilities_can_be_left_out(job: Job, tmp_path: Path) -> None:
    predictor(tmp_path, PLACES)
    assert job("probabilities=false")[0] == 0
    assert list(rows_of("out.csv")[0]) == ["id", "prediction", "probability"]


def test_standard_input_can_be_read(job: Job, tmp_path: Path) -> None:
    predictor(tmp_path, NUMBER)
    assert job("output=file.csv")[0] == 0
    saved, stream = os.dup(0), os.open("in.fasta", os.O_RDONLY)
    os.dup2(stream, 0)
    try:
        code, out, _ = job("input=-", "output=piped.csv")
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(stream)
    assert code == 0
    assert "  input    5 proteins, 389 residues, the longest of 264" in out.splitlines()
    assert Path("piped.csv").read_bytes() == Path("file.csv").read_bytes()


def test_bad_records_are_skipped_if_requested(job: Job, tmp_path: Path) -> None:
    predictor(tmp_path, NUMBER)
    (tmp_path / "in.csv").write_text("name,seq\na,MKT\nb,MK1\nc,WWW\n")
    code, out, _ = job("input=in.csv", "id_column=name", "bad_records=skip")
    assert code == 0
    assert "1 record left out; the first: in.csv, record 2 (b): residue 3 is '1'" in out
    assert [row["id"] for row in rows_of("out.csv")] == ["a", "c"]


REFUSED: dict[str, tuple[Task, Sequence[str], str]] = {
    "an-output-that-exists": (PLACES, ["output=in.fasta"], "output: in.fasta exists already"),
    "a-folder-that-cannot-be": (PLACES, ["output=in.fasta/x.csv"], "output: in.fasta/x.csv cannot be made"),
    "no-table": (PLACES, ["output=out.xlsx"], "output: out.xlsx must end in .csv, .tsv"),
    "no-ending": (PLACES, ["output=out"], "output: out must end in .csv, .tsv"),
    "packed-parquet": (PLACES, ["output=out.parquet.gz"], "output: out.parquet.gz must end in"),
    "fasta-of-words": (WORDS, ["output=out.fasta"], "FASTA takes a letter for each residue, which disorder"),
    "fasta-of-proteins": (NUMBER, ["output=out.fasta"], "FASTA takes a letter for each residue, which melting"),
    "fasta-by-residue": (LETTERS, ["output=out.fasta", "residues=true"], "FASTA has no row for each residue"),
    "residues-of-a-protein": (PLACES, ["residues=true"], "residues=true: location predicts one thing"),
    "words-as-letters": (WORDS, ["residues=false"], "residues=false: what disorder predicts"),
    "residues-that-are-words": (LETTERS, ["residues=yes please"], "residues must be true or false"),
    "no-such-model": (PLACES, ["model=none.nemo"], "none.nemo: no such file"),
    "a-model-that-is-none": (PLACES, ["model=in.fasta"], "in.fasta: is not an archive of ours"),
    "a-pretrained-model": (PLACES, ["model=plain.nemo"], "predicts nothing of a task; `bionemo-esm finetune` makes"),
    "no-such-input": (PLACES, ["input=none.fasta"], "none.fasta"),
    "a-bad-record": (PLACES, ["input=bad.fasta"], "bad.fasta, record 2 (b): residue 3 is '1'"),
    "an-input-without-proteins": (PLACES, ["input=empty.fasta"], "empty.fasta: the file is empty"),
    "no-such-precision": (PLACES, ["precision=16"], "precision must be one of"),
    "no-such-device": (PLACES, ["device=tpu"], "device must be auto, cpu, cuda"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_invalid_setting_gives_one_error_line_before_a_model_is_loaded(
    case: tuple[Task, Sequence[str], str], job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, overrides, message = case
    fine_tuned(tmp_path / "tuned.nemo", task)
    tiny_model().save_to(str(tmp_path / "plain.nemo"))
    (tmp_path / "bad.fasta").write_text(">a\nMKT\n>b\nMK1\n")
    (tmp_path / "empty.fasta").write_text("")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(FineTunedPredictor, "load", lambda *arguments: pytest.fail("a model was loaded"))
    code, _, err = job(*overrides)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: ")
    assert message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.parquet"])
def test_interrupted_command_leaves_no_output(
    number: int, code: int, name: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor(tmp_path, LETTERS)
    rows = tables.Layout.rows

    def stopped(layout: tables.Layout, protein: Protein, prediction: Prediction) -> Any:
        if protein.id == "long" and number == signal.SIGINT:
            raise KeyboardInterrupt  # raised directly: a background process ignores SIGINT
        if protein.id == "long":
            os.kill(os.getpid(), number)
        return rows(layout, protein, prediction)

    monkeypatch.setattr(tables.Layout, "rows", stopped)
    stop, _, err = job(f"output=made/{name}")
    assert (stop, err) == (code, "\nStopped; nothing was written. The same command begins anew.\n")
    assert not list(tmp_path.glob("made/*"))


def test_help_describes_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bionemo-esm", "predict", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command_line.main()
    text = capsys.readouterr().out
    assert text.startswith("bionemo-esm predict key=value")
    for key in predict_job.PredictConfig.model_fields:
        assert f"\n{key}: " in text
    assert set(composed(config="predict", part="finetuning")) == set(predict_job.PredictConfig.model_fields)


def test_example_script_runs_from_a_shell(job: Job, tmp_path: Path) -> None:
    predictor(tmp_path, LETTERS)
    words = ["model=tuned.nemo", "input=in.fasta", "device=cpu", "output=shell.csv"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "predict.py"), *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert job()[0] == 0
    assert [row["prediction"] for row in rows_of("shell.csv")] == [row["prediction"] for row in rows_of("out.csv")]
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.nemo", "in.fasta", "shell.csv", "out.csv"}
