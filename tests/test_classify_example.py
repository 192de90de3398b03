"""Tests of the example of a classifier on embeddings: its output and its errors."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models import tiny_model
from runs import ROOT

EXAMPLE = ROOT / "examples" / "classify_proteins.py"
Classify = Callable[..., tuple[int, str, str]]
LABEL = r"label=^\S+ (\w+)-"
COMPOSITIONS = {"helix": "AELK", "sheet": "VIYT", "loop": "GPNS"}  # classes differ in composition


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.nemo"
    tiny_model().save_to(str(path))
    return path


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    records = [
        f">{name}{number} {name}-{number}\n{''.join(generator.choice(list(letters), 40))}\n"
        for name, letters in COMPOSITIONS.items()
        for number in range(12)
    ]
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(records) + ">odd rare-1\nMKT\n")
    return path


@pytest.fixture
def classify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Classify:
    """Return a function that runs the program in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        code = 0
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


def test_classes_are_separated_and_compared_with_the_baseline(
    classify: Classify, model: Path, proteins: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    code, output, errors = classify(f"model={model}", f"input={proteins}", LABEL, f"output={folder}")
    assert code == 0, errors
    report = json.loads((folder / "report.json").read_text())
    assert report["classes"] == {"helix": 12, "sheet": 12, "loop": 12}  # the rare class has too few proteins
    assert report["one-hot"]["features"] == 20 and report["embeddings"]["features"] == 32
    for name in ("one-hot", "embeddings"):
        accuracy = report[name]["accuracy"]
        assert accuracy["value"] > 0.9 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert f"{accuracy['value']:.3f}" in output
    difference = report["embeddings"]["accuracy"]["value"] - report["one-hot"]["accuracy"]["value"]
    assert f"embeddings: {difference:+.3f} accuracy, within the intervals" in output
    assert (folder / "classes.png").read_bytes().startswith(b"\x89PNG")


def test_verdict_states_whether_a_difference_exceeds_the_intervals() -> None:
    spec = importlib.util.spec_from_file_location("classify_proteins", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    low, middle, high = (example.Estimate(value, value - 0.02, value + 0.02) for value in (0.5, 0.53, 0.6))
    assert example.verdict(low, middle).startswith("embeddings: +0.030 accuracy, within the intervals")
    assert example.verdict(low, high) == "embeddings: +0.100 accuracy, beyond the intervals"
    assert example.verdict(high, low) == "embeddings: -0.100 accuracy, beyond the intervals"


def test_help_exits_with_0() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "regular expression" in done.stdout


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ((), "must be given"),
        (("label=(nothing)",), "finds nothing in 'helix0 helix-0'"),
        ((r"label=^(\S+)",), "two are needed at least"),
        (("label=(",), "is no regular expression with a group"),
        (("label=helix",), "is no regular expression with a group"),
        ((LABEL, "labels=x"), "labels is not a key"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(
    classify: Classify, model: Path, proteins: Path, tmp_path: Path, settings: tuple[str, ...], complaint: str
) -> None:
    code, _, errors = classify(f"model={model}", f"input={proteins}", f"output={tmp_path / 'out'}", *settings)
    assert code == 2
    assert complaint in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
