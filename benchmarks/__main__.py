"""Command line: measure the selected rows, each module in its own process, and write the table."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.comparison import Setting
from benchmarks.machine import ROOT, code_of, hash_of, installed, is_idle, load, machine, source
from benchmarks.report import render, titled
from benchmarks.rows import MODULES, Module
from benchmarks.running import messages_of
from benchmarks.table import Entry, Table, result_of
from bionemo_esm.console import Console, duration, run_to_exit_code, sigterm_as_exit
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, check_writable

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "speed.png"
_GOES_ON = "stopped; what has been measured is kept, and the same command goes on"
_SECONDS_BETWEEN_LINES = 10.0  # of progress, if the output is not a terminal


@dataclass(frozen=True)
class Order:
    """Validated command-line options."""

    modules: dict[str, Module]
    setting: Setting  # `folder` is the parent of temporary folders
    output: Path
    again: bool

    @property
    def picture(self) -> Path:
        return PICTURE if self.output == RESULTS else self.output / "speed.png"


def parser() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {name:<12}{module.what}" for name, module in MODULES.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Measure side by side with what people use, and write a table.\n\nmodules of rows:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("modules", nargs="*", help="which rows to measure (default: all)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--fasta", type=Path, help="real proteins to work on (default: the shipped sample)")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs and agrees; no timings")
    made.add_argument("--output", type=Path, help="folder of table.md and table.json (default: benchmarks/results)")
    made.add_argument("--again", action="store_true", help="measure rows anew that are there already")
    made.add_argument("--table", action="store_true", help="measure nothing; write the table from table.json again")
    return made


def order_of(options: argparse.Namespace, modules: dict[str, Module], folder: Path) -> Order:
    """Return the validated options. Raises `ConfigError` for unusable options, before any process starts."""
    unknown = [name for name in options.modules if name not in modules]
    if unknown:
        raise ConfigError(f"there are no rows {', '.join(unknown)}; there are {', '.join(modules)}")
    chosen = {name: module for name, module in modules.items() if name in options.modules or not options.modules}
    for name, module in chosen.items() if not options.table else ():
        missing = [library for library in module.libraries if installed(library) is None]
        if missing:
            raise ConfigError(
                f"{name}: {' and '.join(missing)} not installed, which it is compared with; "
                f"pip install -c constraints.txt {' '.join(missing)}, or name the rows to measure"
            )
    if options.fasta is not None:
        if not options.fasta.is_file():
            raise ConfigError(f"--fasta: there is no file {options.fasta}")
        next(iter(read_fasta(options.fasta)))
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it away to measure on the CPU")
    output = (options.output or (folder / "quick" if options.quick else RESULTS)).resolve()
    if options.quick and output == RESULTS:
        raise ConfigError("--quick: its times say nothing, and do not belong there; choose another --output")
    check_writable("--output", output / "table.md")
    fasta = None if options.fasta is None else options.fasta.resolve()
    return Order(chosen, Setting(folder, options.device, options.quick, fasta), output, options.again)


@dataclass
class Session:
    """State of one run of the command: the table so far, and the console."""

    order: Order
    console: Console
    table: Table
    failed: list[str] = field(default_factory=list)
    _shown: float = -_SECONDS_BETWEEN_LINES

    def run(self) -> None:
        """Measure all modules. Write each row to disk as soon as it is measured."""
        here, code = machine(self.order.setting.device), source()
        name = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
        self.table.machines.setdefault(name, here)
        names = list(self.order.modules)
        for place, module in enumerate(names):
            identity = self._identity(self.order.modules[module], name)
            done = self.table.finished.get(f"{self.order.setting.device} {module}", {})
            if not self.order.again and done.get("identity") == identity:
                self.console.print_line(f"{module}: is there already (--again measures it anew)")
                continue
            circumstances = {"identity": identity, "machine": name, "source": code, "load": load()}
            self._module(module, circumstances, names[place + 1 :])
        self.table.sort(list(MODULES))

    def _identity(self, module: Module, name: str) -> str:
        setting = self.order.setting
        fasta = None if setting.fasta is None else hash_of(setting.fasta)
        what = [name, setting.device, setting.quick, fasta, module.path, code_of(module.path)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _module(self, module: str, circumstances: dict[str, Any], later: list[str]) -> None:
        order, started = self.order, time.monotonic()
        known = [] if order.again else self.table.keys(module, circumstances["identity"])
        self.console.print_line(f"{module}: {order.modules[module].what}")
        keys: set[str] = set()
        with tempfile.TemporaryDirectory(dir=order.setting.folder) as folder:
            setting = Setting(Path(folder) / "files", order.setting.device, order.setting.quick, order.setting.fasta)
            setting.folder.mkdir()
            path, log = order.modules[module].path, Path(folder) / "log"
            with closing(messages_of(path, setting, known, log)) as messages:
                for message in messages:
                    if message.kind == "told":
                        self._progress(module, message.text, started, later)
                    elif message.kind == "failed":
                        self.failed.append(module)
                        self.console.print_line(f"  {module} FAILED: {message.text}")
                    elif message.kind == "end":
                        seconds = time.monotonic() - started
                        place = module, order.setting.device, circumstances["identity"]
                        self.table.finish(*place, seconds, keys)
                        self.save()
                    else:
                        keys.add(message.text)
                        if message.row is not None:
                            self._take(module, message.row, circumstances)

    def _take(self, module: str, values: dict[str, Any], circumstances: dict[str, Any]) -> None:
        result = result_of(values)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.table.put(Entry(module, self.order.setting.device, date=date, result=result, **circumstances))
        self.save()
        against = [f"{side.ratio[0]:.3g}x {side.name}" for side in result.sides if side.ratio and side.counts]
        void = [f"{side.name} does not count" for side in result.sides if not side.counts]
        self.console.print_line(f"  {titled(result.row)}: {'; '.join([*against, *void]) or 'measured'}")

    def save(self) -> None:
        """Write all rows measured so far atomically."""
        self.table.save(self.order.output / "table.json")

    def _progress(self, module: str, text: str, started: float, later: list[str]) -> None:
        now = time.monotonic()
        if not self.console.is_terminal and now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        device, spent = self.order.setting.device, now - started
        took = [self.table.finished.get(f"{device} {name}") for name in (module, *later)]
        before = [float(found["seconds"]) for found in took if found is not None]
        line = f"  {text}; {duration(spent)} so far"
        if len(before) == len(took):  # earlier durations are known for all later modules
            line += f", about {duration(max(before[0] - spent, 0) + sum(before[1:]))} left"
        self.console.progress(line)


def write(table: Table, order: Order) -> None:
    """Write the table and the chart, each atomically."""
    with atomic_write(order.output / "table.md") as stream:
        stream.write(render(table).encode())
    draw(table, order.picture)


def job(options: argparse.Namespace, modules: dict[str, Module], console: Console) -> int:
    """Measure and write. Return the exit code: 1 if a module failed."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        order = order_of(options, modules, Path(folder))
        order.output.mkdir(parents=True, exist_ok=True)
        table = Table.load(order.output / "table.json")
        if table.entries and table.quick != order.setting.quick and not options.table:
            kind = "a quick run" if table.quick else "a real run"
            raise ConfigError(f"--output: {order.output} has the results of {kind}; choose another folder")
        if options.table:
            if not table.entries:
                raise ConfigError(f"--table: there are no results in {order.output / 'table.json'}; measure first")
            write(table, order)
            console.print_line(f"wrote {order.output / 'table.md'} and {order.picture}")
            return 0
        table.quick = order.setting.quick
        if not order.setting.quick and not is_idle():
            console.print_line(
                f"warning: load average {load():g}: other work is going on here; timings will be worth little"
            )
        session = Session(order, console, table)
        session.run()
        session.save()
        write(table, order)
        kept = options.output is not None or not options.quick
        console.print_line(f"wrote {order.output / 'table.md'} and {order.picture}" if kept else f"\n{render(table)}")
        if session.failed:
            console.print_line(f"failed: {', '.join(session.failed)}; their rows are missing or old")
        return 1 if session.failed else 0


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with sigterm_as_exit(_GOES_ON):
        run_to_exit_code(lambda: job(options, dict(MODULES), Console(sys.stdout)), _GOES_ON)


if __name__ == "__main__":
    main()
