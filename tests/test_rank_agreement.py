"""Ranks that disagree: all stop before the first step with one message and without a hang."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.pretraining import preflight
from bionemo_esm.pretraining.preflight import RankAgreement, RankAgreementError, launched_ranks, versions
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.run_context import RunContext
from faults import Fault, Outcome, run

RUN = "bionemo_esm.pretraining.run."


def refuse(message: str) -> None:
    raise ConfigError(message)


def another_number_of_checkpoints(recipe: Recipe) -> Recipe:
    """Change a setting whose difference would otherwise go unnoticed."""
    saving = recipe.exp_manager.checkpoints.replace(keep_last=9)
    return recipe.replace(exp_manager=recipe.exp_manager.replace(checkpoints=saving))


def another_torch(found: dict[str, str]) -> dict[str, str]:
    return {**found, "torch": "1.0"}


def another_seed(prepared: RunContext) -> RunContext:
    return replace(prepared, recipe=prepared.recipe.replace(seed=7))


def wait_three_seconds_only() -> None:
    preflight._RENDEZVOUS_TIMEOUT = timedelta(seconds=3)


def assert_one_message(outcome: Outcome, folder: Path, *parts: str) -> None:
    """Assert exit code 2 on every rank, one message from rank 0 with these parts, and no training."""
    assert set(outcome.codes) == {2}, outcome.ranks
    for part in parts:
        assert part in outcome.errors, outcome.errors
    assert outcome.errors.count("error:") == 1
    assert not any("error:" in errors for errors in outcome.ranks[1:])
    assert not list(folder.glob("checkpoints/*"))
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (
            Fault(RUN + "check_requirements", functools.partial(refuse, "data.store: /data/x is not a store"), rank=2),
            ("1 of 3 ranks cannot start", "rank 2 (", "data.store: /data/x is not a store"),
        ),
        (
            Fault(RUN + "load_recipe", spoil=another_number_of_checkpoints, rank=1),
            ("ranks differ, and must not", "rank 1 (", "exp_manager.checkpoints.keep_last = 9; rank 0 has 2"),
        ),
        (Fault(RUN + "versions", spoil=another_torch, rank=1), ("rank 1 (", "torch = 1.0; rank 0 has 2.")),
        (Fault(RUN + "RunContext.of", spoil=another_seed, rank=2), ("rank 2 (", "seed = 7; rank 0 has 42")),
        (
            Fault(RUN + "build_run_store", functools.partial(refuse, "sample.fasta is damaged")),
            ("error: sample.fasta is damaged",),
        ),
        (
            Fault(
                "bionemo_esm.pretraining.trainer.choose_starting_checkpoint",
                functools.partial(refuse, "no checkpoint can be read"),
            ),
            ("error: no checkpoint can be read",),
        ),
    ],
    ids=["missing on one node", "configuration", "version", "data", "build on rank 0", "checkpoint on rank 0"],
)
def test_problem_or_difference_on_one_rank_stops_all_with_one_message(
    tmp_path: Path, fault: Fault, parts: tuple[str, ...]
) -> None:
    outcome = run(tmp_path / "run", "data.micro_batch_size=1", "data.global_batch_size=6", ranks=3, faults=[fault])
    assert_one_message(outcome, tmp_path / "run", *parts)


def test_a_batch_that_leaves_a_rank_idle_is_refused_with_one_message(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", "data.micro_batch_size=1", "data.global_batch_size=2", ranks=3)
    assert_one_message(outcome, tmp_path / "run", "a global batch of 2 sequences leaves some of 3 ranks idle")


def test_world_size_other_than_the_recipe_is_rejected(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", "trainer.num_nodes=2", "data.micro_batch_size=4", ranks=2)
    assert_one_message(outcome, tmp_path / "run", "trainer.devices are 2 x 2, but 2 processes were launched")


def test_rank_that_dies_during_preflight_stops_the_others(tmp_path: Path) -> None:
    dying = Fault(RUN + "check_requirements", functools.partial(os._exit, 9), rank=1)
    outcome = run(tmp_path / "run", "data.micro_batch_size=4", ranks=2, faults=[dying])
    assert outcome.codes == [2, 9]
    assert "a rank ended before the first step" in outcome.errors


def test_missing_rank_is_not_awaited_forever(tmp_path: Path) -> None:
    absent = Fault(RUN + "launched_ranks", functools.partial(os._exit, 9), rank=1)
    impatient = Fault(RUN + "launched_ranks", wait_three_seconds_only)
    outcome = run(tmp_path / "run", "data.micro_batch_size=4", ranks=2, faults=[absent, impatient])
    assert outcome.codes == [2, 9]
    assert "error: rank 0 of 2 timed out waiting for the other ranks at 127.0.0.1:" in outcome.errors


def test_single_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with launched_ranks() as alone:
        assert alone == RankAgreement(0, 1)
        assert alone.launched is None
        assert alone.on_every_rank(lambda: 3, lambda _: versions()) == 3
        assert alone.on_rank_zero(lambda: "x") == "x"
        with pytest.raises(ConfigError, match="mine"):
            alone.on_every_rank(functools.partial(refuse, "mine"))


def test_slurm_job_without_srun_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_NAME", "esm")
    with pytest.raises(ConfigError, match="8 tasks, but the process was not started by srun"), launched_ranks():
        pass


def test_long_list_of_differences_is_shortened() -> None:
    notes = [{"host": "a", "error": None, "values": {str(key): rank for key in range(9)}} for rank in range(2)]
    with pytest.raises(RankAgreementError, match="and 5 more"):
        preflight._compare(notes)
