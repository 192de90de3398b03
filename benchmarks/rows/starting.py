"""Rows: seconds from the command to the first step, seconds to resume after ten million samples, and the wait for data.

A start runs from the launch of a new process until its first optimizer step is on record; then the process is killed.
All starts train on the shipped sample. Ours is `examples/pretrain_esm1nv.py` with a store built beforehand. It does all
that a recipe does: it checks the machine, opens logs and takes its lock. Files are in the page cache after the first
turn, which is a warm-up. Not run on a GPU, where the start also loads kernels.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from benchmarks.comparison import Row, Setting, Side, Spent, Target
from benchmarks.rows.resuming import resuming
from benchmarks.steps import Ours
from bionemo_esm.alphabet import TOKENS
from bionemo_esm.data.collate import SampleReader
from bionemo_esm.data.dataloader import BatchPlan, RankBatch, TrainingBatches
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.preprocess import BuildPolicy, build_store_from_splits
from bionemo_esm.data.store import SPLITS, ProteinStore
from bionemo_esm.model.archive import write_archive
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.nemo_connector import describe
from bionemo_esm.pretraining.run_context import SAMPLE_FOLDER

ROOT = Path(__file__).resolve().parents[2]
LONGEST_START_SECONDS = 300.0
PROBING_SECONDS = 0.005  # polling interval for the first step
STEPS, QUICK_STEPS = 40, 4  # per turn of the rows on the wait for data


@dataclass(frozen=True)
class Size:
    """Sizes of a model, with the names of our configuration."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int


LAPTOP = Size(2, 128, 4, 512)
ESM1NV = Size(6, 768, 12, 3072)
TINY = Size(1, 32, 4, 64)
BATCH, MAX_TOKENS = 8, 512


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows: starts of the laptop recipe and of ESM-1nv, a resume, and the wait for data."""
    store = sample_store(setting.folder / "sample")
    if setting.quick:
        yield _starting(setting, store, "start-laptop", "a tiny model", TINY)
    else:
        yield _starting(setting, store, "start-laptop", "the laptop recipe", LAPTOP)
        yield _starting(setting, store, "start-esm1nv", "ESM-1nv", ESM1NV)
    yield resuming(setting)
    yield from _waiting(setting, store)


def sample_store(folder: Path) -> ProteinStore:
    """Build a store of the shipped sample."""
    train, validation, test = (SAMPLE_FOLDER / f"{part}.fasta.gz" for part in SPLITS)
    build_store_from_splits(train, validation, test, folder, BuildPolicy(), licence="CC BY 4.0")
    return ProteinStore.open(folder)


# --- from the command to the first step -------------------------------------------------------------------------------


def _starting(setting: Setting, store: ProteinStore, key: str, title: str, size: Size) -> Row:
    train = store.split("train")
    seen = wait_for_first_step(*_huggingface(setting, size))
    error = abs(seen["sequences"] - len(train)) + abs(seen["residues"] - train.residues)
    return Row(
        key=key,
        title=f"From the command to the first optimizer step, {title}",
        unit="start",
        precision="float32",
        sides=[
            Side("ours", lambda: wait_for_first_step(*_ours(setting, store, size)), 1, "its store built beforehand"),
            Side(
                "Hugging Face, Trainer", lambda: wait_for_first_step(*_huggingface(setting, size)), 1,
                f"{BATCH} sequences, tokenized when asked for; no logs, no checkpoints", error,
                ("transformers", "accelerate"),
            ),
        ],
        parity="sequences and residues to train on that the two count differently",
        tolerance=0,
        targets=[Target(most_seconds=15.0)],
        turns=3,
        seconds_matter=True,
        note="A process from its launch until its first step is on record, files in the page cache.",
    )  # fmt: skip


_numbers = count(1)  # of runs: each has a new folder


def _ours(setting: Setting, store: ProteinStore, size: Size) -> tuple[list[str], Path, Path]:
    """Return command line, record of the first step, and log of our side."""
    name = f"start-{next(_numbers)}"
    command = [
        sys.executable, str(ROOT / "examples" / "pretrain_esm1nv.py"), "recipe=laptop", "trainer.max_steps=1000",
        "trainer.log_every_n_steps=1", "trainer.precision=32", f"data.store={store.folder}",
        f"exp_manager.exp_dir={setting.folder}", f"exp_manager.name={name}",
        *(f"model.{key}={value}" for key, value in vars(size).items()),
    ]  # fmt: skip
    if setting.device == "cuda":
        command.append("trainer.accelerator=gpu")
    return command, setting.folder / name / "metrics.jsonl", setting.folder / f"{name}.log"


def _huggingface(setting: Setting, size: Size) -> tuple[list[str], Path, Path]:
    """Return the same for Hugging Face."""
    return huggingface_run(setting, size, {"arguments": {"max_steps": 1000}})


def huggingface_run(setting: Setting, size: Size, options: dict[str, Any]) -> tuple[list[str], Path, Path]:
    """Return command line, record and log of a run of `huggingface_trainer.py` with these further settings."""
    place = setting.folder / f"huggingface-{next(_numbers)}"
    place.mkdir()
    vocabulary = place / "vocab.txt"
    vocabulary.write_text("\n".join(TOKENS))
    model = {
        "num_hidden_layers": size.num_layers, "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads, "intermediate_size": size.ffn_hidden_size,
        "max_position_embeddings": MAX_TOKENS + 2, "position_embedding_type": "absolute",
        "emb_layer_norm_before": False, "token_dropout": False,
    }  # fmt: skip
    settings = {
        "fasta": str(SAMPLE_FOLDER / "train.fasta.gz"), "vocabulary": str(vocabulary), "max_tokens": MAX_TOKENS,
        "model": model, "batch": BATCH, "device": setting.device, "output": str(place / "output"),
        "record": str(place / "record.json"),
    }  # fmt: skip
    (place / "settings.json").write_text(json.dumps(settings | options))
    program = Path(__file__).with_name("huggingface_trainer.py")
    return [sys.executable, str(program), str(place / "settings.json")], place / "record.json", place / "log"


def wait_for_first_step(command: list[str], record: Path, log: Path) -> dict[str, Any]:
    """Launch a training, return the first line of its record as soon as it exists, and kill the training.

    Raises `RuntimeError` with the end of its log if it ends without a record or exceeds `LONGEST_START_SECONDS`.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    deadline = time.monotonic() + LONGEST_START_SECONDS
    try:
        while True:
            lines = record.read_text().splitlines(keepends=True) if record.exists() else []
            if lines and lines[0].endswith("\n"):
                found: dict[str, Any] = json.loads(lines[0])
                return found
            if process.poll() is not None or time.monotonic() > deadline:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                raise RuntimeError(
                    f"{command[1]} took no step in {LONGEST_START_SECONDS:.0f} s, or ended before:\n{last}"
                )
            time.sleep(PROBING_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- the wait for data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OverAndOver(Sampler[int]):
    """Repeat the same keys of the stream endlessly, so that every turn has the same steps."""

    keys: list[int]

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from self.keys


def _waiting(setting: Setting, store: ProteinStore) -> Iterator[Row]:
    """Yield the rows: share of time that training waits, and training steps with and without a loader process."""
    reader = SampleReader(store.split("train"), MAX_TOKENS, MaskingPolicy(), seed=42)
    stream = TrainingBatches(reader, BatchPlan(global_batch_size=BATCH, micro_batch_size=BATCH))
    keys = [BATCH * step for step in range(QUICK_STEPS if setting.quick else STEPS)]
    pinned = setting.device == "cuda"
    loader = DataLoader(
        stream, sampler=_OverAndOver(keys), batch_size=None, num_workers=1, pin_memory=pinned, persistent_workers=True
    )
    batches = iter(loader)
    resident = [stream[key].to(setting.device) for key in keys]
    error = sum(differing_tokens(next(batches), share) for share in resident)
    model = _trained(setting, TINY if setting.quick else LAPTOP)
    waited = Waiting(lambda: next(batches).to(setting.device, non_blocking=pinned))

    def train(shares: Callable[[], Iterator[RankBatch]]) -> Callable[[], None]:
        def work() -> None:
            for share in shares():
                model.training_step(share, 0)
            if pinned:
                torch.cuda.synchronize()

        return work

    from_loader = train(lambda: islice(waited, len(keys)))

    def between() -> Iterator[RankBatch]:
        return (stream[key].to(setting.device) for key in keys)

    between_error = float(sum(map(differing_tokens, between(), resident)))

    def share_of_time() -> Spent:
        waited.seconds, started = 0.0, time.perf_counter()
        from_loader()
        return Spent(waited.seconds / (time.perf_counter() - started))

    yield Row(
        key="data-wait",
        title="Waiting for data, of the training of the laptop recipe's model",
        unit="second of training",
        precision="float32",
        sides=[Side("ours, one loader process", share_of_time, 1, "masked and packed while the model trains")],
        parity="tokens of the batches that differ",
        tolerance=0,
        targets=[Target(most_seconds=0.01)],
        seconds_matter=True,
        note="Larger models wait less.",
    )
    yield Row(
        key="data-loading",
        title="Training steps of the laptop recipe's model, batches from one loader process",
        unit="step",
        precision="float32",
        sides=[
            Side("ours, one loader process", from_loader, len(keys), "masked and packed while the model trains"),
            Side(
                "batches that are there already", train(lambda: iter(resident)), len(keys), "the same, made beforehand",
                float(error),
            ),
            Side("no loader process", train(between), len(keys), "batches made between steps", between_error),
        ],
        parity="tokens of the batches that differ",
        tolerance=0,
        turns=9,
        seconds_matter=True,
    )  # fmt: skip


class Waiting(Iterator[RankBatch]):
    """Batches, with the seconds spent waiting for them."""

    def __init__(self, get: Callable[[], RankBatch]) -> None:
        self._get, self.seconds = get, 0.0

    def __next__(self) -> RankBatch:
        started = time.perf_counter()
        share = self._get()
        self.seconds += time.perf_counter() - started
        return share


def differing_tokens(one: RankBatch, other: RankBatch) -> int:
    """Return the number of differing tokens and targets of two rank batches; all if the shapes differ."""
    different = abs(len(one.micro_batches) - len(other.micro_batches))
    for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=False):
        for field in ("tokens", "target_index", "targets"):
            a, b = getattr(mine, field).cpu(), getattr(theirs, field).cpu()
            different += int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel())
    return different


def _trained(setting: Setting, size: Size) -> ESM1nvModel:
    """Return a model ready for training, without Lightning."""
    from omegaconf import OmegaConf

    model = ESM1nvModel(OmegaConf.create({"encoder": vars(size), "precision": "32", "seed": 1}))
    path = write_archive(setting.folder / "waiting.nemo", describe(model))
    trained: ESM1nvModel = Ours(path, "32", setting.device).model
    return trained
