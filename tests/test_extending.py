"""The examples of docs/extending.md: written to files unchanged, installed with pip, run with their commands."""

from __future__ import annotations

import ast
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.finetuning.heads import HEADS
from bionemo_esm.inference.embedding.formats import FORMATS, read_embeddings
from bionemo_esm.model.optimizer_registry import OPTIMIZERS
from models import tiny_model
from runs import ROOT, SMALL, command_here, composed
from scripts.structure import MAX_EXTENSION_FILES, Structure

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in re.split(r"^## ", PAGE, flags=re.M)}


def titled_blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', text, re.S | re.M)


def commands(section: str) -> list[list[str]]:
    (block,) = re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.S | re.M)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run(arguments: list[str], folder: Path, site: Path) -> str:
    """Run a command with the packages of `site`, check that it succeeds, and return its standard output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the page's package with pip into a separate folder."""
    source, target = tmp_path_factory.mktemp("my-plugin"), tmp_path_factory.mktemp("site")
    (source / "my_plugin").mkdir()
    (source / "my_plugin" / "__init__.py").touch()
    for title, code in titled_blocks(PAGE):
        if title == "pyproject.toml" or title.startswith("my_plugin/"):
            with (source / title).open("a") as file:
                file.write(code + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, capture_output=True)
    return target


@pytest.fixture
def run_here(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a command in this process, which finds the installed parts of the page's package.

    The function takes the words of a command and returns its standard output.
    """
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    for registry in (OPTIMIZERS, HEADS, FORMATS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
        monkeypatch.setattr(registry, "_plugins_loaded", False)

    def command(program: str, *words: str) -> str:
        assert program == "bionemo-esm"
        command_here(*words)
        return capfd.readouterr().out

    return command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model, proteins and labels for the commands."""
    tiny_model().save_to(str(tmp_path / "model.nemo"))
    proteins = list(read_fasta(ROOT / "bionemo_esm" / "data" / "sample" / "test.fasta.gz"))[:12]
    sequences = [record.sequence.decode()[:60] for record in proteins]
    (tmp_path / "proteins.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(sequences)))
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        rows = ([f"p{i}", text, text.count("A") + 0.5 * text.count("G")] for i, text in enumerate(sequences))
        csv.writer(file).writerows([["id", "sequence", "activity"], *rows])
    return tmp_path


def test_an_optimizer_from_another_package_trains_and_continues_from_its_state(run_here: Callable[..., str]) -> None:
    (command,) = commands("An optimizer")
    small = [word for word in SMALL if word.startswith(("model.", "data.", "trainer.limit_val_batches"))]
    assert "Done in" in run_here(*command, *small)
    longer = [word.replace("max_steps=20", "max_steps=22") for word in command]
    longer = [word.replace("name=lion", "name=longer") if "exp_manager" in word else word for word in longer]
    assert "after the 20 of" in run_here(*longer, *small, "continue_from_path=runs/lion")


def test_a_head_from_another_package_is_trained_and_predicts(run_here: Callable[..., str], folder: Path) -> None:
    for command in commands("A head"):
        run_here(*command)
    with (folder / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_an_embedding_writer_from_another_package_round_trips(
    site: Path, run_here: Callable[..., str], folder: Path
) -> None:
    (command,) = commands("An embedding writer")
    run([sys.executable, "-m", "bionemo_esm", *command[1:]], folder, site)
    run_here(*(word.replace(".jsonl", ".npz") for word in command))
    pairs = list(zip(read_embeddings("embeddings.jsonl"), read_embeddings("embeddings.npz"), strict=True))
    assert len(pairs) == 12
    for one, other in pairs:
        assert one.id == other.id
        assert one.arrays["mean_2"].tobytes() == other.arrays["mean_2"].tobytes()


def test_a_model_family_is_one_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bionemo_esm.pretraining.recipe import load_recipe

    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    ((title, text),) = titled_blocks(SECTIONS["A model family"])
    (tmp_path / title).write_text(text)
    monkeypatch.setattr("runs.config_directory", lambda part="": tmp_path / "conf" / part)
    ((_, _, *settings),) = commands("A model family")
    model = load_recipe(composed(*settings)).model
    assert (model.num_layers, model.hidden_size, model.position_embedding) == (3, 480, "rotary")


def test_a_masking_rule_is_one_function(tmp_path: Path) -> None:
    """Replace the function of the same name with the page's function, which selects spans."""
    shutil.copytree(ROOT / "bionemo_esm", tmp_path / "bionemo_esm", ignore=shutil.ignore_patterns("__pycache__"))
    ((title, code),) = titled_blocks(SECTIONS["A masking rule"])
    lines = (tmp_path / title).read_text().splitlines()
    (old,) = (node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "_choose")
    assert isinstance(old, ast.FunctionDef)
    lines[old.decorator_list[0].lineno - 1 : old.end_lineno] = code.splitlines()
    (tmp_path / title).write_text("\n".join(lines) + "\n")
    (script,) = re.findall(r"^```python\n(.*?)^```", SECTIONS["A masking rule"], re.S | re.M)
    chosen = run([sys.executable, "-c", script], tmp_path, tmp_path).strip()
    spans = {chosen[at : at + 3] for at in range(0, len(chosen) - 2, 3)}
    assert len(chosen) == 76
    assert spans == {"...", "***"}


def test_each_extension_stays_within_its_number_of_files() -> None:
    examples = Structure().extension_files()
    assert examples.keys() == MAX_EXTENSION_FILES.keys()
    for name, files in examples.items():
        assert len(files) <= MAX_EXTENSION_FILES[name], name
        assert all((ROOT / file).is_file() for file in files if file.startswith("bionemo_esm/")), name
