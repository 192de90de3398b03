"""Tests of the rows on archives, averages, starts and resumes: sides that do other work do not count."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")  # Hugging Face's Trainer needs it

from benchmarks.comparison import Result, Row, Setting, Spent, measure
from benchmarks.rows import archives, averaging, resuming, starting, whole_runs
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.errors import ConfigError
from bionemo_esm.model import tensor_io as tensors
from bionemo_esm.model.archive import ArchiveError, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.model.tar_format import SectionReader, hash_section
from bionemo_esm.pretraining.averaging import AveragingError, average_checkpoints
from models import tiny_model


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path, quick=True)


def measured(row: Row) -> Result:
    return measure(replace(row, turns=1))


def by_key(setting: Setting, module: object, key: str) -> Row:
    return next(row for row in module.rows(setting) if row.key == key)  # type: ignore[attr-defined]


# --- rows run and their sides agree -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "keys"),
    [(archives, ["archive-save", "archive-restore", "checkpoint-wait"]), (averaging, ["averaging"])],
    ids=["archives", "averaging"],
)
def test_each_row_runs_and_every_side_counts(setting: Setting, module: object, keys: list[str]) -> None:
    results = [measured(row) for row in module.rows(setting)]  # type: ignore[attr-defined]
    assert [result.row.key for result in results] == keys
    for result in results:
        assert len(result.sides) >= 3
        assert all(side.counts for side in result.sides), result
        assert all(side.error is not None for side in result.sides[1:])


def test_resume_and_data_wait_rows_run_and_every_side_counts(setting: Setting) -> None:
    waiting = starting._waiting(setting, starting.sample_store(setting.folder / "sample"))
    for row in (resuming.resuming(setting), *waiting):
        assert all(side.counts for side in measured(row).sides)


@pytest.mark.slow
def test_start_is_timed_until_the_first_step_on_the_same_proteins(setting: Setting) -> None:
    row = next(starting.rows(setting))
    assert row.key == "start-laptop"
    assert [side.error for side in row.sides] == [None, 0]
    assert {"step", "kind", "loss"} <= starting.wait_for_first_step(
        *starting._ours(setting, ProteinStore.open(setting.folder / "sample"), starting.TINY)
    ).keys()


# --- sides that do other work -----------------------------------------------------------------------------------------


def test_peer_that_saves_other_numbers_does_not_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    true_save = archives.save_file

    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        name = next(iter(tensors))
        true_save(tensors | {name: tensors[name] + 1e-3}, path)

    monkeypatch.setattr(archives, "save_file", save_wrongly)
    result = measured(by_key(setting, archives, "archive-save"))
    assert {side.name: side.counts for side in result.sides} == {
        "ours (.nemo)": True, "torch.save": True, "safetensors": False, "NeMo's save_to": True,
    }  # fmt: skip


def test_loop_that_omits_a_checkpoint_does_not_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    true_loop = averaging.loop
    monkeypatch.setattr(averaging, "loop", lambda paths: true_loop(paths[:-1]))
    assert [side.counts for side in measured(next(averaging.rows(setting))).sides] == [True, False, True]


def test_peer_that_resumes_at_another_batch_does_not_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    true_skip = resuming.skip_first_batches
    monkeypatch.setattr(resuming, "skip_first_batches", lambda loader, count: true_skip(loader, count - 1))
    assert [side.counts for side in measured(resuming.resuming(setting)).sides] == [True, False, True]


def test_differing_and_missing_numbers_are_counted_bitwise() -> None:
    ours = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.ones(4)}
    assert archives.differing(ours, ours) == 0
    assert archives.differing({**ours, "a": torch.tensor([-0.0, 1.0, 2.5])}, ours) == 2
    assert archives.differing({"a": ours["a"]}, ours) == 4
    assert archives.differing({**ours, "b": torch.ones(4, dtype=torch.bfloat16)}, ours) == 4
    assert archives.differing({**ours, "c": torch.ones(5)}, ours) == 5


def test_training_that_ends_before_its_first_step_fails_with_its_last_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such proteins')"]
    with pytest.raises(RuntimeError, match="no such proteins"):
        starting.wait_for_first_step(command, tmp_path / "never", tmp_path / "log")


def test_full_disk_is_reported_before_anything_is_written(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="TMPDIR"):
        archives.check_space(setting.folder, 1e18)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_first_batch_after_a_resume_equals_that_of_an_unbroken_run(tmp_path: Path) -> None:
    store = resuming.short_store(tmp_path, 1_500)
    unbroken = resuming._loader(store, 0)
    for step in range(200):  # crosses the end of an epoch
        expected = next(unbroken)
        if step in (0, 100, 199):
            resumed = resuming.first_of_ours(store, step * resuming.BATCH)
            assert starting.differing_tokens(resumed, expected) == 0
    assert starting.differing_tokens(resuming.first_of_ours(store, 0), expected) > 0


# --- single read of weights -------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """Return the bytes that this process has read so far, as counted by the kernel."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture
def snapshots(tmp_path: Path) -> list[Path]:
    """Return four archives of about 1 MB, snapshots of one model at steps 2, 4, 6 and 8."""
    archive = describe(tiny_model())
    paths = []
    for step in (2, 4, 6, 8):
        weights = {name: tensor.detach() + 0.01 * step for name, tensor in archive.weights.items()}
        weights["large"] = torch.full((600, 500), float(step))  # larger than one chunk of the sum
        path = tmp_path / f"step-{step:09d}.nemo"
        paths.append(write_archive(path, replace(archive, weights=weights, provenance={"steps": step})))
    return paths


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what is read")
@pytest.mark.parametrize("job", ["load", "average"])
def test_weights_are_read_once_including_verification(job: str, snapshots: list[Path], tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in snapshots)
    jobs: dict[str, Callable[[], object]] = {
        "load": lambda: [ArchiveFile.open(path).load_weights() for path in snapshots],
        "average": lambda: average_checkpoints(snapshots, 4, tmp_path / "mean.nemo"),
    }
    jobs[job]()  # loads lazy imports
    before = bytes_read()
    jobs[job]()
    assert size <= bytes_read() - before < 1.3 * size


@pytest.mark.parametrize("place", [0.2, 0.5, 0.99])
def test_flipped_mantissa_bit_is_detected_before_averaging(place: float, snapshots: list[Path], tmp_path: Path) -> None:
    section = ArchiveFile.open(snapshots[2]).weights.data
    content = bytearray(snapshots[2].read_bytes())
    content[section.start + int(section.size * place) // 4 * 4] ^= 1  # the last bit of a mantissa
    snapshots[2].write_bytes(content)
    for job in (
        lambda: average_checkpoints(snapshots, 4, tmp_path / "mean.nemo"),
        lambda: ArchiveFile.open(snapshots[2]).load_weights(),
    ):
        with pytest.raises(ArchiveError, match=f"{snapshots[2].name}.*BLAKE3"):
            job()
    assert not (tmp_path / "mean.nemo").exists()


def test_damage_that_reads_as_nan_is_reported_as_damage(snapshots: list[Path], tmp_path: Path) -> None:
    start = ArchiveFile.open(snapshots[1]).weights.data.start
    content = bytearray(snapshots[1].read_bytes())
    content[start : start + 4] = b"\xff\xff\xff\xff"
    snapshots[1].write_bytes(content)
    with pytest.raises(ArchiveError, match=f"{snapshots[1].name}.*BLAKE3"):
        average_checkpoints(snapshots, 4, tmp_path / "mean.nemo")


def test_tensors_in_another_order_are_refused(
    snapshots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = replace(read_archive(snapshots[0]), provenance={"steps": 10})
    monkeypatch.setattr(tensors, "sorted", lambda names: sorted(names, reverse=True), raising=False)
    other = write_archive(tmp_path / "other.nemo", archive)
    monkeypatch.undo()
    ArchiveFile.open(other).load_weights()
    with pytest.raises(AveragingError, match="another order"):
        average_checkpoints([snapshots[1], other], 2, tmp_path / "mean.nemo")


def test_hash_of_a_section_read_in_parts_equals_the_hash_of_the_whole(snapshots: list[Path]) -> None:
    section = ArchiveFile.open(snapshots[0]).weights.data
    reader = SectionReader(snapshots[0], section, "sha256")
    for size in (1, 100, section.size - 101):
        reader.read_into(memoryview(bytearray(size)))
    assert reader.hexdigest() == hash_section(snapshots[0], section)["sha256"]


@pytest.mark.slow
def test_whole_runs_end_with_perplexities_on_the_same_proteins(setting: Setting) -> None:
    (row,) = whole_runs.rows(setting)
    assert row.key == "run-laptop"
    ours, theirs = row.sides
    assert theirs.error is not None
    assert theirs.error < 1, "three steps of a tiny model: both perplexities are near 30"
    seconds = [side.work() for side in (ours, theirs)]  # the first runs, which are not run again
    assert all(isinstance(one, Spent) and one.seconds > 1 for one in seconds)


def test_run_that_fails_shows_its_last_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such proteins"):
        whole_runs.run_to_end([sys.executable, "-c", "exit('no such proteins')"], tmp_path / "log")
