"""Throughput measurements of a run: speed, MFU, data wait, slowest rank, memory; measuring changes no result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bionemo_esm.data.collate import pack
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.costs import training_flops
from bionemo_esm.model.step_stats import StepStats, Stopwatch, measure_step
from bionemo_esm.pretraining import callbacks as measurements
from bionemo_esm.pretraining import hang_watch as resiliency
from bionemo_esm.pretraining.callbacks import MEASURED, DataWaitTimer, Measurements, Progress, ThroughputMeter
from faults import Fault, history, run
from runs import run_here

CPU = torch.device("cpu")


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def take_a_while() -> None:
    time.sleep(0.3)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks: rank 1 computes slowly, rank 0 waits for its data."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    faults = [
        Fault("bionemo_esm.model.esm1nv.ESM1nvModel.forward", take_a_while, rank=1, repeated=True),
        Fault("bionemo_esm.data.dataloader.TrainingBatches.__getitem__", take_a_while, rank=0, repeated=True),
    ]
    settings = ("trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.log_every_n_steps=2")
    outcome = run(folder, *settings, "data.num_workers=0", ranks=2, faults=faults)
    assert outcome.codes == [0, 0], outcome.errors
    return folder


def test_slowest_rank_and_data_wait_are_found(watched: Path) -> None:
    for line in lines(watched):
        assert line["slowest_rank"] == 1
        assert line["slowest_rank_excess"] > 0.3  # with two ranks the median is half-way
        assert line["data_wait_seconds"] > 0.25
        assert 0 < line["data_wait_share"] < 1


def test_rates_follow_from_the_steps(watched: Path) -> None:
    for line in lines(watched):
        assert line["step_seconds"] >= 0.6  # waiting and computing
        assert line["tokens_per_second"] == pytest.approx(2 * line["tokens_per_second_per_device"], rel=1e-3)
        assert line["tokens"] - line["residues"] == 2 * 16  # <cls> and <eos> of every sequence
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"], rel=0.2)
        assert line["seconds_left"] == pytest.approx((4 - line["step"]) * line["step_seconds"], rel=0.5, abs=0.1)
        assert 0.1 < line["memory_gb"] < 20
        assert "mfu" not in line  # the peak of a CPU is unknown


def test_summary_repeats_the_last_measurements(watched: Path) -> None:
    summary, last = json.loads((watched / "summary.json").read_text()), lines(watched)[-1]
    for name in ("tokens_per_second", "residues_per_second", "data_wait_share", "memory_gb"):
        assert summary[name] == last[name]
    assert "2 x cpu (" in summary["device"]


def test_slow_ranks_and_data_do_not_change_the_history(watched: Path, tmp_path: Path) -> None:
    """Only fields that depend on the clock may differ."""
    settings = ("trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.log_every_n_steps=2")
    outcome = run(tmp_path / "run", *settings, "data.num_workers=0", ranks=2)
    assert outcome.codes == [0, 0]
    assert history(tmp_path / "run") == history(watched)


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    """Frequent and no measurements give archives with the same bytes."""
    settings = ("trainer.max_steps=3", "trainer.val_check_interval=3", "exp_manager.create_tensorboard_logger=true")
    often = run_here(tmp_path / "a" / "run", *settings)
    never = run_here(tmp_path / "b" / "run", *settings, "trainer.log_every_n_steps=100")
    assert Path(often["nemo"]).read_bytes() == Path(never["nemo"]).read_bytes()
    assert never["tokens_per_second"] > 0  # measured at the end, because no step was logged
    events = EventAccumulator(str(next((tmp_path / "a").rglob("events.out*")).parent))
    events.Reload()
    logged = set(events.Tags()["scalars"])
    assert {"train_loss", "tokens_per_second", "data_wait_share", "slowest_rank", "memory_gb"} <= logged
    assert [event.step for event in events.Scalars("tokens_per_second")] == [
        event.step for event in events.Scalars("train_loss")
    ]


# --- units ------------------------------------------------------------------------------------------------------------


def test_step_stats_exclude_padding() -> None:
    lengths = [np.array([10, 30]), np.array([5])]
    batches = [pack(np.full(some.sum(), 5, dtype=np.uint8), some) for some in lengths]
    torch_work = StepStats(*measure_step(batches, CPU).tolist())
    assert torch_work == StepStats(targets=0, residues=45, tokens=51, squared_lengths=12**2 + 32**2 + 7**2)
    assert torch_work + torch_work == StepStats(0, 90, 102, 2 * torch_work.squared_lengths)


def test_flops_use_squared_sequence_lengths() -> None:
    work, config = StepStats(targets=7, residues=45, tokens=51, squared_lengths=1217), EncoderConfig()
    assert work.flops(config) == training_flops(config, 51, 1217, 7)


def test_mfu_is_flops_per_second_and_rank_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "device_flops", lambda *_: 1e12)
    config, meter, watch = EncoderConfig(), ThroughputMeter(), Stopwatch()
    model: Any = SimpleNamespace(stopwatch=watch, device=CPU, encoder_config=config)
    model.parameters = lambda: iter([torch.zeros(1)])
    monkeypatch.setattr(measurements, "_of_all_ranks", lambda *_: [[1.0, 0.2, 3.0], [1.5, 0.1, 4.0], [1.0, 0.0, 2.0]])
    work = StepStats(targets=15, residues=98, tokens=100, squared_lengths=5000)
    meter.add(work, 0.5)
    meter.add(work, 1.5)
    assert meter.tokens_per_second == 100
    measured = meter.read(model)
    expected = 2 * training_flops(config, 100, 5000, 15) / 2.0 / 3
    assert measured.flops_per_second_per_device == expected
    assert measured.mfu == expected / 1e12
    assert measured.step_seconds == 1.0
    assert (measured.data_wait_seconds, measured.data_wait_share) == (0.1, 0.1)
    assert (measured.slowest_rank, measured.slowest_rank_excess) == (1, 0.5)
    assert measured.memory_gb == 4.0
    assert meter.steps == 0


def test_stopwatch_sums_blocks_and_resets_when_read() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.running(CPU):
            time.sleep(0.01)
    time.sleep(0.05)
    assert watch.read() >= 0.02
    assert watch.read() == 0


def test_only_waiting_for_training_batches_is_counted() -> None:
    wait = DataWaitTimer()
    with wait.profile("[_TrainingEpochLoop].train_dataloader_next"):
        time.sleep(0.01)
    assert wait.read() >= 0.01
    with wait.profile("run_training_batch"):
        time.sleep(0.01)
    assert wait.read() == 0


@pytest.mark.parametrize(
    ("share", "excess", "said"),
    [(0.02, 0.05, "lr 2.0e-04"), (0.12, 0.5, "12% data wait"), (0.02, 0.23, "rank 17 +23%")],
)
def test_progress_line_names_the_bottleneck_and_fits_110_columns(share: float, excess: float, said: str) -> None:
    values = dict.fromkeys(MEASURED, 0.5) | {"tokens_per_second": 12_345_678.0, "mfu": 0.41}
    values |= {"data_wait_share": share, "slowest_rank": 17, "slowest_rank_excess": excess}
    meter = ThroughputMeter()
    meter.latest = Measurements(**values)  # type: ignore[arg-type]
    shown: list[str] = []
    console: Any = SimpleNamespace(is_terminal=True, progress=shown.append)
    watching: Any = SimpleNamespace(meter=meter, seconds_left=lambda _: 3.52 * 86400)
    progress = Progress(console, watching, 18.0)
    report = SimpleNamespace(loss=2.345, learning_rate=2e-4)
    progress._show(SimpleNamespace(global_step=349_400, max_steps=349_500), report)  # type: ignore[arg-type]
    assert said in shown[0]
    assert "12.35M tokens/s  MFU 41%" in shown[0]
    assert len(shown[0]) <= 110


# --- NVIDIA's resiliency extension ------------------------------------------------------------------------------------


def test_nvidia_callbacks_are_created_only_if_they_can_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("StragglerDetectionCallback", "FaultToleranceCallback")
    package = SimpleNamespace(**{name: lambda name=name, **_: name for name in names})
    monkeypatch.delenv(resiliency._SOCKET, raising=False)
    monkeypatch.setattr(resiliency, "importable", lambda _: None)
    assert resiliency.resiliency_callbacks("cuda", tmp_path) == []
    monkeypatch.setattr(resiliency, "importable", lambda _: package)
    monkeypatch.setattr(resiliency, "import_problem", lambda _: "libcupti.so.12: cannot open shared object file")
    assert resiliency.resiliency_callbacks("cuda", tmp_path) == []
    monkeypatch.setattr(resiliency, "import_problem", lambda _: None)
    assert resiliency.resiliency_callbacks("cpu", tmp_path) == []
    assert resiliency.resiliency_callbacks("cuda", tmp_path) == [names[0]]
    monkeypatch.setenv(resiliency._SOCKET, "/tmp/monitor.socket")
    assert resiliency.resiliency_callbacks("cuda", tmp_path) == list(names)
    monkeypatch.setattr(package, names[0], lambda **settings: settings)
    assert resiliency.resiliency_callbacks("cuda", tmp_path)[0]["profiling_interval"] > 1, "not every step is profiled"
