"""Atomic writes, modes that follow the umask, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from bionemo_esm.alphabet import encode
from bionemo_esm.data.store import StoreWriter
from bionemo_esm.data.uniprot_release import FetchedRelease, _remember
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import (
    LockedError,
    atomic_folder,
    atomic_write,
    lock_file,
    remove_unfinished,
    write_atomically,
)
from bionemo_esm.inference.contacts.output_dir import WorkFolder as ContactsFolder
from bionemo_esm.inference.embedding.options import Embedding
from bionemo_esm.inference.embedding.work_folder import WorkFolder as EmbeddingsFolder
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.interchange.export import export_hugging_face
from models import tiny_model


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=["077", "022", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> None:
    """Check that every file and folder inside has the mode of a new one under the umask."""
    paths = sorted(folder.rglob("*"))
    assert paths
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_modes_of_files_and_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_atomically(tmp_path / "new" / "text", "é")
    assert (tmp_path / "new" / "text").read_bytes() == "é".encode()
    with atomic_folder("target", tmp_path / "folder") as unfinished:
        write_atomically(unfinished / "file", b"x")
    check_modes(tmp_path, umask)


def test_every_writer_of_results_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """Write a store, an archive, an export, work folders of `embed` and `contacts`, and a download record."""
    with StoreWriter(tmp_path / "store") as writer:
        writer.add("train", encode("MKTAYIAKQR"))
        writer.finish({})
    tiny_model().save_to(str(tmp_path / "model.nemo"))
    export_hugging_face(ArchiveFile.open(tmp_path / "model.nemo"), tmp_path / "exported")
    with ContactsFolder.opened(tmp_path / "maps", "model 1") as maps:
        maps.write_map("a", np.zeros((2, 2), dtype=np.float32))
        maps.finish()
    folder = EmbeddingsFolder(tmp_path / "embeddings", "npz", is_folder=True)
    with folder.held():
        folder.claim({})
        folder.write(0, {}, [Embedding("a", 1, 1, 1, {"mean_1": np.zeros(4, dtype=np.float32)}, None)])
        folder.finish(1, {})
    (tmp_path / "uniref50_2022_05.fasta").write_bytes(b">a\nMK\n")
    _remember(FetchedRelease(tmp_path / "uniref50_2022_05.fasta", "2022_05", "https://x", "0" * 32, "CC"), "0" * 32)
    check_modes(tmp_path, umask)


def test_an_interrupted_file_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")
    with suppress(KeyboardInterrupt), atomic_write(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_folder_write_leaves_nothing(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), atomic_folder("target", tmp_path / "folder") as unfinished:
        (unfinished / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_during_the_write_is_kept(tmp_path: Path) -> None:
    def finish() -> None:
        with atomic_folder("target", tmp_path / "folder"):
            (tmp_path / "folder").mkdir()

    with pytest.raises(ConfigError, match=r"target: .*folder exists already"):
        finish()
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_only_unfinished_files_are_removed(tmp_path: Path) -> None:
    for name in (".a.1f.partial", "b/.c.2f.partial", "b/c", "notes.partial", ".store.partial/train.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"b/c", "notes.partial", ".store.partial/train.bin"}


def locks(path: Path, shared: bool = False) -> bool:
    """Return whether another process can take the lock now."""
    code = (
        "import sys; from pathlib import Path; from bionemo_esm.files import lock_file\n"
        f"with lock_file(Path(sys.argv[1]), shared={shared}): pass"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert not done.returncode or "LockedError" in done.stderr
    return done.returncode == 0


def test_a_lock_excludes_other_processes_until_the_block_ends(tmp_path: Path) -> None:
    with lock_file(tmp_path / "new" / "lock"):
        assert not locks(tmp_path / "new" / "lock")
    assert locks(tmp_path / "new" / "lock")
    with lock_file(tmp_path / "lock", shared=True):
        assert locks(tmp_path / "lock", shared=True)
        assert not locks(tmp_path / "lock")


@pytest.mark.parametrize("reopen", [True, False])
def test_a_lock_on_a_removed_file_is_retried_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reopen: bool
) -> None:
    path, flock = tmp_path / "lock", fcntl.flock

    def remove_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    if reopen:
        with lock_file(path) as stream:
            assert os.path.samestat(os.fstat(stream.fileno()), path.stat())
    else:
        with pytest.raises(LockedError), lock_file(path, reopen=False):
            pass


def test_waiting_for_a_lock_does_not_create_a_removed_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lock_file(tmp_path / "gone" / "lock", wait=True):
        pass
    assert not (tmp_path / "gone").exists()
