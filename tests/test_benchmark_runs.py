"""Tests of the benchmark command: rows in separate processes, interruptions and invalid arguments."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import running
from benchmarks.__main__ import RESULTS, job, parser
from benchmarks.comparison import Setting
from benchmarks.report import render
from benchmarks.rows import MODULES, Module
from benchmarks.table import Table
from bionemo_esm.console import Console
from bionemo_esm.errors import ConfigError

TOY = '''
"""Rows that tell, in a file, what was built and measured; the second one ends its process if a file says so."""
import os
from pathlib import Path
from benchmarks.comparison import Row, Side, Target

SEEN = Path(os.environ["TOY_SEEN"])
TRAP = Path(os.environ["TOY_SEEN"] + ".trap")

def note(text):
    with SEEN.open("a") as stream:
        stream.write(text + "\\n")

def row(key, work):
    sides = (Side("ours", work, 100.0), Side("theirs", lambda: sum(range(10_000)), 10.0, "their best", error=1e-6))
    return Row(key, f"Work {key}", "token", "float32", sides, "the loss, relative", 1e-5, [Target("theirs", 0.001)])

def rows(setting):
    note(f"in {setting.folder.is_dir()} {setting.quick}")
    yield row("first", lambda: note("first"))
    def second():
        if TRAP.exists():
            print("what the peer printed last", flush=True)
            os.kill(os.getpid(), int(TRAP.read_text()))
        note("second")
    yield row("second", second)
'''

Bench = Callable[..., "tuple[int, str]"]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create an importable module `toy_rows`. Return the file in which it logs what it does."""
    (tmp_path / "toy_rows.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TOY_SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


@pytest.fixture
def bench(tmp_path: Path, seen: Path) -> Bench:
    """Return a function that runs the command over modules `toy` and `other`, which are equal: exit code and output."""
    modules = {"toy": Module("toy_rows", "toys"), "other": Module("toy_rows", "the same")}

    def run(*words: str) -> tuple[int, str]:
        seen.unlink(missing_ok=True)
        told = io.StringIO()
        options = parser().parse_args([*words, "--quick", "--output", str(tmp_path / "out")])
        return job(options, modules, Console(told)), told.getvalue()

    return run


def test_all_rows_are_measured_and_written(bench: Bench, seen: Path, tmp_path: Path) -> None:
    code, said = bench("toy")
    assert code == 0, said
    assert seen.read_text().split("\n")[:-1] == [
        "in True True",
        *["first"] * 2,
        *["second"] * 2,
    ]  # one warm-up turn and one timed turn
    table = Table.load(tmp_path / "out" / "table.json")
    assert [key for _, key in table.entries] == ["first", "second"]
    assert (tmp_path / "out" / "table.md").read_text() == render(table)
    assert (tmp_path / "out" / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert "quick run" in render(table)


def test_interrupted_run_continues_with_the_missing_rows(bench: Bench, seen: Path, tmp_path: Path) -> None:
    trap = seen.with_name("seen.trap")
    trap.write_text(str(int(signal.SIGKILL)))
    code, said = bench("toy")
    assert code == 1
    assert "SIGKILL" in said
    assert "what the peer printed last" in said
    assert "failed: toy" in said
    assert [key for _, key in Table.load(tmp_path / "out" / "table.json").entries] == ["first"]
    trap.unlink()
    code, _ = bench("toy")
    assert code == 0
    assert "first" not in seen.read_text()
    assert seen.read_text().count("second") == 2
    assert [key for _, key in Table.load(tmp_path / "out" / "table.json").entries] == ["first", "second"]
    bench("toy")
    assert not seen.exists()  # the process of the rows was not started
    bench("toy", "--again")
    assert seen.read_text().count("first") == seen.read_text().count("second") == 2


def test_rows_are_measured_again_when_proteins_or_code_change(
    bench: Bench, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text(">a\nMKTAYIAKQR\n")
    bench("toy", "--fasta", str(fasta))
    bench("toy", "--fasta", str(fasta))
    assert not seen.exists()
    monkeypatch.setattr("benchmarks.__main__.code_of", lambda path: "mended")
    bench("toy", "--fasta", str(fasta))
    assert "first" in seen.read_text()
    bench("toy")
    assert "first" in seen.read_text()


def test_failing_module_does_not_stop_the_others(bench: Bench, seen: Path, tmp_path: Path) -> None:
    (tmp_path / "toy_rows.py").write_text(TOY.replace("def rows(setting):", "def rows(setting):\n    1 / 0"))
    code, said = bench("toy")
    assert code == 1
    assert "ZeroDivisionError" in said
    modules = {"broken": Module("toy_rows", "broken"), "store": Module("benchmarks.no_such_module", "not there")}
    told = io.StringIO()
    options = parser().parse_args(["--quick", "--output", str(tmp_path / "both")])
    assert job(options, modules, Console(told)) == 1
    assert "failed: broken, store" in told.getvalue()
    assert "No module named 'benchmarks.no_such_module'" in told.getvalue()


def test_user_error_is_printed_without_a_traceback(bench: Bench, tmp_path: Path) -> None:
    error = 'from bionemo_esm.errors import UserError\n    raise UserError("proteins.fasta: too few proteins")'
    (tmp_path / "toy_rows.py").write_text(TOY.replace("def rows(setting):", f"def rows(setting):\n    {error}"))
    code, said = bench("toy")
    assert code == 1
    assert "toy FAILED: proteins.fasta: too few proteins\n" in said
    assert "Traceback" not in said


def test_removed_row_is_removed_from_the_table(bench: Bench, tmp_path: Path) -> None:
    bench("toy")
    (tmp_path / "toy_rows.py").write_text(TOY.replace('row("second", second)', 'row("third", second)'))
    bench("toy", "--again")
    assert [key for _, key in Table.load(tmp_path / "out" / "table.json").entries] == ["first", "third"]


def test_table_is_rewritten_from_its_json_file_alone(bench: Bench, seen: Path, tmp_path: Path) -> None:
    bench("toy")
    seen.unlink()
    before = (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "out" / "table.md").unlink()
    code, _ = bench("--table")
    assert code == 0
    assert (tmp_path / "out" / "table.md").read_text() == before
    assert not seen.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "there are no rows nobody; there are store, batches"),
        (["--fasta", "no_such.fasta"], "no file no_such.fasta"),
        (["--quick", "--output", str(RESULTS)], "--quick: its times"),
        (["--table", "--output", "nowhere"], "--table: there are no results"),
    ],
)
def test_invalid_arguments_are_refused_before_any_process_starts(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.__main__.installed", lambda library: "1.0")
    monkeypatch.setattr("benchmarks.__main__.messages_of", lambda *told: pytest.fail("started"))
    with pytest.raises(ConfigError, match=message):
        job(parser().parse_args(words), dict(MODULES), Console(io.StringIO()))


def test_missing_library_is_named_with_the_rows_that_need_it(tmp_path: Path) -> None:
    modules = {"toy": Module("toy_rows", "toys", ("torch", "no-such-library"))}
    options = parser().parse_args(["--quick", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"toy: no-such-library not installed.*pip install.* no-such-library"):
        job(options, modules, Console(io.StringIO()))


def test_quick_and_real_results_are_not_mixed(bench: Bench, tmp_path: Path) -> None:
    bench("toy")
    options = parser().parse_args(["toy", "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="results of a quick run"):
        job(options, {"toy": Module("toy_rows", "toys")}, Console(io.StringIO()))


def test_stopping_ends_the_measuring_process_and_its_children(tmp_path: Path, seen: Path) -> None:
    sleeper = 'import subprocess\ndef rows(setting):\n    p = subprocess.Popen(["sleep", "60"])\n    note(str(p.pid))'
    (tmp_path / "toy_rows.py").write_text(f"{TOY}\n{sleeper}\n    p.wait()\n    yield\n")
    messages = running.messages_of("toy_rows", Setting(tmp_path), [], tmp_path / "log")
    next(messages)
    while not seen.exists() or not seen.read_text().endswith("\n"):
        time.sleep(0.02)
    messages.close()
    for _ in range(100):
        if not _runs(int(seen.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("a process was left behind")


def _runs(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_exits_with_130_and_keeps_the_measured_rows(tmp_path: Path, seen: Path) -> None:
    seen.with_name("seen.trap").write_text(str(int(signal.SIGSTOP)))  # the second row never ends
    code = (
        "import sys; from benchmarks import __main__ as m; from benchmarks.rows import Module\n"
        "m.MODULES = {'toy': Module('toy_rows', 'toys')}; m.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "--quick", "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        table = tmp_path / "out" / "table.json"
        for _ in range(600):
            if table.exists():
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, complaint = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on" in complaint
    assert [key for _, key in Table.load(table).entries] == ["first"]
    assert sorted(path.name for path in table.parent.iterdir()) == ["table.json"]


# --- the rows of `benchmarks/rows` ------------------------------------------------------------------------------------


def test_every_module_of_rows_exists_under_its_name() -> None:
    known = "store batches training embeddings averaging archives starting whole_runs"
    assert list(MODULES) == known.split()
    for name, module in MODULES.items():
        assert module.path == f"benchmarks.rows.{name}"
        assert (RESULTS.parent / "rows" / f"{name}.py").is_file()


@pytest.mark.slow
def test_all_sides_read_the_same_sequences_and_residues_from_a_fasta_file(tmp_path: Path) -> None:
    options = parser().parse_args(["store", "--quick", "--output", str(tmp_path)])
    told = io.StringIO()
    assert job(options, dict(MODULES), Console(told)) == 0, told.getvalue()
    entries = list(Table.load(tmp_path / "table.json").entries.values())
    assert [entry.result.row.key for entry in entries] == ["store-plain", "store-gzip"]
    for entry in entries:
        assert len(entry.result.sides) == 4
        assert all(side.counts and side.error == 0 for side in entry.result.sides[1:])
