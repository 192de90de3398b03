"""Errors compared by their stable code instead of their wording."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from bionemo_esm.errors import UserError


@contextmanager
def refused(code: str, *mentions: object) -> Iterator[Any]:
    """Assert that the block raises a `UserError` of this code whose message mentions the given key, file or record."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    for mention in mentions:
        assert str(mention) in str(caught.value)


def assert_sections_must_be_mappings(
    load: Callable[[DictConfig], object], cfg: DictConfig, optional: Collection[str] = ()
) -> None:
    """Assert that `load` refuses a configuration whose section is not a mapping, with the key, for every section.

    optional: keys of sections that may be null.
    """
    sections = list(_sections("", OmegaConf.to_container(cfg)))
    assert sections
    for key in sections:
        for value in (0, False, 5, "text", [1], *([] if key in optional else [None])):
            changed = copy.deepcopy(cfg)
            OmegaConf.set_struct(changed, False)
            OmegaConf.update(changed, key, value, merge=False)
            with refused("config.type", f"{key} must be a mapping, not {value!r}"):
                load(changed)


def _sections(prefix: str, values: Any) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{prefix}{key}"
            yield from _sections(f"{prefix}{key}.", value)
