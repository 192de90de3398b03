"""The work folder of `embed`: a long input is computed in parts, so that a killed run resumes and processes share work.

The cuts between parts depend on the input and the settings only, not on the process. Finished parts are in the work
folder `.NAME.partial` beside the output, each complete, with a record of its content:

    job.json      what determines the result: another job does not resume here
    input         standard input, if that is the input
    parts/        part-00000.parquet, ...
    records/      part-00000.json, ...: proteins, residues, bytes, SHA-256; written after the part

When all parts are present they become the output by one rename.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bionemo_esm.data.store import sha256_of_file
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import (
    atomic_write,
    check_absent,
    fsync_directory,
    hold_name,
    hold_output,
    lock_file,
    remove_unfinished,
)
from bionemo_esm.inference.embedding.formats import ABOUT, MANIFEST, PART_FORMAT, format_named
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.inference.inputs import Protein

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPIED_BYTES = 2**20
_JOB, _INPUT, _PARTS, _RECORDS, _JOINED = "job.json", "input", "parts", "records", "joined"
_OLD_LOCK = "lock"  # of earlier versions
_FINISHING = "finishing"


class WorkError(UserError):
    """A work folder that another job or process holds, or a full disk; the message says what to do."""


def cut(
    proteins: Iterable[Protein], most_proteins: int, most_bytes: int, bytes_of: Callable[[int], int]
) -> Iterator[list[Protein]]:
    """Yield the parts of an input, in order: each of up to so many proteins and bytes of results, or of one protein."""
    part: list[Protein] = []
    filled = 0
    for protein in proteins:
        needed = bytes_of(protein.residues)
        if part and (len(part) == most_proteins or filled + needed > most_bytes):
            yield part
            part, filled = [], 0
        part.append(protein)
        filled += needed
    if part:
        yield part


@dataclass(frozen=True)
class Record:
    """The content of a finished part."""

    proteins: int
    residues: int
    bytes: int
    sha256: str


class WorkFolder:
    """The parts of one output. `kind`: the name of a format; a single file is joined from parts in NPZ."""

    def __init__(self, output: Path, kind: str, is_folder: bool) -> None:
        self.output, self.kind, self.is_folder = output, kind, is_folder
        self.folder = output.parent / f".{output.name}.partial"
        self.input = self.folder / _INPUT
        self._part_kind = kind if is_folder else PART_FORMAT

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the work folder, or take over an existing one, and exclude other runs for the length of a block.

        Incomplete files of a killed process are removed; a folder without a finished part is removed after the block.
        Raises `ConfigError` if the output exists or another process holds its name, or the folder is not a work folder.
        """
        with hold_output("output", self.output):
            with _explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._check_ours()
                self._remove_incomplete()
            try:
                yield
            finally:
                if self.folder.is_dir() and not self.records():
                    shutil.rmtree(self.folder)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Like `held`, for one of several processes of a launcher; they exclude runs that `held` the output."""
        with hold_name("output", self.output, shared=True):
            with _explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._check_ours()
            try:
                yield
            finally:
                if self.output.exists():  # the other processes had finished before this one began
                    shutil.rmtree(self.folder, ignore_errors=True)

    def claim(self, job: Mapping[str, Any]) -> None:
        """Store what determines the result, or compare it with what an earlier run or another process stored.

        Raises `WorkError`, naming the settings that differ.
        """
        text = json.dumps(job, indent=2, sort_keys=True)
        path = self.folder / _JOB
        if not path.exists():
            with _explained(path), atomic_write(path) as stream:
                stream.write(text.encode())
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in {*stored, *job} if stored.get(key) != json.loads(text).get(key))
        except (OSError, ValueError, AttributeError) as error:
            raise WorkError(
                f"{path}: cannot be read ({error}); remove the folder {self.folder} to begin anew"
            ) from error
        if differing:
            shown = "; ".join(f"{key} was {stored.get(key)}, now {job.get(key)}" for key in differing)
            raise WorkError(
                f"{self.folder} holds parts of another job for the same output: {shown}. Run that job's command to "
                f"finish it, or remove the folder to begin anew"
            )

    def records(self) -> dict[int, Record]:
        """Return the content of the finished parts by number. A part is finished when its record exists."""
        found = {}
        for path in (self.folder / _RECORDS).glob("part-*.json"):
            try:
                found[int(path.stem.removeprefix("part-"))] = Record(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                path.unlink()  # the part of a damaged record is computed again
        return found

    def part(self, number: int) -> Path:
        return self.folder / _PARTS / f"part-{number:05d}{format_named(self._part_kind).suffix}"

    def _record(self, number: int) -> Path:
        return self.folder / _RECORDS / f"part-{number:05d}.json"

    def is_intact(self, number: int, record: Record) -> bool:
        """Return whether a part has all of its bytes unchanged. A part that has not is forgotten, and computed
        again.
        """
        part = self.part(number)
        if part.is_file() and part.stat().st_size == record.bytes and sha256_of_file(part) == record.sha256:
            return True
        self._record(number).unlink(missing_ok=True)
        return False

    def write(self, number: int, about: Mapping[str, Any], embeddings: Sequence[Embedding]) -> None:
        """Write a finished part and its record. Raises `WorkError` for a full disk."""
        part = self.part(number)
        with _explained(part):
            with atomic_write(part) as stream:
                format_named(self._part_kind).write(stream, about, [embeddings])
            residues = sum(embedding.residues for embedding in embeddings)
            record = Record(len(embeddings), residues, part.stat().st_size, sha256_of_file(part))
            with atomic_write(self._record(number)) as stream:
                stream.write(json.dumps(vars(record)).encode())

    def finish(self, parts: int, about: Mapping[str, Any]) -> bool:
        """Make the output if all parts are present; return whether the output exists. One of several processes does it.

        Raises `WorkError` for a full disk, `ConfigError` if something else has the output's name.
        """
        with ExitStack() as stack, _explained(self.output):
            try:
                stack.enter_context(lock_file(self.folder / _FINISHING, wait=True))
            except FileNotFoundError:  # another process has finished, and removed the folder
                return self.output.exists()
            records = self.records()
            if set(records) != set(range(parts)):
                return False
            check_absent("output", self.output)
            self._become_output(parts, about, records)
            shutil.rmtree(self.folder)
        return True

    def _become_output(self, parts: int, about: Mapping[str, Any], records: Mapping[int, Record]) -> None:
        files = [self.part(number) for number in range(parts)]
        for path in set((self.folder / _PARTS).iterdir()) - set(files):
            path.unlink()  # incomplete: its process was killed
        if self.is_folder:
            listed = [{"file": file.name, **vars(records[number])} for number, file in enumerate(files)]
            totals = {key: sum(getattr(record, key) for record in records.values()) for key in ("proteins", "residues")}
            with atomic_write(self.folder / _PARTS / MANIFEST) as stream:
                stream.write(
                    json.dumps({ABOUT: about, "format": self.kind, **totals, "parts": listed}, indent=2).encode()
                )
            (self.folder / _PARTS).rename(self.output)
        else:
            joined = self.folder / _JOINED
            with atomic_write(joined) as stream:
                format_named(self.kind).join(stream, about, files)
            joined.rename(self.output)
        fsync_directory(self.output.parent)

    def _check_ours(self) -> None:
        known = {_JOB, _OLD_LOCK, _FINISHING, _INPUT, _PARTS, _RECORDS, _JOINED}
        foreign = [path.name for path in self.folder.iterdir() if path.name not in known and path.suffix != ".partial"]
        if foreign:
            raise ConfigError(f"{self.folder}: is in the way, and not ours: it holds {foreign[0]}; move it elsewhere")

    def _remove_incomplete(self) -> None:
        remove_unfinished(self.folder)
        for path in (self.folder / _PARTS).glob("*"):
            if not (self.folder / _RECORDS / f"{path.stem}.json").exists():
                path.unlink()  # the run was killed between a part and its record, or the manifest and the renaming


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Raise `WorkError` for a full disk, and for a place that cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise WorkError(
                f"{place}: {os.strerror(error.errno or 0).lower()}; finished parts are kept; make room, and run "
                "the same command again"
            ) from error
        if error.errno in (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise WorkError(
                f"{error.filename or place}: cannot be written ({error.strerror}); choose another output"
            ) from error
        raise


def copied(source: IO[bytes], target: Path) -> None:
    """Copy a stream that can be read once into a file, completely. Raises `WorkError` for a full disk."""
    with _explained(target), atomic_write(target) as stream:
        shutil.copyfileobj(source, stream, _COPIED_BYTES)
