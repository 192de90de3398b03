"""The folder of contact maps while it is being filled: each file in it is complete."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import atomic_write, check_absent, fsync_directory, remove_unfinished

if TYPE_CHECKING:
    from bionemo_esm.inference.contacts.prediction import Map

_LONGEST_NAME = 150  # characters; file systems take 255 bytes
_JOB, _OLD_LOCK = "job.sha256", ".lock"  # the latter of earlier versions


class WorkFolder:
    """`.NAME.partial` beside the output, with a map for each protein that is done. The caller holds the output."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self._output = folder, output

    @classmethod
    @contextmanager
    def opened(cls, output: Path, fingerprint: str) -> Iterator[WorkFolder]:
        """Open the work folder of an output, new or of a job that was stopped.

        `fingerprint`: a line for each thing that must be the same to resume: a name for it, and its digest. Raises
        `ConfigError` if the folder cannot be made, `UserError` if a job with another fingerprint began it.
        """
        folder = output.absolute().parent / f".{output.name}.partial"
        try:
            (folder / "maps").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"output: {output} cannot be made: {error.filename}: {error.strerror}") from error
        job = folder / _JOB
        if not job.exists():
            with atomic_write(job) as stream:
                stream.write(fingerprint.encode())
        elif differing := _differing(job.read_text(errors="replace"), fingerprint):
            raise UserError(
                f"output: {folder} is of an unfinished job with another {differing}; remove it, or choose another "
                "output"
            )
        yield cls(folder, output)

    def has_map(self, name: str) -> bool:
        return self._map(name).exists()

    def write_map(self, name: str, found_RR: Map) -> None:
        """Write a map, completely or not at all."""
        with atomic_write(self._map(name)) as stream:
            np.savez(stream, probabilities=found_RR)

    def read_map(self, name: str, residues: int) -> Map:
        """Return a map. Raises `UserError` for a file that is not the map of a protein of so many residues."""
        path = self._map(name)
        try:
            with np.load(path) as file:
                found_RR = file["probabilities"]
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is damaged ({error}); remove it, and run the same command again") from error
        if found_RR.shape != (residues, residues) or found_RR.dtype != np.float32:
            raise UserError(f"{path}: is not the map of its protein; remove it, and run the same command again")
        found: Map = found_RR
        return found

    def finish(self) -> None:
        """Rename the folder to the output."""
        check_absent("output", self._output)
        for name in (_JOB, _OLD_LOCK):
            (self.folder / name).unlink(missing_ok=True)
        remove_unfinished(self.folder)
        fsync_directory(self.folder)
        self.folder.replace(self._output)
        fsync_directory(self._output.absolute().parent)

    def _map(self, name: str) -> Path:
        return self.folder / "maps" / f"{name}.npz"


def _differing(before: str, now: str) -> str:
    """Return the names of the lines in which two fingerprints differ; "" if none does."""
    lines = dict(line.partition(" ")[::2] for line in before.splitlines())
    wanted = [line.partition(" ")[::2] for line in now.splitlines()]
    if before != now and set(lines) != {word for word, _ in wanted}:
        return "version of this program"
    return " and ".join(word for word, digest in wanted if lines.get(word) != digest)


@contextmanager
def written_table(path: Path, header: Sequence[str]) -> Iterator[Any]:
    """Yield a CSV writer to a file that exists only if the block ends without an error."""
    with atomic_write(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        yield writer
        text.detach()  # flushes; `atomic_write` closes the stream beneath


def file_names(ids: Sequence[str]) -> list[str]:
    """Return a file name, without ending, for each id, valid on any file system.

    Characters other than letters, digits and `_.-~` are percent-encoded; a long name is cut. No two names are
    equal, not even without regard to case.
    """
    names: list[str] = []
    taken: set[str] = set()
    for identifier in ids:
        name = quote(identifier, safe="", errors="surrogatepass")
        name = f"%2E{name[1:]}" if name.startswith(".") else name
        if len(name) > _LONGEST_NAME or name.casefold() in taken:
            digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            name = f"{name[:_LONGEST_NAME]}~{digest}"
        assert name.casefold() not in taken, "ids differ"
        taken.add(name.casefold())
        names.append(name)
    return names
