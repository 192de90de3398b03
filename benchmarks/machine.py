"""Environment of a row: processor, threads, memory, GPU, versions, and the commit of our code; no host names."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.rows import MODULES

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    *("torch", "numpy", "numba", "isal", "megatron-core", "nemo-toolkit", "lightning"),
    *("transformers", "fair-esm", "tokenizers", "datasets", "accelerate", "biopython", "pyfastx", "safetensors"),
    "transformer-engine",
)
"""Distributions whose versions are recorded if they are installed."""

HARNESS = ("__main__", "running", "machine", "report", "chart", "table", "__init__")
"""Files of this folder that run and report rows but do not affect what is measured."""

_BUSY = 0.5  # load average (runnable processes) above which timings are unreliable


def installed(library: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """Return the properties of the machine that affect speed, as plain values. Imports torch."""
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    units = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    found = [name for flag, name in units.items() if flags and flag in flags[1].split()]
    versions = {library: installed(library) for library in LIBRARIES}
    return {
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": ", ".join([torch.backends.cpu.get_cpu_capability(), *found]),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {library: found for library, found in versions.items() if found is not None},
    }


def source() -> dict[str, Any]:
    """Return the commit of our code, and whether the work tree is clean; both None outside a git checkout."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["--", ".", ":(exclude)benchmarks/results", ":(exclude)docs"]
        changed = subprocess.run([*git, "status", "--porcelain", *paths], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is a copy without history
        return {"commit": None, "clean": None}
    return {"commit": commit.stdout.strip(), "clean": not changed.stdout.strip()}


def code_of(path: str) -> str:
    """Return a hash of the code that a module of rows runs: package, configuration, and this folder's measuring code.

    Other modules of rows are excluded, so a change to one of them does not invalidate these rows.
    """
    files = [*(ROOT / "bionemo_esm").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    files += [file for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in HARNESS]
    others = {module.path.rpartition(".")[2] for module in MODULES.values() if module.path != path} | {"__init__"}
    files += [file for file in (ROOT / "benchmarks" / "rows").glob("*.py") if file.stem not in others]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(hash_of(file).encode() + file.relative_to(ROOT).as_posix().encode() + b"\n")
    return whole.hexdigest()[:16]


@cache
def hash_of(file: Path) -> str:
    """Return the SHA-256 of a file, cached after the first call."""
    whole = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**22):
            whole.update(block)
    return whole.hexdigest()


def load() -> float:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def is_idle() -> bool:
    return load() < _BUSY
