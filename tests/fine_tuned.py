"""Fine-tuned models for tests: a tiny encoder and a head with random weights, written as archives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bionemo_esm import FineTunedPredictor
from bionemo_esm.alphabet import encode
from bionemo_esm.finetuning.archive import MODEL_CLASS, archive_config, extra_tensors
from bionemo_esm.finetuning.config import CONVNET, AdapterConfig, HeadConfig, Parts, ReadingConfig
from bionemo_esm.finetuning.tasks import CLASSIFICATION, REGRESSION, RESIDUE, SEQUENCE, Task
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import Archive, write_archive
from models import tiny_model

LETTERS = Task(
    name="secondary_structure", level=RESIDUE, kind=CLASSIFICATION, metric="accuracy", classes=("H", "E", "C")
)
WORDS = Task(name="disorder", level=RESIDUE, kind=CLASSIFICATION, metric="mcc", classes=("ordered", "disordered"))
PROFILE = Task(
    name="flexibility", level=RESIDUE, kind=REGRESSION, metric="spearman", classes=(), target_mean=3.0, target_scale=2.5
)
PLACES = Task(
    name="location",
    level=SEQUENCE,
    kind=CLASSIFICATION,
    metric="f1",
    classes=("Nucleus", "id", "Cell, membrane", "prediction"),
)
NUMBER = Task(
    name="melting", level=SEQUENCE, kind=REGRESSION, metric="mse", classes=(), target_mean=50.0, target_scale=8.0
)
TASKS = (LETTERS, WORDS, PROFILE, PLACES, NUMBER)
LINEAR = HeadConfig()
CONV = HeadConfig(kind=CONVNET, hidden=4, kernel_size=5)
READING = ReadingConfig(layer=2, window=100, overlap=40)
ADAPTERS = AdapterConfig(rank=2, targets=("linear_qkv", "linear_fc2"))
PROVENANCE = {
    "base": {"file": "pretrained.nemo", "weights_sha256": "0123456789abcdef" * 4},
    "validation": {"accuracy": 0.71875},
}
PROTEINS = {
    "ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "one": "M",
    "long": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 8,
    "two": "WK",
    "crambin": "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN",
}


def fine_tuned(
    path: Path,
    task: Task,
    head: HeadConfig = LINEAR,
    reading: ReadingConfig = READING,
    adapters: AdapterConfig | None = None,
    precision: str = "32",
    **sizes: Any,
) -> Path:
    """Write a fine-tuned tiny model as an archive. Its head and adapters have weights far from zero."""
    return write_archive(path, archive(task, Parts(head, reading, adapters), precision, **sizes))


def archive(task: Task, parts: Parts, precision: str = "32", **sizes: Any) -> Archive:
    model = tiny_model(precision, **sizes)
    weights = model.archive_weights()
    config = archive_config(model.encoder_config, precision, 1, task, parts)
    generator = torch.Generator().manual_seed(7)
    for name, shape in extra_tensors(config, model.encoder_config).items():
        weights[name] = (0.1 if "lora" in name else 0.3) * torch.randn(shape, generator=generator)
    return Archive(MODEL_CLASS, config, weights, {"finetuning": PROVENANCE})


def changed(archive: Archive, config: Mapping[str, Any] | None = None, **weights: Any) -> Archive:
    """Return the archive with other configuration values or tensors. The value `...` removes an entry."""
    both = (dict(archive.config) | dict(config or {}), dict(archive.weights) | weights)
    whole, tensors = ({key: value for key, value in each.items() if value is not ...} for each in both)
    return Archive(archive.model_class, whole, tensors, archive.provenance)


def proteins(sequences: Mapping[str, str] = PROTEINS) -> list[Protein]:
    """Return real proteins, and some of one or two residues."""
    pairs = enumerate(sequences.items(), start=1)
    return [Protein(name, encode(sequence.encode()), number) for number, (name, sequence) in pairs]


def predictor(folder: Path, task: Task, head: HeadConfig = CONV, batch_tokens: int = 200) -> FineTunedPredictor:
    """Write a fine-tuned model to `tuned.nemo` in the folder and load it."""
    path = fine_tuned(folder / "tuned.nemo", task, head, adapters=ADAPTERS)
    return FineTunedPredictor.load(path, "cpu", "32", batch_tokens)
