"""The score command: input and output tables, pictures, statistics, and output that is complete or absent."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from matplotlib.image import imread
from pyarrow import parquet
from scipy.stats import spearmanr

from bionemo_esm.alphabet import encode
from bionemo_esm.errors import UserError
from bionemo_esm.inference import figures
from bionemo_esm.inference.protein_model import ProteinModel
from bionemo_esm.inference.variants import score_command as score_job
from bionemo_esm.inference.variants.mutations import WildType, all_single
from bionemo_esm.inference.variants.table import Agreement, agreement, agreements, lines_of, read_table, verdict_of
from models import tiny_model

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
ROWS = [("name", "mutant", "fitness"), ("a", "Q2A", "0.50"), ("b", "K6R", "-1.5"), ("c", "Q2A,K6R", "-2"),
        ("d", "WT", "1"), ("e, f", "T7C", ""), ("g", "L8W", "0.1"), ("h", "I3V", "0.7")]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a wild type and variant tables; read-only."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model(token_dropout=True, position_embedding="rotary").save_to(str(folder / "m.nemo"))
    (folder / "ubiquitin.fasta").write_text(f">ubiquitin human\n{UBIQUITIN}\n")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(ROWS)
    (folder / "mutants.csv").write_text(text.getvalue())
    (folder / "mutants.tsv.gz").write_bytes(gzip.compress("\n".join("\t".join(row) for row in ROWS).encode()))
    columns = dict(zip(ROWS[0], zip(*ROWS[1:], strict=True), strict=True))
    fitness = [float(text) if text else None for text in columns["fitness"]]
    parquet.write_table(arrow.table(columns | {"fitness": fitness}), folder / "mutants.parquet")
    return folder


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Run `bionemo-esm score` in this process in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **changes: str | None) -> tuple[int, str, str]:
        settings: dict[str, Any] = {"model": given / "m.nemo", "sequence": given / "ubiquitin.fasta", "device": "cpu"}
        settings |= {"output": "out.csv"} | changes
        words = [f"{key}={value}" for key, value in settings.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["bionemo-esm score", *words, *arguments])
        try:
            score_job.main()
        except SystemExit as end:
            return (int(str(end.code)), *capfd.readouterr())
        return (0, *capfd.readouterr())

    return run


def rows_of(path: Path | str, separator: str = ",") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


# --- output -----------------------------------------------------------------------------------------------------------


def test_scores_are_appended_to_the_unchanged_table(given: Path, job: Job) -> None:
    code, told, _ = job(input=str(given / "mutants.csv"), method="[masked-marginals,pseudo-log-likelihood]")
    assert code == 0
    rows = rows_of("out.csv")
    assert [tuple(rows[0])[:3], *(tuple(row.values())[:3] for row in rows)] == ROWS
    assert list(rows[0])[3:] == ["masked_marginals", "pseudo_log_likelihood"]
    model = ProteinModel.load(given / "m.nemo", "cpu")
    expected = model.score_variants(UBIQUITIN, [row[1] for row in ROWS[1:]], "pseudo-log-likelihood")
    np.testing.assert_allclose([float(row["pseudo_log_likelihood"]) for row in rows], expected, atol=2e-6)
    assert rows[3]["masked_marginals"] == "0.000000"
    assert "Scoring 7 variants of ubiquitin, 76 residues" in told
    assert "passes   masked-marginals 6, pseudo-log-likelihood 532" in told
    summary = json.loads(Path("out.summary.json").read_text())
    assert summary["weights_sha256"] == model.engine.weights_sha256
    assert (summary["variants"], summary["scored"], summary["left_out"]) == (7, 7, 0)
    assert summary["wild_type"] == {"name": "ubiquitin", "sequence": UBIQUITIN}


@pytest.mark.parametrize("source", ["mutants.tsv.gz", "mutants.parquet"])
@pytest.mark.parametrize("output", ["out.tsv", "out.parquet"])
def test_every_format_can_be_read_and_written(source: str, output: str, given: Path, job: Job) -> None:
    assert job(input=str(given / "mutants.csv"))[0] == 0
    code, _, errors = job(input=str(given / source), output=f"more/{output}", measurement_column="fitness")
    assert code == 0, errors
    expected = [row["masked_marginals"] for row in rows_of("out.csv")]
    if output == "out.tsv":
        rows = rows_of(f"more/{output}", "\t")
        assert [row["masked_marginals"] for row in rows] == expected
        assert [row["name"] for row in rows] == [row[0] for row in ROWS[1:]]
    else:
        table = parquet.read_table(f"more/{output}")
        assert [f"{value:.6f}" for value in table["masked_marginals"].to_pylist()] == expected
        numbers = table["fitness"].to_pylist()
        assert numbers[:2] == ([0.5, -1.5] if source == "mutants.parquet" else ["0.50", "-1.5"])


def test_scan_writes_a_table_and_a_picture_reproducibly(job: Job) -> None:
    code, told, errors = job("scan=true", "scan_region=[11,30]", "offset=10", method="wildtype-marginals")
    assert code == 0, errors
    rows = rows_of("out.csv")
    assert list(rows[0]) == ["mutant", "position", "wildtype", "mutant_residue", "wildtype_marginals"]
    assert len(rows) == 20 * 19
    assert list(rows[0].values())[:4] == ["Q11A", "11", "Q", "A"]
    assert "picture  out.png" in told
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out.png").stat().st_size > 10_000
    assert job("scan=true", "scan_region=[11,30]", "offset=10", method="wildtype-marginals", output="b/out.csv")[0] == 0
    for name in ("out.csv", "out.png", "out.summary.json"):
        assert Path(name).read_bytes() == Path("b", name).read_bytes()
    assert sorted(path.name for path in Path("b").iterdir()) == ["out.csv", "out.png", "out.summary.json"]


def test_picture_is_drawn_if_a_fifth_of_single_mutants_is_present_or_if_requested(job: Job, given: Path) -> None:
    wild_type = WildType("ubiquitin", encode(UBIQUITIN))
    singles = [wild_type.write(variant) for variant in all_single(wild_type)]
    Path("many.csv").write_text("\n".join(["mutant", *singles[::4]]))
    Path("few.csv").write_text("\n".join(["mutant", *singles[::6]]))
    for table, picture, drawn in (("many", "auto", True), ("many", "false", False), ("few", "auto", False),
                                  ("few", "true", True)):  # fmt: skip
        code, _, errors = job(f"picture={picture}", input=f"{table}.csv", output=f"{table}{picture}.csv",
                              method="wildtype-marginals")  # fmt: skip
        assert code == 0, errors
        assert Path(f"{table}{picture}.png").exists() == drawn


def test_picture_has_one_cell_per_single_mutant() -> None:
    wild_type = WildType("ubiquitin", encode(UBIQUITIN), 5)
    texts = ["Q6A", "Q6A,I7L", "K10R", "WT", "Q6A", "K10U"]
    variants = [None, *(wild_type.variant(text) for text in texts)]
    grid, first = figures.grid_of(variants, np.arange(7.0))
    assert (grid.shape, first) == ((20, 5), 1)
    found = {(figures.RESIDUES[row], place): grid[row, place] for row, place in np.argwhere(~np.isnan(grid)).tolist()}
    assert found == {("A", 0): 1.0, ("R", 4): 3.0}
    assert figures.covered(grid) == pytest.approx(2 / (19 * 5))
    assert sorted(figures.RESIDUES) == sorted("ACDEFGHIKLMNPQRSTVWY")
    assert figures.undrawable([wild_type.variant("Q6A,I7L"), None, ()])


def test_long_scan_picture_is_wrapped_and_a_far_too_long_one_is_rejected() -> None:
    heights = []
    for length in (1, 75, 577):
        wild_type = WildType("long", encode((UBIQUITIN * 40)[:length]))
        variants = all_single(wild_type)
        picture = io.BytesIO()
        figures.draw_heat_map(
            wild_type, *figures.grid_of(variants, np.zeros(len(variants))), "masked-marginals", picture, "x" * 99
        )
        width, height = (int.from_bytes(picture.getvalue()[at : at + 4], "big") for at in (16, 20))
        assert width == 1500
        if length == 1:  # cells of a single position do not fill the width
            assert imread(io.BytesIO(picture.getvalue()))[120:, 500:].min() == 1
        heights.append(height)
    assert heights[0] == heights[1] and heights[2] > 4 * heights[1]
    long = WildType("long", encode(UBIQUITIN * 30))
    assert "2,000 positions at most, and these span 2,280" in figures.undrawable(all_single(long))


# --- statistics -------------------------------------------------------------------------------------------------------


def test_spearman_equals_scipy_with_and_without_ties() -> None:
    generator = np.random.default_rng(3)
    for scores, measured in (
        (generator.normal(size=50), generator.normal(size=50)),
        (generator.integers(4, size=200).astype(float), generator.integers(3, size=200).astype(float)),
        (np.arange(10.0), np.arange(10.0) ** 3),
    ):
        found = agreement(scores, measured, 100)
        assert found.spearman == pytest.approx(spearmanr(scores, measured).statistic, abs=1e-12)
        assert found.low <= found.spearman <= found.high
        assert found.variants == len(scores)


def test_interval_equals_scipy_correlations_of_the_same_resamples() -> None:
    generator = np.random.default_rng(4)
    scores, measured = generator.integers(30, size=60).astype(float), generator.integers(30, size=60).astype(float)
    draws = np.random.default_rng(9)
    drawn = [draws.integers(60, size=60) for _ in range(200)]
    expected = [spearmanr(scores[some], measured[some]).statistic for some in drawn]
    found = agreement(scores, measured, 200, seed=9)
    np.testing.assert_allclose([found.low, found.high], np.percentile(expected, [2.5, 97.5]), atol=1e-12)
    assert agreement(scores, measured, 200, seed=9) == found
    assert agreement(scores, measured, 200, seed=10) != found


def test_variants_without_score_or_measurement_are_left_out() -> None:
    scores, measured = np.array([1.0, 2, 3, 4, np.nan]), np.array([1.0, 3, 2, np.nan, 9])
    assert agreement(scores, measured).variants == 3
    assert agreement(scores, measured).spearman == pytest.approx(0.5)
    for found in (agreement(scores[:2], measured[:2]), agreement(np.ones(9), np.arange(9.0))):
        assert np.isnan([found.spearman, found.low, found.high]).all()
        assert found.as_json()["spearman"] is None


def test_single_and_multiple_mutants_are_reported_separately_if_both_exist() -> None:
    scores, count = np.arange(8.0), np.array([0, 1, 1, 1, 2, 2, 3, -1])
    found = agreements({"m": scores}, scores, count, agreement)["m"]
    assert {group: told.variants for group, told in found.items()} == {"all": 7, "single": 3, "multiple": 3}
    assert list(agreements({"m": scores}, scores, np.ones(8), agreement)["m"]) == ["all"]
    measured = np.where(count > 1, 1.0, scores)  # equal measurements for all multiple mutants
    assert list(agreements({"m": scores}, measured, count, agreement)["m"]) == ["all", "single"]
    assert list(agreements({"m": scores}, np.where(count == 1, np.nan, scores), count, agreement)["m"]) == [
        "all",
        "multiple",
    ]


def test_undefined_correlation_is_shown_as_a_dash_without_interval() -> None:
    (_, line) = lines_of({"m": {"all": Agreement(np.nan, np.nan, np.nan, 2)}})
    assert line.split() == ["m", "all", "-", "2"]


def test_verdict_states_if_no_method_beats_the_baselines() -> None:
    def told(**values: float) -> dict[str, dict[str, Agreement]]:
        return {name: {"all": Agreement(value, value, value, 9)} for name, value in values.items()}

    assert (
        verdict_of(told(m=0.3, b=0.3, few=0.1), ("b", "few"))
        == "No method does better than b here, which needs no model"
    )
    assert verdict_of(told(m=0.3, b=0.2), ("b",)) == ""
    assert verdict_of(told(m=0.3, b=np.nan), ("b",)) == ""
    assert "than b here" in verdict_of(told(m=np.nan, b=0.1), ("b",))


def test_correlation_of_50_000_variants_takes_seconds() -> None:
    generator, started = np.random.default_rng(1), time.monotonic()
    scores = generator.normal(size=50_000)
    agreement(scores, scores + generator.normal(size=50_000), 100)
    assert time.monotonic() - started < 6  # a tenth of the default number of resamples


def test_command_reports_the_correlation_with_baselines(job: Job, given: Path) -> None:
    code, told, errors = job(input=str(given / "mutants.csv"), measurement_column="fitness")
    assert code == 0, errors
    summary = json.loads(Path("out.summary.json").read_text())
    assert summary["not_measured"] == 1
    found = summary["spearman"]["masked-marginals"]["all"]
    kept = [row for row in rows_of("out.csv") if row["fitness"]]
    expected = spearmanr([float(row["masked_marginals"]) for row in kept], [float(row["fitness"]) for row in kept])
    assert found["spearman"] == pytest.approx(expected.statistic, abs=1e-6)
    assert found["variants"] == 6
    assert list(summary["spearman"]) == ["masked-marginals", "(fewer mutations)", "(BLOSUM62)"]
    assert f"masked-marginals       all       {expected.statistic:8.3f}" in told
    assert "Not measured: 1" in told


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "either input=..., a table of variants, or scan=true"),
        ({"input": "{t}", "scan": "true"}, "either input"),
        ({"input": "{t}", "scan_region": "[1,2]"}, "scan_region is for scan=true"),
        ({"scan": "true", "scan_region": "[1,2,3]"}, "scan_region must be two positions"),
        ({"scan": "true", "scan_region": "[5,99]"}, "scan_region: 5 to 99 is not within 1 to 76"),
        ({"scan": "true", "measurement_column": "fitness"}, "measurement_column is a column of input"),
        ({"scan": "true", "method": "wt-marginals"}, "method: one or several of"),
        ({"scan": "true", "output": "out.xlsx"}, "output: out.xlsx must end in .csv, .tsv or .parquet"),
        ({"scan": "true", "picture": "maybe"}, "picture must be one of auto, true, false"),
        ({"scan": "true", "resamples": "1"}, "resamples must be at least 2"),
        ({"scan": "true", "sequence": "MK1V.fasta"}, "MK1V.fasta: no such file"),
        (
            {"input": "{t}", "mutation_column": "variant"},
            "mutation_column=variant: there is no such column, but name, mut",
        ),
        ({"input": "{t}", "measurement_column": "name"}, r"row 2: measurement_column=name: 'a' is not a number"),
        ({"input": "{t}", "offset": "2"}, "mutants.csv, row 2: Q2A: position 2 of ubiquitin is M, not Q, by offset=2"),
        ({"input": "none.csv"}, "none.csv: no such file"),
        ({"input": "{t}", "picture": "true", "mutation_column": "name", "bad_rows": "skip"}, "no variant is left"),
        ({"input": "mutants.xlsx"}, "is a spreadsheet, or another zip file; save the sheet as CSV"),
        ({"input": "mutants.txt"}, "a table must end in .csv"),
    ],
)
def test_invalid_setting_gives_one_error_line_before_the_model_is_read(
    changes: dict[str, str], said: str, given: Path, job: Job
) -> None:
    table = str(given / "mutants.csv")
    code, _, errors = job(**{"model": "no.nemo"} | {key: value.format(t=table) for key, value in changes.items()})
    assert code == 2
    assert said in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad.csv: is empty; its first line must name the columns"),
        ("mutant\n", "bad.csv: has a header (mutant), but no row below it"),
        ("mutant,score\nQ2A,1\nK6R\n", "row 3 (record 2): has 1 fields, the header 2; correct it"),
        ("mutant,mutant\nQ2A,K6R\n", "two columns are named 'mutant'"),
        ("mutant,masked_marginals\nQ2A,1\n", "has a column masked_marginals already"),
        ("mutant\n\nQ2A\n\nK7R\n", "row 5: K7R: position 7 of ubiquitin is T, not K"),
        (b"mutant\n\xff\n", "is not UTF-8"),
        ("mutant\nQ2A\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "is no text; is it the right file?"),
        (gzip.compress(b"mutant\n" + b"Q2A\n" * 99, mtime=0)[:-9], "gzip stream is damaged"),
    ],
)
def test_unusable_table_is_rejected_with_the_row(text: str | bytes, said: str, job: Job) -> None:
    Path("bad.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, errors = job(input="bad.csv", model="no.nemo")
    assert code == 2
    assert said in errors
    assert [path.name for path in Path().iterdir()] == ["bad.csv"]


def test_invalid_parquet_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("mutant\nQ2A\n")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_table(tmp_path / "bad.parquet")


@pytest.mark.parametrize("name", ["out.csv", "out.summary.json", "out.png"])
def test_existing_output_is_not_overwritten(name: str, job: Job) -> None:
    Path(name).write_text("mine")
    code, _, errors = job("scan=true", model="no.nemo")
    assert code == 2
    assert f"output: {name} exists already" in errors
    assert Path(name).read_text() == "mine"


def test_bad_rows_can_be_left_without_a_score(job: Job) -> None:
    Path("one.csv").write_text("mutant\nQ2A\n")
    assert "Scoring 1 variant of ubiquitin, 76 residues" in job(input="one.csv", output="one_out.csv")[1]
    Path("some.csv").write_text('mutant,y\nQ2A,1\nQ2*,2\nK6R,3\nK7R,4\nQ2W,5\nT9C,5\n"Q2W,T9C",1\n')
    code, told, errors = job("bad_rows=skip", "window=7", input="some.csv", measurement_column="y")
    assert code == 0, errors
    assert [row["mutant"] for row in rows_of("out.csv") if not row["masked_marginals"]] == ["Q2*", "K7R", "Q2W,T9C"]
    assert "Left out 3; the first: some.csv, row 3: Q2*:" in told
    summary = json.loads(Path("out.summary.json").read_text())
    assert (summary["scored"], summary["left_out"]) == (4, 3)
    assert summary["spearman"]["masked-marginals"]["all"]["variants"] == 4


def test_mutations_too_far_apart_for_the_window_are_reported_with_the_row(job: Job) -> None:
    Path("apart.csv").write_text('mutant\nQ2A\n"Q2W,T9C"\n')
    code, _, errors = job("window=7", input="apart.csv")
    assert code == 2
    assert "apart.csv, row 3: Q2W,T9C: its places span more than the 7 residues" in errors
    assert job("window=7", "masks=each", input="apart.csv")[0] == 0


# --- complete output or none ------------------------------------------------------------------------------------------


def test_full_disk_leaves_no_output(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "draw_heat_map", full)  # the last file to be written
    code, _, errors = job("scan=true", method="wildtype-marginals")
    assert code == 2
    assert "No space left on device; free some space" in errors
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_command_leaves_no_final_output(
    number: signal.Signals, code: int, given: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "bionemo_esm", "score", f"model={given}/m.nemo", "device=cpu", "scan=true"]
    command += [f"sequence={UBIQUITIN * 6}", "method=pseudo-log-likelihood", "output=out.csv"]
    environment = os.environ | {"PYTHONPATH": str(Path(score_job.__file__).parents[3]), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "passes" in line:
                break
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(30) == code
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []
