"""Table of the row modules. Each module is imported only in the process that measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """A module of rows on the command line."""

    path: str  # import path; the module defines `rows: RowsOf`
    what: str
    libraries: tuple[str, ...] = ()  # distributions of the peers that are not our own dependencies


def _of(name: str, what: str, *libraries: str) -> Module:
    return Module(f"benchmarks.rows.{name}", what, libraries)


MODULES: Mapping[str, Module] = {
    "store": _of("store", "FASTA to a store", "transformers", "biopython", "pyfastx"),
    "batches": _of("batches", "store to masked, packed batches", "transformers", "fair-esm", "megatron-core"),
    "training": _of("training", "training steps", "transformers", "fair-esm"),
    "embeddings": _of("embeddings", "embeddings of proteins", "transformers", "fair-esm"),
    "averaging": _of("averaging", "the average of 47 checkpoints"),
    "archives": _of("archives", "archives saved and restored", "safetensors"),
    "starting": _of("starting", "from the command to the first step, new and resumed", "transformers", "accelerate"),
    "whole_runs": _of("whole_runs", "from the command to the result", "transformers", "accelerate"),
}
"""Modules by their name on the command line, in the order of the table."""
