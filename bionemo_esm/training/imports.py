"""Large libraries imported in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import within this without Python's search for garbage in cycles, which it is to go on with afterwards.

    Lightning, NeMo and Megatron make millions of objects that stay: to look through them again and again is a third of
    the time that their import takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
