"""Locking an output path before the work starts, so that a second process is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.files import hold_name, hold_output
from errors import refused


def test_a_held_output_is_refused_to_others_and_released_afterwards(tmp_path: Path) -> None:
    target = tmp_path / "new" / "scores.csv"
    with hold_output("output", target):
        with refused("files.held", "output: another process is writing", target), hold_output("output", target):
            pass
        with hold_output("output", tmp_path / "new" / "other.csv"):
            pass
    assert not any(tmp_path.iterdir()), "a lock, or a folder that holds nothing, is left"
    with hold_output("output", target):
        target.write_text("done")
    assert [path.name for path in target.parent.iterdir()] == ["scores.csv"]
    with pytest.raises(ConfigError, match="exists already"), hold_output("output", target):
        pass


def test_a_refusal_names_the_key_the_holder_and_what_to_do(tmp_path: Path) -> None:
    with hold_output("output", tmp_path / "scores.csv"):
        refusal = refused("files.held", "key:", f"process {os.getpid()} on ", "or give another key")
        with refusal, hold_name("key", tmp_path / "scores.csv", otherwise="give another key"):
            pass


def test_the_name_of_an_output_that_exists_can_be_held(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold_name("output", tmp_path / "run"), refused("files.held"), hold_name("output", tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_processes_that_share_a_name_exclude_others_until_the_last_one_ends(tmp_path: Path) -> None:
    target = tmp_path / "e.h5"
    one, two = (hold_name("output", target, shared=True) for _ in range(2))
    with one:
        with two:
            pass
        with refused("files.held"), hold_output("output", target):
            pass
    with hold_output("output", target), refused("files.held"), hold_name("output", target, shared=True):
        pass
    assert not any(tmp_path.iterdir())


def test_a_killed_process_releases_its_output(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from bionemo_esm.files import hold_name, hold_output\n"
        "with hold_output('output', Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "scores.csv"
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".scores.csv.lock"]
    with hold_output("output", target):
        pass
    assert not any(tmp_path.iterdir())


def test_an_output_that_appeared_while_another_process_held_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "scores.csv"
    flock = __import__("fcntl").flock

    def finished_meanwhile(*arguments: int) -> None:
        target.write_text("theirs")
        flock(*arguments)

    monkeypatch.setattr("bionemo_esm.files.fcntl.flock", finished_meanwhile)
    with pytest.raises(ConfigError, match="exists already"), hold_output("output", target):
        os.abort()
