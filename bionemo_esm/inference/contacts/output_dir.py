"""The folder of contact maps while it is being filled: what is in it is whole, and another process keeps off."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import LockedError, atomic_write, check_absent, fsync_directory, lock_file, remove_unfinished

if TYPE_CHECKING:
    from bionemo_esm.inference.contacts.prediction import Map

_LONGEST_NAME = 150  # characters; file systems take 255 bytes
_JOB, _LOCK = "job.sha256", ".lock"


class WorkFolder:
    """`.NAME.partial` beside the output, with a map for each protein that is done."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self._output = folder, output

    @classmethod
    @contextmanager
    def opened(cls, output: Path, fingerprint: str) -> Iterator[WorkFolder]:
        """The work folder of an output, new or of a job that was stopped, kept for this process.

        `fingerprint`: a line for each thing that must be the same to go on: a word for it, and its digest.

        Raises `ConfigError` where it cannot be made, `UserError` where another process fills it, or it was begun by a
        job with another `fingerprint`.
        """
        folder = output.absolute().parent / f".{output.name}.partial"
        with ExitStack() as stack:
            try:
                (folder / "maps").mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(folder / _LOCK))
            except LockedError as error:
                raise UserError(f"output: another process is writing {output}; wait for it to end") from error
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
        """Whole, or not at all."""
        with atomic_write(self._map(name)) as stream:
            np.savez(stream, probabilities=found_RR)

    def read_map(self, name: str, residues: int) -> Map:
        """Raises `UserError` for a file that is not the map of a protein of so many residues."""
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
        """The folder takes its name."""
        check_absent("output", self._output)
        for name in (_JOB, _LOCK):
            (self.folder / name).unlink()
        remove_unfinished(self.folder)
        fsync_directory(self.folder)
        self.folder.replace(self._output)
        fsync_directory(self._output.absolute().parent)

    def _map(self, name: str) -> Path:
        return self.folder / "maps" / f"{name}.npz"


def _differing(before: str, now: str) -> str:
    """The words of the lines in which two fingerprints differ; "" where none does."""
    lines = dict(line.partition(" ")[::2] for line in before.splitlines())
    wanted = [line.partition(" ")[::2] for line in now.splitlines()]
    if before != now and set(lines) != {word for word, _ in wanted}:
        return "version of this program"
    return " and ".join(word for word, digest in wanted if lines.get(word) != digest)


@contextmanager
def written_table(path: Path, header: Sequence[str]) -> Iterator[Any]:
    """A CSV writer to a file that is there when the block ends well, and absent otherwise."""
    with atomic_write(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        yield writer
        text.detach()  # flushed; the stream beneath is closed by who opened it


def file_names(ids: Sequence[str]) -> list[str]:
    """A name for each id that any file system takes, without its ending: what is no letter, digit or one of `_.-~` is
    percent-encoded, a long one is cut. No two are alike, not even where upper and lower case are one.
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
