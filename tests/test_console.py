"""The screen: ours reaches the person, everybody else's goes into the log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bionemo_esm.console import redirect_output

PROGRAM = """
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


def test_only_our_lines_reach_the_person(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "output.log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "ours", "step 1", "after"]
    assert done.stderr == ""
    for line in ("a library prints", "a library warns", "C++ writes", "a child writes"):
        assert line in log.read_text()


def test_an_exception_finds_the_streams_as_they_were(tmp_path: Path) -> None:
    streams = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError), redirect_output(tmp_path / "log"):
        raise RuntimeError
    assert (sys.stdout, sys.stderr) == streams


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with redirect_output(tmp_path / "log", silent=True) as console:
        console.print_line("hello")
        console.progress("step")
    assert capfd.readouterr().out == ""
