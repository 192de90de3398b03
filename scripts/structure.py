"""Print the structure of the package: files, lines, importers, import circles, and the files per extension example.

    python scripts/structure.py             # the package of this checkout
    python scripts/structure.py --json      # the same figures as JSON

The script parses the source with `ast` and imports nothing. Imports inside functions count. Imports under
`TYPE_CHECKING` and the lazy exports of `bionemo_esm/__init__.py` do not count.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bionemo_esm"
LAYERS = (
    "alphabet", "errors", "registry", "settings", "compat", "console", "files", "statistics", "plotting",
    "command_line", "data", "model", "inference", "finetuning", "pretraining",
)  # fmt: skip
"""Layers from the bottom up. A module imports from its own layer and from lower layers."""
PATH = (
    ("bionemo_esm/data/preprocess.py", "a FASTA record is cleaned and assigned to a split"),
    ("bionemo_esm/data/store.py", "a memory-mapped store of uint8 tokens"),
    ("bionemo_esm/data/dataloader.py", "samples of a global batch in their order, and each rank's part"),
    ("bionemo_esm/data/collate.py", "crop and pack into one row without padding"),
    ("bionemo_esm/data/masking.py", "select and corrupt residues"),
    ("bionemo_esm/model/encoder.py", "embedding, attention blocks, logits"),
    ("bionemo_esm/model/esm1nv.py", "the loss over masked positions of the global batch"),
    ("bionemo_esm/model/packed_model.py", "gradients of the micro batches, clipping, the optimizer step"),
)
"""The files from the FASTA record to the optimizer step, in order, and what happens in each."""
MAX_EXTENSION_FILES = {
    "An optimizer": 3, "A head": 2, "An embedding writer": 1, "A model family": 1, "A block": 5, "A masking rule": 1,
}  # fmt: skip
"""How many files an extension may touch, by heading of `docs/extending.md`."""
MAX_FILE_LINES, MAX_FUNCTION_LINES, SMALL_FILE_LINES, MAX_PATH_FILES = 800, 60, 80, 8
EXTENDING = Path("docs/extending.md")


@dataclass(frozen=True)
class Module:
    """A source file. `name` is dotted; imports are modules of this package."""

    name: str
    path: str
    lines: int
    top_level_imports: tuple[str, ...]
    all_imports: tuple[str, ...]
    module_strings: tuple[str, ...]  # dotted names of modules of this package in string constants
    long_functions: tuple[tuple[str, int], ...]

    @property
    def layer(self) -> str:
        """Name of the layer; "" for the package's entry points."""
        return layer_of(self.name)


def layer_of(module: str) -> str:
    """Return the name of the layer; "" for entry points, which include every `__main__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS and parts[-1] != "__main__" else ""


def is_upward(source: str, target: str) -> bool:
    """Return whether `source` imports from a layer above its own. Entry points lie above all layers."""
    rank = {layer: index for index, layer in enumerate(LAYERS)}
    return bool(layer_of(source)) and rank.get(layer_of(target), len(LAYERS)) > rank[layer_of(source)]


class Structure:
    """The modules of a package below `root`, with figures derived from their imports."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        paths = sorted((root / PACKAGE).rglob("*.py"))
        names = {_module_name(path.relative_to(root)): path for path in paths}
        self.modules = {name: _read_module(name, path, root, set(names)) for name, path in names.items()}

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """Other modules that import a module, by module, without the package's `__init__`."""
        found: dict[str, set[str]] = {name: set() for name in self.modules}
        for module in self.modules.values():
            for target in module.all_imports if module.name != PACKAGE else ():
                found[target].add(module.name)
        return found

    def single_importer(self) -> list[str]:
        return [name for name, importers in self.importers.items() if len(importers) == 1]

    def small_files(self) -> list[str]:
        """Return the paths of small files, without the `__init__.py` of packages."""
        return [
            module.path
            for module in self.modules.values()
            if module.lines <= SMALL_FILE_LINES and not module.path.endswith("__init__.py")
        ]

    def large_files(self) -> list[tuple[str, int]]:
        return [(module.path, module.lines) for module in self.modules.values() if module.lines > MAX_FILE_LINES]

    def long_functions(self) -> list[tuple[str, int]]:
        return [
            (f"{module.path}:{name}", lines)
            for module in self.modules.values()
            for name, lines in module.long_functions
        ]

    def lines_per_layer(self) -> dict[str, int]:
        """Return lines per layer, from the top down; "" is for the package's entry points."""
        lines: Counter[str] = Counter()
        for module in self.modules.values():
            lines[module.layer] += module.lines
        return {layer: lines[layer] for layer in ("", *reversed(LAYERS)) if lines[layer]}

    def circles(self, top_level_only: bool) -> list[list[str]]:
        """Return groups of modules that import each other, directly or indirectly."""
        imports = {
            module.name: module.top_level_imports if top_level_only else module.all_imports
            for module in self.modules.values()
        }
        return [sorted(group) for group in _strongly_connected(imports) if len(group) > 1]

    def upward_imports(self) -> list[tuple[str, str]]:
        return [
            (module.name, target)
            for module in self.modules.values()
            for target in module.all_imports
            if target != PACKAGE and is_upward(module.name, target)
        ]

    def upward_strings(self) -> list[tuple[str, str]]:
        """Return strings that name modules of a higher layer, such as the argument of `import_module`."""
        return [
            (module.name, target)
            for module in self.modules.values()
            for target in module.module_strings
            if is_upward(module.name, target)
        ]

    def extension_files(self) -> dict[str, list[str]]:
        """Return the files that each extension example of `docs/extending.md` writes, in order, by example."""
        page = self.root / EXTENDING
        return files_per_example(page.read_text()) if page.is_file() else {}


def files_per_example(markdown: str) -> dict[str, list[str]]:
    """Return the files that each example writes or changes, by heading, omitting sections that write no file.

    They are the titles of code blocks and the paths of numbered lists. The entry point in pyproject.toml, which names
    an installed part, does not count.
    """
    examples = {}
    for section in re.split(r"^##+ ", markdown, flags=re.M)[1:]:
        files = re.findall(r'^```\w+ title="([^"]+)"|^\d\. `([^`]+)`:', section, re.M)
        if names := [name for pair in files for name in pair if name and name != "pyproject.toml"]:
            examples[section.splitlines()[0]] = list(dict.fromkeys(names))
    return examples


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read_module(name: str, path: Path, root: Path, known: set[str]) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    everywhere, top_level = [], []
    for node, inside_function in _imports(tree):
        if name == PACKAGE and inside_function:
            continue
        targets = [target for target in _targets(node, known) if target != name]
        everywhere += targets
        top_level += [] if inside_function else targets
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known - {PACKAGE}
    }
    functions = [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Module(
        name=name,
        path=str(path.relative_to(root)),
        lines=len(text.splitlines()),
        top_level_imports=tuple(sorted(set(top_level))),
        all_imports=tuple(sorted(set(everywhere))),
        module_strings=tuple(sorted(strings)),
        long_functions=tuple((name, lines) for name, lines in functions if lines > MAX_FUNCTION_LINES),
    )


def _imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield all import statements outside `if TYPE_CHECKING`, and whether each is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside_function
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _imports(ast.Module(node.orelse, []), inside_function)
        else:
            yield from _imports(node, inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _targets(node: ast.Import | ast.ImportFrom, known: set[str]) -> Iterable[str]:
    """Yield the modules of this package that a statement imports; `from package import module` is that module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    base = node.module or ""
    submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in known]
    return submodules + ([base] if base in known and len(submodules) < len(node.names) else [])


def _strongly_connected(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return sets of nodes that reach each other. Pairwise reachability is fast enough for about 150 nodes."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in set(graph[waiting.pop()]) - seen:
                seen.add(target)
                waiting.append(target)
        reachable[start] = seen
    groups: list[set[str]] = []
    for node in graph:
        group = {node} | {other for other in reachable[node] if node in reachable[other]}
        if group not in groups:
            groups.append(group)
    return groups


def figures(structure: Structure) -> dict[str, object]:
    """Return all figures as plain values."""
    modules = structure.modules.values()
    return {
        "files": len(modules),
        "lines": sum(module.lines for module in modules),
        "lines_per_layer": structure.lines_per_layer(),
        "one_importer": structure.single_importer(),
        f"files_of_{SMALL_FILE_LINES}_lines_or_less": structure.small_files(),
        f"files_over_{MAX_FILE_LINES}_lines": structure.large_files(),
        f"functions_over_{MAX_FUNCTION_LINES}_lines": structure.long_functions(),
        "circles_at_module_level": structure.circles(top_level_only=True),
        "circles_with_imports_in_functions": structure.circles(top_level_only=False),
        "upward_imports": structure.upward_imports(),
        "upward_strings": structure.upward_strings(),
        "path": [path for path, _ in PATH],
        "files_per_extension_example": structure.extension_files(),
    }


def report(structure: Structure) -> str:
    """Return the figures as text."""
    modules = structure.modules.values()
    lines = [f"{len(modules)} files, {sum(module.lines for module in modules):,} lines"]
    lines += ["", "Lines per layer"]
    lines += [f"  {count:6,}  {layer or '(entry points)'}" for layer, count in structure.lines_per_layer().items()]
    lines += [
        "",
        f"{len(structure.single_importer()):4d}  modules with exactly one importer",
        f"{len(structure.small_files()):4d}  files of {SMALL_FILE_LINES} lines or less",
    ]
    for name, found in (
        (f"files over {MAX_FILE_LINES} lines", [f"{path} ({count})" for path, count in structure.large_files()]),
        (f"functions over {MAX_FUNCTION_LINES} lines", [f"{at} ({n})" for at, n in structure.long_functions()]),
        ("import circles at module level", [" <-> ".join(group) for group in structure.circles(True)]),
        ("import circles with those in functions", [" <-> ".join(group) for group in structure.circles(False)]),
        ("upward imports", [f"{source} -> {target}" for source, target in structure.upward_imports()]),
        ("upward names in strings", [f"{source} -> {target}" for source, target in structure.upward_strings()]),
    ):
        lines += [f"{len(found):4d}  {name}", *(f"        {entry}" for entry in found)]
    lines += ["", f"{len(PATH)} files from the FASTA record to the optimizer step"]
    lines += [f"  {number}. {path}: {what}" for number, (path, what) in enumerate(PATH, start=1)]
    lines += ["", f"Files per extension example of {EXTENDING}"]
    for name, files in structure.extension_files().items():
        lines.append(f"  {len(files)} of at most {MAX_EXTENSION_FILES[name]}  {name}: {', '.join(files)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the structure of the package.")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to read (default: this one)")
    arguments = parser.parse_args()
    structure = Structure(arguments.root.resolve())
    sys.stdout.write(json.dumps(figures(structure), indent=2) if arguments.json else report(structure))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
