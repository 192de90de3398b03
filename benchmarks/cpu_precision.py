"""Speed of bf16 relative to float32 on this CPU, which decides what `trainer.precision=auto` should select.

    python benchmarks/cpu_precision.py

The ratio comes from alternating repeats on the same batches (median and range). Each measurement runs in its own
process. Nothing else should run at the same time. It takes about four minutes and prints a Markdown table.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPEATS = 3
STEPS = 12


def seconds_per_step(precision: str) -> float:
    """Return median seconds of a forward and backward pass of a 2M-parameter ESM-1nv, 8 packed sample proteins."""
    from omegaconf import OmegaConf
    from torch.nn.functional import cross_entropy

    from bionemo_esm.data.collate import SampleReader
    from bionemo_esm.data.dataloader import BatchPlan, TrainingBatches
    from bionemo_esm.data.masking import MaskingPolicy
    from bionemo_esm.data.store import ProteinStore
    from bionemo_esm.model.esm1nv import ESM1nvModel

    sizes = {"num_layers": 4, "hidden_size": 192, "num_attention_heads": 6, "ffn_hidden_size": 768}
    encoder = {**sizes, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = ESM1nvModel(OmegaConf.create({"encoder": encoder, "precision": precision}))
    store = ProteinStore.open(_sample_store())
    stream = TrainingBatches(SampleReader(store.split("train"), 512, MaskingPolicy(), 0), BatchPlan(8, 8))
    times = []
    for step in range(STEPS):
        (batch,) = stream[8 * step].micro_batches
        started = time.perf_counter()
        cross_entropy(model(batch), batch.targets).backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _sample_store() -> Path:
    """Build a store of the shipped sample beside this script's results (ignored by git), once."""
    from bionemo_esm.data.preprocess import BuildPolicy, build_store_from_splits

    folder = Path(__file__).parent / "results" / ".sample-store"
    if not folder.is_dir():
        sample = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample"
        parts = (sample / f"{part}.fasta.gz" for part in ("train", "validation", "test"))
        build_store_from_splits(*parts, folder, BuildPolicy())
    return folder


def measure(precision: str) -> float:
    """Run `seconds_per_step` in a new process."""
    command = [sys.executable, __file__, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    import torch

    _sample_store()
    settings = {"float32": "32", "bf16": "bf16"}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(REPEATS):
        for name, setting in settings.items():
            seconds[name].append(measure(setting))
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {cpu}, Python {platform.python_version()}\n")
    print("| setting | seconds a step, median (range) | times as long as float32 |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["float32"], strict=True))
        print(f"| {name} | {statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f}) | {ratio:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(seconds_per_step(sys.argv[1]))
    else:
        main()
