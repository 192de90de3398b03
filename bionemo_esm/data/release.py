"""UniRef50 as UniProt publishes it: a release is found by its metalink, fetched, checked, and known again.

    uniref/uniref50/uniref50.fasta.gz                                the current release, some 9 GB
    previous_releases/release-2022_05/uniref/uniref2022_05.tar.gz    an archived one: UniRef100, 90 and 50, some 170 GB

Beside each lies a RELEASE.metalink (Metalink 3.0) with the version, and the size and MD5 of every file. `download`
gets the file, `release_archive` the FASTA out of an archive; beside the FASTA, uniref50_2022_05.json records where it
came from.

This layout is taken from public programs that read these files; it was not compared with UniProt's server, and the
tests run against a local one that is laid out so.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from bionemo_esm.data.download import Progress, ReleaseError, download, is_whole, md5_of, read_small
from bionemo_esm.data.release_archive import extract_fasta, refuse_doctype

UNIPROT = "https://ftp.uniprot.org/pub/databases/uniprot"
CURRENT = "current"
LICENCE = "CC BY 4.0"
_METALINK_BYTES = 2**22


class Release(NamedTuple):
    """Where a release of UniRef50 lies, and how to know it again."""

    version: str  # "2022_05"
    url: str
    size: int  # bytes
    md5: str
    archived: bool  # `url` is a tar that holds UniRef50 among others, not its FASTA


class FetchedRelease(NamedTuple):
    """A release on disk, and where it came from."""

    path: Path  # FASTA
    version: str
    url: str  # of the file that was downloaded
    md5: str  # of the file that was downloaded
    licence: str


def fetch_release(
    name: str, folder: str | os.PathLike[str], progress: Progress | None = None, base_url: str = UNIPROT
) -> FetchedRelease:
    """UniRef50 of the release `YYYY_NN`, or of `current`, as `<folder>/uniref50_<version>.fasta.gz` (or `.fasta`).

    A release that was fetched into the folder before is checked by its MD5 and returned; if it was asked for by its
    number, without a connection. Else it is downloaded, going on where an earlier call broke off. An archived release
    needs room for its archive, some 170 GB, which is removed once the FASTA is written, some 10 GB.

    `progress` is called with the bytes downloaded. For an archived release it then starts again from 0, with the bytes
    of the archive that have been read to write the FASTA.

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
    """The release `YYYY_NN`, or the `current` one, from its metalink under `base_url`; nothing else is downloaded.

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
    """Note beside the FASTA where it came from, with its own size and MD5, so that it is known again."""
    file = {"path": fetched.path.name, "file_bytes": fetched.path.stat().st_size, "file_md5": file_md5}
    path = _record_path(fetched.path.parent, fetched.version)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(fetched._asdict() | file, indent=2) + "\n")
    unfinished.replace(path)


def _recall(folder: Path, version: str) -> FetchedRelease | None:
    """What an earlier call put into the folder, if the file is there and as it was."""
    try:
        record: dict[str, Any] = json.loads(_record_path(folder, version).read_text())
        path = folder / record["path"]
        known = path.name in (f"uniref50_{version}.fasta.gz", f"uniref50_{version}.fasta") and path.parent == folder
        if not known or not is_whole(path, record["file_bytes"], record["file_md5"]):
            return None
        return FetchedRelease(path, version, str(record["url"]), str(record["md5"]), str(record["licence"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
