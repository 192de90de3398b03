"""Continuing another run: the same weights, moments, stream and steps under a new configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.model.archive import ArchiveFile, read_archive
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.preflight import check_requirements
from bionemo_esm.pretraining.recipe import load_recipe
from faults import Outcome, history, run
from runs import SMALL, command_here, composed

PHASE_1 = ("optim.sched.max_steps=40", "trainer.max_steps=4")
PHASE_2 = ("optim.sched.max_steps=40", "trainer.max_steps=8", "data.global_batch_size=32")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps of 16 sequences with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("continuing") / "first"
    outcome = run(folder, *PHASE_1)
    assert outcome.codes == [0], outcome.errors
    return folder


def nemo(folder: Path) -> Path:
    return folder / "laptop.nemo"


def train_lines(folder: Path) -> list[dict[str, object]]:
    return [line for line in history(folder) if line["kind"] == "train"]


def test_continued_run_equals_one_long_run_bit_for_bit(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compare four steps plus four in another folder with eight steps in one run."""
    whole, second = tmp_path / "whole", tmp_path / "second"
    assert run(whole, "optim.sched.max_steps=40", "trainer.max_steps=8").codes == [0]
    outcome = run(second, "optim.sched.max_steps=40", "trainer.max_steps=8", f"continue_from_path={first}")
    assert outcome.codes == [0], outcome.errors
    assert "4, 0.0 epochs" in outcome.console
    assert f"after the 4 of {first}" in outcome.console
    expected, found = read_archive(nemo(whole)), read_archive(nemo(second))
    assert all(found.weights[name].equal(tensor) for name, tensor in expected.weights.items())
    assert train_lines(second) == train_lines(whole)[4:]
    command_here("inspect", str(nemo(second)))
    assert "step 4 of a run of laptop, after 64 samples" in capfd.readouterr().out
    assert found.provenance["continued_from"] == {"recipe": "laptop", "steps": 4, "consumed_samples": 64}


def test_another_batch_size_continues_the_stream_with_the_new_schedule(first: Path, tmp_path: Path) -> None:
    overrides = (*PHASE_2, f"continue_from_path={first}", "optim.lr=4e-3", "optim.weight_decay=0.5")
    assert run(tmp_path / "second", *overrides).codes == [0]
    lines = train_lines(tmp_path / "second")
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert [line["consumed_samples"] for line in lines] == [96, 128, 160, 192]
    config = load_recipe(composed(*SMALL, *overrides)).optim
    assert [line["learning_rate"] for line in lines] == pytest.approx([learning_rate(config, n) for n in range(4, 8)])
    state = ArchiveFile.open(tmp_path / "second" / "checkpoints" / "step-000000008.ckpt").load_state()
    assert [group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]


def test_best_checkpoint_of_a_continued_run_is_its_own(first: Path, tmp_path: Path) -> None:
    """With a diverging learning rate no checkpoint beats the parent's best; this run's best is still kept."""
    overrides = (*PHASE_2, f"continue_from_path={first}", "optim.lr=1.0", "optim.sched.warmup_ratio=0")
    assert run(tmp_path / "second", *overrides).codes == [0]
    validations = [line["loss"] for line in history(tmp_path / "second") if line["kind"] == "validation"]
    assert min(validations) > min(line["loss"] for line in history(first) if line["kind"] == "validation")
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert Path(summary["best_checkpoint"]).parent == tmp_path / "second" / "checkpoints"


def test_stopped_continued_run_resumes_from_its_own_checkpoint(first: Path, tmp_path: Path) -> None:
    """It resumes even if the first run was deleted, and still records its origin."""
    origin, second, unbroken = tmp_path / "origin", tmp_path / "second", tmp_path / "unbroken"
    shutil.copytree(first, origin)
    overrides = (*PHASE_2, f"continue_from_path={origin}")
    assert run(unbroken, *overrides).codes == [0]
    shutil.copytree(unbroken, second, ignore=shutil.ignore_patterns("step-000000008*", "laptop*.nemo", "summary.json"))
    shutil.rmtree(origin)
    outcome = run(second, *overrides)
    assert outcome.codes == [0], outcome.errors
    assert "resuming from step 6" in outcome.console
    assert nemo(second).read_bytes() == nemo(unbroken).read_bytes()


def test_one_checkpoint_can_be_named_and_the_world_size_can_change(first: Path, tmp_path: Path) -> None:
    checkpoint = first / "checkpoints" / "step-000000003.ckpt"
    outcome = run(tmp_path / "second", *PHASE_2, f"continue_from_path={checkpoint}", ranks=2)
    assert outcome.codes == [0, 0], outcome.ranks
    assert train_lines(tmp_path / "second")[0]["consumed_samples"] == 48 + 32


def refusal(folder: Path, *overrides: str) -> str:
    outcome: Outcome = run(folder, *overrides)
    assert outcome.codes == [2], outcome.errors
    assert not list(folder.glob("checkpoints/*"))
    return outcome.errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("seed=7",), "was written with seed = 42, this run has 7; continue_from_path goes on in the same stream"),
        (("model.num_layers=2",), "was written by another model: model.num_layers differ"),
        (("trainer.max_steps=4",), "is at step 4 already, and trainer.max_steps (4) counts those steps, too"),
        (("continue_from_path=/nowhere",), "continue_from_path: there is no /nowhere; name a run's folder, or a .ckpt"),
        (("restore_from_path=x.nemo",), "restore_from_path (weights alone) and continue_from_path are both set"),
    ],
)
def test_incompatible_continuation_is_rejected(
    first: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    assert message in refusal(tmp_path / "run", *PHASE_2, f"continue_from_path={first}", *overrides)
    assert not (tmp_path / "run").exists(), "refused before anything is begun"


def test_folder_without_checkpoints_and_damaged_checkpoint_are_named(first: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint; name a run's folder" in refusal(
        tmp_path / "run", *PHASE_2, f"continue_from_path={tmp_path / 'empty'}"
    )
    damaged = tmp_path / "damaged.ckpt"
    content = bytearray((first / "checkpoints" / "step-000000004.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "damaged.ckpt" in refusal(tmp_path / "run", *PHASE_2, f"continue_from_path={damaged}")


def test_another_global_batch_in_the_same_folder_is_rejected(first: Path, tmp_path: Path) -> None:
    """Phase 2 changes the batch through continue_from_path and in another folder."""
    shutil.copytree(first, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    outcome = run(tmp_path / "run", *PHASE_1[:1], "trainer.max_steps=8", "data.global_batch_size=32", ranks=2)
    assert outcome.codes == [2, 2]
    assert "was written with data.global_batch_size = 16, this run has 32" in outcome.errors
    assert not outcome.ranks[1].count("error:")


def test_phase_2_requires_the_run_that_it_continues(tmp_path: Path) -> None:
    recipe = load_recipe(composed("recipe=esm1nv_phase2", f"exp_manager.exp_dir={tmp_path}"))
    with pytest.raises(ConfigError, match="esm1nv_phase2 continues a run of esm1nv_phase1; name its folder"):
        check_requirements(recipe, 144)
