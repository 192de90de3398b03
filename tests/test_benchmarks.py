"""Tests of benchmark measurement and output: turns, ratios, agreement, the table as text and file, the chart."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks import machine as machines
from benchmarks.chart import draw, shown
from benchmarks.comparison import Inputs, MemoryWatch, Result, Row, Side, Target, measure
from benchmarks.report import figure, render
from benchmarks.table import Entry, Table, TableError


def a_row(clock: str = "wall", error: float | None = 0.0, *targets: Target) -> Row:
    sides = (Side("ours", lambda: None, 1.0), Side("theirs", lambda: None, 1.0, error=error))
    return Row("key", "Some work", "token", "float32", sides, "the loss", 1e-3, targets, clock)


def a_table(*results: Result) -> Table:
    of = {"processor": "CPU", "cores": 2, "threads": 2, "capability": "AVX2", "memory_gb": 24, "gpu": None}
    of |= {"system": "Linux x86_64", "python": "3.11.7", "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}
    table = Table(machines={"m": of})
    for result in results:
        source = {"commit": "abcdef0123", "clean": True}
        table.put(Entry("toy", "cpu", "identity", "m", "2026-11-22T10:00:00+00:00", source, 0.1, result))
    return table


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """Return a function that makes a row whose sides take the given seconds in each turn, on a fake clock."""
    now = [0.0]
    monkeypatch.setitem(comparison.CLOCKS, "told", lambda: now[0])  # type: ignore[arg-type]

    def row(ours: list[float], theirs: list[float], amounts: tuple[float, float] = (1.0, 1.0)) -> Row:
        left = iter(ours), iter(theirs)

        def turn(side: int) -> None:
            now[0] += next(left[side])

        sides = [
            Side(name, lambda side=side: turn(side), amounts[side], error=0.0)  # type: ignore[misc]
            for side, name in enumerate(("ours", "theirs"))
        ]
        return replace(a_row("told"), sides=sides, turns=len(ours) - 1)

    return row


def test_medians_and_ratios_are_per_turn_without_the_warm_up(works: Callable[..., Row]) -> None:
    ours, theirs = measure(works([99, 1, 2, 4], [1, 10, 10, 80])).sides
    assert ours.seconds == (2, 1, 4)
    assert theirs.seconds == (10, 10, 80)
    assert theirs.ratio == (10, 5, 20)  # of the turns: 10, 5, 20; not of the medians
    assert ours.ratio is None


def test_side_that_does_less_work_is_compared_per_unit(works: Callable[..., Row]) -> None:
    ours, theirs = measure(works([1, 1], [1, 1], amounts=(200.0, 4.0))).sides
    assert (ours.per_second, theirs.per_second) == (200, 4)
    assert theirs.ratio == (50, 50, 50)


def test_sides_alternate_turn_by_turn() -> None:
    order: list[str] = []
    sides = [Side(name, lambda name=name: order.append(name), 1.0) for name in "ab"]  # type: ignore[misc]
    measure(replace(a_row(), sides=sides, turns=2))
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("error", [2e-3, math.nan, math.inf, -math.inf, None])
def test_side_that_disagrees_does_not_count_and_meets_no_target(works: Callable[..., Row], error: object) -> None:
    row = works([1, 1], [50, 50])
    target = Target("theirs", ratio=5)
    row = replace(row, sides=[row.sides[0], replace(row.sides[1], error=error)], targets=[target])
    result = measure(row)
    assert not result.sides[1].counts
    assert not result.met(target)
    table = a_table(result)
    text = render(table)
    assert "does not count" in text
    assert "**missed**: Some work" in text
    assert "50.0" not in text  # its ratio does not appear
    assert not shown(next(iter(table.entries.values())))


def test_each_turn_draws_its_inputs_before_the_clock_starts(works: Callable[..., Row]) -> None:
    row = works([9, 5, 1, 8], [7, 7, 2, 4])  # the warm-up twice, then two turns; amounts 10 and 20
    drawn: list[tuple[str, int]] = []
    received: list[tuple[str, int]] = []

    def fresh(side: Side) -> Side:
        def draw(turn: int) -> Inputs:
            drawn.append((side.name, turn))
            return Inputs(turn, 10.0 * max(turn, 1))

        def work(turn: int) -> None:
            received.append((side.name, turn))
            side.work()

        return replace(side, work=work, amount=0.0, draw=draw)

    result = measure(replace(row, sides=[fresh(side) for side in row.sides], turns=2))
    assert drawn == [(name, turn) for turn in range(3) for name in ("ours", "theirs")]
    assert received == [("ours", 0)] * 2 + [("theirs", 0)] * 2 + drawn[2:]
    ours, theirs = result.sides
    assert (ours.first, ours.compiling) == (9, 4)
    assert (theirs.first, theirs.compiling) == (7, 0)
    assert ours.seconds == (0.25, 0.1, 0.4)  # 1 / 10 and 8 / 20
    assert theirs.ratio == (1.25, 0.5, 2)
    table = a_table(result)
    assert "| 9.00 s | 4.00 s |" in render(table)


def test_memory_that_other_work_keeps_or_frees_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(
        [
            *({"VmRSS": 100, "VmHWM": 100}, {"VmRSS": 110, "VmHWM": 130}),  # keeps 10, at most 30 more
            *({"VmRSS": 500, "VmHWM": 500}, {"VmRSS": 505, "VmHWM": 525}),  # other work kept 390; this keeps 5, 25 more
            *({"VmRSS": 50, "VmHWM": 50}, {"VmRSS": 60, "VmHWM": 60}),
        ]
    )
    monkeypatch.setattr(comparison, "_resident", lambda: next(readings))
    watch, most = MemoryWatch(), []
    for _ in range(3):
        with watch:
            pass
        most.append(watch.most)
    assert most == [30, 10 + 25, 35]


def test_table_names_what_is_faster_first(works: Callable[..., Row]) -> None:
    faster, slower = measure(works([1, 2], [1, 1])), measure(works([1, 1], [1, 2]))
    table = a_table(faster, replace(slower, row=replace(slower.row, key="slower", title="Other work")))
    (line,) = (line for line in render(table).splitlines() if line.startswith("**Faster"))
    assert line == "**Faster than ours:** theirs (Some work, float32, 0.500x)."


def test_targets_are_met_by_medians(works: Callable[..., Row]) -> None:
    result = measure(works([1, 1, 2, 3], [1, 9, 10, 11]))
    for target, met in (
        (Target("theirs", ratio=5), True),
        (Target("theirs", ratio=5.01), False),
        (Target(most_seconds=2), True),
        (Target(most_seconds=1.99), False),
        (Target(least_per_second=0.5), True),
        (Target(least_per_second=0.51), False),
    ):
        assert result.met(target) is met, target


def test_inconsistent_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="not there"):
        a_row("wall", 0.0, Target("nobody", ratio=2))
    with pytest.raises(AssertionError, match="one name"):
        replace(a_row(), sides=[a_row().sides[0]] * 2)
    with pytest.raises(AssertionError, match="one figure"):
        Target("theirs", ratio=2, most_seconds=3)


# --- table and chart --------------------------------------------------------------------------------------------------


def test_table_survives_saving_and_loading_unchanged(works: Callable[..., Row], tmp_path: Path) -> None:
    rows = [works([1, 1 / 3, 2], [1, 7, math.pi]), replace(works([1, 1], [1, 2]), key="nan", note="x|y")]
    rows[0] = replace(rows[0], targets=[Target("theirs", ratio=2), Target(most_seconds=1)])
    rows[1] = replace(rows[1], sides=[rows[1].sides[0], replace(rows[1].sides[1], error=math.nan)])
    table = a_table(*map(measure, rows))
    table.save(tmp_path / "table.json")
    back = Table.load(tmp_path / "table.json")
    assert render(back) == render(table)
    for place, entry in table.entries.items():
        for one, other in zip(entry.result.sides, back.entries[place].result.sides, strict=True):
            assert repr(one) == repr(other)  # every digit; NaN is not equal to itself
    text = (tmp_path / "table.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back.save(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == text


def test_table_states_sides_machine_settings_and_error(works: Callable[..., Row]) -> None:
    row = works([1, 1, 1], [1, 3, 6], amounts=(1000.0, 1000.0))
    side = replace(row.sides[1], settings="SDPA, 8 at a time", error=2.5e-4, libraries=("transformers",))
    text = render(a_table(measure(replace(row, sides=[row.sides[0], side], targets=[Target("theirs", ratio=4)]))))
    assert "| Some work | **ours** |  | float32 | **1,000 tokens/s** |" in text
    line = "|  | theirs | SDPA, 8 at a time; transformers 5.23.0 | float32 | 222 tokens/s | 4.50 (3.00-6.00) |"
    assert f"{line}  |  |  | 2.5e-04 | at least 4x: met |" in text
    for part in ("CPU, 2 cores", "torch 2.13.0", "2026-11-22", "our commit abcdef0123", "Error: the loss; tolerated"):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(6701.4, "6,701"), (14.32, "14.3"), (0.02134, "0.0213"), (1.0, "1.00"), (0, "0"), (3e-7, "3.00e-07")],
)
def test_figures_have_three_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_invalid_table_file_is_named_in_the_error(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"schema": "bionemo_esm/benchmarks/1"}'):
        (tmp_path / "table.json").write_text(content)
        with pytest.raises(TableError, match=r"table\.json.*move it away"):
            Table.load(tmp_path / "table.json")
    a_table().save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    (tmp_path / "table.json").write_text(text.replace("benchmarks/1", "benchmarks/0"))
    with pytest.raises(TableError, match="of another version"):
        Table.load(tmp_path / "table.json")


def test_chart_has_the_same_bytes_each_time(works: Callable[..., Row], tmp_path: Path) -> None:
    faster, slower = measure(works([1, 1, 1], [1, 9, 11])), measure(works([1, 5, 6], [1, 1, 1]))
    table = a_table(faster, replace(slower, row=replace(slower.row, key="slower")))
    first, second = draw(table, tmp_path / "a.png").read_bytes(), draw(table, tmp_path / "b.png").read_bytes()
    assert first == second
    assert first != draw(a_table(faster), tmp_path / "c.png").read_bytes()


def test_chart_shows_the_fastest_side_and_those_with_a_target(works: Callable[..., Row]) -> None:
    measured = measure(works([1, 1], [1, 1]))
    ours, theirs = measured.sides
    others = tuple(replace(theirs, name=f"{ratio}", ratio=(ratio, ratio, ratio)) for ratio in range(1, 9))
    row = replace(measured.row, sides=(), targets=[Target("8", ratio=2)])
    (entry,) = a_table(Result(row, (ours, *others))).entries.values()
    assert [side.name for side in shown(entry)] == ["1", "8"]


# --- machine ----------------------------------------------------------------------------------------------------------


def test_code_hash_of_rows_covers_the_package_and_their_own_module_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (
        "bionemo_esm/model/encoder.py",
        "conf/model/esm1nv.yaml",
        "benchmarks/comparison.py",
        "benchmarks/chart.py",
    )
    files += ("benchmarks/rows/training.py", "benchmarks/rows/store.py", "benchmarks/rows/shared.py")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(machines, "ROOT", tmp_path)
    before = machines.code_of("benchmarks.rows.training")
    changes = []
    for name in files:
        (tmp_path / name).write_text("after")
        machines.hash_of.cache_clear()
        changes.append(machines.code_of("benchmarks.rows.training") != before)
        (tmp_path / name).write_text("before")
    assert changes == [True, True, True, False, True, False, True]


def test_machine_description_contains_no_host_name_and_no_path() -> None:
    here = machines.machine("cpu")
    assert here["cores"] >= 1
    assert here["versions"]["torch"]
    text = json.dumps([here, machines.source()])
    assert socket.gethostname() not in text
    assert "/" not in text.replace(here["processor"], "")
