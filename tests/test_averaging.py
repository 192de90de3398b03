"""Tests of checkpoint averaging: exact results, refused inputs, peak memory, whole and sharded weights.

Rounding: the package rounds each addition and the division to float64, and then the mean to float32. The NumPy
reference does the same in the order of the steps; results must match it bit for bit. A second reference adds exactly
(`math.fsum`). For weights of similar magnitude the results must be equal. For weights from 1e-30 to 1e30 the result may
differ by the error bound of 47 roundings in float64.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from bionemo_esm import config_directory
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import ValidationBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.model.archive import Archive, ArchiveFile, read_archive, write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.model.optimizer import MasterWeights
from bionemo_esm.pretraining.averaging import AveragingError, average_checkpoints
from bionemo_esm.pretraining.checkpoint_commands import average
from bionemo_esm.pretraining.checkpoints import AsyncWriter, CheckpointAveraging
from bionemo_esm.pretraining.resume import list_checkpoints
from faults import FORK_SERVER
from models import TINY, tiny_model
from runs import ROOT, run_here

RECIPE_LAST = 47
SHAPES: dict[str, tuple[int, ...]] = {"embedding.weight": (128, 32), "norm.weight": (32,)}
Values = dict[str, np.ndarray]


def ordinary(seed: int) -> Values:
    """Return typical trained weights: a matrix centred on 0 and a layer norm centred on 1."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(len(shape) == 1, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}


def wild(seed: int) -> Values:
    """Return extreme values: all exponents, denormals, both zeros. The first columns are uniform or order-sensitive."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        drawn = rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-30, 30, shape)
        drawn = np.where(rng.random(shape) < 0.1, rng.choice([-1e-42, 3e-45, 1e-39, 0.0, -0.0], shape), drawn)
        drawn[..., 0], drawn[..., 1] = -0.0, rng.choice([-1e-45, 1e-44], shape[:-1])
        drawn[..., 2] = 3.4e38  # their sum overflows float32
        drawn[..., 3] = {4: 1e30, 6: -1e30}.get(seed, seed)  # 1e30 absorbs the values that are added before and between
        values[name] = drawn.astype(np.float32)
    return values


def put(path: Path, step: int | None, values: Mapping[str, Any] | None = None, heads: int = 4, **said: Any) -> Path:
    """Write an archive of a step, with weights drawn from the step, as of a run that saves every 2 steps."""
    weights = {name: torch.as_tensor(value) for name, value in (values or ordinary(step or 0)).items()}
    config = {"encoder": TINY | {"num_attention_heads": heads}, "precision": "32", "seed": 1}
    said = {"checkpoint": {"every_n_train_steps": 2, "on_schedule": True}} | said
    said |= {} if step is None else {"steps": step}
    return write_archive(path, Archive("ESM1nvModel", config, weights, said))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        bits = found[name].numpy().view(np.int32)
        np.testing.assert_array_equal(bits, np.asarray(value).view(np.int32), err_msg=name)


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [ordinary, wild])
def test_average_of_the_last_47_checkpoints_equals_float64_bit_for_bit(
    tmp_path: Path, draw: Callable[[int], Values]
) -> None:
    sources = [draw(seed) for seed in range(RECIPE_LAST + 3)]
    places = np.random.default_rng(7).permutation(len(sources))  # file names do not follow the order of the steps
    paths = [put(tmp_path / f"step-{places[n]:09d}.nemo", 2 * n + 2, values) for n, values in enumerate(sources)]
    average_checkpoints(sorted(paths), RECIPE_LAST, tmp_path / "mean.nemo")
    mean = read_archive(tmp_path / "mean.nemo").weights
    for name in SHAPES:
        columns = [source[name].astype(np.float64) for source in sources[-RECIPE_LAST:]]
        total = columns[0]
        for column in columns[1:]:
            total = total + column
        assert_same_bits({name: mean[name]}, {name: (total / np.float64(RECIPE_LAST)).astype(np.float32)})

        flat = np.stack(columns, axis=-1).reshape(-1, RECIPE_LAST)
        found, exact = mean[name].numpy().ravel(), np.array([math.fsum(row) / RECIPE_LAST for row in flat])
        if draw is ordinary:
            np.testing.assert_array_equal(found, exact.astype(np.float32))
        else:
            allowed = np.spacing(np.abs(found)).astype(float) / 2 + RECIPE_LAST * 2.0**-53 * np.abs(flat).mean(axis=1)
            assert (np.abs(found - exact) <= allowed).all()


def test_average_does_not_depend_on_argument_order_and_names_its_sources(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{step}.nemo", step, wild(step)) for step in (2, 4, 6, 8)]
    for number, order in enumerate((paths, paths[::-1], [*paths[2:], *paths[:2]])):
        average_checkpoints(order, 3, tmp_path / f"mean-{number}.out")
    assert len({path.read_bytes() for path in tmp_path.glob("*.out")}) == 1
    assert read_archive(tmp_path / "mean-0.out").provenance["averaged_from"] == [
        {"file": f"{step}.nemo", "steps": step, "weights_sha256": ArchiveFile.open(path).weights_sha256}
        for step, path in zip((4, 6, 8), paths[1:], strict=True)
    ]


def test_bfloat16_weights_are_averaged_in_float32_and_restored(tmp_path: Path) -> None:
    archives = [describe(tiny_model("bf16", seed)) for seed in (1, 2, 3)]
    for step, archive in enumerate(archives, 1):
        write_archive(tmp_path / f"{step}.nemo", replace(archive, provenance={"steps": step}))
    average_checkpoints(sorted(tmp_path.glob("*.nemo")), 3, tmp_path / "mean.nemo")
    restored = describe(ESM1nvModel.restore_from(str(tmp_path / "mean.nemo"), map_location="cpu")).weights
    for name, tensor in restored.items():
        first, second, third = (archive.weights[name].double().numpy() for archive in archives)
        assert_same_bits({name: tensor}, {name: ((first + second + third) / 3).astype(np.float32)})


# --- run, callback and command ----------------------------------------------------------------------------------------

RUN = [f"exp_manager.checkpoints.{value}" for value in ("keep_last=9", "average_last=4")]
RUN += ["trainer.max_steps=9"]  # not a multiple of 2: the last step belongs to the schedule nevertheless


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints of steps 2, 4, 6, 8 and 9, and of step 3, kept for its validation loss."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_here(folder, *RUN)
    return folder


def command(checkpoints: Any, output: Path, last: int | None = None) -> None:
    """Run `examples/average_checkpoints.py` in this process."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("average_checkpoints")
    cfg.checkpoints, cfg.output, cfg.last = checkpoints, str(output), last
    average(cfg)


def test_command_writes_the_same_bytes_as_the_callback(finished: Path, tmp_path: Path) -> None:
    command(f"{finished}/averaging/*.nemo", tmp_path / "again.nemo", last=4)
    assert (tmp_path / "again.nemo").read_bytes() == (finished / "laptop-averaged.nemo").read_bytes()


def test_checkpoints_average_like_snapshots_and_off_schedule_ones_are_skipped(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(f"{finished}/checkpoints/*.ckpt", tmp_path / "4.nemo", last=4)
    averaged = read_archive(finished / "laptop-averaged.nemo").weights
    assert_same_bits(read_archive(tmp_path / "4.nemo").weights, averaged)
    command(f"{finished}/checkpoints/*.ckpt", tmp_path / "5.nemo", last=5)  # the last five include step 3
    assert capsys.readouterr().out.count("step-000000003.ckpt: left out; saved off the schedule") == 2
    sources = read_archive(tmp_path / "5.nemo").provenance["averaged_from"]
    assert [source["steps"] for source in sources] == [2, 4, 6, 8, 9]


def test_averaged_archive_names_its_sources_and_has_the_perplexity_of_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["averaged_checkpoints"], summary["averaged_from_step"]) == (4, 4)
    restored = ESM1nvModel.restore_from(summary["averaged_nemo"])
    for source, step in zip(restored.provenance["averaged_from"], (4, 6, 8, 9), strict=True):
        file = ArchiveFile.open(finished / "averaging" / f"step-{step:09d}.nemo")
        assert source == {"file": file.path.name, "steps": step, "weights_sha256": file.weights_sha256}
    proteins = ProteinStore.open(finished / "store").split("validation")
    reader = SampleReader(proteins, 128, MaskingPolicy().for_evaluation(), seed=42)
    result = restored.evaluate(ValidationBatches(reader, micro_batch_size=8))
    assert result.perplexity == pytest.approx(summary["averaged_validation_perplexity"], rel=1e-6)
    assert summary["averaged_validation_perplexity"] != pytest.approx(summary["validation_perplexity"], rel=1e-5)


def test_run_stopped_at_an_odd_step_ends_with_the_same_average(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate_gradients = ESM1nvModel.accumulate_gradients

    def interrupt_the_fifth(model: ESM1nvModel, *arguments: Any) -> Any:
        if model.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate_gradients(model, *arguments)

    monkeypatch.setattr(ESM1nvModel, "accumulate_gradients", interrupt_the_fifth)
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        run_here(folder, *RUN)
    assert (folder / "checkpoints" / "step-000000005.ckpt").is_file()
    assert [path.stem for path in list_checkpoints(folder / "averaging", ".nemo")] == [
        "step-000000002",
        "step-000000004",
    ]
    put(folder / "averaging" / "step-000000007.nemo", 7)  # as of a run that continued and lost its checkpoints
    assert run_here(folder, *RUN)["resumed_from_step"] == 5
    assert (folder / "laptop-averaged.nemo").read_bytes() == (finished / "laptop-averaged.nemo").read_bytes()


# --- retention of snapshots -------------------------------------------------------------------------------------------


def save(callback: CheckpointAveraging, model: ESM1nvModel, step: int, rank: int = 0) -> list[str]:
    """Save as the trainer does at a step. Return the names of the snapshots after the writer has finished."""
    model.steps = step
    callback.on_save_checkpoint(SimpleNamespace(is_global_zero=rank == 0, max_steps=15), model, {})
    callback.writer.drain()
    return [path.name for path in list_checkpoints(callback.folder, ".nemo")]


def test_only_the_last_k_snapshots_on_schedule_are_kept(tmp_path: Path) -> None:
    callback, model = CheckpointAveraging(tmp_path, 3, 4, AsyncWriter()), tiny_model()
    for step in range(1, 16):
        expected = [past for past in range(4, step + 1) if past % 4 == 0 or past == 15][-3:]
        assert save(callback, model, step) == [f"step-{past:09d}.nemo" for past in expected], step


def test_resume_removes_snapshots_of_later_steps(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        put(tmp_path / f"step-{step:09d}.nemo", step)
    callback = CheckpointAveraging(tmp_path, 9, 2, AsyncWriter())
    callback.on_train_start(SimpleNamespace(is_global_zero=False, global_step=5, max_steps=15), tiny_model())
    assert len(list(tmp_path.iterdir())) == 4, "rank 0 alone removes"
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=5, max_steps=15), tiny_model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.nemo", "step-000000004.nemo"]


def test_snapshot_does_not_change_while_training_continues(tmp_path: Path) -> None:
    model, jobs = tiny_model(), []
    before = {name: tensor.clone() for name, tensor in describe(model).weights.items()}
    save(CheckpointAveraging(tmp_path, 2, 1, SimpleNamespace(submit=jobs.append, drain=lambda: None)), model, 1)
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), 1.0)
    for job in jobs:
        job()
    assert_same_bits(read_archive(tmp_path / "step-000000001.nemo").weights, before)


def test_averaging_needs_at_least_two_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(AveragingError, match="at least 2"):
        CheckpointAveraging(tmp_path, 1, 2, AsyncWriter())
    put(tmp_path / "step-000000002.nemo", 2)
    assert not CheckpointAveraging(tmp_path, 2, 2, AsyncWriter()).finish(tmp_path / "mean.nemo")
    assert not (tmp_path / "mean.nemo").exists()


# --- refused inputs ---------------------------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, member: str) -> None:
    section, content = ArchiveFile.open(path).sections[member], bytearray(path.read_bytes())
    content[section.start + section.size // 2] ^= 1
    path.write_bytes(content)


def ending_in(number: float) -> Values:
    return ordinary(4) | {"norm.weight": np.array([1.0] * 31 + [number], np.float32)}


OFF = {"every_n_train_steps": 2, "on_schedule": False}
WIDER = ordinary(4) | {"norm.weight": np.ones(64, np.float32)}
ALL = "*.nemo"
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], int | None, list[str]]] = {
    "sizes": (lambda f: put(f / "4.nemo", 4, WIDER), [ALL], None, ["4.nemo: is another arch", "8.nemo", "norm.weight"]),
    "heads": (lambda f: put(f / "4.nemo", 4, heads=2), [ALL], None, ["4.nemo: is another arch", "heads is 2, there 4"]),
    "one file twice": (lambda f: None, ["4.nemo", ALL], None, ["4.nemo: is given twice"]),
    "same weights": (lambda f: put(f / "x.nemo", 6, ordinary(6)), [ALL], None, ["x.nemo: has the weights of"]),
    "one step": (lambda f: put(f / "x.nemo", 6, ordinary(1)), [ALL], None, [": is of the step of", "x.nemo"]),
    "an average": (lambda f: put(f / "4.nemo", 4, averaged_from=[]), [ALL], None, ["4.nemo: is an average itself"]),
    "another run": (lambda f: put(f / "4.nemo", 4, seed=43), [ALL], None, ["4.nemo: is of another run", "seed is 43"]),
    "none at all": (lambda f: put(f / "4.nemo", 4, checkpoint=OFF), ["4.nemo"], None, ["there are 0 (4.nemo: left"]),
    "gap": (lambda f: (f / "6.nemo").unlink(), [ALL], None, ["step 6 is missing", "4.nemo", "8.nemo"]),
    "too few": (lambda f: None, [ALL], 5, ["the last 5 were asked for, but there are 4"]),
    "few on schedule": (lambda f: put(f / "4.nemo", 4, checkpoint=OFF), [ALL], 4, ["there are 3", "4.nemo: left out"]),
    "no match": (lambda f: None, [ALL, "none-*.ckpt"], None, ["none-*.ckpt: no such file"]),
    "cut in half": (lambda f: cut(f / "4.nemo", 9_000), [ALL], None, ["4.nemo: cut short"]),
    "cut at the end": (lambda f: cut(f / "4.nemo", -1024), [ALL], None, ["4.nemo: cut short"]),
    "weights": (lambda f: flip(f / "4.nemo", "model_weights.safetensors"), [ALL], None, ["4.nemo", "BLAKE3"]),
    "manifest": (lambda f: flip(f / "4.nemo", "manifest.json"), [ALL], None, ["4.nemo: manifest.json"]),
    "config": (lambda f: flip(f / "4.nemo", "model_config.yaml"), [ALL], None, ["4.nemo: model_config.yaml"]),
    "NaN": (lambda f: put(f / "4.nemo", 4, ending_in(math.nan)), [ALL], None, ["4.nemo: tensor 'norm.weight'", "NaN"]),
    "inf": (lambda f: put(f / "4.nemo", 4, ending_in(-math.inf)), [ALL], None, ["4.nemo: tensor 'norm.", "infinity"]),
    "no step": (lambda f: put(f / "4.nemo", None), [ALL], None, ["4.nemo: does not say after how many steps"]),
    "none": (lambda f: None, [ALL], 0, ["last must be at least 1"]),
}


OUTPUTS = {"8.nemo": "8.nemo exists already", "mean.ckpt": "mean.ckpt must end in .nemo"}


@pytest.mark.parametrize("case", [*REFUSED, *OUTPUTS])
def test_invalid_averaging_input_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6, 8):
        put(tmp_path / f"{step}.nemo", step)
    spoil, patterns, last, said = REFUSED.get(case, (lambda f: None, [ALL], None, [OUTPUTS.get(case, "")]))
    spoil(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    output = tmp_path / (case if case in OUTPUTS else "mean.nemo")
    with pytest.raises(SystemExit) as stopped:
        command([f"{tmp_path}/{name}" for name in patterns], output, last)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [words for words in said if words not in error] == [], error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "something was left or changed"


@pytest.mark.slow
def test_example_script_averages_and_refuses_from_a_shell(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        put(tmp_path / f"{step}.nemo", step)
    script = [sys.executable, str(ROOT / "examples" / "average_checkpoints.py"), "checkpoints=*.nemo"]
    settings: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*script, "last=3", "output=mean.nemo"], check=False, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Averaged 3 checkpoints, 4.nemo (step 4) to 8.nemo (step 8), into mean.nemo." in done.stdout
    (tmp_path / "mean.nemo").unlink()
    refused = subprocess.run(script, check=False, **settings)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: the last 47 were asked for, but there are 4")
    assert refused.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.nemo", "4.nemo", "6.nemo", "8.nemo"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from bionemo_esm.pretraining.averaging import average_checkpoints

def peak():  # bytes, of this program; getrusage would begin with the peak of the process that started it
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

folder = Path(sys.argv[1])
average_checkpoints(sorted(folder.glob("small-*")), 2, folder / "mean-small")  # all that is imported late
before = peak()
average_checkpoints(sorted(folder.glob("large-*")), 20, folder / "mean-large")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_averaging_twenty_models_needs_less_memory_than_three_models(tmp_path: Path) -> None:
    sizes = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 6  # the six layers of ESM-1nv at half width: 10.6M
    base = {f"layer.{number:02d}": torch.rand(size) for number, size in enumerate(sizes)}
    for step in range(2, 42, 2):
        put(tmp_path / f"small-{step:02d}", step)
        put(tmp_path / f"large-{step:02d}", step, {name: tensor + step for name, tensor in base.items()})
    script = [sys.executable, "-c", MEASURED, str(tmp_path)]
    measured = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    shutil.rmtree(tmp_path)  # 900 MB
    models = int(measured.stdout) / sum(4 * tensor.numel() for tensor in base.values())
    assert 0.9 < models < 3, "below: the measurement does not even see the average"


# --- sharded weights --------------------------------------------------------------------------------------------------


def shard(rank: int, folder: Path) -> None:
    """One of two tensor-parallel ranks: restore whole archives, take snapshots and record the weights seen."""
    from megatron.core import parallel_state
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    initial = describe(ESM1nvModel(tiny_model().cfg))
    write_archive(folder / f"initial-{rank}", initial)
    callback = CheckpointAveraging(folder / "sharded", 3, 2, AsyncWriter())
    for step in (2, 4, 6):
        model = ESM1nvModel.restore_from(str(folder / "whole" / f"step-{step:09d}.nemo"), map_location="cpu")
        parts = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert parts["encoder.embedding.word_embeddings.weight"] == (64, 32)
        assert parts["encoder.encoder.layers.1.self_attention.linear_proj.weight"] == (32, 16)
        write_archive(folder / f"described-{rank}-{step}", describe(model))
        save(callback, model, step, rank)
    low = ESM1nvModel(tiny_model("bf16").cfg)
    low.masters = MasterWeights(low.named_parameters())
    low.masters.load_state_dict({name: tensor / 3 for name, tensor in initial.weights.items()})  # no bfloat16 values
    write_archive(folder / f"masters-{rank}", describe(low))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_are_gathered_averaged_and_sharded_again(tmp_path: Path) -> None:
    wholes = {step: describe(tiny_model(seed=step)) for step in (2, 4, 6)}
    for step, archive in wholes.items():
        write_archive(tmp_path / "whole" / f"step-{step:09d}.nemo", replace(archive, provenance={"steps": step}))
    ranks = [FORK_SERVER.Process(target=shard, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]

    alone = describe(ESM1nvModel(tiny_model().cfg)).weights
    for rank in (0, 1):  # both ranks see the whole weights
        assert_same_bits(read_archive(tmp_path / f"initial-{rank}").weights, alone)
        thirds = {name: tensor / 3 for name, tensor in alone.items()}
        assert_same_bits(read_archive(tmp_path / f"masters-{rank}").weights, thirds)
        for step, archive in wholes.items():
            assert_same_bits(read_archive(tmp_path / f"described-{rank}-{step}").weights, archive.weights)
    for kind in ("whole", "sharded"):
        average_checkpoints(list_checkpoints(tmp_path / kind, ".nemo"), 3, tmp_path / f"{kind}.nemo")
    assert_same_bits(read_archive(tmp_path / "sharded.nemo").weights, read_archive(tmp_path / "whole.nemo").weights)
