"""Training on a CPU beside another program that keeps one core busy: how much of the speed is left.

    python benchmarks/busy_machine.py                # some minutes; nothing else should run
    python benchmarks/busy_machine.py --steps 20     # to see that it runs

Each case is a new run of the laptop recipe, alone and beside a busy loop, with settings of OpenMP, whose threads wait
for each other many times a step. `ours` is what `bionemo-esm` sets; `GNU's` is the default of the OpenMP library that
PyTorch brings. The rate is that of the last half of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES: dict[str, dict[str, str]] = {
    "ours": {},
    "GNU's": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(steps: int, settings: dict[str, str], loops: int) -> float:
    """Return the median rate of the last half of a new run's steps."""
    with tempfile.TemporaryDirectory() as folder, busy_loops(loops):
        command = [
            *(sys.executable, str(ROOT / "examples" / "pretrain_esm1nv.py"), "recipe=laptop"),
            *(f"trainer.max_steps={steps}", f"exp_manager.exp_dir={folder}", "exp_manager.name=run"),
        ]
        subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [line["tokens_per_second"] for line in map(json.loads, lines) if line["kind"] == "train"]
    return float(statistics.median(rates[len(rates) // 2 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    print(f"{os.cpu_count()} cores; {steps} steps of recipe=laptop; tokens/s\n")
    print("| OpenMP | alone | beside one busy loop | left |\n|---|---:|---:|---:|")
    for name, settings in CASES.items():
        alone, beside = (tokens_per_second(steps, settings, loops) for loops in (0, 1))
        print(f"| {name} | {alone:,.0f} | {beside:,.0f} | {beside / alone:.0%} |", flush=True)


if __name__ == "__main__":
    main()
