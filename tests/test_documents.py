"""The pages about using a model keep their word: every command composes, and the Python of the README runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.inference.contacts.contacts_command import load_contacts_config
from bionemo_esm.inference.contacts.fit_command import load_fit_config
from bionemo_esm.inference.embedding.embed_command import load_embed_config
from bionemo_esm.inference.variants.score_command import load_score_config
from models import tiny_model
from runs import ROOT, composed

JOBS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # the configuration of a command, and what reads it
    "embed": ("embed", load_embed_config),
    "extract_embeddings.py": ("embed", load_embed_config),
    "score": ("score", load_score_config),
    "score_variants.py": ("score", load_score_config),
    "contacts": ("contacts", load_contacts_config),
    "predict_contacts.py": ("contacts", load_contacts_config),
    "fit-contacts": ("fit_contacts", load_fit_config),
    "fit_contacts.py": ("fit_contacts", load_fit_config),
}
PAGES = ("README.md", "docs/embeddings.md", "docs/variants.md", "docs/contacts.md")


def commands_of(page: str) -> list[tuple[str, list[str]]]:
    """Name of the job and its settings, of each command in the code blocks of a page."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        words = shlex.split(line.split("  #")[0].rpartition("| ")[2])
        for index, word in enumerate(words):
            if (name := word.removeprefix("examples/")) in JOBS and index:
                commands.append((name, words[index + 1 :]))
    return commands


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_works(page: str) -> None:
    commands = commands_of(page)
    assert len(commands) >= 2
    for name, settings in commands:
        config, load = JOBS[name]
        load(composed(*settings, config=config, part="inference"))


def test_the_notebook_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    block = next(
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "ProteinModel" in code
    )
    path = re.search(r'load\("(.+?)"\)', block)
    assert path is not None
    (tmp_path / path[1]).parent.mkdir(parents=True)
    tiny_model().save_to(str(tmp_path / path[1]))
    code = block + "print(features.shape, effects.shape, features.dtype)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 32) (2,) float32\n", done.stderr
    assert done.stderr == ""
