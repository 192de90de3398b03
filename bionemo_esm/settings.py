"""From a composed Hydra configuration to frozen dataclasses: every key known, every value of its declared type.

A DictConfig is taken apart here, at the door, and seen nowhere else.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from bionemo_esm.errors import ConfigError


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, interpolations resolved. Raises `ConfigError` for one that is missing."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given: {error.full_key}=...") from error
    except Exception as error:  # OmegaConf's errors share no base but name the key
        raise ConfigError(f"configuration: {error}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def known(section: str, values: Any, names: set[str]) -> dict[str, Any]:
    """The values of a section ('' for the top); raises `ConfigError` for one that is no mapping or has another key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{section} must be a mapping, not {values!r}")
    for key in values:
        if key not in names:
            name = f"{section}.{key}" if section else str(key)
            raise ConfigError(f"unknown key {name}; known are: {', '.join(sorted(names))}")
    return values


def typed(section: str, values: Any, kind: Any) -> dict[str, Any]:
    """The values of a section, each turned into the type that the dataclass `kind` declares for it."""
    declared = {item.name: str(item.type) for item in fields(kind)}
    checked = {}
    for name, value in known(section, values, set(declared)).items():
        checked[name] = _convert(f"{section}.{name}", value, declared[name])
    return checked


def _convert(key: str, value: Any, declared: str) -> Any:
    if value is None and declared.endswith("| None"):
        return None
    kind = declared.removesuffix(" | None")
    converters: dict[str, Any] = {
        "int": integer,
        "float": number,
        "bool": boolean,
        "Path": path,
        "str": lambda _, text: str(text),
    }
    if kind == "tuple[float, float]":
        if not isinstance(value, list) or len(value) != 2:
            raise ConfigError(f"{key} must be two numbers, not {value!r}")
        return tuple(number(key, item) for item in value)
    return converters[kind](key, value) if kind in converters else value


def integer(key: str, value: Any) -> int:
    """A whole number; raises `ConfigError` naming the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConfigError(f"{key} must be an integer, not {value!r}")
    return int(value)


def number(key: str, value: Any) -> float:
    """A number; raises `ConfigError` naming the key."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    return float(value)


def boolean(key: str, value: Any) -> bool:
    """True or false; raises `ConfigError` naming the key."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {value!r}")
    return value


def path(key: str, value: Any) -> Path | None:
    """A path, or None; raises `ConfigError` naming the key."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be a path, not {value!r}")
    return Path(value).expanduser()
