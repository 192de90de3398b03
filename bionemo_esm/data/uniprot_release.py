"""UniRef50 from UniProt: find a release by its metalink, download and check it, and extract the FASTA of an archive.

    uniref/uniref50/uniref50.fasta.gz                                the current release, some 9 GB
    previous_releases/release-2022_05/uniref/uniref2022_05.tar.gz    an archived one: UniRef100, 90 and 50, some 170 GB

Beside each is a RELEASE.metalink (Metalink 3.0) with the version, and the size and MD5 of every file. Beside the FASTA
that results, uniref50_2022_05.json records its source.

Archives are experimental. An archive holds uniref100.tar, uniref90.tar and uniref50.tar. The last one holds
uniref50.xml.gz but no FASTA, so the FASTA is written from the XML: with the same headers, in the order of the XML,
which may differ from that of the published FASTA. A tar with the FASTA, or without the inner tar, is read as well.

The layout is taken from public programs that read these files (archives of 2015_01, 2021_02, 2021_04 and 2023_01). It
was not compared with UniProt's server; the tests use a local server of this layout.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from bionemo_esm.data.download import (
    Progress,
    ReleaseError,
    download,
    file_errors,
    is_whole,
    locked,
    md5_of,
    read_small,
    require_room,
)
from bionemo_esm.files import write_atomically

UNIPROT = "https://ftp.uniprot.org/pub/databases/uniprot"
CURRENT = "current"
LICENCE = "CC BY 4.0"
_METALINK_BYTES = 2**22


class Release(NamedTuple):
    """The address, size and MD5 of a release of UniRef50."""

    version: str  # "2022_05"
    url: str
    size: int  # bytes
    md5: str
    archived: bool  # `url` is a tar of UniRef50 and others, not its FASTA


class FetchedRelease(NamedTuple):
    """A release on disk, and its source."""

    path: Path  # FASTA
    version: str
    url: str  # of the file that was downloaded
    md5: str  # of the file that was downloaded
    licence: str


def fetch_release(
    name: str, folder: str | os.PathLike[str], progress: Progress | None = None, base_url: str = UNIPROT
) -> FetchedRelease:
    """Download UniRef50, release `YYYY_NN` or `current`, to `<folder>/uniref50_<version>.fasta.gz` (or `.fasta`).

    A release that exists in the folder is checked by its MD5 and returned, for a number without a connection. Otherwise
    it is downloaded; an interrupted download resumes. An archived release needs space for its archive, some 170 GB,
    which is removed once the FASTA, some 10 GB, is written.

    `progress` is called with the bytes downloaded. For an archived release it then starts again from 0, with the bytes
    of the archive that have been read.

    Raises `ReleaseError` as `locate_release`, `download` and `extract_fasta` do.
    """
    folder = Path(folder)
    _check_name(name)
    if name != CURRENT and (known := _recall(folder, name)):
        return known
    release = locate_release(name, base_url=base_url)
    if release.archived:
        archive = folder / PurePosixPath(release.url).name
        download(release.url, archive, size=release.size, md5=release.md5, progress=progress)
        path = extract_fasta(archive, folder, release.version, progress)
    else:
        path = folder / f"uniref50_{release.version}.fasta.gz"
        download(release.url, path, size=release.size, md5=release.md5, progress=progress)
    fetched = FetchedRelease(path, release.version, release.url, release.md5, LICENCE)
    _remember(fetched, md5_of(path) if release.archived else release.md5)
    if release.archived:
        archive.unlink()
    return fetched


def locate_release(name: str, *, base_url: str = UNIPROT) -> Release:
    """Return the release `YYYY_NN`, or `current`, by its metalink under `base_url`; nothing else is downloaded.

    Raises `ReleaseError`: a name of another form, an address that `download` refuses, no such release, a server that
    does not answer, a metalink that is no such file, has a DTD, or lacks the version, the size or the MD5.
    """
    _check_name(name)
    folder = f"{base_url.rstrip('/')}/uniref/uniref50"
    current = _read_metalink(folder, "uniref50.fasta.gz", archived=False)
    if name in (CURRENT, current.version):  # the newest release is not archived yet
        return current
    folder = f"{base_url.rstrip('/')}/previous_releases/release-{name}/uniref"
    release = _read_metalink(folder, f"uniref{name}.tar.gz", archived=True)
    if release.version != name:
        raise ReleaseError(f"{folder}: its metalink is of release {release.version}, not {name}; try another server")
    return release


def _check_name(name: str) -> None:
    if name != CURRENT and not re.fullmatch(r"[0-9]{4}_[0-9]{2}", name):
        raise ReleaseError(f"no release {name!r}: give a number such as 2022_05, or {CURRENT!r}")


def _read_metalink(folder: str, file_name: str, *, archived: bool) -> Release:
    url = f"{folder}/RELEASE.metalink"

    text = read_small(url, _METALINK_BYTES)
    try:
        check = expat.ParserCreate()
        check.StartDoctypeDeclHandler = refuse_doctype
        check.Parse(text, True)
        root = ElementTree.fromstring(text)  # noqa: S314 - without a DTD, as was just checked, it can do no harm
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ReleaseError(f"{url}: cannot be read as a metalink ({error}); check the server") from None
    version = (root.findtext("{*}version") or "").strip()
    files = [file for file in root.iterfind("{*}files/{*}file") if file.get("name") == file_name]
    if len(files) != 1:
        raise ReleaseError(f"{url}: lists {file_name} {len(files)} times, not once; check the server")
    size = (files[0].findtext("{*}size") or "").strip()
    md5 = (files[0].findtext("{*}verification/{*}hash[@type='md5']") or "").strip().lower()
    forms = {"version": (version, "[0-9]{4}_[0-9]{2}"), "size": (size, "[0-9]{1,15}"), "md5": (md5, "[0-9a-f]{32}")}
    for key, (value, form) in forms.items():
        if not re.fullmatch(form, value):
            raise ReleaseError(f"{url}: the {key} of {file_name} is {value!r}; check the server")
    return Release(version, f"{folder}/{file_name}", int(size), md5, archived)


def _record_path(folder: Path, version: str) -> Path:
    return folder / f"uniref50_{version}.json"


def _remember(fetched: FetchedRelease, file_md5: str) -> None:
    """Record the source of the FASTA beside it, with its size and MD5."""
    file = {"path": fetched.path.name, "file_bytes": fetched.path.stat().st_size, "file_md5": file_md5}
    path = _record_path(fetched.path.parent, fetched.version)
    write_atomically(path, json.dumps(fetched._asdict() | file, indent=2) + "\n")


def _recall(folder: Path, version: str) -> FetchedRelease | None:
    """Return the release that an earlier call wrote to the folder, if the file is unchanged."""
    try:
        record: dict[str, Any] = json.loads(_record_path(folder, version).read_text())
        path = folder / record["path"]
        known = path.name in (f"uniref50_{version}.fasta.gz", f"uniref50_{version}.fasta") and path.parent == folder
        if not known or not is_whole(path, record["file_bytes"], record["file_md5"]):
            return None
        return FetchedRelease(path, version, str(record["url"]), str(record["md5"]), str(record["licence"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


_MEMBERS = ("uniref50.fasta.gz", "uniref50.fasta", "uniref50.xml.gz", "uniref50.xml")
_INNER_TARS = ("uniref50.tar", "uniref50.tar.gz")
_FASTA_SHARE = {"uniref50.fasta.gz": 1.0, "uniref50.fasta": 1.0, "uniref50.xml.gz": 0.85, "uniref50.xml": 0.2}
"""Bytes written per byte of the member. For XML it is an upper bound: it was measured on the shipped sample in clusters
of a single member, and more members add to the XML but not to the FASTA."""
_ARCHIVE_TO_FASTA = 17  # some 170 GB to some 10 GB
_BLOCK_BYTES = 2**16  # read of the archive at once; gzip makes up to a thousand times as much of it
_LINE_RESIDUES = 60
_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, expat.ExpatError, ValueError, LookupError)


def extract_fasta(archive: Path, folder: Path, version: str, progress: Progress | None = None) -> Path:
    """Extract UniRef50 from an archived release to `<folder>/uniref50_<version>.fasta.gz`, or `.fasta` if plain.

    The tars are read once, and only the content of one file, selected by name, is written to disk. A FASTA is copied;
    of XML the representative sequences are written. `progress` gets the bytes read of the archive, and its size, which
    is not reached where other files follow UniRef50.

    The free space is checked before the archive is read, by the typical share of the FASTA, and before the FASTA is
    written, by the size of the member (an estimate for XML).

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
    """A file that reports how far it has been read."""

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
    """Yield the files of UniRef50 in a tar and its inner tars: name, size, content to read before the next."""
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
                # Level 1, as compression takes most of the time. No name and time, so that it is reproducible.
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
    """Refuse a DTD (expat's `StartDoctypeDeclHandler`), by which XML can grow without bound or read local files."""
    raise ValueError("it has a DTD, which may hide anything")


class _XmlToFasta:
    """Write the representative of each cluster of UniRef's XML, with the header of UniRef's FASTA.

    It uses expat's events, so that memory does not grow with the members of a cluster.
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
        """Convert a whole file. Raises `ExpatError` or `ValueError` for XML that is invalid or not UniRef's."""
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
            self.parser.StartElementHandler = self._seek_entry  # skips the other members of the cluster

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
