"""Fine-tuning runs for tests: proteins of the shipped sample with learnable labels, and jobs over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.finetuning.finetune_command import finetune
from conftest import SAMPLE
from models import tiny_model
from runs import composed

GREASY = frozenset("AVILMFWC")
PROTEINS = 48
QUICK = (
    "trainer.accelerator=cpu", "seeds=[1]", "baselines=[]", "resamples=50", "tuning.max_epochs=3",
    "tuning.global_batch_size=8", "tuning.lr=5e-3",
)  # fmt: skip
"""Overrides for a job of one or two seconds. Every test starts from these."""


def proteins(count: int = PROTEINS, longest: int = 150) -> dict[str, str]:
    """Return the first proteins of the sample within the length limit, by id."""
    found: dict[str, str] = {}
    for record in read_fasta(SAMPLE / "train.fasta.gz"):
        if 30 <= len(record.sequence) <= longest and len(found) < count:
            found[record.id] = record.sequence.decode()
    return found


def neighbours(sequence: str) -> str:
    """Label each residue by how many of it and the previous residue are hydrophobic: B(oth), O(ne) or N(one)."""
    greasy = [letter in GREASY for letter in sequence]
    counts = [here + before for here, before in zip(greasy, [False, *greasy], strict=False)]
    return "".join("NOB"[count] for count in counts)


def per_residue(folder: Path, **changes: Any) -> list[str]:
    """Write files in FLIP's form and return their overrides. Every fourth protein is validation, every sixth test."""
    known = proteins(**changes)
    labels = []
    for number, (name, sequence) in enumerate(known.items()):
        group = "test" if number % 6 == 5 else "train"
        held_out = group == "train" and number % 4 == 3
        labels.append(f">{name} SET={group} VALIDATION={held_out}\n{neighbours(sequence)}\n")
    (folder / "labels.fasta").write_text("".join(labels))
    (folder / "sequences.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in known.items()))
    return [
        "task=custom", "task.name=neighbours", "task.level=residue", "task.kind=classification",
        f"data.train={folder / 'labels.fasta'}", f"data.sequences={folder / 'sequences.fasta'}",
    ]  # fmt: skip


def per_protein(folder: Path, **changes: Any) -> list[str]:
    """Write a table of the hydrophobic share of each protein in percent, and return its overrides."""
    rows = ["id,sequence,share,set,validation"]
    for number, (name, sequence) in enumerate(proteins(**changes).items()):
        share = 100 * sum(letter in GREASY for letter in sequence) / len(sequence)
        group = "test" if number % 6 == 5 else "train"
        rows.append(f"{name},{sequence},{share:.3f},{group},{group == 'train' and number % 4 == 3}")
    (folder / "shares.csv").write_text("\n".join(rows) + "\n")
    return [
        "task=custom", "task.name=shares", "task.level=sequence", "task.kind=regression", "task.target_column=share",
        f"data.train={folder / 'shares.csv'}",
    ]  # fmt: skip


def pretrained(folder: Path, **sizes: Any) -> Path:
    """Save a tiny encoder with random weights and return its path."""
    path = folder / "pretrained.nemo"
    tiny_model(**{"seq_length": 128} | sizes).save_to(str(path))
    return path


def run_here(folder: Path, model: Path, *overrides: str) -> dict[str, Any]:
    """Fine-tune in this process into `folder` and return the report. A stop raises `SystemExit`."""
    places = (f"model={model}", f"output={folder}")
    finetune(composed(*QUICK, *places, *overrides, config="finetune", part="finetuning"))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
