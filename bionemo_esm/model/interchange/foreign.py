"""What the readers of other libraries' files hand over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.interchange.dialects import Dialect
from bionemo_esm.model.interchange.translation import ForeignTensors


@dataclass(frozen=True)
class ForeignModel:
    """Another library's model as it was read: nothing translated yet."""

    dialect: Dialect
    config: EncoderConfig  # sizes; `contact_head` and `position_offset` are settled by `take`
    tensors: ForeignTensors
    provenance: dict[str, Any]  # plain values: {"imported_from": {format, source, revision, sha256 by file, ...}}
    notes: tuple[str, ...] = ()  # what was left aside, for people
