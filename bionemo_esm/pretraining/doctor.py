"""`bionemo-esm doctor`: check whether this machine can train, and if not, say what to do."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bionemo_esm.console import Console, redirect_output
from bionemo_esm.errors import UserError
from bionemo_esm.pretraining.hardware import cpu_name, peak_flops

REQUIRED = ("torch", "lightning", "nemo_toolkit", "megatron-core", "hydra-core", "numpy", "numba")
OPTIONAL = ("transformer-engine", "apex", "nvidia-resiliency-ext", "tensorboard", "wandb")
ENVIRONMENT: tuple[str, ...] = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_GPUS",
)
ENVIRONMENT += ("SLURM_CPUS_PER_TASK", "SLURM_PROCID", "SLURM_LOCALID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
ENVIRONMENT += ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_")
"""Prefixes of the environment variables that are shown."""
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its size is read
_SMALLEST_SHARED_MEMORY = 10**9  # bytes; loader processes use it for batches
_Facts = dict[str, Any]


class NotReadyError(UserError):
    """The problems that prevent training here, one a line."""


def main(arguments: Sequence[str]) -> int:
    """Print the environment, test it, and return 0 for `ready` or 1 for problems, with what to do."""
    parser = argparse.ArgumentParser("bionemo-esm doctor", description="Check that this machine can train.")
    parser.add_argument("--quick", action="store_true", help="no training step, no NeMo: a few seconds")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.add_argument("--gpu", action="store_true", help="compare every kernel on a GPU; print Markdown; minutes")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "32"), help="of the training step")
    options = parser.parse_args(arguments)
    facts: _Facts = {"host": socket.gethostname(), "versions": _versions(), "machine": _machine()}
    facts |= {"environment": _environment(), "gpus": [], "notes": []}
    prints, problems = True, _missing_packages(facts)
    with redirect_output(Path(os.devnull)) as console:  # hide the warnings of NeMo
        if options.gpu and not problems:
            return _check_gpu(facts, console)
        if not problems:
            prints, problems = _examine(facts, options.quick, options.precision)
        if prints:
            facts |= {"ready": not problems, "problems": problems}
            console.print_line(json.dumps(facts, indent=2) if options.json else _page(facts))
    return 1 if problems else 0


def _check_gpu(facts: _Facts, console: Console) -> int:
    """Print the report of all checks on a GPU, and return 1 if there is none or a check fails."""
    import torch

    try:
        _inspect_gpus(facts)
        if not facts["gpus"]:
            raise NotReadyError("--gpu needs a GPU, and torch sees none; `bionemo-esm doctor` checks a CPU")
        from bionemo_esm.pretraining.gpu_check import markdown, run_checks

        outcomes = run_checks(_device())
    except UserError as error:
        console.print_line(f"not ready: {error}")
        return 1
    console.print_line(markdown(outcomes, torch.cuda.get_device_name(), facts["versions"]))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _examine(facts: _Facts, quick: bool, precision: str) -> tuple[bool, list[str]]:
    """Inspect the GPUs; unless quick, also run the self-test and an all-reduce.

    Returns whether this process prints the result, and the problems of any rank.
    """
    from bionemo_esm.pretraining.preflight import launched_ranks

    prints = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        if quick:
            _inspect_gpus(facts)
            return True, []
        with launched_ranks() as ranks:
            ranks.on_every_rank(lambda: _self_test(facts, precision), lambda _: facts["versions"])
            if ranks.size > 1:
                from bionemo_esm.pretraining.selftest import all_reduce, to_dict

                facts["all_reduce"] = to_dict(ranks.on_every_rank(lambda: all_reduce(_device())))
    except UserError as error:
        return prints, str(error).splitlines()
    except Exception as error:  # this command reports any error of a driver or a kernel
        return prints, [f"{type(error).__name__}: {str(error).strip() or 'no message'}"]
    return prints, []


def _self_test(facts: _Facts, precision: str) -> None:
    """Run the self-test. Raises `NotReadyError`, also for errors of a driver or a kernel."""
    _inspect_gpus(facts)
    from bionemo_esm.model.backends import import_problem
    from bionemo_esm.pretraining.selftest import self_test, to_dict

    device = _device()
    try:
        facts["self_test"] = to_dict(self_test(device, precision))
        facts["other_paths"] = [to_dict(self_test(device, each, rate)) for each, rate in _other_paths(precision)]
    except (RuntimeError, OSError, ImportError) as error:
        raise NotReadyError(f"a training step on {device} fails: {type(error).__name__}: {error}") from error
    if device.type == "cuda":
        for module in ("transformer_engine.pytorch", "apex.optimizers"):
            if problem := import_problem(module):
                facts["notes"].append(f"{module} is not in use: {problem}; the NGC PyTorch container has it")
    if len(facts["gpus"]) > 1 and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        count = len(facts["gpus"])
        facts["notes"].append(f"all {count} GPUs together: torchrun --nproc-per-node {count} -m bionemo_esm doctor")


def _other_paths(precision: str) -> list[tuple[str, float]]:
    """Return precision and dropout of the other steps that recipes may take: each can have kernels of its own."""
    precisions = dict.fromkeys((precision, "32"))
    return [(each, rate) for each in precisions for rate in (0.0, 0.1) if (each, rate) != (precision, 0.0)]


def _device() -> Any:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


# --- environment ------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "bionemo_esm": version("bionemo_esm")}
    for package in REQUIRED + OPTIONAL:
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _missing_packages(facts: _Facts) -> list[str]:
    missing = [package for package in REQUIRED if facts["versions"][package] is None]
    if missing:
        return [f"not installed: {', '.join(missing)}; install bionemo_esm with its dependencies (README.md)"]
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return [f"torch does not import ({error}); install the build for this machine"]
    facts["versions"] |= {"cuda": torch.version.cuda, "cudnn": None, "nccl": None}
    if torch.version.cuda:
        facts["versions"]["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            facts["versions"]["nccl"] = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
    return []


def _machine() -> dict[str, str | int | float]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    disk = shutil.disk_usage(Path.cwd())
    here: dict[str, str | int | float] = {"cpu": cpu_name(), "cores": cores, "memory_gb": round(memory / 1e9, 1)}
    here |= {"folder": str(Path.cwd()), "free_disk_gb": round(disk.free / 1e9, 1)}
    if _SHARED_MEMORY.is_dir():
        here["shared_memory_gb"] = round(shutil.disk_usage(_SHARED_MEMORY).total / 1e9, 2)
    return here


def _environment() -> dict[str, str]:
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD", "JWT")
    named = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
    return {name: value for name, value in named.items() if not any(word in name for word in secret)}


def _promised_gpus() -> str | None:
    """Return the environment variable, with its value, that announces GPUs; None if there is none."""
    none = {"SLURM_GPUS_ON_NODE": ("", "0"), "SLURM_JOB_GPUS": ("",), "CUDA_VISIBLE_DEVICES": ("", "-1", "NoDevFiles")}
    for name, nothing in none.items():
        if (value := os.environ.get(name, "")) not in nothing:
            return f"{name}={value}"
    return None


def _inspect_gpus(facts: _Facts) -> None:
    """Record each GPU. Raises `NotReadyError` for a driver that torch cannot use."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not torch.cuda.is_available():
        if _DRIVER.is_file() and not hidden:
            fix = "start the container with --gpus all, or update the driver" if torch.version.cuda else ""
            fix = fix or "this torch is built for CPUs; install a build for CUDA, or use the container"
            raise NotReadyError(f"an NVIDIA driver is here, but torch sees no GPU: {fix}")
        if promised := _promised_gpus():
            raise NotReadyError(
                f"{promised} promises GPUs, but torch sees none: look whether the driver is there (nvidia-smi), and "
                "whether torch is built for CUDA"
            )
        facts["notes"].append("no GPU: recipes for a CPU only, such as recipe=laptop")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        best = peak_flops(properties.name, "bf16")
        facts["gpus"].append(
            {
                "name": properties.name,
                "memory_gb": round(total / 1e9, 1),
                "free_gb": round(free / 1e9, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
                "peak_bf16_tflops": best and best / 1e12,
            }
        )
        if free < 0.9 * total:
            facts["notes"].append(
                f"GPU {index}: {(total - free) / 1e9:.1f} GB are in use, by others or by this process"
            )
    if facts["gpus"] and _DRIVER.is_file():
        facts["versions"]["driver"] = _DRIVER.read_text().split("\n")[0].split("Module  ")[-1].split("  ")[0]
    if facts["machine"].get("shared_memory_gb", 1) < _SMALLEST_SHARED_MEMORY / 1e9:
        facts["notes"].append("little shared memory: start the container with --ipc=host, or data.num_workers=0")


# --- output -----------------------------------------------------------------------------------------------------------


def _paths_told(paths: Sequence[_Facts]) -> list[str]:
    """Return one text for each distinct set of kernels."""
    return list(dict.fromkeys(f"{path['precision']}, {path['backends']}" for path in paths))


def _page(facts: _Facts) -> str:
    versions = [f"{name} {number}" for name, number in facts["versions"].items() if number]
    missing = [name for name, number in facts["versions"].items() if number is None]
    lines = [("versions", ", ".join(versions)), ("not there", ", ".join(missing))]
    for index, gpu in enumerate(facts["gpus"]):
        peak = f", at best {gpu['peak_bf16_tflops']:,.0f} TFLOP/s in bf16" if gpu["peak_bf16_tflops"] else ""
        text = f"{gpu['name']}, {gpu['free_gb']} of {gpu['memory_gb']} GB free, sm {gpu['compute_capability']}"
        lines.append((f"GPU {index}", f"{text}, {'bf16' if gpu['bf16'] else 'no bf16'}{peak}"))
    machine = facts["machine"]
    lines.append(("machine", f"{facts['host']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"))
    lines.append(("disk", f"{machine['free_disk_gb']:,} GB free in {machine['folder']}"))
    lines.append(("environment", "  ".join(f"{name}={value}" for name, value in facts["environment"].items())))
    if test := facts.get("self_test"):
        lines.append(("fused", test["backends"]))
        text = f"a training step on {test['device']} in {test['precision']}: loss {test['loss']:.2f}, packed rows right"
        lines.append(("self-test", f"{text} (to {test['packing_difference']:.0e}), {test['seconds']:.1f} s"))
        lines += [("", f"right, too: {other}") for other in _paths_told(facts.get("other_paths", []))]
    if network := facts.get("all_reduce"):
        text = f"{network['ranks']} ranks, {network['megabytes']:.0f} MB in {network['milliseconds']:,.1f} ms"
        lines.append(("all-reduce", f"{text}: {network['bus_gb_per_second']:,.1f} GB/s (bus bandwidth)"))
    lines += [("note", note) for note in facts["notes"]]
    page = "\n".join(f"{label:<12} {text}" for label, text in lines if text)
    if facts["ready"]:
        return f"{page}\n\nready"
    return f"{page}\n\nnot ready: " + "\n  ".join(facts["problems"])
