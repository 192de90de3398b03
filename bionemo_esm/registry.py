"""Tables of named parts: optimizers, heads, writers, backends. A package outside this one can add to each.

A part registers itself where it is defined:

    @HEADS.register("mlp")
    class MLPHead(Head): ...

An installed package adds its own by an entry point in the group of the table; it is imported at the first look-up:

    [project.entry-points."bionemo_esm.heads"]
    gated = "my_package.heads:GatedHead"

Names never come from an archive or a checkpoint: a file can select a part that is installed, not import one.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from bionemo_esm.errors import ConfigError

Part = TypeVar("Part")


@dataclass(frozen=True)
class ModelModules:
    """Modules of a class of models that archives may name. They are imported when an archive names the class."""

    model: str  # the class, registered by `bionemo_esm.model.nemo_connector.register_model`
    extension: str | None = None  # its parts beside the encoder, a `bionemo_esm.model.validate.Extension`


MODEL_MODULES: dict[str, ModelModules] = {}
"""By the name of the class. `bionemo_esm/__init__.py` fills it, so that no layer names a module of a higher layer."""


class Registry(Generic[Part]):
    """A table of parts by name.

    kind: what a part is called in messages ("optimizer"); key: the configuration key that selects one
    ("optim.name"); group: the entry-point group, `bionemo_esm.<group>`, that other packages add to; part_type: the
    class that a part must be an instance or a subclass of.
    """

    def __init__(self, kind: str, key: str, group: str, part_type: type = object) -> None:
        self.kind, self.key, self.group, self.part_type = kind, key, f"bionemo_esm.{group}", part_type
        self._parts: dict[str, Part] = {}
        self._owners: dict[str, str] = {}  # of parts from other packages: the package
        self._broken: dict[str, ConfigError] = {}  # by name: why the part of an installed package cannot be used
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that adds a part under this name. Raises `ConfigError` for a name that is taken."""

        def add(part: Part) -> Part:
            if self._parts.setdefault(name, part) is not part:
                raise ConfigError(f"{self.key}: there are two {self.kind}s named {name!r}", code="registry.duplicate")
            return part

        return add

    def get(self, name: str) -> Part:
        """Return the part of this name. Raises `ConfigError` for an unknown one, and for one that cannot be used.

        The error names the key and all known names, or the package at fault. A faulty part that is not asked for does
        no harm.
        """
        if name not in self._parts or name in self._broken:
            self._load_plugins()
        if name in self._broken:
            raise self._broken[name]
        if name not in self._parts:
            raise ConfigError(
                f"{self.key} must be one of {', '.join(self)}, not {name!r}; others come with packages that add to "
                f"{self.group}",
                code="registry.unknown-name",
            )
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._parts))

    def _load_plugins(self) -> None:
        """Import the parts that installed packages add."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for entry in entry_points(group=self.group):
            owner = entry.dist.name if entry.dist else entry.value
            try:
                self._add(entry.name, owner, entry.load())
            except ConfigError as error:
                self._broken[entry.name] = error
            except Exception as error:  # the code of another package
                self._broken[entry.name] = ConfigError(
                    f"{self.kind} {entry.name!r} of the installed package {owner} cannot be imported "
                    f"({type(error).__name__}: {error}{_line_of(error)}); fix or uninstall that package",
                    code="registry.broken-plugin",
                )

    def _add(self, name: str, owner: str, part: Any) -> None:
        if name in self._parts:
            first = self._owners.get(name, "bionemo_esm")
            raise ConfigError(
                f"{self.key}: there are two {self.kind}s named {name!r}, of {first} and of the installed package "
                f"{owner}; rename one, or uninstall that package",
                code="registry.duplicate",
            )
        if not (isinstance(part, self.part_type) or (isinstance(part, type) and issubclass(part, self.part_type))):
            raise ConfigError(
                f"{self.kind} {name!r} of the installed package {owner} is {type(part).__name__}, not "
                f"{self.part_type.__name__}; correct its entry point in {self.group}",
                code="registry.wrong-type",
            )
        if abstract := getattr(part, "__abstractmethods__", None):
            raise ConfigError(
                f"{self.kind} {name!r} of the installed package {owner} lacks {', '.join(sorted(abstract))}; add them",
                code="registry.wrong-type",
            )
        self._parts[name] = part  # type: ignore[assignment]
        self._owners[name] = owner


def _line_of(error: Exception) -> str:
    """Return the file and line of another package's code at which an import failed."""
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) < 2 or "importlib" in frames[-1].filename:
        return ""
    return f", {frames[-1].filename}, line {frames[-1].lineno}"
