"""Measured rows as a JSON file: complete rows with machine and date, to render again or to continue."""

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
    """A file that is not a benchmark table; the message names the file and what to do."""


@dataclass(frozen=True)
class Entry:
    """A measured row and its circumstances."""

    module: str  # the module's name on the command line
    device: str
    identity: str  # hash of settings, machine, versions and code; figures with equal hashes are comparable
    machine: str  # a key of `Table.machines`
    date: str  # ISO 8601, UTC
    source: dict[str, Any]  # commit, and whether the work tree was clean
    load: float  # load average before the module's first row
    result: Result


@dataclass
class Table:
    """All rows by device and key, in the order of the report."""

    quick: bool = False
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # by "device module": identity, seconds

    def put(self, entry: Entry) -> None:
        self.entries[entry.device, entry.result.row.key] = entry

    def keys(self, module: str, identity: str) -> list[str]:
        """Return the keys of a module's rows that were measured with this identity."""
        chosen = (entry for entry in self.entries.values() if (entry.module, entry.identity) == (module, identity))
        return [entry.result.row.key for entry in chosen]

    def finish(self, module: str, device: str, identity: str, seconds: float, keys: set[str]) -> None:
        """Record that a module is complete with these rows. Removes its rows with other keys."""
        gone = [
            place
            for place, entry in self.entries.items()
            if (entry.module, entry.device) == (module, device) and place[1] not in keys
        ]
        for place in gone:
            del self.entries[place]
        self.finished[f"{device} {module}"] = {"identity": identity, "seconds": seconds}

    def sort(self, modules: list[str]) -> None:
        """Sort the rows by module; rows of a module keep their order."""
        known = {name: place for place, name in enumerate(modules)}
        ordered = sorted(self.entries.items(), key=lambda item: (item[0][0], known.get(item[1].module, len(known))))
        self.entries = dict(ordered)

    def save(self, path: Path) -> None:
        """Write the table atomically, replacing `path`."""
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
        """Read a table; an empty one if there is no file. Raises `TableError` for any other content."""
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
    """Return a result as plain values, unrounded."""
    row = {name: getattr(result.row, name) for name in _OF_ROW}
    row["targets"] = [asdict(target) | {"met": result.met(target)} for target in result.row.targets]
    return row | {"sides": [asdict(side) | {"error": _plain(side.error)} for side in result.sides]}


def result_of(values: dict[str, Any]) -> Result:
    """Return the result with these values. Its row has no sides, because nothing will be run."""
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
    """Return an error for JSON, which has no NaN and no infinity: these become text."""
    return error if error is None or math.isfinite(error) else str(error)


def _entry_values(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in ("module", "device", "identity", "machine", "date", "source")}
    return values | {"load": entry.load} | result_values(entry.result)


def _entry(values: dict[str, Any]) -> Entry:
    names = ("module", "device", "identity", "machine", "date", "source", "load")
    return Entry(**{name: values[name] for name in names}, result=result_of(values))
