"""Tests of `bionemo-esm doctor --gpu`, whose checks find faults and name a fallback, and of leaving kernels out.

The checks run on the CPU, whose kernels stand in the same tables as a GPU's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from bionemo_esm.model import attention
from bionemo_esm.model.backends import ADAMS, NORMS, WITHOUT, Kernel, choose_backends
from bionemo_esm.pretraining import doctor, gpu_check
from errors import refused

CPU = torch.device("cpu")


class WrongNorm(torch.nn.LayerNorm):
    """A layer norm with a wrong scale, as of a kernel that fails on one device."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().forward(rows)


def test_every_check_passes_with_right_kernels() -> None:
    outcomes = gpu_check.run_checks(CPU)
    assert [outcome.text for outcome in outcomes if not outcome.passed] == []
    names = " ".join(outcome.name for outcome in outcomes)
    for kernel in ("attention sdpa-by-sequence, bfloat16", "layer norm PyTorch fused, float32", "Adam PyTorch AdamW"):
        assert kernel in names
    for precision in ("bf16", "32"):
        assert f"gradients against a CPU's, {precision}" in names
        assert f"training step, {precision}, dropout 0.1" in names
    page = gpu_check.markdown(outcomes, "a CPU", {"torch": torch.__version__})
    assert f"All {len(outcomes)} checks passed." in page
    assert "To go on" not in page


def test_a_wrong_kernel_fails_and_the_report_names_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS._parts, "wrong", Kernel(lambda: WrongNorm, ("cpu",), priority=-1))

    def shifted(*arguments: Any) -> torch.Tensor:
        return attention.attention_by_sequence(*arguments).roll(1, 0)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error:\n no | kernel")

    for name, function in (("shifted", shifted), ("broken", broken)):
        part = replace(attention.ATTENTION.get("sdpa-by-sequence"), attend=function, priority=-1)
        monkeypatch.setitem(attention.ATTENTION._parts, name, part)
    monkeypatch.setitem(ADAMS._parts, "idle", Kernel(lambda: torch.optim.SGD, ("cpu",), priority=-1))
    failed = {outcome.name: outcome for outcome in gpu_check.run_checks(CPU) if not outcome.passed}
    assert set(failed) == {
        *(f"{kind}, {dtype}" for kind in ("layer norm wrong", "attention shifted", "attention broken")
          for dtype in ("bfloat16", "float32")),
        "Adam idle",
    }  # fmt: skip
    page = gpu_check.markdown(list(failed.values()), "a CPU", {})
    assert "7 of 7 checks failed." in page
    assert "no \\| kernel" in page
    assert f"- layer norm wrong, float32: leave it out: export {WITHOUT}='wrong'" in page


def test_gradients_unlike_the_cpus_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gpu_check._encoder

    def other(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        encoder = expected(config, dtype, device)
        if dtype == torch.bfloat16:
            with torch.no_grad():
                encoder.encoder.layers[0].mlp.linear_fc1.weight.mul_(1.5)
        return encoder

    monkeypatch.setattr(gpu_check, "_encoder", other)
    with refused("user-error", "gradient off by"):
        gpu_check._gradients("bf16", CPU)


def test_no_gpu_is_said_in_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.main(["--gpu"]) == 1
    assert capfd.readouterr().out.splitlines() == [
        "not ready: --gpu needs a GPU, and torch sees none; `bionemo-esm doctor` checks a CPU"
    ]


# --- leaving kernels out ----------------------------------------------------------------------------------------------


def test_kernels_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setitem(NORMS._parts, "other", Kernel(lambda: WrongNorm, priority=9))

    def chosen(device: str) -> str:
        return choose_backends(device, torch.bfloat16, 0.0).describe()

    assert "layer norm: other" in chosen("cuda")
    assert "attention: varlen-flash" in chosen("cuda")
    monkeypatch.setenv(WITHOUT, "other, varlen-flash,oneDNN")
    assert "layer norm: PyTorch fused" in chosen("cuda")
    assert "attention: nested" in chosen("cuda")
    assert "linear: Megatron" in chosen("cpu")


def test_of_kernels_with_one_priority_all_ranks_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"norm {number}" for number in range(8)]
    for name in reversed(names):
        monkeypatch.setitem(NORMS._parts, name, Kernel(lambda: WrongNorm, ("cpu",), priority=9))
    assert choose_backends("cpu", torch.float32, 0.0).layer_norm_name == names[0]


@pytest.mark.parametrize("name", ["flash", "sdpa-by-sequence", "PyTorch fused", "PyTorch AdamW(fused)"])
def test_a_kernel_that_cannot_be_left_out_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(WITHOUT, f"nested,{name}")
    with refused("backends.unknown-name", WITHOUT, name, "varlen-flash"):
        choose_backends("cpu", torch.float32, 0.0)


def test_speed_and_memory_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with a small model; what a GPU would report is replaced."""
    monkeypatch.setattr(gpu_check, "ESM1NV", gpu_check.TINY.replace(seq_length=512))
    monkeypatch.setattr(gpu_check, "_PROTEINS", 3)
    for name, answer in (
        ("reset_peak_memory_stats", None),
        ("get_device_name", "NVIDIA H200"),
        ("max_memory_allocated", 3.2e9),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    told = gpu_check._speed(torch.device("cpu"))
    assert re.fullmatch(r"[\d,]+ tokens in [\d.]+ ms: [\d,]+ tokens/s, MFU 0%; peak 3.2 GB, planned 0.0 GB", told), told
