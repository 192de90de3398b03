"""Getting UniRef50: every way in which a server, a network or an archive can fail, against a server on this machine."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import time
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import pytest

from bionemo_esm.data import release
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.data.release import (
    FetchedRelease,
    ReleaseError,
    download,
    extract_fasta,
    fetch_release,
    locate_release,
)

CONTENT = (Path(release.__file__).parent / "sample" / "train.fasta.gz").read_bytes()  # some 600 KB of real proteins
MD5 = hashlib.md5(CONTENT).hexdigest()
DATA = "/uniref50.fasta.gz"


class Reply(NamedTuple):
    """What the server does with one request: by default, what a good one would."""

    status: int = 0  # another than 200 or 206
    headers: Mapping[str, str] = MappingProxyType({})
    drop_after: int | None = None  # bytes of the body, before the connection is closed
    length_told: int | None = None  # Content-Length
    ranges: bool = True
    body: bytes | None = None


class Server(ThreadingHTTPServer):
    """Files by path, and for the next requests of a path what is to go wrong with them, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {DATA: CONTENT}
        self.replies: dict[str, list[Reply]] = {}
        self.every: Reply = Reply()  # once the list is used up
        self.etags = True
        self.seen: list[tuple[str, str | None, int]] = []  # path, Range and status of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what some tests are about."""

    def fail(self, *replies: Reply, path: str = DATA) -> None:
        self.replies[path] = list(replies)

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.seen]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        waiting = self.server.replies.get(self.path)
        reply = waiting.pop(0) if waiting else self.server.every
        content = self.server.files.get(self.path) if reply.body is None else reply.body
        status = reply.status or (200 if content is not None else 404)
        etag = f'"{hashlib.md5(content or b"").hexdigest()}"'
        headers = dict(reply.headers)
        asked = self.headers["Range"]
        body = content or b""
        if status == 200:
            if self.server.etags:
                headers.setdefault("ETag", etag)
            if (
                asked
                and reply.ranges
                and self.headers["If-Range"] in (headers.get("ETag"), headers.get("Last-Modified"))
            ):
                begin = int(asked.removeprefix("bytes=").removesuffix("-"))
                status = 206 if begin < len(body) else 416
                place = f"{begin}-{len(body) - 1}" if status == 206 else "*"
                headers.setdefault("Content-Range", f"bytes {place}/{len(body)}")
                body = body[begin:] if status == 206 else b"nothing there"
        self.server.seen.append((self.path, asked, status))
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body) if reply.length_told is None else reply.length_told))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: reply.drop_after])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses made between attempts, in seconds; none is waited for."""
    made: list[float] = []
    monkeypatch.setattr(release, "sleep", made.append)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "uniref50.fasta.gz"


def fetch(server: Server, target: Path, **options: object) -> Path:
    settings = {"size": len(CONTENT), "md5": MD5} | options
    return download(server.url + DATA, target, **settings)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Downloads


def test_a_file_arrives_whole_and_alone(server: Server, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert fetch(server, target, progress=lambda *now: seen.append(now)) == target
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == [target.name]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert len(seen) > 5


def test_a_whole_file_is_not_downloaded_again(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT)
    fetch(server, target)
    assert server.seen == []


def test_a_file_with_one_bit_changed_is_replaced(server: Server, target: Path) -> None:
    target.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_download_goes_on_after_each_lost_connection(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(*[Reply(drop_after=100_000)] * 5)
    fetch(server, target, retries=1)  # as each attempt gains something, one retry is enough for any number of them
    assert target.read_bytes() == CONTENT
    begins = [0 if asked is None else int(asked[6:-1]) for asked in server.ranges]
    assert begins == sorted(set(begins))
    assert len(begins) == 6
    assert begins[-1] > 5 * 30_000
    assert pauses == [1.0] * 5


def test_without_any_gain_the_pauses_double_and_the_retries_end(
    server: Server, target: Path, pauses: list[float]
) -> None:
    server.every = Reply(status=503)
    with pytest.raises(ReleaseError, match=r"HTTP status 503 \(9 attempts in a row\)"):
        fetch(server, target)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert names(target.parent) == []


def test_a_server_that_is_busy_is_asked_again(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(Reply(status=503), Reply(status=500), Reply(status=408))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert pauses == [1, 2, 4]


def test_the_pause_a_server_asks_for_is_made(server: Server, target: Path, pauses: list[float]) -> None:
    later = formatdate(time() + 100, usegmt=True)
    server.fail(Reply(429, {"Retry-After": "17"}), Reply(503, {"Retry-After": later}), Reply(429, {"Retry-After": "x"}))
    fetch(server, target)
    assert pauses[0] == 17
    assert 90 < pauses[1] < 101
    assert pauses[2] == 4


def test_a_pause_of_hours_is_an_error(server: Server, target: Path, pauses: list[float]) -> None:
    server.fail(Reply(429, {"Retry-After": "7200"}))
    with pytest.raises(ReleaseError, match="asks to wait for 7200 s; run it again after that"):
        fetch(server, target)
    assert pauses == []


@pytest.mark.parametrize("status", [404, 403, 410])
def test_what_another_attempt_will_not_mend_is_an_error_at_once(server: Server, target: Path, status: int) -> None:
    server.every = Reply(status=status)
    with pytest.raises(ReleaseError, match=f"HTTP status {status}; check"):
        fetch(server, target)
    assert len(server.seen) == 1
    assert names(target.parent) == []


def test_a_server_without_ranges_sends_the_file_again_from_its_start(server: Server, target: Path) -> None:
    server.fail(Reply(drop_after=300_000), Reply(ranges=False, drop_after=200_000), Reply(ranges=False))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 200, 200]


def test_a_server_without_ranges_that_never_finishes_is_given_up(server: Server, target: Path) -> None:
    server.every = Reply(ranges=False, drop_after=200_000)
    with pytest.raises(ReleaseError, match="3 attempts in a row"):
        fetch(server, target, retries=2)
    assert len(server.seen) == 3


def test_a_body_shorter_than_told_is_continued(server: Server, target: Path) -> None:
    server.fail(Reply(body=CONTENT[:400_000], length_told=len(CONTENT), headers={"ETag": f'"{MD5}"'}))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.seen) == 2
    assert server.ranges[1] is not None


@pytest.mark.parametrize("told", [len(CONTENT) + 1, len(CONTENT) - 1])
def test_a_file_of_another_size_than_expected_is_refused_before_it_is_read(
    server: Server, target: Path, told: int
) -> None:
    server.every = Reply(length_told=told)
    with pytest.raises(ReleaseError, match=f"has {told} bytes at the server, {len(CONTENT)} expected"):
        fetch(server, target, progress=lambda *_: pytest.fail("read some of it"))
    assert names(target.parent) == []


def test_a_body_of_no_told_length_that_never_ends_is_cut_off(server: Server, target: Path) -> None:
    told = {"Content-Length": "unknown"}  # read until the connection closes
    server.every = Reply(body=CONTENT * 3, headers=told)
    read: list[int] = []
    with pytest.raises(ReleaseError, match=f"at the server, {len(CONTENT)} expected"):
        fetch(server, target, progress=lambda now, _: read.append(now))
    assert read[-1] <= len(CONTENT)
    assert names(target.parent) == []


def test_a_body_of_no_told_length_that_ends_early_is_continued(server: Server, target: Path) -> None:
    server.fail(Reply(headers={"Content-Length": "unknown"}, drop_after=300_000))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 206]


def test_another_content_of_the_same_size_is_removed(server: Server, target: Path) -> None:
    server.files[DATA] = CONTENT[::-1]
    found = hashlib.md5(CONTENT[::-1]).hexdigest()
    with pytest.raises(ReleaseError, match=f"with MD5 {found}, {MD5} expected"):
        fetch(server, target)
    assert names(target.parent) == []


def test_a_gzip_file_called_a_gzip_encoding_is_not_decompressed(server: Server, target: Path) -> None:
    server.every = Reply(headers={"Content-Encoding": "gzip"})
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def stop_after(length: int) -> release.Progress:
    def stop(now: int, _: int | None) -> None:
        if now >= length:
            raise KeyboardInterrupt

    return stop


def test_what_arrived_before_ctrl_c_is_not_downloaded_again(server: Server, target: Path) -> None:
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
def test_a_file_that_changed_meanwhile_is_not_glued_to_its_old_half(server: Server, target: Path, etags: bool) -> None:
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
def test_a_part_that_nothing_vouches_for_is_started_over(server: Server, target: Path, headers: dict[str, str]) -> None:
    server.etags = False
    server.every = Reply(headers=headers)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    fetch(server, target)
    assert server.ranges == [None, None]


def test_a_part_from_another_address_is_started_over(server: Server, target: Path) -> None:
    server.files["/other"] = CONTENT[::-1]
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/other", target, progress=stop_after(300_000))
    fetch(server, target)
    assert server.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_another_part_than_was_asked_for_is_not_used(server: Server, target: Path) -> None:
    wrong = {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.fail(Reply(drop_after=300_000), Reply(headers=wrong))
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [status for *_, status in server.seen] == [200, 206, 200]


def test_a_part_that_lacks_nothing_is_finished(server: Server, target: Path) -> None:
    for options in ({"size": None, "md5": MD5}, {"size": len(CONTENT), "md5": MD5}):
        server.seen.clear()
        with pytest.raises(KeyboardInterrupt):
            fetch(server, target, progress=stop_after(len(CONTENT)), **options)
        fetch(server, target, **options)
        assert target.read_bytes() == CONTENT
        assert [status for *_, status in server.seen] == ([200, 416] if options["size"] is None else [200])
        target.unlink()


def test_a_part_longer_than_the_file_is_started_over(server: Server, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(CONTENT + b"more")
    part.with_name(f"{part.name}.json").write_text(json.dumps({"url": server.url + DATA, "validator": f'"{MD5}"'}))
    fetch(server, target, size=None)
    assert [status for *_, status in server.seen] == [416, 200]
    assert target.read_bytes() == CONTENT


def test_a_damaged_note_beside_a_part_starts_it_over(server: Server, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    target.with_name(f"{target.name}.part.json").write_text('{"url": ')
    fetch(server, target)
    assert server.ranges == [None, None]


def test_a_redirect_is_followed(server: Server, target: Path) -> None:
    server.files["/elsewhere"] = CONTENT
    server.fail(Reply(302, {"Location": "/elsewhere"}))
    fetch(server, target)
    assert [path for path, *_ in server.seen] == [DATA, "/elsewhere"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["http://example.org/uniref50.fasta.gz", "ftp://127.0.0.1/uniref50.fasta.gz"])
def test_a_redirect_to_what_is_not_https_is_refused(server: Server, target: Path, place: str) -> None:
    server.every = Reply(302, {"Location": place})
    with pytest.raises(ReleaseError, match=f"^{place}: .*https"):
        fetch(server, target)
    assert len(server.seen) == 1


def test_a_redirect_in_a_circle_is_an_error(server: Server, target: Path) -> None:
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
def test_only_https_is_accepted_from_elsewhere(target: Path, url: str) -> None:
    with pytest.raises(ReleaseError, match="https"):
        download(url, target)
    assert names(target.parent) == []


def test_no_answer_at_all_is_an_error(server: Server, target: Path, pauses: list[float]) -> None:
    server.server_close()
    with pytest.raises(ReleaseError, match=r"no answer .* check the connection"):
        fetch(server, target, retries=2)
    assert pauses == [1, 2]


def test_a_server_that_falls_silent_is_asked_again(
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


def test_too_small_a_disk_is_found_before_the_download(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(ReleaseError, match=r"GB free, .* needed; choose another folder"):
        fetch(server, target)
    assert server.seen == []
    assert names(target.parent) == []


def test_what_has_arrived_needs_no_room_again(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop_after(300_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 300_000))
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_folder_that_cannot_be_one_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match=r"file: .*; choose another folder"):
        fetch(server, tmp_path / "file" / "uniref50.fasta.gz")


def test_a_second_process_at_the_same_target_is_told_so(server: Server, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    with part.open("wb") as other:
        other.write(b"theirs")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ReleaseError, match="another process is writing it"):
            fetch(server, target)
    assert part.read_bytes() == b"theirs"
    assert server.seen == []


def test_a_part_renamed_before_it_was_locked_is_left_alone(
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


# Releases


def tar(files: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def metalink(version: str, files: dict[str, bytes], **changes: str) -> bytes:
    entries = "".join(
        f'<file name="{name}"><size>{changes.get("size", str(len(content)))}</size><verification>'
        f'<hash type="md5">{changes.get("md5", hashlib.md5(content).hexdigest())}</hash></verification>'
        f'<resources><url type="ftp">ftp://ftp.example.org/{name}</url></resources></file>'
        for name, content in files.items()
    )
    head = '<?xml version="1.0" encoding="UTF-8"?>' + changes.get("doctype", "")
    body = f"<version>{version}</version><files>{entries}</files>"
    return f'{head}<metalink version="3.0" xmlns="http://www.metalinker.org/">{body}</metalink>'.encode()


HEADERS = {  # as the entries of XML below say
    "UniRef50_P0CG48": "Polyubiquitin-C & <its> \xe9 n=3 Tax=Eukaryota TaxID=2759 RepID=UBC_HUMAN",
    "UniRef50_P01542": "Crambin n=1 Tax=Crambe hispanica TaxID=3721 RepID=CRAM_CRAAB",
}
SEQUENCES = {
    "UniRef50_P0CG48": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "UniRef50_P01542": "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN",
}


def uniref_xml(doctype: str = "", length: int = 0) -> bytes:
    """UniRef50 XML of two clusters, the first of which has more members; `length` is added to what the XML says."""
    text = f'<?xml version="1.0" encoding="ISO-8859-1" ?>\n{doctype}'
    text += '<UniRef50 xmlns="http://uniprot.org/uniref" \n releaseDate="2022-12-14" version="2022_05"> \n'
    for key, header in HEADERS.items():
        name, _, rest = header.partition(" n=")
        count, _, rest = rest.partition(" Tax=")
        taxon, _, rest = rest.partition(" TaxID=")
        number, _, representative = rest.partition(" RepID=")
        residues = SEQUENCES[key]
        wrapped = "\n".join(residues[at : at + 60] for at in range(0, len(residues), 60))  # as before 2019_09
        text += f'<entry id="{key}" updated="2022-12-14">\n<name>Cluster: {escape(name)}</name>\n'
        for kind, value in (("member count", count), ("common taxon", taxon), ("common taxon ID", number)):
            text += f'<property type="{kind}" value={quoteattr(value)}/>\n'
        member = '<dbReference type="UniProtKB ID" id="{}">\n<property type="length" value="9"/>\n</dbReference>\n'
        text += f"<representativeMember>\n{member.format(representative)}"
        text += f'<sequence length="{len(residues) + length}" checksum="0">\n{wrapped}\n</sequence>\n'
        text += "</representativeMember>\n"
        text += f"<member>\n{member.format('OTHER_MOUSE')}</member>\n" * (int(count) - 1) + "</entry>\n"
    return f"{text}</UniRef50>\n".encode("latin-1")


XML = gzip.compress(uniref_xml())
INNER = tar({"README": b"", "uniref50.release_note": b"UniRef50", "uniref50.xml.gz": XML})
ARCHIVE = tar({"uniref100.tar": b"\0" * 30_000, "uniref90.tar": b"\0" * 20_000, "uniref50.tar": INNER}, "w:gz")
OLD = "/previous_releases/release-2022_05/uniref"
NOW = "/uniref/uniref50"


@pytest.fixture
def uniprot(server: Server) -> Server:
    """A server laid out like UniProt's: 2024_06 is current, 2022_05 archived."""
    server.files = {
        f"{NOW}/uniref50.fasta.gz": CONTENT,
        f"{NOW}/RELEASE.metalink": metalink("2024_06", {"uniref50.xml.gz": b"xml", "uniref50.fasta.gz": CONTENT}),
        f"{OLD}/uniref2022_05.tar.gz": ARCHIVE,
        f"{OLD}/RELEASE.metalink": metalink("2022_05", {"README": b"read", "uniref2022_05.tar.gz": ARCHIVE}),
    }
    return server


def read(path: Path) -> dict[str, tuple[str, str]]:
    return {record.id: (record.header, record.sequence.decode()) for record in read_fasta(path)}


EXPECTED = {key: (f"{key} {HEADERS[key]}", SEQUENCES[key]) for key in HEADERS}


@pytest.mark.parametrize("name", ["current", "2024_06"])
def test_the_current_release_gets_the_version_its_metalink_says(uniprot: Server, tmp_path: Path, name: str) -> None:
    fetched = fetch_release(name, tmp_path / "data", base_url=uniprot.url)
    path = tmp_path / "data" / "uniref50_2024_06.fasta.gz"
    assert fetched == FetchedRelease(path, "2024_06", f"{uniprot.url}{NOW}/uniref50.fasta.gz", MD5, "CC BY 4.0")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == [path.name, "uniref50_2024_06.json"]


def test_an_archived_release_becomes_fasta_with_the_headers_of_uniref(uniprot: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    fetched = fetch_release("2022_05", tmp_path, lambda now, _: seen.append(now), f"{uniprot.url}/")
    md5 = hashlib.md5(ARCHIVE).hexdigest()
    path = tmp_path / "uniref50_2022_05.fasta.gz"
    assert fetched == FetchedRelease(path, "2022_05", f"{uniprot.url}{OLD}/uniref2022_05.tar.gz", md5, "CC BY 4.0")
    assert read(path) == EXPECTED
    assert max(map(len, gzip.decompress(path.read_bytes()).split(b"\n")[1:3])) == 60
    assert names(tmp_path) == [path.name, "uniref50_2022_05.json"]  # the archive is gone
    assert seen[-1] == len(ARCHIVE)


def test_a_release_that_was_fetched_needs_no_server(uniprot: Server, tmp_path: Path) -> None:
    first = fetch_release("2022_05", tmp_path, base_url=uniprot.url)
    uniprot.seen.clear()
    assert fetch_release("2022_05", tmp_path, base_url=uniprot.url) == first
    assert uniprot.seen == []
    fetch_release("current", tmp_path, base_url=uniprot.url)
    uniprot.seen.clear()
    fetch_release("current", tmp_path, base_url=uniprot.url)
    assert [path for path, *_ in uniprot.seen] == [f"{NOW}/RELEASE.metalink"]


def test_a_fetched_release_that_was_damaged_is_fetched_again(uniprot: Server, tmp_path: Path) -> None:
    path = fetch_release("2022_05", tmp_path, base_url=uniprot.url).path
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fetch_release("2022_05", tmp_path, base_url=uniprot.url).path.read_bytes() == good


def test_a_record_that_points_elsewhere_is_not_believed(uniprot: Server, tmp_path: Path) -> None:
    path = fetch_release("2022_05", tmp_path / "data", base_url=uniprot.url).path
    record = json.loads((path.parent / "uniref50_2022_05.json").read_text())
    (tmp_path / path.name).write_bytes(path.read_bytes())
    for elsewhere in (str(tmp_path / path.name), f"../{path.name}", 7):
        (path.parent / "uniref50_2022_05.json").write_text(json.dumps(record | {"path": elsewhere}))
        uniprot.seen.clear()
        assert fetch_release("2022_05", path.parent, base_url=uniprot.url).path == path
        assert uniprot.seen


def test_a_broken_archive_download_goes_on(uniprot: Server, tmp_path: Path) -> None:
    place = f"{OLD}/uniref2022_05.tar.gz"
    uniprot.fail(Reply(drop_after=len(ARCHIVE) // 2), path=place)
    assert read(fetch_release("2022_05", tmp_path, base_url=uniprot.url).path) == EXPECTED
    assert [status for path, _, status in uniprot.seen if path == place] == [200, 206]


@pytest.mark.parametrize(
    "name", ["2022", "2022_5", "../2022_05", "2022_05/..", "", "latest", "2022_05\n", "２０２２_05"]
)
def test_a_name_that_is_no_release_is_refused_before_anything_else(uniprot: Server, tmp_path: Path, name: str) -> None:
    with pytest.raises(ReleaseError, match="give a number such as 2022_05, or 'current'"):
        fetch_release(name, tmp_path, base_url=uniprot.url)
    assert uniprot.seen == []


def test_a_release_that_is_not_there_is_an_error(uniprot: Server) -> None:
    with pytest.raises(ReleaseError, match=r"release-1999_01/.*HTTP status 404; check that there is such a release"):
        locate_release("1999_01", base_url=uniprot.url)


def test_an_archive_of_another_release_is_refused(uniprot: Server) -> None:
    uniprot.files[f"{OLD}/RELEASE.metalink"] = metalink("2022_04", {"uniref2022_05.tar.gz": ARCHIVE})
    with pytest.raises(ReleaseError, match="of release 2022_04, not 2022_05"):
        locate_release("2022_05", base_url=uniprot.url)


LAUGHS = '<!DOCTYPE metalink [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (metalink("&b;", {"uniref50.fasta.gz": CONTENT}, doctype=LAUGHS), "it has a DTD"),
        (metalink("2024_06", {"uniref50.fasta.gz": b""}, doctype='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), "a DTD"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT})[:-5], "cannot be read as a metalink"),
        (b"<html>not found</html>", "lists uniref50.fasta.gz 0 times, not once"),
        (metalink("2024_06", {"uniref90.fasta.gz": CONTENT}), "lists uniref50.fasta.gz 0 times, not once"),
        (
            metalink("2024_06", {"uniref50.fasta.gz": b""}).replace(
                b"</files>", b'<file name="uniref50.fasta.gz"/></files>'
            ),
            "2 times",
        ),
        (metalink("../2024_06", {"uniref50.fasta.gz": CONTENT}), "the version of .* is '../2024_06'"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT}, size="-1"), "the size of .* is '-1'"),
        (metalink("2024_06", {"uniref50.fasta.gz": CONTENT}, md5=""), "the md5 of .* is ''"),
        (b" " * (2**22 + 1), "is longer than 4194304 bytes"),
    ],
)
def test_a_metalink_that_cannot_be_trusted_is_refused(uniprot: Server, text: bytes, problem: str) -> None:
    uniprot.files[f"{NOW}/RELEASE.metalink"] = text
    with pytest.raises(ReleaseError, match=problem):
        locate_release("current", base_url=uniprot.url)


def test_a_metalink_is_asked_for_again_when_the_server_is_busy(uniprot: Server, pauses: list[float]) -> None:
    uniprot.fail(Reply(status=503), Reply(drop_after=50), path=f"{NOW}/RELEASE.metalink")
    assert locate_release("current", base_url=uniprot.url).size == len(CONTENT)
    assert pauses == [1, 2]


# Archives


@pytest.mark.parametrize(
    ("files", "suffix"),
    [
        ({"uniref50.tar": tar({"uniref50.fasta.gz": CONTENT})}, ".fasta.gz"),
        ({"uniref50.tar.gz": tar({"./uniref50.fasta.gz": CONTENT}, "w:gz")}, ".fasta.gz"),
        ({"uniref50.fasta.gz": CONTENT}, ".fasta.gz"),
        ({"../../uniref50.fasta.gz": CONTENT}, ".fasta.gz"),
        ({"uniref50.tar": tar({"uniref50.fasta": gzip.decompress(CONTENT)})}, ".fasta"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_fasta_in_the_archive_is_copied_as_it_is(
    tmp_path: Path, files: dict[str, bytes], suffix: str, mode: str
) -> None:
    archive, folder = tmp_path / "uniref.tar", tmp_path / "data"
    archive.write_bytes(tar({"uniref90.tar": tar({"uniref90.fasta.gz": b"90"}), **files}, mode))
    folder.mkdir()
    path = extract_fasta(archive, folder, "2022_05")
    assert path == folder / f"uniref50_2022_05{suffix}"
    assert path.read_bytes() == (CONTENT if suffix.endswith("gz") else gzip.decompress(CONTENT))
    assert names(folder) == [path.name]
    assert names(tmp_path) == ["data", "uniref.tar"]


def test_plain_xml_gives_the_same_file_as_packed_xml(tmp_path: Path) -> None:
    made = []
    for name, content in {"uniref50.xml": uniref_xml(), "uniref50.xml.gz": XML}.items():
        (tmp_path / "a.tar").write_bytes(tar({name: content}))
        made.append(extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05").read_bytes())
    assert made[0] == made[1]


CLUSTERS = uniref_xml()


@pytest.mark.parametrize(
    ("xml", "problem"),
    [
        (uniref_xml(doctype='<!DOCTYPE UniRef50 [<!ENTITY a "x">]>'), "it has a DTD"),
        (uniref_xml(length=1), "UniRef50_P0CG48 has 76 residues, '77' by its length"),
        (CLUSTERS[:-20], "no element found|not well-formed|unclosed token"),
        (CLUSTERS.replace(b"sequence", b"peptide"), "UniRef50_P0CG48 has no sequence of"),
        (CLUSTERS.replace(b"sequence", b"peptide", 2).replace(b"member>", b"x>"), "UniRef50_P0CG48 has no sequence of"),
        (
            CLUSTERS.replace(b"sequence", b"peptide", 2).replace(b"</member>", b"<sequence/></member>"),
            "has no sequence of",
        ),
        (
            CLUSTERS[: CLUSTERS.rindex(b"<sequence")] + b"</representativeMember></entry></UniRef50>",
            "after 1 whole ones",
        ),
        (CLUSTERS.replace(b"entry id=", b"entry name="), "cannot be read"),
        (b"<UniRef50></UniRef50>", "after 0 whole ones"),
    ],
)
def test_xml_that_is_not_as_it_should_be_is_refused(tmp_path: Path, xml: bytes, problem: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"uniref50.tar": tar({"uniref50.xml.gz": gzip.compress(xml)})}, "w:gz"))
    with pytest.raises(ReleaseError, match=f"a.tar: .*({problem})"):
        extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    assert names(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (tar({"uniref90.tar": b"90", "uniref50.txt": b"50"}, "w:gz"), "holds none of uniref50.fasta.gz"),
        (tar({"uniref50.fasta.gz": b""}, kind=tarfile.SYMTYPE), "holds none of"),
        (tar({"uniref50.fasta.gz": b""}, kind=tarfile.DIRTYPE), "holds none of"),
        (tar({"uniref50.tar": tar({"uniref50.tar": tar({"uniref50.fasta": b">"})})}), "holds none of"),
        (tar({"uniref50.tar": b"no tar at all"}), "cannot be read"),
        (b"", "cannot be read"),
        (ARCHIVE[: len(ARCHIVE) // 2], "cannot be read"),
        (tar({"uniref50.xml.gz": XML[: len(XML) // 2]}), "cannot be read"),
        (tar({"uniref50.xml.gz": XML[:-8] + b"\0" * 8}), "cannot be read"),
        (tar({"uniref50.xml.gz": XML[:20] + b"\xff" * 20 + XML[40:]}), "cannot be read"),
    ],
)
def test_an_archive_without_uniref50_or_a_damaged_one_leaves_nothing(
    tmp_path: Path, archive: bytes, problem: str
) -> None:
    (tmp_path / "a.tar").write_bytes(archive)
    with pytest.raises(ReleaseError, match=f"a.tar: {problem}"):
        extract_fasta(tmp_path / "a.tar", tmp_path, "2022_05")
    assert names(tmp_path) == ["a.tar"]
