"""`pretrain` and `doctor` with a closed pipe, closed streams, a deleted working folder, or Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import command

DOCTOR = [sys.executable, "-m", "bionemo_esm", "doctor", "--quick"]
INTERRUPTED = """
import os, signal, sys
from bionemo_esm.pretraining import {module} as module
module.{function} = lambda *arguments: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["bionemo-esm", *{arguments!r}]
from bionemo_esm.__main__ import main
main()
"""


def test_training_continues_after_the_reader_of_its_output_exits(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "trainer.max_steps=2", "data.num_workers=0")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "\n"  # the run description starts with an empty line
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "run" / "summary.json").is_file()


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_doctor_and_plan_work_with_closed_streams(streams: str, tmp_path: Path) -> None:
    done = shell(f"$PYTHON -m bionemo_esm doctor --quick {streams}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"$PYTHON -m bionemo_esm pretrain recipe=laptop plan=true {streams}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("job", ["doctor", "doctor --quick", "pretrain recipe=laptop plan=true"])
def test_reader_that_exits_after_one_line_causes_no_error(job: str, tmp_path: Path) -> None:
    done = shell(f"$PYTHON -m bionemo_esm {job} | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("job", ["doctor", "doctor --quick", "pretrain recipe=laptop"])
def test_deleted_working_folder_gives_one_error_line(job: str, tmp_path: Path) -> None:
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && $PYTHON -m bionemo_esm {job}", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "working folder" in done.stderr


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("doctor", "_versions", ["doctor"]),
        ("doctor", "_inspect_gpus", ["doctor"]),
        ("run", "load_recipe", ["pretrain", "recipe=laptop"]),
        ("run", "check_requirements", ["pretrain", "recipe=laptop"]),
        ("run", "build_run_store", ["pretrain", "recipe=laptop"]),
    ],
)
def test_interrupt_ends_with_one_line_and_exit_code_130(
    module: str, function: str, arguments: list[str], tmp_path: Path
) -> None:
    code = INTERRUPTED.format(module=module, function=function, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().startswith("Interrupted")
    assert len(done.stderr.strip().splitlines()) == 1
