"""Profile of one training step of ESM-1nv: PyTorch's operators by self time.

    python -m benchmarks.profile_step --precision bf16

Model, proteins and step are those of the rows `train-esm1nv-*`. The script profiles the third step and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

from benchmarks.proteins import TUNING, sources
from benchmarks.rows.training import ESM1NV, SCALES, TINY
from benchmarks.steps import WIDTH, Ours, masked_proteins, tokens_of
from bionemo_esm.model.esm1nv import ESM1nvModel


class Operator(NamedTuple):
    """An operator and its self time in one step."""

    name: str
    shapes: str  # of its arguments; empty if shapes are not recorded
    calls: int
    seconds: float


def operators(step: Callable[[], object], device: str, shapes: bool = False) -> list[Operator]:
    """Return the operators of a step by descending self time (device time on "cuda"), after two warm-up steps."""
    step()
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, record_shapes=shapes) as watched:
        step()
    found = []
    for event in watched.key_averages(group_by_input_shape=shapes):
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if microseconds > 0:
            told = str(event.input_shapes) if shapes else ""
            found.append(Operator(event.key, told, event.count, microseconds / 1e6))
    return sorted(found, key=lambda operator: -operator.seconds)


def table(found: Sequence[Operator], most: int) -> str:
    """Return a Markdown table: the `most` longest operators, the sum of the others, and the total."""
    total = sum(operator.seconds for operator in found)
    rest = found[most:]
    shown = list(found[:most])
    if rest:
        shown.append(
            Operator(f"{len(rest)} others", "", sum(one.calls for one in rest), sum(one.seconds for one in rest))
        )
    lines = ["| operator | calls | ms | share |", "|---|---:|---:|---:|"]
    for name, shapes, calls, seconds in shown:
        label = f"`{name}`" + (f" {shapes}" if shapes else "")
        lines.append(f"| {label} | {calls:,} | {1000 * seconds:,.1f} | {seconds / total:.1%} |")
    calls = sum(operator.calls for operator in found)
    return "\n".join([*lines, f"| all | {calls:,} | {1000 * total:,.1f} | 100% |"])


def profiled(precision: str, device: str, quick: bool, shapes: bool) -> tuple[str, list[Operator]]:
    """Return a description of the profiled step, and its operators."""
    shape = TINY if quick else ESM1NV.shape
    sizes = {"num_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads}
    encoder = {**sizes, "ffn_hidden_size": shape.ffn or 4 * shape.hidden, "seq_length": WIDTH}
    scale = SCALES["quick" if quick else device]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "esm1nv.nemo"
        ESM1nvModel(OmegaConf.create({"encoder": encoder})).save_to(str(path))
        ours = Ours(path, precision, device)
    proteins = masked_proteins(sources(None)[0].draw(TUNING, scale.proteins))
    batches = ours.batches(proteins, scale.at_once)
    kept = f"{len(proteins)} proteins of {tokens_of(proteins):,} tokens, {scale.at_once} in a row"
    words = (
        f"{shape}, {precision}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{kept}; {ours.backends}"
    )
    return words, operators(lambda: ours.step(batches), device, shapes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--most", type=int, default=20, help="operators that are shown (default: 20)")
    parser.add_argument("--shapes", action="store_true", help="tell calls with arguments of other shapes apart")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.most < 1:
        parser.error(f"--most must be at least 1, not {chosen.most}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    with redirect_stdout(StringIO()):  # suppresses what libraries print when a model is built
        words, found = profiled(chosen.precision, chosen.device, chosen.quick, chosen.shapes)
    print(f"{words}\n\n{table(found, chosen.most)}")


if __name__ == "__main__":
    main()
