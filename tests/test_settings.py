"""A configuration section is typed, bounded and closed; each error is one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import Fraction, PositiveFloat, PositiveInt, Settings


class Inner(Settings, section="outer.inner"):
    size: PositiveInt = 1
    betas: tuple[float, float] = (0.9, 0.98)
    names: tuple[str, ...] = ()


class Outer(Settings, section="outer"):
    steps: PositiveInt = 8
    limit: int | None = None
    most: PositiveInt | None = None
    most: PositiveInt | None = None
    counts: tuple[PositiveInt, ...] = ()
    lr: PositiveFloat = 1e-3
    name: str | None = None
    file: Path | None = None
    flag: bool = False
    device: Literal["cpu", "gpu"] = "gpu"
    dropout: Fraction = 0.1
    inner: Inner = Field(default_factory=Inner)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps == 13:
            raise ConfigError("outer.steps is 13; choose another number", code="outer.unlucky")
        return self


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"steps": 0}, "config.value", "outer.steps must be at least 1, not 0"),
        ({"steps": "3"}, "config.type", "outer.steps must be an integer, not '3'"),
        ({"steps": True}, "config.type", "outer.steps must be an integer, not True"),
        ({"steps": float("nan")}, "config.type", "outer.steps must be an integer, not nan"),
        ({"most": True}, "config.type", "outer.most must be an integer, not True"),
        ({"most": "5"}, "config.type", "outer.most must be an integer, not '5'"),
        ({"counts": [1, True]}, "config.type", "outer.counts must be an integer, not True"),
        ({"most": 0}, "config.value", "outer.most must be at least 1, or null, not 0"),
        ({"limit": 2.5}, "config.type", "outer.limit must be an integer, not 2.5"),
        ({"lr": float("nan")}, "config.value", "outer.lr must be a finite number, not nan"),
        ({"lr": float("inf")}, "config.value", "outer.lr must be a finite number, not inf"),
        ({"lr": 0}, "config.value", "outer.lr must be positive, not 0.0"),
        ({"flag": 1}, "config.type", "outer.flag must be true or false, not 1"),
        ({"file": ""}, "config.type", "outer.file must be a path, not ''"),
        ({"name": {"a": 1}}, "config.type", "outer.name must be text, not {'a': 1}"),
        ({"device": "tpu"}, "config.value", "outer.device must be one of cpu, gpu, not 'tpu'"),
        ({"inner": {"size": 0}}, "config.value", "outer.inner.size must be at least 1, not 0"),
        ({"inner": {"betas": [1]}}, "config.type", "outer.inner.betas must be a list of 2, not [1]"),
        ({"inner": {"betas": [0.9, "x"]}}, "config.type", "outer.inner.betas must be a number, not 'x'"),
        ({"inner": {"x": 1}}, "config.unknown-key", "unknown key outer.inner.x; known are: betas, names, size"),
        ({"inner": 3}, "config.type", "outer.inner must be a mapping, not 3"),
        ({"steps": 13}, "outer.unlucky", "outer.steps is 13; choose another number"),
    ],
)
def test_error_names_key_value_and_remedy(values: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_config(values)
    assert (caught.value.code, str(caught.value)) == (code, message)


def test_values_are_converted_to_the_declared_types() -> None:
    made = Outer(steps=2.0, lr=1, file="~/x", inner={"betas": [0, 1], "names": ["a"]})
    assert made.steps == 2 and type(made.steps) is int
    assert type(made.lr) is float
    assert made.file == Path.home() / "x"
    assert made.inner == Inner(betas=(0.0, 1.0), names=("a",))


def test_tilde_is_expanded_only_for_existing_users() -> None:
    assert Outer(file="~").file == Path.home()
    for name in ("~tilde.fasta", "a/~/b", "~nobody-has-this-name/x.fasta"):
        assert Outer(file=name).file == Path(name)


def test_settings_are_frozen_and_a_changed_copy_is_validated() -> None:
    with pytest.raises(ValidationError):
        Outer().steps = 3  # type: ignore[misc]
    assert Outer().replace(steps=3).steps == 3
    with pytest.raises(ConfigError, match=r"outer\.steps"):
        Outer().replace(steps=0)


def test_section_that_is_not_a_mapping_is_rejected() -> None:
    with pytest.raises(ConfigError, match="outer must be a mapping, not 5"):
        Outer.from_config(5)
