"""The folder of a run, in which one process writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bionemo_esm import outputs
from bionemo_esm.errors import ConfigError

_HALF_WRITTEN = (".*.nemo.*.partial", ".*.json.partial", "*/.step-*.partial")


def make_folder(folder: Path) -> None:
    """Raises `ConfigError` where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"exp_manager.exp_dir: {folder} cannot be made ({error.strerror}); choose another place"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder for the length of a block, and clear it of what a killed process left half-written.

    Raises `ConfigError`, naming the holder, where another process holds it.
    """
    with outputs.alone_in(folder, "exp_manager.exp_dir", "give this run another exp_manager.name"):
        for pattern in _HALF_WRITTEN:
            for partial in folder.glob(pattern):
                partial.unlink()
        yield
