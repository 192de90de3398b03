"""Errors compared by their stable code, not by their wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bionemo_esm.errors import UserError


@contextmanager
def refused(code: str, *mentions: object) -> Iterator[Any]:
    """The block raises a `UserError` of this code, whose message mentions these (a key, a file, a record)."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    for mention in mentions:
        assert str(mention) in str(caught.value)
