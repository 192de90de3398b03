"""Probing a labelled set during pretraining: the recorded scores, and a run unchanged by the probe."""

from __future__ import annotations

import json
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bionemo_esm.finetuning.batches import Collator, EvaluationBatches
from bionemo_esm.pretraining import probe as probe_module
from bionemo_esm.pretraining.callbacks import last_probe
from bionemo_esm.pretraining.probe import Probe
from bionemo_esm.pretraining.recipe import load_recipe
from bionemo_esm.pretraining.report import write_report
from faults import Fault, history, run, send
from models import tiny_model
from probed import SLOW, asking, probed, recipe_of, write_labels
from runs import composed, run_here


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels"))


def probes(folder: Path) -> list[dict[str, Any]]:
    return [line for line in history(folder) if line["kind"] == "probe"]


def others(folder: Path) -> list[dict[str, Any]]:
    return [line for line in history(folder) if line["kind"] != "probe"]


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Return the saved state of a run: checkpoints, snapshots and archives."""
    files = [*folder.glob("checkpoints/*"), *folder.glob("averaging/*"), *folder.glob("*.nemo")]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a probe."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_here(folder)
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, labels: Path) -> Path:
    """The same run with a probe."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    run_here(folder, *asking(labels), "exp_manager.create_tensorboard_logger=true")
    return folder


# --- a probe does not change the run ----------------------------------------------------------------------------------


def test_probe_changes_no_byte_of_a_run(plain: Path, watched: Path) -> None:
    assert others(watched) == history(plain)
    assert checkpoints(watched) == checkpoints(plain)
    assert len(checkpoints(plain)) >= 4


@pytest.mark.slow
def test_probe_changes_no_byte_of_a_bf16_run_with_loader_workers(tmp_path: Path, labels: Path) -> None:
    settings = ("trainer.precision=bf16", "data.num_workers=1", "model.attention_dropout=0.1")
    run_here(tmp_path / "plain", *settings)
    run_here(tmp_path / "watched", *settings, *asking(labels))
    assert others(tmp_path / "watched") == history(tmp_path / "plain")
    assert checkpoints(tmp_path / "watched") == checkpoints(tmp_path / "plain")
    assert [line["step"] for line in probes(tmp_path / "watched")] == [0, 2, 4, 6]


def test_probe_does_not_change_the_run_folder(labels: Path) -> None:
    without, with_one = load_recipe(composed("recipe=laptop")), recipe_of(labels)
    assert with_one.probe is not None
    assert without.probe is None
    assert with_one.run_folder == without.run_folder
    assert with_one.settings_text != without.settings_text, "ranks that were told of another probe are found out"


# --- recorded scores --------------------------------------------------------------------------------------------------


def test_scores_are_recorded_before_training_every_n_steps_and_at_the_end(
    watched: Path, labels: Path, tmp_path: Path
) -> None:
    lines = probes(watched)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert {(line["task"], line["metric"]) for line in lines} == {("neighbour", "accuracy")}
    assert len({line["one_hot"] for line in lines}) == 1
    assert all(line["score"] == line["accuracy"] for line in lines)
    read_off = {(line["score"], line["f1"], line["mcc"]) for line in lines}
    assert len(read_off) > 1, "the model changes, and what is read off it"
    outcome = run(tmp_path / "run", *asking(labels, every=4))
    assert outcome.codes == [0], outcome.errors
    assert [line["step"] for line in probes(tmp_path / "run")] == [0, 4, 6]
    first, last = lines[0], lines[-1]
    assert f"step 0  probe neighbour: accuracy {first['score']:.3f} (one-hot" in outcome.console
    assert f"step 6  probe neighbour: accuracy {last['score']:.3f} (one-hot {last['one_hot']:.3f})\n" in outcome.console
    assert "probe    neighbour, every 4 steps: fitted on " in outcome.console
    assert last_probe(tmp_path / "run" / "metrics.jsonl") == {k: v for k, v in last.items() if k != "kind"}


def test_loggers_record_the_scores_by_step(watched: Path) -> None:
    events = EventAccumulator(str(next(watched.rglob("events.out*")).parent))
    events.Reload()
    logged = events.Scalars("probe_accuracy")
    assert [event.step for event in logged] == [0, 2, 4, 6]
    assert [event.value for event in logged] == pytest.approx([line["accuracy"] for line in probes(watched)])


def test_report_plots_the_probe_with_its_reference(watched: Path) -> None:
    page = (watched / "report.html").read_text()
    line = probes(watched)[-1]
    assert "neighbour accuracy, a linear head on the states" in page
    assert f"one-hot ({line['one_hot']:.3g})" in page
    assert f">{line['score']:.3g}<" in page


def test_report_shows_the_latest_probe(tmp_path: Path, plain: Path) -> None:
    lines = [
        {"kind": "probe", "step": 1, "task": "old", "metric": "mse", "score": 7777.0, "one_hot": 9.0},
        {"kind": "probe", "step": 2, "task": "new", "metric": "f1", "score": 0.25, "one_hot": None},
        {"kind": "probe", "step": 3, "task": "new", "metric": "f1", "score": None, "one_hot": None},
    ]
    (tmp_path / "summary.json").write_text((plain / "summary.json").read_text())
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "new f1, a linear head" in page
    assert "7777" not in page


# --- stop and resume --------------------------------------------------------------------------------------------------

STOP = Fault(
    "bionemo_esm.pretraining.checkpoints.Checkpoints.on_train_batch_end", partial(send, signal.SIGTERM), call=3
)


def batches(labels: Path) -> int:
    """Return the number of model calls of one probe in runs of this size."""
    some = probed(labels)
    sets = (EvaluationBatches(Collator(some.task, one, some.reading), 8 * 128) for one in (some.train, some.validation))
    return sum(map(len, sets))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_a_probe_and_the_resumed_run_starts_with_it(
    tmp_path: Path, labels: Path, watched: Path, plain: Path, number: signal.Signals, code: int
) -> None:
    """Steps before the signal are recorded, the probe of step 2 is not; the resumed run equals an uninterrupted one."""
    stop = Fault(SLOW, partial(send, number), call=batches(labels) + 2)
    outcome = run(tmp_path / "run", *asking(labels), faults=[stop])
    assert outcome.codes == [code], outcome.errors
    assert [line["step"] for line in probes(tmp_path / "run")] == [0]
    assert max(line["step"] for line in others(tmp_path / "run")) == 2
    assert run(tmp_path / "run", *asking(labels)).codes == [0]
    assert history(tmp_path / "run") == history(watched)
    assert checkpoints(tmp_path / "run") == checkpoints(plain)


def test_resumed_run_has_the_history_of_an_uninterrupted_run(
    tmp_path: Path, labels: Path, watched: Path, plain: Path
) -> None:
    assert run(tmp_path / "run", *asking(labels), faults=[STOP]).codes == [143]
    assert run(tmp_path / "run", *asking(labels)).codes == [0]
    assert history(tmp_path / "run") == history(watched)
    assert checkpoints(tmp_path / "run").keys() >= checkpoints(plain).keys()
    assert all(checkpoints(tmp_path / "run")[name] == content for name, content in checkpoints(plain).items())


def test_probe_can_be_added_to_a_resumed_run(tmp_path: Path, labels: Path, watched: Path) -> None:
    assert run(tmp_path / "run", faults=[STOP]).codes == [143]
    assert run(tmp_path / "run", *asking(labels)).codes == [0]
    found = probes(tmp_path / "run")
    assert [line["step"] for line in found] == [3, 4, 6], "at once, so that there is something to compare with"
    assert found[1:] == probes(watched)[2:]


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_ranks_wait_for_a_probe_longer_than_the_hang_timeout(tmp_path: Path, labels: Path, watched: Path) -> None:
    # After step 2, because the first step can be slow.
    slow = Fault(SLOW, partial(time.sleep, 6), call=batches(labels) + 3)
    settings = ("trainer.hang_timeout_seconds=3", "trainer.max_steps=3")
    outcome = run(tmp_path / "run", *asking(labels), *settings, ranks=2, faults=[slow])
    assert outcome.codes == [0, 0], outcome.ranks
    assert [line["step"] for line in probes(tmp_path / "run")] == [0, 2, 3]
    assert probes(tmp_path / "run")[0] == probes(watched)[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (third,) = (line for line in lines if line["kind"] == "train" and line["step"] == 3)
    assert third["step_seconds"] < 6, "its time is no step's"


@pytest.mark.slow
def test_tensor_parallel_ranks_run_the_probe_together_and_stop_together(
    tmp_path: Path, labels: Path, watched: Path
) -> None:
    settings = (*asking(labels), "trainer.tensor_model_parallel_size=2", "data.global_batch_size=8")
    stop = Fault(SLOW, partial(send, signal.SIGTERM), call=batches(labels) + 2, rank=1)
    assert run(tmp_path / "run", *settings, ranks=2, faults=[stop]).codes == [143, 143]
    outcome = run(tmp_path / "run", *settings, ranks=2)
    assert outcome.codes == [0, 0], outcome.ranks
    found = probes(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 2, 4, 6]
    assert found[0]["score"] == pytest.approx(probes(watched)[0]["score"], abs=0.01)


def test_the_host_waits_until_the_probe_of_another_rank_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective of NCCL returns before it is done; without a read the others would go on, and be ended as hung."""
    probe: Any = Probe.__new__(Probe)
    probe.watch, probe.history, waited = Mock(), Mock(), Mock()
    probe.watch.long_operation = nullcontext
    monkeypatch.setattr(Probe, "_measure_head", lambda *_: None)
    monkeypatch.setattr(probe_module, "world_sum", lambda tensor: waited)
    probe.measure(Mock(), tiny_model())
    waited.item.assert_called_once()
