"""Definition of a row of the table, and its measurement: all sides take turns at the same work.

A row compares our side with other sides at one benchmark. It states the error of their results relative to ours, and
the target ratios. Sides alternate, so that other load on the machine affects all sides equally. The report gives
medians of the turns and of their ratios, with the range.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setting:
    """Settings that every module of rows receives."""

    folder: Path  # for temporary files; removed afterwards
    device: str = "cpu"  # or "cuda"
    quick: bool = False  # tiny sizes, to check that a row runs and its sides agree; its timings mean nothing
    fasta: Path | None = None  # proteins to use; None: the shipped sample


@dataclass(frozen=True)
class Spent:
    """Seconds to count for a turn, if they are not its whole duration."""

    seconds: float


@dataclass(frozen=True)
class Side:
    """One implementation of the work."""

    name: str  # "Hugging Face, sorted by length"
    work: Callable[[], object]  # one turn; returns after all work is done (GPU synchronized), optionally a `Spent`
    amount: float  # units of work in a turn; slow sides may do less
    settings: str = ""  # "bf16 autocast, SDPA, 8 at a time, its best of 1 to 32"
    error: float | None = None  # error of its result relative to ours, as the row's `parity` defines it; None for ours
    libraries: tuple[str, ...] = ()  # distributions whose versions the report shows: "transformers"


@dataclass(frozen=True)
class Target:
    """Target for our side: a speedup over another side, a maximum of seconds a unit, or a minimum rate per second."""

    side: str | None = None  # name of the side, for `ratio`
    ratio: float | None = None
    most_seconds: float | None = None
    least_per_second: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.ratio, self.most_seconds, self.least_per_second) if value is not None]
        assert len(given) == 1 and given[0] > 0, "a target is one figure"
        assert (self.side is None) == (self.ratio is None), "a ratio is to a side"


@dataclass(frozen=True)
class Row:
    """A benchmark and its sides; the first side is ours."""

    key: str  # "train-esm1nv-bf16": the name on the command line
    title: str  # "Training step, ESM-1nv"
    unit: str  # unit of `amount`: "unpadded token"
    precision: str  # "float32", or "-" if nothing is rounded
    sides: Sequence[Side]
    parity: str  # definition of `error`: "largest difference of the loss, relative"
    tolerance: float  # a side with a larger error is not valid
    targets: Sequence[Target] = ()
    clock: str = "wall"  # or "cpu": CPU seconds of this process on all cores
    turns: int = 5
    seconds_matter: bool = False  # show seconds a unit instead of units a second
    note: str = ""

    def __post_init__(self) -> None:
        names = [side.name for side in self.sides]
        assert len(set(names)) == len(names), f"{self.key}: two sides of one name"
        assert all(side.amount > 0 for side in self.sides), f"{self.key}: a side without work"
        assert self.clock in CLOCKS and self.turns > 0, f"{self.key}: clock {self.clock!r}, {self.turns} turns"
        others = {target.side for target in self.targets if target.side is not None}
        if names:  # empty for a row read from a file, whose measurements are in its `Result`
            assert others <= set(names[1:]), f"{self.key}: a target for a side that is not there"


@dataclass(frozen=True)
class Measured:
    """Measurements of a side. `seconds` is per unit of work; `ratio` is our speedup over this side."""

    name: str
    settings: str
    libraries: tuple[str, ...]
    error: float | None
    counts: bool  # whether its result agrees with ours
    seconds: tuple[float, float, float]  # median, minimum, maximum
    ratio: tuple[float, float, float] | None  # median, minimum, maximum over turns; None for ours

    @property
    def per_second(self) -> float:
        return 1 / self.seconds[0]


@dataclass(frozen=True)
class Result:
    """A measured row."""

    row: Row = field(repr=False)
    sides: tuple[Measured, ...]

    def met(self, target: Target) -> bool:
        """Return whether our median reaches the target. False if the side of the target is not valid."""
        ours = self.sides[0]
        if target.most_seconds is not None:
            return ours.seconds[0] <= target.most_seconds
        if target.least_per_second is not None:
            return ours.per_second >= target.least_per_second
        (side,) = (side for side in self.sides if side.name == target.side)
        assert side.ratio is not None and target.ratio is not None
        return side.counts and side.ratio[0] >= target.ratio


def measure(row: Row, told: Callable[[str], None] = lambda what: None) -> Result:
    """Run the sides in turns; the first turn of each is a warm-up. `told` receives progress messages."""
    clock = CLOCKS[row.clock]
    seconds: dict[str, list[float]] = {side.name: [] for side in row.sides}
    for turn in range(row.turns + 1):
        for side in row.sides:
            told(f"{row.key}: turn {turn} of {row.turns}, {side.name}")
            started = clock()
            done = side.work()
            spent = done.seconds if isinstance(done, Spent) else clock() - started
            if turn:
                seconds[side.name].append(spent / side.amount)
    ours = seconds[row.sides[0].name]
    return Result(row, tuple(_measured(row, side, seconds[side.name], ours) for side in row.sides))


def _measured(row: Row, side: Side, seconds: Sequence[float], ours: Sequence[float]) -> Measured:
    first = side is row.sides[0]
    ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
    agrees = first or (side.error is not None and math.isfinite(side.error) and side.error <= row.tolerance)
    ratio = None if first else _spread(ratios)
    return Measured(side.name, side.settings, side.libraries, side.error, agrees, _spread(seconds), ratio)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def best_of(sizes: Sequence[int], work: Callable[[int], object]) -> int:
    """Return the fastest batch size of a side, from one warm run each. Peers are measured at their best size."""
    seconds = {}
    for size in sizes:
        work(size)
        started = time.perf_counter()
        work(size)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


RowsOf = Callable[[Setting], Iterator[Row]]
"""Type of the function `rows` in each module of `benchmarks.rows`; it builds each row lazily."""
