"""Import layers, safety rules, commented configuration keys, and a complete wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from runs import ROOT
from scripts.structure import MAX_PATH_FILES, Structure
from scripts.structure import PATH as READING_PATH

PACKAGE = ROOT / "bionemo_esm"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_imports_follow_the_layers_and_have_no_cycles() -> None:
    structure = Structure()
    assert structure.upward_imports() == []
    assert structure.circles(top_level_only=True) == []
    assert structure.circles(top_level_only=False) == []
    assert structure.upward_strings() == []


def test_functions_fit_on_a_screen() -> None:
    assert Structure().long_functions() == []


def test_structure_script_finds_cycles_upward_imports_and_module_names_in_strings(tmp_path: Path) -> None:
    sources = {
        "data/a.py": "def f():\n    from bionemo_esm.data import b\n    return b\n",
        "data/b.py": "import bionemo_esm.data.a\nMODULE = 'bionemo_esm.model.c'\n",
        "model/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bionemo_esm.pretraining.d\n",
        "pretraining/d.py": "",
        "errors.py": "from bionemo_esm.data.a import f\n",
    }
    for name, text in sources.items():
        (tmp_path / "bionemo_esm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bionemo_esm" / name).write_text(text)
    structure = Structure(tmp_path)
    assert structure.circles(top_level_only=True) == []
    assert structure.circles(top_level_only=False) == [["bionemo_esm.data.a", "bionemo_esm.data.b"]]
    assert structure.upward_imports() == [("bionemo_esm.errors", "bionemo_esm.data.a")]
    assert structure.upward_strings() == [("bionemo_esm.data.b", "bionemo_esm.model.c")]
    assert structure.single_importer() == ["bionemo_esm.data.b"]


def test_reading_path_from_fasta_record_to_optimizer_step_has_at_most_eight_files() -> None:
    assert len(READING_PATH) <= MAX_PATH_FILES
    assert all((ROOT / path).is_file() for path, _ in READING_PATH)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_never_unpickles_evaluates_or_instantiates_by_name(path: Path) -> None:
    text = path.read_text()
    for forbidden in (
        "pickle.load",
        "weights_only=False",
        "allow_pickle",
        "extractall",
        "hydra.utils",
        " eval(",
        " exec(",
    ):
        assert forbidden not in text
    assert len(text.splitlines()) <= 800


def test_data_modules_import_without_nemo_megatron_or_lightning() -> None:
    code = (
        "import sys, bionemo_esm, bionemo_esm.alphabet, bionemo_esm.data.preprocess, bionemo_esm.data.dataloader\n"
        "print([name for name in ('nemo', 'megatron', 'lightning', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_configuration_key_has_a_comment() -> None:
    """Only base groups are checked: recipes and derived groups set keys that are explained there."""
    for path in (ROOT / "conf").glob("*/*.yaml"):
        text = path.read_text()
        if path.parent.name == "recipe" or "defaults:" in text:
            continue
        for line in text.splitlines():
            key, _, value = line.strip().partition(":")
            if value and not key.startswith("#"):
                assert "#" in value or key in PLAIN, f"{path.relative_to(ROOT)}: {line}"


PLAIN = {"num_layers", "hidden_size", "layernorm_epsilon", "betas", "eps", "exp_dir", "num_nodes"}
PLAIN |= {"create_tensorboard_logger"}
"""Keys that need no comment."""


@pytest.mark.slow
def test_wheel_contains_configurations_and_sample_and_runs_anywhere(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()  # a copy, because the build leaves a folder behind
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bionemo_esm", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    command = [sys.executable, "-m", "bionemo_esm", "pretrain", "recipe=laptop", "--cfg", "job"]
    environment = {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "name: laptop" in done.stdout
    assert (site / "bionemo_esm" / "data" / "sample" / "train.fasta.gz").stat().st_size > 500_000


def test_every_pinned_version_can_be_installed_on_the_first_release_of_python_3_11() -> None:
    """Debian 12 has Python 3.11.2. A pin that needs a later one ends `make` there with a conflict."""
    later = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        try:
            metadata = distribution(name).metadata
        except PackageNotFoundError:
            continue
        needs = metadata["Requires-Python"]
        if metadata["Version"] == pinned and needs and not SpecifierSet(needs).contains("3.11.0"):
            later.append(f"{name}=={pinned} needs {needs}")
    assert not later
