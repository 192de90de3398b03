"""How proteins are read, and how to say to whoever can change it what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bionemo_esm.errors import ConfigError

FORMATS = ("fasta", "csv", "tsv", "parquet")
_PACKED = (".gz", ".zst", ".zstd", ".bgz")


@dataclass(frozen=True)
class InputPolicy:
    """How proteins are read.

    input_format: one of `FORMATS`, or None to tell by the name; standard input is FASTA unless told otherwise.
    id_column, sequence_column: of a table; None for `id` (where there is none, the record's number) and `sequence` or
    `seq`, in capitals or not.
    bad_records: one that has no residue, an id met before, or an unknown letter ends the work ("error"), or is left out
    and counted ("skip"). unknown_letters: what the model has no token for (J, `*` within, digits), and gaps: makes a
    record bad ("error"), or is read as "X".
    """

    input_format: str | None = None
    id_column: str | None = None
    sequence_column: str | None = None
    bad_records: str = "error"
    unknown_letters: str = "error"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("input_format", self.input_format, (None, *FORMATS)),
            ("bad_records", self.bad_records, ("error", "skip")),
            ("unknown_letters", self.unknown_letters, ("error", "X")),
        ):
            if value not in allowed:
                words = ", ".join("null" if word is None else word for word in allowed)
                raise ConfigError(f"{key} must be one of {words}, not {value!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InputPolicy:
        """The policy of a job's configuration, by `POLICY_KEYS`. Raises `ConfigError`, naming the key."""
        return cls(**{key: None if values[key] is None else str(values[key]) for key in POLICY_KEYS})  # type: ignore[arg-type]

    def format_of(self, path: str) -> str:
        """The format of a file, by `input_format` or its name."""
        if self.input_format is not None:
            return self.input_format
        name = path.lower()
        for packed in _PACKED:
            name = name.removesuffix(packed)
        endings = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
        return next((kind for ending, kind in endings.items() if name.endswith(ending)), "fasta")

    def advice(self, text: str, key: str, value: str) -> str:
        """The text with how to set a key in the place of `{}`, in the words of who can."""
        return text.format(f"{key}={value}")


POLICY_KEYS = tuple(field.name for field in fields(InputPolicy))
"""Of a job's configuration."""


class PythonPolicy(InputPolicy):
    """The same, as an argument of a method."""

    def advice(self, text: str, key: str, value: str) -> str:
        return text.format(f"policy=InputPolicy({key}={value!r})")


class FixedPolicy(InputPolicy):
    """The usual one, where nobody has a say in it."""

    def advice(self, text: str, key: str, value: str) -> str:
        return ""
