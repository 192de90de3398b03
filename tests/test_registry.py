"""Registries: lookup by name, parts from installed packages, and errors for broken packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from bionemo_esm.errors import ConfigError
from bionemo_esm.registry import Registry
from errors import refused


def table() -> Registry[object]:
    registry: Registry[object] = Registry("gadget", "gadget.name", "test_gadgets", Mapping)
    registry.register("plain")(dict)
    return registry


def plugin(site: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Install a package as pip does: a module, and metadata with an entry point."""
    (site / "gadget_plugin.py").write_text(code)
    info = site / "gadget_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gadget-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bionemo_esm.test_gadgets]\nfancy = gadget_plugin:Fancy\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(__import__("sys").modules, "gadget_plugin", raising=False)


def test_unknown_name_error_lists_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"gadget\.name must be one of plain, not 'fancy'") as caught:
        table().get("fancy")
    assert caught.value.code == "registry.unknown-name"


def test_duplicate_name_is_rejected() -> None:
    with pytest.raises(ConfigError) as caught:
        table().register("plain")(list)
    assert caught.value.code == "registry.duplicate"


def test_installed_package_adds_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, monkeypatch, "class Fancy(dict): pass\n")
    assert list(table()) == ["fancy", "plain"]
    assert table().get("fancy").__name__ == "Fancy"  # type: ignore[attr-defined]


def test_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, monkeypatch, "import a_module_that_is_not_there\n")
    registry = table()
    assert registry.get("plain") is dict, "a broken part that is not asked for does no harm"
    assert list(registry) == ["plain"]
    for _ in range(2):  # also the second time
        with refused(
            "registry.broken-plugin", "package gadget-plugin cannot be imported", "ModuleNotFoundError", "line 1"
        ):
            registry.get("fancy")


@pytest.mark.parametrize(
    ("code", "mentions"),
    [
        ("Fancy = 5\n", ("gadget 'fancy' of the installed package gadget-plugin is int, not Mapping", "entry point")),
        ("class Fancy: pass\n", ("is type, not Mapping",)),
        ("import collections.abc as abc\nclass Fancy(abc.Mapping): pass\n", ("lacks __getitem__, __iter__, __len__",)),
    ],
)
def test_a_part_of_another_kind_is_refused_with_its_package(
    code: str, mentions: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(tmp_path, monkeypatch, code)
    with refused("registry.wrong-type", *mentions):
        table().get("fancy")


def test_two_parts_of_one_name_are_refused_with_both_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, monkeypatch, "class Fancy(dict): pass\n")
    registry = table()
    registry.register("fancy")(dict)
    with refused("registry.duplicate", "of bionemo_esm and of the installed package gadget-plugin"):
        list(registry)
        registry.get("fancy")
