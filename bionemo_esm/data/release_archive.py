"""The FASTA of UniRef50 out of the archive of a release, where UniProt keeps UniRef100, 90 and 50 together.

An archive holds uniref100.tar, uniref90.tar and uniref50.tar, and the last of them uniref50.xml.gz but no FASTA, so the
FASTA is written from the XML: the same headers, in the order of the XML, which need not be that of the FASTA once
published.

This layout is taken from public programs that read these files (archives of 2015_01, 2021_02, 2021_04 and 2023_01); it
was not compared with UniProt's server, and the tests make their archives so. A tar with the FASTA in it, or without the
inner tar, is read as well.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from xml.parsers import expat

from bionemo_esm.data.download import Progress, ReleaseError, file_errors, locked, require_room

_MEMBERS = ("uniref50.fasta.gz", "uniref50.fasta", "uniref50.xml.gz", "uniref50.xml")
_INNER_TARS = ("uniref50.tar", "uniref50.tar.gz")
_FASTA_SHARE = {"uniref50.fasta.gz": 1.0, "uniref50.fasta": 1.0, "uniref50.xml.gz": 0.85, "uniref50.xml": 0.2}
"""What is written, by the size of the member that is read. For XML this is rather too much: it was measured on the
shipped sample, put into clusters of a single member each, and more members add to the XML but not to the FASTA."""
_ARCHIVE_TO_FASTA = 17  # some 170 GB to some 10 GB
_BLOCK_BYTES = 2**16  # read of the archive at once; gzip makes up to a thousand times as much of it
_LINE_RESIDUES = 60
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, expat.ExpatError, ValueError, LookupError)


def extract_fasta(archive: Path, folder: Path, version: str, progress: Progress | None = None) -> Path:
    """UniRef50 of an archived release, out of its tar, as `<folder>/uniref50_<version>.fasta.gz`, or `.fasta` if plain.

    The tars are read through once; nothing of them but the contents of one file, known by its name, reaches the disk.
    A FASTA is copied as it is; of XML the representative sequences are written. `progress` is told how many bytes of
    the archive have been read, and its size, which is not reached where other files follow UniRef50.

    The room for it is checked twice: before the archive is read, for the share that a FASTA has of UniProt's archives,
    and before the FASTA is written, by the size of the file in the archive (of XML, an estimate).

    Raises `ReleaseError` for too little room, an archive that is damaged or has no UniRef50, a file that cannot be
    written, another process at the same file.
    """
    target = folder / f"uniref50_{version}.fasta.gz"
    with file_errors(folder):
        try:
            with _MeteredFile(archive, progress) as file:
                require_room(_part_of(target), file.total // _ARCHIVE_TO_FASTA)
                with tarfile.open(fileobj=file, mode="r|*", bufsize=_BLOCK_BYTES) as tar:
                    for name, size, content in _members(tar, _INNER_TARS):
                        if name == "uniref50.fasta":
                            target = target.with_suffix("")
                        _write_fasta(name, size, content, target)
                        return target
        except ReleaseError:
            raise
        except _DAMAGE as error:
            raise ReleaseError(
                f"{archive}: cannot be read ({error}); remove it and get it again, or another release"
            ) from None
    raise ReleaseError(f"{archive}: holds none of {', '.join(_MEMBERS)}; choose another release")


class _MeteredFile(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        super().__init__(path)
        self.total = os.fstat(self.fileno()).st_size
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        if self._progress is not None:
            self._progress(self.tell(), self.total)
        return block


def _members(tar: tarfile.TarFile, inner_tars: tuple[str, ...]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """The files of a tar, and of the tars in it, that hold UniRef50: name, size, content to read before the next."""
    for member in tar:
        name = PurePosixPath(member.name).name
        content = tar.extractfile(member) if member.isreg() and name in (*_MEMBERS, *inner_tars) else None
        if content is None:
            continue
        if name in _MEMBERS:
            yield name, member.size, content
        else:
            with tarfile.open(fileobj=content, mode="r|*") as inner:
                yield from _members(inner, ())


def _write_fasta(name: str, size: int, content: IO[bytes], target: Path) -> None:
    with locked(_part_of(target)) as stream:
        part = Path(stream.name)
        try:
            stream.truncate(0)
            require_room(part, int(size * _FASTA_SHARE[name]))
            if "xml" in name:
                xml: IO[bytes] = gzip.GzipFile(fileobj=content) if name.endswith(".gz") else content  # type: ignore[assignment]
                # Level 1: this is what the conversion mostly waits for. No name and time, so that it is reproducible.
                with gzip.GzipFile("", "wb", compresslevel=1, fileobj=stream, mtime=0) as packed:
                    _XmlToFasta(packed).convert(xml)
            else:
                shutil.copyfileobj(content, stream, 1 << 20)
            stream.flush()
            os.fsync(stream.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def refuse_doctype(*_: object) -> None:
    """For expat's `StartDoctypeDeclHandler`: without a DTD, XML can neither grow without bound nor read our files."""
    raise ValueError("it has a DTD, which may hide anything")


class _XmlToFasta:
    """Writes the representative of each cluster of UniRef's XML, with the header that UniRef's FASTA gives it.

    By expat's own events, so that a cluster of a million members needs no more memory than one of a single one.
    """

    def __init__(self, sink: IO[bytes] | gzip.GzipFile) -> None:
        self.sink = sink
        self.entries = 0
        self.fields: dict[str, str] = {}
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = refuse_doctype
        self.parser.StartElementHandler = self._seek_entry

    def convert(self, xml: IO[bytes]) -> None:
        """Raises `ExpatError` or `ValueError` for what is no XML, or not UniRef's."""
        while block := xml.read(1 << 20):
            self.parser.Parse(block, False)
        self.parser.Parse(b"", True)
        if self.fields or not self.entries:
            raise ValueError(f"the XML ends within a cluster after {self.entries} whole ones")

    def _seek_entry(self, name: str, attributes: dict[str, str]) -> None:
        if name == "entry":
            self.fields = {"id": attributes["id"]}
            self.parser.StartElementHandler = self._start

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "property" and "member" not in self.fields:
            self.fields[attributes["type"]] = attributes["value"]
        elif name == "dbReference":
            self.fields.setdefault("member", attributes["id"])
        elif name in ("name", "sequence"):
            self.fields["length"] = attributes.get("length", "")
            self.text: list[str] = []
            self.parser.CharacterDataHandler = self.text.append
            self.parser.EndElementHandler = self._end
        elif name in ("member", "entry"):
            raise ValueError(f"cluster {self.fields['id']} has no sequence of its representative")

    def _end(self, name: str) -> None:
        self.parser.CharacterDataHandler = self.parser.EndElementHandler = None
        if name == "name":
            self.fields["name"] = " ".join("".join(self.text).split())
        else:
            self._write("".join("".join(self.text).split()))
            self.fields = {}
            self.parser.StartElementHandler = self._seek_entry  # the other members of the cluster are passed over

    def _write(self, residues: str) -> None:
        fields = self.fields
        if str(len(residues)) != fields["length"]:
            raise ValueError(f"cluster {fields['id']} has {len(residues)} residues, {fields['length']!r} by its length")
        words = [f">{fields['id']}", fields.get("name", "").removeprefix("Cluster: ")]
        keys = {"n": "member count", "Tax": "common taxon", "TaxID": "common taxon ID", "RepID": "member"}
        words += [f"{short}={fields[key]}" for short, key in keys.items() if key in fields]
        lines = [residues[at : at + _LINE_RESIDUES] for at in range(0, len(residues), _LINE_RESIDUES)]
        self.sink.write("\n".join([" ".join(filter(None, words)), *lines, ""]).encode())
        self.entries += 1
