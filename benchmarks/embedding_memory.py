"""Memory of `bionemo-esm embed` over 100,000 proteins, which should not grow.

    python benchmarks/embedding_memory.py            # a few minutes on 2 cores
    python benchmarks/embedding_memory.py 20000      # fewer proteins

The proteins are pieces of 40 to 120 residues of the shipped sample with new ids. The model is a 0.5M-parameter ESM-1nv
with random weights. The script reads the resident memory of the process (Linux: /proc) twice a second, and prints the
maximum in each fifth of the run. Other load on the machine does not matter.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bionemo_esm.alphabet import decode
from bionemo_esm.inference.inputs import read_proteins
from models import tiny_model

SAMPLE = Path(__file__).parents[1] / "bionemo_esm" / "data" / "sample" / "train.fasta.gz"
SHORTEST, LONGEST = 40, 120


def write_proteins(path: Path, count: int) -> None:
    source = np.concatenate([protein.tokens for protein in read_proteins(SAMPLE)])
    generator = np.random.default_rng(0)
    lengths = generator.integers(SHORTEST, LONGEST, endpoint=True, size=count)
    begins = generator.integers(len(source) - LONGEST, size=count)
    with path.open("w") as stream:
        for number, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            stream.write(f">piece{number}\n{decode(source[begin : begin + length])}\n")


def resident_megabytes(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    return 0.0  # the process is exiting


def watch(command: list[str]) -> list[tuple[float, float]]:
    """Run a command to a successful end. Return pairs of seconds since the start and megabytes of resident memory."""
    started, seen = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            seen.append((time.monotonic() - started, resident_megabytes(process.pid)))
            time.sleep(0.5)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        sys.exit(said)
    return seen


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_proteins(folder / "pieces.fasta", count)
        sizes = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 512}
        tiny_model(**sizes).save_to(str(folder / "model.nemo"))
        job = [f"model={folder}/model.nemo", f"input={folder}/pieces.fasta", f"output={folder}/embeddings.h5"]
        seen = watch([sys.executable, "-m", "bionemo_esm", "embed", *job])
    end = seen[-1][0]
    print(f"{count:,} proteins in {end:.0f} s\n\n| part of the time | highest memory, MB |\n|---|---:|")
    for fifth in range(5):
        memory = max(mb for second, mb in seen if fifth <= 5 * second / end <= fifth + 1)
        print(f"| {20 * fifth}-{20 * fifth + 20}% | {memory:,.0f} |")


if __name__ == "__main__":
    main()
