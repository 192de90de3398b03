"""Downloading a task's files from a local server: checksums, unpacking, and reuse."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bionemo_esm.data import download as downloading
from bionemo_esm.data.download import ReleaseError
from bionemo_esm.finetuning import splits as downloads
from bionemo_esm.finetuning.splits import download_task, read_splits
from bionemo_esm.finetuning.tasks import DataConfig, DownloadConfig, TaskConfig
from labelled_files import MASK, SEQUENCES, STRUCTURE, preset
from release_server import Reply, Server, names, running_server

MEMBERS = {"splits/": "", "splits/sampled.fasta": STRUCTURE, "splits/sequences.fasta": SEQUENCES}
MEMBERS |= {"splits/mask.fasta": MASK, "../outside.txt": "no", "splits/other.csv": "no"}
PATH = "/FLIP/splits.zip"


def packed(members: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return stream.getvalue()


ARCHIVE = packed(MEMBERS)
SHA256 = f"sha256:{hashlib.sha256(ARCHIVE).hexdigest()}"
BLOB = f"git:{hashlib.sha1(b'blob %d' % len(ARCHIVE) + bytes(1) + ARCHIVE).hexdigest()}"  # as `git hash-object` does


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as running:
        running.files[PATH] = ARCHIVE
        yield running


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "sleep", lambda _: None)


def config(server: Server, **values: Any) -> DownloadConfig:
    return DownloadConfig(
        **{"url": server.url + PATH, "checksum": SHA256, "train": "splits/sampled.fasta"} | values  # type: ignore[arg-type]
    )


def test_task_is_downloaded_read_and_then_reused(server: Server, tmp_path: Path) -> None:
    own = preset("secondary_structure", download={"url": server.url + PATH, "checksum": SHA256})
    task, data = TaskConfig.from_config(own), DataConfig.from_config({"download": str(tmp_path / "flip")})
    server.fail(Reply(status=503), Reply(drop_after=100), path=PATH)  # a busy server, then a lost connection
    splits = read_splits(task, data, 1)
    assert [protein.id for protein in splits.train.proteins] == ["a"]
    assert splits.test is not None
    assert set(splits.files) == {"sampled.fasta", "sequences.fasta", "mask.fasta"}
    folder = tmp_path / "flip" / "secondary_structure"
    assert names(folder) == ["mask.fasta", "sampled.fasta", "sequences.fasta", "splits.zip"]
    assert names(tmp_path) == ["flip"]  # nothing outside the folder, only the named members
    asked = len(server.seen)
    assert read_splits(task, data, 1).task == splits.task
    assert len(server.seen) == asked


@pytest.mark.parametrize("checksum", [SHA256, BLOB], ids=["sha256", "git"])
def test_sha256_and_git_checksums_are_verified(server: Server, tmp_path: Path, checksum: str) -> None:
    found = download_task("mine", config(server, checksum=checksum), tmp_path)
    assert found["train"].read_text() == STRUCTURE
    assert set(found) == {"train"}
    server.files[PATH] = packed({**MEMBERS, "splits/sampled.fasta": STRUCTURE.replace("EC", "HC")})
    with pytest.raises(ReleaseError, match=r"has other bytes than .*give local files by data\.train="):
        download_task("other", config(server, checksum=checksum), tmp_path)
    assert names(tmp_path / "other") == []


def test_files_changed_on_disk_are_repaired(server: Server, tmp_path: Path) -> None:
    found = download_task("mine", config(server), tmp_path)["train"]
    found.write_text(STRUCTURE.replace("EC", "HC"))
    assert download_task("mine", config(server), tmp_path)["train"].read_text() == STRUCTURE
    assert len(server.seen) == 1
    (tmp_path / "mine" / "splits.zip").write_bytes(ARCHIVE[:-1] + b"x")
    assert download_task("mine", config(server), tmp_path)["train"].read_text() == STRUCTURE
    assert len(server.seen) == 2


def test_missing_member_error_lists_the_members(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"no member 'sampled\.csv', but splits/sampled\.fasta, .*task\.download"):
        download_task("mine", config(server, train="sampled.csv"), tmp_path)
    with pytest.raises(ReleaseError, match=r"member 'splits/' is no file"):
        download_task("mine", config(server, train="splits/"), tmp_path)


def test_member_stays_within_its_folder_and_size_limit(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = download_task("mine", config(server, train="../outside.txt"), tmp_path)
    assert found["train"] == tmp_path / "mine" / "outside.txt"
    monkeypatch.setattr(downloads, "_LARGEST_MEMBER_BYTES", len(STRUCTURE) - 1)
    with pytest.raises(ReleaseError, match=r"is no file of up to 1 GiB"):
        download_task("mine", config(server), tmp_path)


def test_invalid_archive_is_rejected(server: Server, tmp_path: Path) -> None:
    server.files[PATH] = b"<html>moved</html>"
    checksum = f"sha256:{hashlib.sha256(server.files[PATH]).hexdigest()}"
    with pytest.raises(ReleaseError, match=r"cannot be unpacked"):
        download_task("mine", config(server, checksum=checksum), tmp_path)
    damaged = bytearray(ARCHIVE)
    damaged[ARCHIVE.index(b"splits/sampled.fasta") + 30] ^= 0xFF  # inside the compressed data
    server.files[PATH] = bytes(damaged)
    checksum = f"sha256:{hashlib.sha256(damaged).hexdigest()}"
    with pytest.raises(ReleaseError, match=r"cannot be unpacked"):
        download_task("mine", config(server, checksum=checksum), tmp_path / "more")
    assert not [name for name in names(tmp_path / "more" / "mine") if name.endswith((".fasta", ".partial"))]


def test_failed_download_suggests_local_files(server: Server, tmp_path: Path) -> None:
    server.files.clear()
    with pytest.raises(ReleaseError, match=r"HTTP status 404.*; or give local files by data\.train=\.\.\."):
        download_task("mine", config(server), tmp_path)
    assert names(tmp_path / "mine") == []


def test_folder_that_cannot_be_created_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReleaseError, match=r"choose another folder"):
        download_task("mine", config(server), tmp_path / "file")
    assert server.seen == []
