"""Definition of a row of the table, and its measurement: all sides take turns at the same work.

A row compares our side with other sides at one benchmark. It states the error of their results relative to ours, and
the target ratios. Sides alternate, so that other load on the machine affects all sides equally. Where shapes of inputs
matter, each turn has fresh inputs, as in a real run. The report gives medians of the turns and of their ratios, with
the range.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
class Inputs:
    """Inputs of one turn, drawn before its clock starts."""

    value: Any
    amount: float  # units of work in it


@dataclass(frozen=True)
class Side:
    """One implementation of the work."""

    name: str  # "Hugging Face, sorted by length"
    work: Callable[..., object]  # one turn; returns after all work is done (GPU synchronized), optionally a `Spent`
    amount: float = 0.0  # units of work in a turn without `draw`; slow sides may do less
    settings: str = ""  # "bf16 autocast, SDPA, 8 at a time, its best of 1 to 32"
    error: float | None = None  # error of its result relative to ours, as the row's `parity` defines it; None for ours
    libraries: tuple[str, ...] = ()  # distributions whose versions the report shows: "transformers"
    draw: Callable[[int], Inputs] | None = None  # fresh inputs of each turn, which `work` receives; 0 is the warm-up


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
        idle = [side.name for side in self.sides if (side.amount > 0) == (side.draw is not None)]
        assert not idle, f"{self.key}: sides that need either an amount or inputs: {idle}"
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
    first: float | None = None  # seconds of the warm-up turn; this and the next two for sides with fresh inputs only
    compiling: float | None = None  # of these, seconds that the same inputs do not take again
    memory: int | None = None  # bytes that the turns added to the resident memory of the process, at most

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
    """Run the sides in turns; the first turn of each is a warm-up. `told` receives progress messages.

    A side with fresh inputs repeats its warm-up once, on the same inputs, to measure what they take again.
    """
    watches = [_Watch(side, CLOCKS[row.clock]) for side in row.sides]
    for turn in range(row.turns + 1):
        for watch in watches:
            told(f"{row.key}: turn {turn} of {row.turns}, {watch.side.name}")
            watch.turn(turn)
    return Result(row, tuple(watch.measured(row, watches[0].seconds) for watch in watches))


class _Watch:
    """Measure one side, turn by turn."""

    def __init__(self, side: Side, clock: Callable[[], float]) -> None:
        self.side = side
        self.seconds: list[float] = []  # per unit, of each turn but the warm-up
        self._clock = clock
        self._first: float | None = None
        self._compiling: float | None = None
        self._memory = MemoryWatch()

    def turn(self, turn: int) -> None:
        inputs = self.side.draw(turn) if self.side.draw is not None else None
        spent = self._spent(inputs)
        if turn > 0:
            self.seconds.append(spent / (self.side.amount if inputs is None else inputs.amount))
        elif inputs is not None:
            self._first, self._compiling = spent, max(spent - self._spent(inputs), 0.0)

    def _spent(self, inputs: Inputs | None) -> float:
        """Return the seconds of one turn of the work."""
        with self._memory if inputs is not None else nullcontext():
            started = self._clock()
            done = self.side.work() if inputs is None else self.side.work(inputs.value)
            return done.seconds if isinstance(done, Spent) else self._clock() - started

    def measured(self, row: Row, ours: Sequence[float]) -> Measured:
        side, first = self.side, self.side is row.sides[0]
        ratios = [theirs / mine for theirs, mine in zip(self.seconds, ours, strict=True)]
        agrees = first or (side.error is not None and math.isfinite(side.error) and side.error <= row.tolerance)
        return Measured(
            name=side.name,
            settings=side.settings,
            libraries=side.libraries,
            error=side.error,
            counts=agrees,
            seconds=_spread(self.seconds),
            ratio=None if first else _spread(ratios),
            first=self._first,
            compiling=self._compiling,
            memory=self._memory.most,
        )


class MemoryWatch:
    """Bytes of resident memory that the watched blocks add to this process, at most; None where Linux does not say.

    Blocks may alternate with other work: what that work keeps or frees does not count.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._kept = 0  # by all blocks so far

    def __enter__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        self._before = _resident()

    def __exit__(self, *_: object) -> None:
        before, after = self._before, _resident()
        if before is not None and after is not None:
            self.most = max(self.most or 0, self._kept + after["VmHWM"] - before["VmRSS"])
            self._kept += after["VmRSS"] - before["VmRSS"]


def _resident() -> dict[str, int] | None:
    """Return resident memory in bytes: VmRSS now, VmHWM the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()} if len(found) == 2 else None


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
