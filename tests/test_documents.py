"""Tests of the documents: commands compose, Python runs, paths and links exist, the site builds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.__main__ import COMMANDS as COMMAND_LINE
from bionemo_esm.finetuning.finetune_command import finetune_config
from bionemo_esm.finetuning.predict_command import load_predict_config
from bionemo_esm.inference.contacts.contacts_command import load_contacts_config
from bionemo_esm.inference.contacts.fit_command import load_fit_config
from bionemo_esm.inference.embedding.embed_command import load_embed_config
from bionemo_esm.inference.evaluation.evaluate_command import load_evaluate_config
from bionemo_esm.inference.variants.score_command import load_score_config
from bionemo_esm.model.interchange.convert_command import load_convert_config
from bionemo_esm.pretraining.checkpoint_commands import load_average_config
from bionemo_esm.pretraining.recipe import load_recipe
from models import tiny_model
from runs import ROOT, composed
from scripts.structure import PATH as READING_PATH

COMMANDS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {  # configuration, its folder in conf/, its loader
    "pretrain": ("pretrain_esm1nv", "", load_recipe),
    "preprocess": ("preprocess_uniref50", "", lambda config: config),
    "average": ("average_checkpoints", "", load_average_config),
    "convert": ("convert_checkpoint", "", load_convert_config),
    "embed": ("embed", "inference", load_embed_config),
    "evaluate": ("evaluate", "inference", load_evaluate_config),
    "score": ("score", "inference", load_score_config),
    "contacts": ("contacts", "inference", load_contacts_config),
    "fit-contacts": ("fit_contacts", "inference", load_fit_config),
    "finetune": ("finetune", "finetuning", finetune_config),
    "predict": ("predict", "finetuning", load_predict_config),
}
SCRIPTS = {
    "pretrain_esm1nv.py": "pretrain",
    "preprocess_uniref50.py": "preprocess",
    "average_checkpoints.py": "average",
    "convert_checkpoint.py": "convert",
    "extract_embeddings.py": "embed",
    "evaluate.py": "evaluate",
    "score_variants.py": "score",
    "predict_contacts.py": "contacts",
    "fit_contacts.py": "fit-contacts",
    "finetune.py": "finetune",
    "predict.py": "predict",
    "pretrain.sbatch": "pretrain",
}
OTHER_COMMANDS = {"inspect", "doctor", "check-leakage", "convert-legacy"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def code_blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a language, including those indented in a list."""
    blocks = re.findall(rf"^ *```{language}[^\n]*\n(.*?)^ *```", (ROOT / page).read_text(), re.S | re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) if block.startswith("    ") else block for block in blocks]


def commands_of(page: str) -> list[tuple[str, list[str]]]:
    """Return name and settings of each command in the bash blocks and table cells of a page."""
    lines = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"\| `((?:bionemo-esm|sbatch) [^`]+)` \|", (ROOT / page).read_text())
    commands = []
    for line in lines:
        words = shlex.split(line.rpartition("| ")[2], comments=True)
        for index, word in enumerate(words):
            previous = words[index - 1] if index else ""
            name = SCRIPTS.get(Path(word).name, word if Path(previous).name in ("bionemo-esm", "bionemo_esm") else "")
            if re.fullmatch(r"-?-?[a-z][a-z-]+", name):
                assert name in {*COMMANDS, *OTHER_COMMANDS} or name.startswith("-"), f"{page}: {line}"
                nodes = (
                    re.findall(r"--nodes=(\d+)", line) if word.endswith(".sbatch") else []
                )  # pretrain.sbatch adds this setting
                commands.append((name, [*words[index + 1 :], *(f"trainer.num_nodes={count}" for count in nodes)]))
                break
    return commands


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/extending.md"])  # it has its own tests
def test_every_command_of_a_page_is_accepted(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose and load each command as its program does. A small model stands in for each named model."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_to("tiny.nemo")
    for name, words in commands_of(page):
        settings = [word for word in words if not word.startswith("-")]
        if name not in COMMANDS or any("..." in word or "…" in word for word in settings):
            continue
        config, folder, load = COMMANDS[name]
        program = COMMAND_LINE[name]
        main = getattr(import_module(program.module), program.function)
        composed_config = composed(*main.overrides(settings), config=config, part=folder)
        paths = dict(
            word.split("=", 1) for word in settings if word.startswith(("source=", "restore_from_path=", "model="))
        )
        for path in map(Path, paths.values()):
            if path.suffix == ".nemo":
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy("tiny.nemo", path)
        if not any(Path(path).suffix == ".pt" or Path(path).is_absolute() for path in paths.values()):
            load(composed_config)
        for path in map(Path, paths.values()):
            path.unlink(missing_ok=True)


def test_readme_shows_the_two_main_commands_and_one_per_use() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(code_blocks("README.md", "bash")), re.M)
    assert targets == ["pretrain", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    names = {name for name, _ in commands_of("README.md")}
    assert names >= {*COMMANDS, "inspect", "doctor"} - {"fit-contacts"}
    assert len(README.splitlines()) <= 130


def test_readme_names_the_run_folder_of_make_pretrain() -> None:
    assert str(load_recipe(composed("recipe=laptop")).run_folder) in README


def test_every_setting_in_the_table_of_the_tutorial_is_a_key() -> None:
    settings = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", TUTORIAL, re.M)
    assert len(settings) >= 4
    for setting in settings:
        load_recipe(composed("recipe=laptop", *shlex.split(setting)))


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_notebook_code_of_a_page_runs_unchanged(page: str, tmp_path: Path) -> None:
    (block,) = (code for code in code_blocks(page, "python") if "ProteinModel" in code)
    path = re.search(r'load\("(.+?)"\)', block)
    assert path is not None
    (tmp_path / path[1]).parent.mkdir(parents=True)
    tiny_model().save_to(str(tmp_path / path[1]))
    code = block + "print(features.shape, effects.shape, features.dtype)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 32) (2,) float32\n", done.stderr
    assert done.stderr == ""


def test_every_import_in_the_documents_works() -> None:
    found = {
        line.strip()
        for page in PAGES
        for block in code_blocks(page, "python")
        for line in re.findall(r"^(?:from|import) (?:bionemo_esm|nemo)[^\n(]*$", block, re.M)
    }
    assert len(found) >= 10
    done = subprocess.run([sys.executable, "-c", "\n".join(found)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_pictures_and_files_named_in_a_document_exist(document: Path) -> None:
    text = document.read_text()
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(#[^)]+)?\)", text):
        path = document.parent / target if target else document
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M) if anchor else []
        slugs = {"#" + re.sub(r"[^\w -]", "", heading).lower().strip().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, target + anchor
    for path in re.findall(r"`((?:bionemo_esm|conf|examples|scripts|benchmarks|docs|tests)/[\w/.-]*\w\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name


def test_architecture_page_lists_the_files_of_the_reading_path_in_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\d\. `([^`]+)`: (.+)$", text, re.M) == [(path, what) for path, what in READING_PATH]


def test_every_decision_has_a_statement_and_a_one_line_reason() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    entries = [entry for entry in text.split("\n\n") if entry.startswith("**")]
    assert len(entries) >= 40
    for entry in entries:
        decision, reason = entry.splitlines()
        assert decision.endswith("  "), f"no line break after {decision[:40]}"
        assert reason.startswith("*Reason:* "), decision


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """The build needs no network. `strict` makes every broken link and anchor an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis.com" not in home
    assert (tmp_path / "site" / "api" / "use" / "index.html").read_text().count("ProteinModel") > 3
    assert 'class="mermaid"' in (tmp_path / "site" / "architecture" / "index.html").read_text()
