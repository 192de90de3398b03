"""An engine from a checked configuration, without the warnings of libraries."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from bionemo_esm.inference.engine_options import EngineConfig

if TYPE_CHECKING:  # torch takes seconds to import
    from bionemo_esm.inference.engine import Engine


def load_engine(config: EngineConfig) -> Engine:
    """Return `Engine.load` of a configuration, without Megatron's warnings about a missing Apex."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bionemo_esm.inference.engine import Engine

        return Engine.load(config.model, config.device, config.precision, config.batch_tokens)
