"""From a composed Hydra configuration to frozen, strictly typed settings.

A section of the configuration is a class: `class TrainerConfig(Settings, section="trainer")`. Pydantic checks types,
ranges and unknown keys; cross-field checks are `model_validator(mode="after")` methods that raise `ConfigError`. Every
failure is one `ConfigError` line that names the key, the value and what is allowed. No other file sees a DictConfig.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from bionemo_esm.errors import ConfigError, UserError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A rate in [0, 1), such as dropout."""
STANDARD_INPUT = "-"


class InputPath(str):
    """A path to read, a leading `~` expanded, or `STANDARD_INPUT`."""


class Settings(BaseModel):
    """Base of all sections of a configuration: frozen, unknown keys refused, values of exactly the declared type.

    Accepted beyond the declared type: a whole float for `int`, an `int` for `float`, text for `Path` (a leading `~` is
    expanded), a list for a tuple. Raises `ConfigError` on construction, naming `section.key`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.section = section

    @classmethod
    def __pydantic_init_subclass__(cls, section: str = "", **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(type(self), error) from None

    @classmethod
    def from_config(cls, values: Any) -> Self:
        """Build from a section of plain values. Raises `ConfigError` if it is not a mapping."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{cls.section or 'the configuration'} must be a mapping, not {values!r}", code="config.type"
            )
        return cls(**{str(key): value for key, value in values.items()})

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed; everything is checked again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    @field_validator("*", mode="before")
    @classmethod
    def _exact_type(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return _converted(value, cls.model_fields[info.field_name].annotation)


def _converted(value: Any, annotation: Any) -> Any:
    """The value as the plain type that a field declares; raises `PydanticCustomError` for another type."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(_without_constraints(kind) for kind in kinds if kind is not NoneType)
    if len(kinds) != 1:
        return value
    if get_origin(kinds[0]) is tuple and isinstance(value, list | tuple):
        items = get_args(kinds[0])
        if items[-1] is Ellipsis:
            return tuple(_converted(item, items[0]) for item in value)
        if len(items) != len(value):
            raise _wrong_type(f"a list of {len(items)}", value)
        return tuple(_converted(item, kind) for item, kind in zip(value, items, strict=True))
    return _CONVERTERS[kinds[0]](value) if kinds[0] in _CONVERTERS else value


def _without_constraints(kind: Any) -> Any:
    """Return `int` for `Annotated[int, Field(ge=1)]`: pydantic keeps constraints inside unions and tuples."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _config_error(settings: type[Settings], error: ValidationError) -> UserError:
    """The first failure of a validation as one line: key, what is wrong, what is allowed."""
    details = error.errors(include_url=False)[0]
    original = details.get("ctx", {}).get("error")
    if isinstance(original, UserError):
        return original
    key = ".".join(filter(None, [settings.section, *map(str, details["loc"])]))
    return ConfigError(*_worded(key, settings, details), code=f"config.{_CODES.get(details['type'], 'value')}")


_CODES = {
    "extra_forbidden": "unknown-key",
    "missing": "missing-key",
    "wrong_type": "type",
    "model_type": "type",
    "dict_type": "type",
}


def _worded(key: str, settings: type[Settings], details: ErrorDetails) -> tuple[str]:
    kind, value, limits = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted(field.alias or name for name, field in settings.model_fields.items())
        return (f"unknown key {key}; known are: {', '.join(known)}",)
    if kind == "missing":
        return (f"{key} must be given: {key}=...",)
    if kind == "finite_number":
        return (f"{key} must be a finite number, not {value}",)
    if kind == "greater_than_equal" and limits["ge"] == 0:
        return (f"{key} must not be negative, but is {value}",)
    if kind == "less_than" and limits["lt"] == 1:  # a Fraction
        return (f"{key} must lie in [0, 1), not {value}",)
    if kind == "greater_than" and limits["gt"] == 0:
        return (f"{key} must be positive, not {value}",)
    if kind in ("model_type", "dict_type", "mapping_type", "tuple_type"):
        return (f"{key} must be a {'list' if kind == 'tuple_type' else 'mapping'}, not {value!r}",)
    bounds = {"greater_than_equal": "at least {ge}", "greater_than": "over {gt}", "less_than_equal": "at most {le}"}
    bounds |= {"less_than": "under {lt}", "literal_error": "one of {expected}"}
    if kind in bounds:
        expected = (
            str(limits.get("expected", ""))
            .replace("'", "")
            .replace(" or ", ", ")
            .replace("True", "true")
            .replace("False", "false")
        )
        shown = repr(value) if kind == "literal_error" else value
        field = settings.model_fields.get(str(details["loc"][0]))
        null = ", or null" if field is not None and NoneType in get_args(field.annotation) else ""
        return (f"{key} must be {bounds[kind].format(**limits | {'expected': expected})}{null}, not {shown}",)
    return (f"{key} {details['msg'][:1].lower()}{details['msg'][1:]}",)


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


def expand_home(text: str | Path) -> Path:
    """The path, a leading `~/` or `~name/` expanded; `~` that names no user's home is part of a file's name."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for a file named ~x


def _wrong_type(message: str, value: Any) -> PydanticCustomError:
    text = f"must be {message}, not {value!r}"
    return PydanticCustomError("wrong_type", text)  # type: ignore[arg-type]


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise _wrong_type("an integer", value)
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type("a number", value)
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type("true or false", value)
    return value


def _path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise _wrong_type("a path", value)
    return expand_home(value)


def _input_path(value: Any) -> InputPath:
    if not isinstance(value, str) or not value:
        raise _wrong_type("a path, or - for standard input", value)
    return InputPath(value if value == STANDARD_INPUT else expand_home(value))


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        raise _wrong_type("text", value)
    return str(value)


_CONVERTERS: dict[Any, Any] = {
    int: _integer,
    float: _number,
    bool: _boolean,
    Path: _path,
    InputPath: _input_path,
    str: _text,
}
