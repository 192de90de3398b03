"""What has been measured, as a JSON file: each row whole, with where and when; to be shown again, or continued."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison import Measured, Result, Row, Target
from bionemo_esm.errors import UserError
from bionemo_esm.files import atomic_write

SCHEMA = "bionemo_esm/benchmarks/1"
_OF_ROW = ("key", "title", "unit", "precision", "parity", "tolerance", "clock", "turns", "seconds_matter", "note")


class TableError(UserError):
    """A file that is not a table of ours; the message names it, and what to do."""


@dataclass(frozen=True)
class Entry:
    """A measured row, and under what circumstances."""

    module: str  # its name on the command line
    device: str
    identity: str  # of settings, machine, versions and code: what makes figures comparable
    machine: str  # a key of `Table.machines`
    date: str  # ISO 8601, UTC
    source: dict[str, Any]  # commit, and whether the tree was clean
    load: float  # load average before the module's first row
    result: Result


@dataclass
class Table:
    """All rows, by device and key, in the order in which they are shown."""

    quick: bool = False
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # by "device module": identity, seconds it took

    def put(self, entry: Entry) -> None:
        self.entries[entry.device, entry.result.row.key] = entry

    def keys(self, module: str, identity: str) -> list[str]:
        """Rows of a module that have been measured under these circumstances."""
        chosen = (entry for entry in self.entries.values() if (entry.module, entry.identity) == (module, identity))
        return [entry.result.row.key for entry in chosen]

    def finish(self, module: str, device: str, identity: str, seconds: float, keys: set[str]) -> None:
        """A module has come to its end: it has these rows, and no others. What it had under other names goes."""
        gone = [
            place
            for place, entry in self.entries.items()
            if (entry.module, entry.device) == (module, device) and place[1] not in keys
        ]
        for place in gone:
            del self.entries[place]
        self.finished[f"{device} {module}"] = {"identity": identity, "seconds": seconds}

    def sort(self, modules: list[str]) -> None:
        """Put rows into the order of the modules; within one they stay as they were measured."""
        known = {name: place for place, name in enumerate(modules)}
        ordered = sorted(self.entries.items(), key=lambda item: (item[0][0], known.get(item[1].module, len(known))))
        self.entries = dict(ordered)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all, over what is there."""
        used = {entry.machine for entry in self.entries.values()}
        content = {
            "schema": SCHEMA,
            "quick": self.quick,
            "machines": {name: value for name, value in self.machines.items() if name in used},
            "rows": [_entry_values(entry) for entry in self.entries.values()],
            "finished": self.finished,
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with atomic_write(path) as stream:
            stream.write(text.encode())

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read it back; an empty one where there is none. Raises `TableError` for anything else."""
        if not path.exists():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise TableError(f"{path} is of another version ({content['schema']}); move it away and measure anew")
            table = cls(bool(content["quick"]), dict(content["machines"]), {}, dict(content["finished"]))
            for values in content["rows"]:
                table.put(_entry(values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TableError):
                raise
            what = f"{type(error).__name__}: {error}"
            raise TableError(f"{path} is not a table of benchmarks ({what}); move it away") from error
        return table


def result_values(result: Result) -> dict[str, Any]:
    """A result in plain values, unrounded."""
    row = {name: getattr(result.row, name) for name in _OF_ROW}
    row["targets"] = [asdict(target) | {"met": result.met(target)} for target in result.row.targets]
    return row | {"sides": [asdict(side) | {"error": _plain(side.error)} for side in result.sides]}


def result_of(values: dict[str, Any]) -> Result:
    """The result of those values; its row has no sides, as there is nothing to be run."""
    wanted = [{name: value for name, value in target.items() if name != "met"} for target in values["targets"]]
    row = Row(sides=(), targets=[Target(**target) for target in wanted], **{name: values[name] for name in _OF_ROW})
    return Result(row, tuple(map(_side, values["sides"])))


def _side(values: dict[str, Any]) -> Measured:
    side = Measured(**values)
    error = None if side.error is None else float(side.error)
    ratio = None if side.ratio is None else _three(side.ratio)
    return replace(side, libraries=tuple(side.libraries), seconds=_three(side.seconds), ratio=ratio, error=error)


def _three(values: tuple[float, float, float]) -> tuple[float, float, float]:
    median, least, most = map(float, values)
    return median, least, most


def _plain(error: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return error if error is None or math.isfinite(error) else str(error)


def _entry_values(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in ("module", "device", "identity", "machine", "date", "source")}
    return values | {"load": entry.load} | result_values(entry.result)


def _entry(values: dict[str, Any]) -> Entry:
    names = ("module", "device", "identity", "machine", "date", "source", "load")
    return Entry(**{name: values[name] for name in names}, result=result_of(values))
