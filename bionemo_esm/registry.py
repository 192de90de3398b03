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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Generic, TypeVar

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
    ("optim.name"); group: the entry-point group, `bionemo_esm.<group>`, that other packages add to.
    """

    def __init__(self, kind: str, key: str, group: str) -> None:
        self.kind, self.key, self.group = kind, key, f"bionemo_esm.{group}"
        self._parts: dict[str, Part] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that adds a part under this name. Raises `ConfigError` for a name that is taken."""

        def add(part: Part) -> Part:
            if self._parts.setdefault(name, part) is not part:
                raise ConfigError(f"{self.key}: there are two {self.kind}s named {name!r}", code="registry.duplicate")
            return part

        return add

    def get(self, name: str) -> Part:
        """Return the part of this name. Raises `ConfigError`, naming the key and all known names, if there is none."""
        if name not in self._parts:
            self._load_plugins()
        if name not in self._parts:
            raise ConfigError(
                f"{self.key} must be one of {', '.join(self)}, not {name!r}", code="registry.unknown-name"
            )
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._parts))

    def _load_plugins(self) -> None:
        """Import the parts that installed packages add. Raises `ConfigError`, naming the package, if that fails."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for entry in entry_points(group=self.group):
            try:
                part = entry.load()
            except Exception as error:  # the code of another package
                owner = entry.dist.name if entry.dist else entry.value
                raise ConfigError(
                    f"{self.kind} {entry.name!r} of the installed package {owner} cannot be imported ({error}); "
                    "fix or uninstall that package",
                    code="registry.broken-plugin",
                ) from error
            self.register(entry.name)(part)
