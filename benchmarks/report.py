"""The table as Markdown: machine, rate, ratio and error of each side, and the targets reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.comparison import Measured, Result, Row, Target
from benchmarks.table import Entry, Table

COMMAND = "python -m benchmarks"
_COLUMNS = (
    "work",
    "side",
    "settings and versions",
    "precision",
    "rate",
    "times as fast",
    "first turn",
    "of it compiling",
    "memory",
    "error",
    "target",
)

_NUMBERS = ("rate", "first turn", "of it compiling", "memory", "error")  # aligned to the right


def render(table: Table) -> str:
    """Return the whole document, with one table for each machine (usually one)."""
    lines = ["# Side by side with what people use", ""]
    if table.quick:
        lines += ["**A quick run, which shows that everything runs and agrees. Its times say nothing.**", ""]
    lines += [
        "Rates are medians of alternated turns at the same work. Ours, in bold, is so many times as fast as others:",
        "the median of the turns' ratios, and their range. A side whose results differ from ours by more than the row",
        "tolerates does not count. Rows that step or embed have other proteins in each turn; the seconds of the first",
        "turn, the part of them that the same proteins do not take again, and the largest memory that the turns added",
        "have their own columns.",
        "",
        _faster(table),
        "",
    ]
    used = list(dict.fromkeys(entry.machine for entry in table.entries.values()))
    for number, name in enumerate(used, 1):
        entries = [entry for entry in table.entries.values() if entry.machine == name]
        lines += _part(table.machines[name], entries, number if len(used) > 1 else None)
    if not table.entries:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join(lines)


def _faster(table: Table) -> str:
    """Return a sentence that names the sides that are faster than ours."""
    results = [entry.result for entry in table.entries.values()]
    found = [
        f"{_text(side.name)} ({_text(titled(result.row))}, {figure(side.ratio[0])}x)"
        for result in results
        for side in result.sides
        if side.counts and side.ratio is not None and side.ratio[0] < 1
    ]
    return f"**Faster than ours:** {'; '.join(found) if found else 'no side that counts'}."


def _part(machine: Mapping[str, Any], entries: Sequence[Entry], number: int | None) -> Iterator[str]:
    if number is not None:
        yield from (f"## Machine {number}", "")
    yield from (f"- made by: `{_command(entries)}`", *_circumstances(machine, entries), "")
    columns = list(_COLUMNS)
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---:' if name in _NUMBERS else '---' for name in columns)}|"
    for entry in entries:
        for place, side in enumerate(entry.result.sides):
            yield f"| {' | '.join(_cells(entry, side, place == 0, machine['versions']))} |"
    yield from ("", "### Targets", "")
    yield from _targets(entries)
    yield from ("", "### What is compared", "")
    for entry in entries:
        yield from _compared(entry.result)
    yield ""


def _command(entries: Sequence[Entry]) -> str:
    device = entries[0].device
    return COMMAND if device == "cpu" else f"{COMMAND} --device {device}"


def _circumstances(machine: Mapping[str, Any], entries: Sequence[Entry]) -> Iterator[str]:
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    yield f"- machine: {gpu}{machine['processor']}, {machine['cores']} cores, {machine['capability']}, " + (
        f"{machine['memory_gb']} GB, {machine['system']}; PyTorch uses {threads}"
    )
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    yield f"- versions: Python {machine['python']}, {versions}"
    states = list(dict.fromkeys(_state(entry) for entry in entries))
    dates = sorted({entry.date[:10] for entry in entries})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    loads = [entry.load for entry in entries]
    yield f"- measured: {when}, {'; '.join(states)}; load average beforehand {min(loads):g} to {max(loads):g}"


def _state(entry: Entry) -> str:
    commit, clean = entry.source["commit"], entry.source["clean"]
    if commit is None:
        return "our code without its history"
    return f"our commit {commit}" + ("" if clean else " with changes")


# --- the table --------------------------------------------------------------------------------------------------------


def _cells(entry: Entry, side: Measured, first: bool, versions: Mapping[str, str]) -> Iterator[str]:
    row, result = entry.result.row, entry.result
    yield _text(row.title) if first else ""
    yield f"**{_text(side.name)}**" if first else _text(side.name)
    named = [f"{library} {versions.get(library, '?')}" for library in side.libraries]
    yield _text("; ".join(filter(None, [side.settings, ", ".join(named)])))
    yield _text(row.precision)
    rate = _rate(result, side)
    yield f"**{rate}**" if first else rate
    yield _ratio(side)
    yield from _warm_up(side)
    yield "" if first else _error(side)
    mine = [target for target in row.targets if target.side == (None if first else side.name)]
    yield "; ".join(f"{_wanted(result, target)}: {'met' if result.met(target) else '**missed**'}" for target in mine)


def _rate(result: Result, side: Measured) -> str:
    row = result.row
    if row.seconds_matter:
        return f"{figure(side.seconds[0])} s" if row.unit == "" else f"{figure(side.seconds[0])} s a {_text(row.unit)}"
    return f"{figure(side.per_second)} {_text(plural(row.unit))}/s"


def plural(unit: str) -> str:
    """Return the plural of a unit: `unpadded tokens`, `MB of text`."""
    return unit if " of " in unit or unit.endswith("s") else f"{unit}s"


def _ratio(side: Measured) -> str:
    if side.ratio is None:
        return ""
    median, least, most = map(figure, side.ratio)
    text = f"{median} ({least}-{most})"
    return text if side.counts else f"does not count: {'no error given' if side.error is None else 'error too large'}"


def _warm_up(side: Measured) -> Iterator[str]:
    yield "" if side.first is None else f"{figure(side.first)} s"
    yield "" if side.compiling is None else f"{figure(side.compiling)} s"
    yield "" if side.memory is None else f"{side.memory / 2**20:,.0f} MiB"


def _error(side: Measured) -> str:
    return "none given" if side.error is None else "0" if side.error == 0 else f"{side.error:.1e}"


def titled(row: Row) -> str:
    """Return a row's title with its precision if it has one; rows may differ in precision only."""
    return row.title if row.precision == "-" else f"{row.title}, {row.precision}"


def _wanted(result: Result, target: Target) -> str:
    row = result.row
    if target.ratio is not None:
        return f"at least {target.ratio:g}x"
    if target.most_seconds is not None:
        return f"at most {target.most_seconds:g} s"
    assert target.least_per_second is not None
    return f"at least {figure(target.least_per_second)} {_text(plural(row.unit))}/s"


def figure(value: float) -> str:
    """Format with three significant digits, and all digits before the decimal point: 6,701; 14.3; 0.021."""
    if value != 0 and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.2e}"
    digits = 0
    while digits < 7 and abs(value) * 10**digits < 99.95 and value != 0:
        digits += 1
    return f"{value:,.{min(digits, 6)}f}"


def _text(text: str) -> str:
    """Escape a text for a table cell: no line breaks and no vertical bars."""
    return " ".join(text.split()).replace("|", "\\|")


# --- below it ---------------------------------------------------------------------------------------------------------


def _targets(entries: Sequence[Entry]) -> Iterator[str]:
    found = False
    for entry in entries:
        for target in entry.result.row.targets:
            found = True
            yield f"- {_verdict(entry.result, target)}"
    if not found:
        yield "None of these rows has one."


def _verdict(result: Result, target: Target) -> str:
    row, ours = result.row, result.sides[0]
    work = _text(titled(row))
    word = "met" if result.met(target) else "**missed**"
    if target.side is None:
        got = f"{figure(ours.seconds[0])} s" if target.most_seconds is not None else _rate(result, ours)
        return f"{word}: {work}: {got}; wanted {_wanted(result, target)}"
    (side,) = (side for side in result.sides if side.name == target.side)
    got = f"{figure(side.ratio[0])}x" if side.ratio is not None and side.counts else _ratio(side)
    return f"{word}: {work}, against {_text(side.name)}: {got}; wanted {_wanted(result, target)}"


def _compared(result: Result) -> Iterator[str]:
    row = result.row
    clock = "seconds by the clock" if row.clock == "wall" else "CPU seconds of all cores together"
    turns = f"{row.turns} turn{'s' if row.turns != 1 else ''}"
    yield f"- {_text(row.title)} (`{row.key}`), {clock}, {turns}. Error: {_text(row.parity)}; tolerated " + (
        f"{row.tolerance:g}. {_text(row.note)}".rstrip()
    )
