"""Tests of the console: lines on the terminal, log of other libraries, streams, signals and exit codes of commands."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from bionemo_esm import __main__ as program
from bionemo_esm.console import redirect_output

REDIRECTING = """
import os, sys, warnings
from pathlib import Path
from bionemo_esm.console import redirect_output
print("before")
with redirect_output(Path(sys.argv[1])) as console:
    print("a library prints")
    warnings.warn("a library warns")
    os.write(1, b"C++ writes\\n")
    os.system("echo a child writes")
    console.print_line("ours")
    console.progress("step 1")
print("after")
"""


def test_only_our_lines_reach_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "output.log"
    done = subprocess.run([sys.executable, "-c", REDIRECTING, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "ours", "step 1", "after"]
    assert done.stderr == ""
    for line in ("a library prints", "a library warns", "C++ writes", "a child writes"):
        assert line in log.read_text()


def test_streams_are_restored_after_an_exception(tmp_path: Path) -> None:
    streams = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError), redirect_output(tmp_path / "log"):
        raise RuntimeError
    assert (sys.stdout, sys.stderr) == streams


def test_ranks_other_than_0_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with redirect_output(tmp_path / "log", silent=True) as console:
        console.print_line("hello")
        console.progress("step")
    assert capfd.readouterr().out == ""


PROGRAM = """
import atexit, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from bionemo_esm.console import Console, redirect_output, run_program
from bionemo_esm.errors import UserError

def main():
    {body}

run_program(main)
"""


def running(body: str, shell: str = "@", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code as a command, in a process that the shell starts in place of @."""
    source = PROGRAM.format(body=body.replace("\n", "\n    "))
    line = shell.replace("@", '"$0" -c "$1"')
    return subprocess.run(
        ["bash", "-c", line, sys.executable, source], cwd=folder, capture_output=True, text=True, check=False
    )


PRINTING = """
with redirect_output(Path("log")) if {redirected} else nullcontext(Console(sys.stdout)) as console:
    for number in range(20_000):
        console.print_line(f"line {{number}}")
        print("a library's")
Path("result").write_text("whole")
"""


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("set -o pipefail; @| head -1", id="reader-that-leaves"),
        pytest.param("@2>&1 | true", id="no-reader"),
        pytest.param("@>&-", id="closed-output"),
        pytest.param("@<&- >&- 2>&-", id="all-closed"),
    ],
)
def test_command_finishes_when_nobody_reads_its_output(redirected: bool, shell: str, tmp_path: Path) -> None:
    done = running(PRINTING.format(redirected=redirected), shell, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "result").read_text() == "whole"


def test_characters_outside_the_terminal_encoding_are_escaped() -> None:
    body = 'Console(sys.stdout).print_line("größe \\udcff")\nraise UserError("über")'
    done = running(body, "PYTHONIOENCODING=ascii @")
    assert (done.returncode, done.stdout, done.stderr) == (2, "gr\\xf6\\xdfe \\udcff\n", "error: \\xfcber\n")


@pytest.mark.parametrize(
    ("body", "shell", "code", "error"),
    [
        (
            "pass",
            "mkdir gone; cd gone; rmdir ../gone; @",
            2,
            "error: the working folder was deleted; change to another ",
        ),
        ("open('loop')", "ln -s loop loop; @", 2, "error: loop: Too many levels of symbolic links"),
        ("Path('loop').resolve(strict=True)", "ln -s loop loop; @", 2, "error: "),
        ("open('x' * 300)", "@", 2, f"error: {'x' * 300}: File name too long"),
        ("print('x' * 10_000)", "@> /dev/full", 2, "error: No space left on device; free some space and run the same "),
        ("print('x')", "@> /dev/full", 2, "error: No space left on device; free some space and run the same "),
        ("os.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()", "@", 143, "\nStopped."),
        ("os.kill(os.getpid(), signal.SIGINT)\nsignal.pause()", "@", 130, "\nInterrupted."),
        ("atexit.register(os.kill, os.getpid(), signal.SIGINT)\nraise KeyboardInterrupt", "@", 130, "\nInterrupted."),
    ],
)
def test_command_ends_with_one_line_and_its_exit_code(
    body: str, shell: str, code: int, error: str, tmp_path: Path
) -> None:
    done = running(body, shell, tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", program.COMMANDS)
def test_ctrl_c_during_the_import_of_a_command_ends_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["bionemo-esm", name])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_every_command_of_the_table_exists() -> None:
    for place in program.COMMANDS.values():
        assert callable(getattr(import_module(place.module), place.function))
