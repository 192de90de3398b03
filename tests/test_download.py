"""Tests of downloads: failures of server, network and disk, with a server on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
import threading
from email.utils import formatdate
from pathlib import Path
from time import time
from types import SimpleNamespace

import pytest

from bionemo_esm.data.download import Progress, ReleaseError, download
from release_server import CONTENT, DATA, MD5, Handler, Reply, Server, names

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "uniref50.fasta.gz"


def fetch(server: Server, target: Path, **options: object) -> Path:
    settings = {"size": len(CONTENT), "md5": MD5} | options
    return download(server.url + DATA, target, **settings)  # type: ignore[arg-type]


def test_download_writes_the_whole_file_and_nothing_else(server: Server, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert fetch(server, target, progress=lambda *now: seen.append(now)) == target
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == [target.name]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert len(seen) > 5


def test_complete_file_is_not_downloaded_again(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT)
    fetch(server, target)
    assert server.seen == []


def test_file_with_a_flipped_bit_is_replaced(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_download_resumes_after_each_lost_connection(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(*[Reply(drop_after=100_000)] * 5)
    # Every attempt makes progress, so one retry is enough for any number of lost connections.
    fetch(server, target, retries=1)
    assert target.read_bytes() == CONTENT
    begins = [0 if asked is None else int(asked[6:-1]) for asked in server.ranges]
    assert begins == sorted(set(begins))
    assert len(begins) == 6
    assert begins[-1] > 5 * 30_000
    assert pauses == [1.0] * 5


def test_pauses_double_and_retries_end_without_progress(server: Server, target: Path, pauses: list[float]) -> None:
    server.every = Reply(status=503)
    with pytest.raises(ReleaseError, match=r"HTTP status 503 \(9 attempts in a row\)"):
        fetch(server, target)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert names(target.parent) == []


def test_busy_server_is_retried(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(Reply(status=503), Reply(status=500), Reply(status=408))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert pauses == [1, 2, 4]


def test_retry_after_header_sets_the_pause(server: Server, target: Path, pauses: list[float]) -> None:
    later = formatdate(time() + 100, usegmt=True)
    server.fail(Reply(429, {"Retry-After": "17"}), Reply(503, {"Retry-After": later}), Reply(429, {"Retry-After": "x"}))
    fetch(server, target)
    assert pauses[0] == 17
    assert 90 < pauses[1] < 101
    assert pauses[2] == 4


def test_retry_after_of_hours_is_an_error(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(Reply(429, {"Retry-After": "7200"}))
    with pytest.raises(ReleaseError, match="asks to wait for 7200 s; run it again after that"):
        fetch(server, target)
    assert pauses == []


@pytest.mark.parametrize("status", [404, 403, 410])
def test_permanent_http_error_is_not_retried(server: Server, target: Path, status: int) -> None:
    server.every = Reply(status=status)
    with pytest.raises(ReleaseError, match=f"HTTP status {status}; check"):
        fetch(server, target)
    assert len(server.seen) == 1
    assert names(target.parent) == []


def test_server_without_ranges_restarts_the_file(server: Server, target: Path) -> None:
    server.fail(Reply(drop_after=300_000), Reply(ranges=False, drop_after=200_000), Reply(ranges=False))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 200, 200]


def test_server_without_ranges_that_never_finishes_is_given_up(server: Server, target: Path) -> None:
    server.every = Reply(ranges=False, drop_after=200_000)
    with pytest.raises(ReleaseError, match="3 attempts in a row"):
        fetch(server, target, retries=2)
    assert len(server.seen) == 3


def test_body_shorter_than_its_content_length_is_continued(server: Server, target: Path) -> None:
    server.fail(Reply(body=CONTENT[:400_000], length_told=len(CONTENT), headers={"ETag": f'"{MD5}"'}))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.seen) == 2
    assert server.ranges[1] is not None


@pytest.mark.parametrize("told", [len(CONTENT) + 1, len(CONTENT) - 1])
def test_file_of_unexpected_size_is_refused_before_reading(server: Server, target: Path, told: int) -> None:
    server.every = Reply(length_told=told)
    with pytest.raises(ReleaseError, match=f"has {told} bytes at the server, {len(CONTENT)} expected"):
        fetch(server, target, progress=lambda *_: pytest.fail("read some of it"))
    assert names(target.parent) == []


def test_endless_body_of_unknown_length_is_cut_off(server: Server, target: Path) -> None:
    told = {"Content-Length": "unknown"}  # the client reads until the connection closes
    server.every = Reply(body=CONTENT * 3, headers=told)
    read: list[int] = []
    with pytest.raises(ReleaseError, match=f"at the server, {len(CONTENT)} expected"):
        fetch(server, target, progress=lambda now, _: read.append(now))
    assert read[-1] <= len(CONTENT)
    assert names(target.parent) == []


def test_body_of_unknown_length_that_ends_early_is_continued(server: Server, target: Path) -> None:
    server.fail(Reply(headers={"Content-Length": "unknown"}, drop_after=300_000))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 206]


def test_other_content_of_the_same_size_is_removed(server: Server, target: Path) -> None:
    server.files[DATA] = CONTENT[::-1]
    found = hashlib.md5(CONTENT[::-1]).hexdigest()
    with pytest.raises(ReleaseError, match=f"with MD5 {found}, {MD5} expected"):
        fetch(server, target)
    assert names(target.parent) == []


def test_gzip_file_with_gzip_content_encoding_is_not_decompressed(server: Server, target: Path) -> None:
    server.every = Reply(headers={"Content-Encoding": "gzip"})
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def stop_after(length: int) -> Progress:
    def stop(now: int, _: int | None) -> None:
        if now >= length:
            raise KeyboardInterrupt

    return stop


def test_partial_download_before_ctrl_c_is_resumed(server: Server, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    part = target.with_name(f"{target.name}.part")
    kept = part.stat().st_size
    assert CONTENT[:kept] == part.read_bytes()
    assert kept >= 300_000
    assert not target.exists()
    fetch(server, target)
    assert [reply[1:] for reply in server.seen] == [(None, 200), (f"bytes={kept}-", 206)]
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize("etags", [True, False])
def test_file_changed_on_the_server_is_downloaded_from_the_start(server: Server, target: Path, etags: bool) -> None:
    server.etags = etags
    server.every = Reply(headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})
    server.files[DATA] = CONTENT[::-1]
    with pytest.raises(KeyboardInterrupt):
        download(server.url + DATA, target, progress=stop_after(300_000))
    server.files[DATA] = CONTENT
    server.every = Reply(headers={"Last-Modified": "Mon, 01 Jul 2024 00:00:00 GMT"})
    download(server.url + DATA, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 200]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_partial_file_without_a_strong_validator_is_restarted(
    server: Server, target: Path, headers: dict[str, str]
) -> None:
    server.etags = False
    server.every = Reply(headers=headers)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    fetch(server, target)
    assert server.ranges == [None, None]


def test_partial_file_from_another_url_is_restarted(server: Server, target: Path) -> None:
    server.files["/other"] = CONTENT[::-1]
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/other", target, progress=stop_after(300_000))
    fetch(server, target)
    assert server.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_wrong_content_range_is_not_used(server: Server, target: Path) -> None:
    wrong = {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.fail(Reply(drop_after=300_000), Reply(headers=wrong))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 206, 200]


def test_complete_partial_file_is_finished(server: Server, target: Path) -> None:
    for options in ({"size": None, "md5": MD5}, {"size": len(CONTENT), "md5": MD5}):
        server.seen.clear()
        with pytest.raises(KeyboardInterrupt):
            fetch(server, target, progress=stop_after(len(CONTENT)), **options)
        fetch(server, target, **options)
        assert target.read_bytes() == CONTENT
        assert [status for *_, status in server.seen] == ([200, 416] if options["size"] is None else [200])
        target.unlink()


def test_partial_file_longer_than_the_file_is_restarted(server: Server, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(CONTENT + b"more")
    part.with_name(f"{part.name}.json").write_text(json.dumps({"url": server.url + DATA, "validator": f'"{MD5}"'}))
    fetch(server, target, size=None)
    assert [status for *_, status in server.seen] == [416, 200]
    assert target.read_bytes() == CONTENT


def test_damaged_metadata_of_a_partial_file_restarts_it(server: Server, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    target.with_name(f"{target.name}.part.json").write_text('{"url": ')
    fetch(server, target)
    assert server.ranges == [None, None]


def test_redirect_is_followed(server: Server, target: Path) -> None:
    server.files["/elsewhere"] = CONTENT
    server.fail(Reply(302, {"Location": "/elsewhere"}))
    fetch(server, target)
    assert [path for path, *_ in server.seen] == [DATA, "/elsewhere"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["http://example.org/uniref50.fasta.gz", "ftp://127.0.0.1/uniref50.fasta.gz"])
def test_redirect_to_another_scheme_than_https_is_refused(server: Server, target: Path, place: str) -> None:
    server.every = Reply(302, {"Location": place})
    with pytest.raises(ReleaseError, match=f"^{place}: .*https"):
        fetch(server, target)
    assert len(server.seen) == 1


def test_redirect_loop_is_an_error(server: Server, target: Path) -> None:
    server.every = Reply(302, {"Location": DATA})
    with pytest.raises(ReleaseError, match="redirects"):
        fetch(server, target)


@pytest.mark.parametrize(
    "url",
    [
        "http://ftp.uniprot.org/x",
        "http://10.0.0.1/x",
        "ftp://localhost/x",
        "file:///etc/passwd",
        "uniref50",
        "https://",
    ],
)
def test_only_https_is_accepted_from_other_hosts(target: Path, url: str) -> None:
    with pytest.raises(ReleaseError, match="https"):
        download(url, target)
    assert names(target.parent) == []


def test_unreachable_server_is_an_error(server: Server, target: Path, pauses: list[float]) -> None:
    server.server_close()
    with pytest.raises(ReleaseError, match=r"no answer .* check the connection"):
        fetch(server, target, retries=2)
    assert pauses == [1, 2]


def test_silent_server_is_retried_after_the_timeout(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Handler.end_headers
    silent = threading.Event()

    def end_headers(handler: Handler) -> None:
        write(handler)
        if len(server.seen) == 1:
            silent.wait(5)

    monkeypatch.setattr(Handler, "end_headers", end_headers)
    fetch(server, target, timeout_seconds=0.2)
    silent.set()
    assert len(server.seen) == 2
    assert target.read_bytes() == CONTENT


def test_too_small_disk_is_found_before_the_download(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(ReleaseError, match=r"GB free, .* needed for uniref50.fasta.gz; make room, or"):
        fetch(server, target)
    assert server.seen == []
    assert names(target.parent) == []


def test_disk_check_subtracts_the_bytes_already_downloaded(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 300_000))
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_target_below_a_file_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match=r"file: .*; choose another folder"):
        fetch(server, tmp_path / "file" / "uniref50.fasta.gz")


def test_second_process_with_the_same_target_is_refused(server: Server, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    with part.open("wb") as other:
        other.write(b"theirs")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ReleaseError, match="another process is writing it"):
            fetch(server, target)
    assert part.read_bytes() == b"theirs"
    assert server.seen == []


def test_partial_file_renamed_before_its_lock_is_left_alone(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def finish_first(stream: io.BufferedRandom, how: int) -> None:
        target.with_name(f"{target.name}.part").replace(target)
        lock(stream, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(ReleaseError, match="another process"):
        fetch(server, target)
    assert names(target.parent) == [target.name]


def test_unresolvable_host_is_reported_without_retries(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"the name no-such-host\.invalid cannot be resolved; check the connection"):
        download("https://no-such-host.invalid/uniref50.fasta.gz", tmp_path / "file")
