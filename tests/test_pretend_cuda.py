"""The GPU paths on a pretend device: everything is on it, the host waits where listed, and nothing else is copied.

No kernel runs: see `pretend_cuda.py` for what this can and cannot show.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretend_cuda import COMPILER

RUNS = Path(__file__).with_name("pretend_cuda_runs.py")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="NOT RUN, as there is no C++ compiler (g++)")

Found = dict[str, dict[str, Any]]
WAITS_OF_A_STEP = {"esm1nv.py training_step"}
"""Places at which the host waits for the device in a training step: one vector of loss, gradient norm and counts."""
COPIES_OF_A_STEP = {"cpu to cuda: step_stats.py measure_step"}


def run(what: str, folder: Path) -> Found:
    command = [sys.executable, str(RUNS), what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("one", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    ("form", "attention"),
    [
        ("bf16", "nested"),
        ("bf16, no dropout", "varlen-flash"),
        ("float32", "nested"),
        ("ESM-1b", "nested"),
        ("ESM-2", "varlen-flash"),
    ],
)
def test_a_training_step_stays_on_the_device(one_rank: Found, form: str, attention: str) -> None:
    found = one_rank[f"step, {form}"]
    assert "error" not in found, found["error"]
    assert found["devices"] == ["cuda"]
    assert set(found["waits"]) == WAITS_OF_A_STEP
    assert set(found["copies"]) == COPIES_OF_A_STEP
    assert f"attention: {attention}; linear: Megatron" in found["backends"]


@pytest.mark.parametrize("what", ["validation", "inference"])
def test_validation_and_inference_never_wait(one_rank: Found, what: str) -> None:
    found = one_rank[what]
    assert "error" not in found, found["error"]
    assert found["devices"] == ["cuda"]
    assert found["waits"] == {}


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_fine_tuning_with_class_weights_stays_on_the_device(one_rank: Found, mode: str) -> None:
    found = one_rank[f"fine-tuning, {mode}"]
    assert "error" not in found, found["error"]
    assert found["devices"] == ["cuda"]
    assert found["trained"] > 0


@pytest.mark.parametrize("beginning", ["random", "archive"])
def test_initial_weights_do_not_depend_on_the_default_device(one_rank: Found, beginning: str) -> None:
    assert one_rank["beginnings"][beginning] == {"equal": True, "devices": ["cpu"]}


def test_kernels_follow_a_model_to_the_device(one_rank: Found) -> None:
    found = one_rank["kernels"]
    assert all("sdpa-by-sequence" in text for text in found["cpu"])
    assert all("attention: nested; linear: Megatron" in text for text in found["cuda"])


@pytest.mark.parametrize(
    ("parallelism", "collectives"),
    [("data", {"allreduce_", "broadcast_"}), ("tensor", {"allreduce_", "allgather_"})],
)
def test_a_step_of_two_ranks_stays_on_the_device(tmp_path: Path, parallelism: str, collectives: set[str]) -> None:
    found = run(parallelism, tmp_path)[parallelism]
    assert "error" not in found, found["error"]
    assert found["devices"] == ["cuda"]
    assert set(found["waits"]) == WAITS_OF_A_STEP
    assert set(found["copies"]) == COPIES_OF_A_STEP
    assert {name.split(".")[1] for name in found["collectives"]} == collectives
