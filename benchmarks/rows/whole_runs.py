"""Row: the laptop recipe from the command to the result, against Hugging Face's `Trainer`.

Same model, proteins, number of steps, proteins a step, and rates; each side starts as a new process, trains, and
evaluates the validation proteins. Ours is the command of `make pretrain`: it also evaluates along the
way, writes checkpoints, averages the last ones and draws its report. The peer does none of that. Each side draws its
own weights, order and masks, so perplexities agree within a tolerance only. Not run on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.comparison import Row, Setting, Side, Spent, Target
from benchmarks.rows.starting import LAPTOP, ROOT, TINY, Size, huggingface_run, sample_store
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.pretraining.run_context import SAMPLE_FOLDER

STEPS, QUICK_STEPS = 1200, 3
TRIAL = 20  # of the steps one is tried, to find the peer's best precision
ORDER = {"train_sampling_strategy": "group_by_length"}
TOLERANCE = 0.05  # of a perplexity, relative
RECIPE = ROOT / "conf" / "recipe" / "laptop.yaml"

Run = Callable[[], float]
"""A new process that trains and evaluates; returns the validation perplexity."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the row."""
    store = sample_store(setting.folder / "sample")
    steps, size = (QUICK_STEPS, TINY) if setting.quick else (STEPS, LAPTOP)
    perplexity, work = timed(lambda: ours(setting, store, size, steps))
    sides = [Side("ours", work, 1, "bf16 where the CPU has it; its store built beforehand", libraries=("torch",))]
    options = ORDER | {"bf16": False} if setting.quick else fastest(setting, size, steps // TRIAL)
    found, work = timed(lambda: peer(setting, size, steps, options))
    settings = (
        f"{'bf16 autocast' if options['bf16'] else 'float32'} (its best of both), batches of similar length; "
        f"perplexity {found:.2f}, ours {perplexity:.2f}"
    )
    error = abs(found - perplexity) / perplexity
    sides.append(Side("Hugging Face, Trainer", work, 1, settings, error, ("transformers", "accelerate")))
    yield Row(
        key="run-laptop",
        title=f"From the command to the result, {steps:,} steps of the laptop recipe",
        unit="run",
        precision="-",
        sides=sides,
        parity="validation perplexity, relative; weights, order and masks are drawn by each side",
        tolerance=TOLERANCE,
        targets=[Target("Hugging Face, Trainer", ratio=3)],
        turns=1,
        seconds_matter=True,
        note="Ours also validates along the way, writes checkpoints, averages the last ones and draws its report.",
    )


def fastest(setting: Setting, size: Size, steps: int) -> dict[str, Any]:
    """Return the options with which the peer trains fastest, from one short run each."""
    seconds = {}
    for bf16 in (False, True):
        started = time.perf_counter()
        peer(setting, size, steps, {"bf16": bf16, **ORDER})
        seconds[bf16] = time.perf_counter() - started
    return {"bf16": min(seconds, key=seconds.__getitem__), **ORDER}


def timed(run: Run) -> tuple[float, Callable[[], Spent]]:
    """Run once. Return the perplexity, and the work of a side, whose warm-up is this first run."""
    seconds: list[float] = []

    def once() -> float:
        started = time.perf_counter()
        perplexity = run()
        seconds.append(time.perf_counter() - started)
        return perplexity

    perplexity = once()

    def work() -> Spent:
        if not seconds:
            once()
        return Spent(seconds.pop())

    return perplexity, work


_numbers = count(1)  # of our runs: each has a new folder


def ours(setting: Setting, store: ProteinStore, size: Size, steps: int) -> float:
    name = f"run-{next(_numbers)}"
    command = [
        sys.executable, str(ROOT / "examples" / "pretrain_esm1nv.py"), "recipe=laptop", f"trainer.max_steps={steps}",
        f"data.store={store.folder}", f"exp_manager.exp_dir={setting.folder}", f"exp_manager.name={name}",
        *(f"model.{key}={value}" for key, value in vars(size).items()),
    ]  # fmt: skip
    run_to_end(command, setting.folder / f"{name}.log")
    summary: dict[str, Any] = json.loads((setting.folder / name / "summary.json").read_text())
    return float(summary["validation_perplexity"])


def peer(setting: Setting, size: Size, steps: int, options: dict[str, Any]) -> float:
    optim = OmegaConf.load(RECIPE).optim
    arguments = {
        "max_steps": steps,
        "learning_rate": optim.lr,
        "warmup_steps": round(optim.sched.warmup_ratio * steps),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": optim.sched.min_lr},
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        **options,
    }
    validation = str(SAMPLE_FOLDER / "validation.fasta.gz")
    command, record, log = huggingface_run(setting, size, {"arguments": arguments, "validation": validation})
    run_to_end(command, log)
    return float(json.loads(record.read_text())["perplexity"])


def run_to_end(command: list[str], log: Path) -> None:
    """Run a command to its end. Raises `RuntimeError` with the end of its log if it fails."""
    with log.open("wb") as sink:
        ended = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    if ended.returncode != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise RuntimeError(f"{command[1]} failed with exit code {ended.returncode}:\n{last}")
