"""A task's own files over the network: one zip archive at a fixed commit of FLIP's repository, of which only named
members are taken out, once its bytes have been found to be the expected ones.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from bionemo_esm.data.download import Progress, ReleaseError, download, file_errors, require_room
from bionemo_esm.finetuning.tasks import DownloadConfig
from bionemo_esm.outputs import written_whole

_LARGEST_ARCHIVE_BYTES = 2**30
_LARGEST_MEMBER_BYTES = 2**30
_BLOCK_BYTES = 2**20


def download_task(name: str, config: DownloadConfig, folder: Path, progress: Progress | None = None) -> dict[str, Path]:
    """The files of a task in `folder/name`, by what they are: train, and where the task has them sequences and mask.

    What is there already is looked through, and not downloaded again. Raises `ReleaseError`: for an archive that cannot
    be had, has other bytes than expected, or lacks a member; for a folder that cannot be written to.
    """
    place = folder / name
    archive = place / (PurePosixPath(config.url).name or "archive.zip")
    if not (archive.is_file() and _has_checksum(archive, config.checksum)):
        try:
            download(config.url, archive, progress=progress)
        except ReleaseError as error:
            raise ReleaseError(f"{error}; or give local files by data.train=...") from error
        if not _has_checksum(archive, config.checksum):
            archive.unlink()
            raise ReleaseError(
                f"{config.url}: has other bytes than {config.checksum}; it was removed. Check the address and "
                "task.download.checksum, or give local files by data.train=..."
            )
    members = {"train": config.train, "sequences": config.sequences, "mask": config.mask}
    with file_errors(archive):
        return {key: _taken_out(archive, member, place) for key, member in members.items() if member is not None}


def _has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has the bytes of `sha256:...`, or of a blob `git:...`: SHA-1 of a header and the file."""
    kind, _, expected = checksum.partition(":")
    size = path.stat().st_size
    if size > _LARGEST_ARCHIVE_BYTES:
        return False
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == expected


def _taken_out(archive: Path, member: str, place: Path) -> Path:
    """One member of an archive, as a file of its last name in a folder."""
    target = place / PurePosixPath(member).name
    try:
        with zipfile.ZipFile(archive) as packed:
            if member not in packed.namelist():
                there = ", ".join(name for name in packed.namelist() if not name.endswith("/"))
                raise ReleaseError(f"{archive}: has no member {member!r}, but {there}; correct task.download")
            info = packed.getinfo(member)
            if target == archive or not target.name or info.is_dir() or info.file_size > _LARGEST_MEMBER_BYTES:
                raise ReleaseError(f"{archive}: member {member!r} is no file of up to 1 GiB; correct task.download")
            if _is_taken_out(target, info):
                return target
            require_room(target, info.file_size)
            with packed.open(info) as source, written_whole(target) as stream:
                shutil.copyfileobj(source, stream, _BLOCK_BYTES)  # no more than file_size, and its CRC is checked
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ReleaseError(f"{archive}: cannot be unpacked ({error}); remove it and run this again") from error
    return target


def _is_taken_out(target: Path, info: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != info.file_size:
        return False
    check = 0
    with target.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            check = zlib.crc32(block, check)
    return check == info.CRC
