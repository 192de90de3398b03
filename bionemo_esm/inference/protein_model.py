"""The model in a notebook: load it, ask it.

    model = ProteinModel.load("runs/laptop/laptop.nemo")
    model.embed({"ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"})

Nothing here computes; each method calls the module that its name says.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and Megatron take seconds to import
    from bionemo_esm.inference.engine import Engine


class ProteinModel:
    """A pretrained model, and what it is for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "32", batch_tokens: int | None = None
    ) -> ProteinModel:
        """The model of a `.nemo` or a `.ckpt` of ours.

        `device`: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one. `precision`: "32", "bf16", or "auto"
        for what the device multiplies faster. `batch_tokens`: computed at once; memory grows with it, and no answer
        depends on it but for rounding. Raises `ArchiveError`, `ConfigError`.
        """
        return cls(load_engine(path, device, precision, batch_tokens))


def load_engine(path: str | os.PathLike[str], device: str, precision: str, batch_tokens: int | None) -> Engine:
    """`Engine.load` without the warnings that Megatron gives where neither Apex nor Transformer Engine is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bionemo_esm.inference.engine import Engine

        return Engine.load(path, device, precision, batch_tokens)
