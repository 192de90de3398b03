"""A local server with configurable failures, and other helpers for the tests of downloads and releases."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bionemo_esm.data import uniprot_release as release

CONTENT = (Path(release.__file__).parent / "sample" / "train.fasta.gz").read_bytes()  # about 600 KB of real proteins
MD5 = hashlib.md5(CONTENT).hexdigest()
DATA = "/uniref50.fasta.gz"


class Reply(NamedTuple):
    """Response of the server to one request. The default is a correct response."""

    status: int = 0  # a status other than 200 or 206
    headers: Mapping[str, str] = MappingProxyType({})
    drop_after: int | None = None  # bytes of the body before the connection closes
    length_told: int | None = None  # Content-Length
    ranges: bool = True
    body: bytes | None = None


class Server(ThreadingHTTPServer):
    """A server of files by path. `fail` sets the next responses for a path, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {DATA: CONTENT}
        self.replies: dict[str, list[Reply]] = {}
        self.every: Reply = Reply()  # after the list is used up
        self.etags = True
        self.seen: list[tuple[str, str | None, int]] = []  # path, Range and status of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore errors: some tests close the connection on purpose."""

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


@contextmanager
def running_server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
