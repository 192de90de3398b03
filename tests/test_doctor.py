"""Tests of `bionemo-esm doctor`: environment report, self-test, verdict and exit code."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import faults  # noqa: F401 - its fork server has imported what takes long
from bionemo_esm.model import attention, backends
from bionemo_esm.pretraining import doctor, selftest

CPU = torch.device("cpu")


def report(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main(["--json", *arguments])
    return code, json.loads(capfd.readouterr().out)


def test_machine_that_can_train_is_ready(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--precision", "32"]) == 0
    page = capfd.readouterr().out
    assert page.rstrip().endswith("\nready")
    for text in (f"torch {torch.__version__}", "megatron-core", "fused ", "AdamW", "a training step on cpu in float32"):
        assert text in page


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_self_test_trains_a_step(precision: str) -> None:
    result = selftest.self_test(CPU, precision)
    assert result.precision == {"32": "float32", "bf16": "bfloat16"}[precision]
    assert 3 < result.loss < 4  # ln 33 = 3.5, the loss of a uniform prediction
    assert result.packing_difference < selftest.TOLERANCE[torch.float32 if precision == "32" else torch.bfloat16]


def replace_attention(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Use `function` as the attention of a CPU in float32 and in bfloat16 with dropout."""
    backend = replace(attention.ATTENTION.get("sdpa-by-sequence"), attend=function)
    monkeypatch.setitem(attention.ATTENTION._parts, "sdpa-by-sequence", backend)


def test_every_path_that_recipes_take_is_tested(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, found = report(capfd, "--precision", "bf16")
    assert code == 0
    paths = [found["self_test"], *found["other_paths"]]
    assert [path["precision"] for path in paths] == ["bfloat16", "bfloat16", "float32", "float32"]
    kernel = attention.ATTENTION.get("sdpa-by-sequence").attend

    def broken_with_dropout(query: Any, key: Any, value: Any, layout: Any, dropout: float) -> Any:
        if dropout:
            raise RuntimeError("CUDA error: dropout is not supported")
        return kernel(query, key, value, layout, dropout)

    replace_attention(monkeypatch, broken_with_dropout)
    code, found = report(capfd, "--precision", "32")
    assert code == 1
    assert "dropout is not supported" in found["problems"][0]


def test_attention_across_sequences_is_detected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def one_for_all(query: Any, key: Any, value: Any, layout: Any, dropout: float) -> Any:
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)

    replace_attention(monkeypatch, one_for_all)
    code, found = report(capfd, "--precision", "32")
    assert code == 1
    assert not found["ready"]
    assert "a packed row gives other logits than its sequences one by one" in found["problems"][0]


def test_optimizer_that_changes_nothing_is_detected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    code, found = report(capfd, "--precision", "32")
    assert code == 1
    assert "changed no weight" in found["problems"][0]


def test_kernel_error_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available")

    replace_attention(monkeypatch, broken)
    assert doctor.main([]) == 1
    output = capfd.readouterr()
    assert "not ready: a training step on cpu fails: RuntimeError: CUDA error: no kernel image" in output.out
    assert "Traceback" not in output.out + output.err


def test_driver_that_torch_cannot_use_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    monkeypatch.setattr(doctor, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, found = report(capfd, "--quick")
    assert code == 1
    assert "an NVIDIA driver is here, but torch sees no GPU" in found["problems"][0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPUs on purpose
    assert report(capfd, "--quick")[0] == 0


@pytest.mark.parametrize(("name", "value"), [("SLURM_GPUS_ON_NODE", "8"), ("CUDA_VISIBLE_DEVICES", "0,1")])
def test_promised_but_missing_gpus_are_a_problem(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(name, value)
    assert doctor.main(["--quick"]) == 1
    assert f"{name}={value} promises GPUs, but torch sees none" in capfd.readouterr().out
    monkeypatch.setenv(name, "" if name == "CUDA_VISIBLE_DEVICES" else "0")
    assert doctor.main(["--quick"]) == 0


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "nemo-of-the-future"))
    code, found = report(capfd)
    assert code == 1
    assert found["problems"][0].startswith("not installed: nemo-of-the-future; install")


def test_quick_imports_neither_nemo_nor_megatron() -> None:
    code = (
        "import sys; from bionemo_esm.pretraining.doctor import main; code = main(['--quick'])\n"
        "print(code, [name for name in ('nemo', 'megatron', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("ready\n0 []\n")


def test_secrets_in_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_API_TOKEN", "hidden")
    shown = doctor._environment()
    assert shown["NCCL_DEBUG"] == "INFO"
    assert "hidden" not in shown.values()


def test_import_problem_gives_the_reason_a_backend_is_unavailable() -> None:
    assert backends.import_problem("json") is None
    assert backends.import_problem("no_such_engine.pytorch") == "No module named 'no_such_engine'"


def examine(folder: Path, rank: int, port: int, ill: int | None) -> None:
    """Run the doctor as one of two ranks under torchrun, with output to a file."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "doctor", "WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in (places | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    os.dup2(os.open(folder / f"{rank}.json", os.O_WRONLY | os.O_CREAT), 1)
    if rank == ill:
        torch.optim.AdamW.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    sys.exit(doctor.main(["--json"]))


@pytest.mark.parametrize("ill", [None, 1])
def test_all_ranks_under_a_launcher_give_one_verdict(tmp_path: Path, ill: int | None) -> None:
    server = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [server.Process(target=examine, args=(tmp_path, rank, port, ill)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        process.kill()
    assert [process.exitcode for process in ranks] == ([0, 0] if ill is None else [1, 1])
    found = json.loads((tmp_path / "0.json").read_text())
    assert (tmp_path / "1.json").read_text() == ""  # only rank 0 prints
    if ill is None:
        assert found["all_reduce"]["ranks"] == 2
        assert found["all_reduce"]["bus_gb_per_second"] > 0
    else:
        assert any("rank 1" in problem and "changed no weight" in problem for problem in found["problems"])
