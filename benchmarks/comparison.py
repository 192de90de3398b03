"""What a row of the table is, and how it is measured: all sides take turns at the same work.

A row compares our side with others at one piece of work, says how far their results are from ours, and what we want the
ratio to be. Turns alternate, so that whatever else the machine does meets all sides alike; reported are medians of the
turns and of their ratios, with the range.
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
    """Where and how large: what every module of rows is told."""

    folder: Path  # for files of the benchmark's own; removed afterwards
    device: str = "cpu"  # or "cuda"
    quick: bool = False  # tiny sizes, which show that a row runs and that its sides agree; its times say nothing
    fasta: Path | None = None  # real proteins to work on; None: the shipped sample


@dataclass(frozen=True)
class Spent:
    """What a turn returns of which not the whole time counts: the seconds that do."""

    seconds: float


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str  # "Hugging Face, sorted by length"
    work: Callable[[], object]  # a turn; returns once everything is done (on a GPU, waited for), or what counts of it
    amount: float  # units of work in a turn: of a slow side less may be asked
    settings: str = ""  # "bf16 autocast, SDPA, 8 at a time, its best of 1 to 32"
    error: float | None = None  # how far its result is from ours, in the row's `parity`; None for ours
    libraries: tuple[str, ...] = ()  # distributions whose versions belong beside it: "transformers"


@dataclass(frozen=True)
class Target:
    """What we want: so many times as fast as a side, at most so many seconds a unit, or at least so many a second."""

    side: str | None = None  # its name, for `ratio`
    ratio: float | None = None
    most_seconds: float | None = None
    least_per_second: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.ratio, self.most_seconds, self.least_per_second) if value is not None]
        assert len(given) == 1 and given[0] > 0, "a target is one figure"
        assert (self.side is None) == (self.ratio is None), "a ratio is to a side"


@dataclass(frozen=True)
class Row:
    """A piece of work and the sides that do it; the first is ours."""

    key: str  # "train-esm1nv-bf16": names it on the command line
    title: str  # "Training step, ESM-1nv"
    unit: str  # what `amount` counts: "unpadded token"
    precision: str  # "float32", or "-" where nothing is rounded
    sides: Sequence[Side]
    parity: str  # what `error` is: "largest difference of the loss, relative"
    tolerance: float  # a side with a larger error does not count
    targets: Sequence[Target] = ()
    clock: str = "wall"  # or "cpu": seconds of this process on all its cores
    turns: int = 5
    seconds_matter: bool = False  # shown as seconds a unit, not units a second
    note: str = ""

    def __post_init__(self) -> None:
        names = [side.name for side in self.sides]
        assert len(set(names)) == len(names), f"{self.key}: two sides of one name"
        assert all(side.amount > 0 for side in self.sides), f"{self.key}: a side without work"
        assert self.clock in CLOCKS and self.turns > 0, f"{self.key}: clock {self.clock!r}, {self.turns} turns"
        others = {target.side for target in self.targets if target.side is not None}
        if names:  # a row read back from a file has none: what they measured is in its `Result`
            assert others <= set(names[1:]), f"{self.key}: a target for a side that is not there"


@dataclass(frozen=True)
class Measured:
    """A side after its turns. `seconds` are of one unit of work; `ratio` is by how much ours is faster."""

    name: str
    settings: str
    libraries: tuple[str, ...]
    error: float | None
    counts: bool  # whether it agrees with ours
    seconds: tuple[float, float, float]  # median, least, most
    ratio: tuple[float, float, float] | None  # median, least, most of the turns' ratios; None for ours

    @property
    def per_second(self) -> float:
        return 1 / self.seconds[0]


@dataclass(frozen=True)
class Result:
    """A measured row."""

    row: Row = field(repr=False)
    sides: tuple[Measured, ...]

    def met(self, target: Target) -> bool:
        """Whether our median reaches it; a side that does not count meets nothing."""
        ours = self.sides[0]
        if target.most_seconds is not None:
            return ours.seconds[0] <= target.most_seconds
        if target.least_per_second is not None:
            return ours.per_second >= target.least_per_second
        (side,) = (side for side in self.sides if side.name == target.side)
        assert side.ratio is not None and target.ratio is not None
        return side.counts and side.ratio[0] >= target.ratio


def measure(row: Row, told: Callable[[str], None] = lambda what: None) -> Result:
    """Let the sides take turns; the first turn of each is not counted. `told` is what goes on, for a screen."""
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
    """The size at which a side is fastest, tried once warm each: peers run at their best setting."""
    seconds = {}
    for size in sizes:
        work(size)
        started = time.perf_counter()
        work(size)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


RowsOf = Callable[[Setting], Iterator[Row]]
"""What a module of `benchmarks.rows` has under the name `rows`: its rows, each built when it is asked for."""
