"""Embedding jobs for tests, in this process or in a separate one, with signals at chosen moments.

A fork server that has imported everything once forks the child processes, so this module imports little.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from omegaconf import OmegaConf

from bionemo_esm.inference.embedding import embed_command as embed_job
from bionemo_esm.inference.embedding import embeddings as computation

ROOT = Path(__file__).resolve().parent.parent
PROTEINS = 30
_SERVER = multiprocessing.get_context("forkserver")  # faults.py makes it preload the slow imports


class Stop(NamedTuple):
    """Send a signal to this process at the n-th file operation or call of `embed_proteins`."""

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
            (os, "fsync"), (Path, "replace"), (Path, "rename"), (shutil, "rmtree"),
            (computation, "embed_proteins"),
        ):  # fmt: skip
            setattr(owner, name, counted(getattr(owner, name)))


def _apart(folder: str, settings: dict[str, Any], stop: Stop | None, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.stdout = open("../screen.txt", "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open("../errors.txt", "w", encoding="utf-8")  # noqa: SIM115
    if stop is not None:
        stop.install()
    embed_job.embed(OmegaConf.create(settings))


def started(
    folder: Path, settings: dict[str, Any], stop: Stop | None = None, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start the job in a folder. Its output goes to `screen.txt` and `errors.txt` beside the folder."""
    process = _SERVER.Process(target=_apart, args=(str(folder), settings, stop, environment or {}))
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    """Return the exit code. It is negative if a signal killed the process."""
    process.join(120)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


class Inputs(NamedTuple):
    model: Path
    proteins: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Return a tiny model and thirty real proteins. Read-only."""
    from models import tiny_model  # imports NeMo, which the children do not need

    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(seq_length=128).save_to(str(folder / "tiny.nemo"))
    records = (
        gzip.decompress((ROOT / "bionemo_esm" / "data" / "sample" / "test.fasta.gz").read_bytes())
        .decode()
        .split(">")[1 : PROTEINS + 1]
    )
    (folder / "proteins.fasta").write_text("".join(f">{record}" for record in records))
    return Inputs(folder / "tiny.nemo", folder / "proteins.fasta")


Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Return a function that runs the job in this process with overrides: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return code_of(settings_of(inputs, *overrides)), *capfd.readouterr()

    return run


def overrides_of(inputs: Inputs, *overrides: str) -> list[str]:
    usual = {"model": str(inputs.model), "input": str(inputs.proteins), "output": "out.npz", "device": "cpu"}
    usual |= {"part_proteins": "7"} | dict(override.split("=", 1) for override in overrides)
    return [f"{key}={value}" for key, value in usual.items()]


def settings_of(inputs: Inputs, *overrides: str) -> dict[str, Any]:
    from runs import composed

    settings = OmegaConf.to_container(composed(*overrides_of(inputs, *overrides), config="embed", part="inference"))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def code_of(settings: dict[str, Any]) -> int:
    try:
        embed_job.embed(OmegaConf.create(settings))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def names(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_apart(
    folder: Path, inputs: Inputs, *overrides: str, stop: Stop | None = None, environment: dict[str, str] | None = None
) -> int:
    """Run the job in a separate process. Return its exit code, negative if a signal killed it."""
    return ended(started(folder, settings_of(inputs, *overrides), stop, environment))


def content(place: Path) -> dict[str, bytes]:
    """Return the bytes of every file of an output file or folder, by name."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}
