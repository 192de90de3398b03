"""Downloads from the Hub: pinned commits, the cache, and one-line errors.

A local server imitates the Hub. The client is huggingface_hub in separate processes, because it reads its environment
only once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from transformers import EsmConfig, EsmForMaskedLM

from bionemo_esm.alphabet import TOKENS
from bionemo_esm.model.interchange.hub import _explain
from bionemo_esm.model.interchange.huggingface import read_hugging_face

NAME = "lab/esm"
FIRST, SECOND = "1" * 40, "2" * 40
SERVER = """
import json, os, sys, traceback
from bionemo_esm.model.interchange.hub import fetch_from_hub

def fetch(wanted):
    repository, _, revision = wanted.partition("@")
    try:
        folder, commit = fetch_from_hub(repository, revision or None)
        return {"folder": str(folder), "commit": commit}
    except ValueError as error:
        return {"kind": type(error).__name__, "error": str(error)}

for line in sys.stdin:
    assert "huggingface_hub" not in sys.modules  # so that the child reads its own environment
    job = json.loads(line)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, suffix in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{job['output']}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        print(json.dumps([fetch(wanted) for wanted in job["wanted"]]), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""
Files = dict[str, bytes]
Client = subprocess.Popen[str]
Fetch = Callable[..., list[dict[str, str]]]


@dataclass
class Repository:
    """Hold the files of each commit, and the commits of branches and tags."""

    commits: dict[str, Files]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None  # requests without it get "not found"
    pushed: dict[str, str] = field(default_factory=dict)  # refs that move after they are first resolved


@dataclass
class Requests:
    """Record the method, path and token of each request."""

    all: list[tuple[str, str, str | None]] = field(default_factory=list)

    def files(self) -> set[str]:
        return {path.rsplit("/", 1)[1] for _, path, _ in self.all if "/resolve/" in path}


class Hub(ThreadingHTTPServer):
    """Serve the endpoints of the Hub that a download needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests = Requests()
        self.drops = 0  # number of weight responses to cut off
        self.status = 0  # HTTP status of every response, if not 0
        self.page: bytes | None = None  # replaces every response

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore disconnected clients; some tests cause them."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.requests.all.append((self.command, path, self.headers["Authorization"]))
        parts = path.strip("/").split("/")
        if hub.status or hub.page is not None:
            self.answer(hub.status or 200, hub.page or b"")
            return
        api = parts[:2] == ["api", "models"]
        name, verb, revision, *rest = ["/".join(parts[2:4]), *parts[4:]] if api else ["/".join(parts[:2]), *parts[2:]]
        repository = hub.repositories.get(name)
        if not repository or (repository.token and self.headers["Authorization"] != f"Bearer {repository.token}"):
            self.answer(401, b'{"error":"Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = repository.commits[commit]
        if verb == "resolve":
            self.send_file(repository, commit, files, "/".join(rest))
        elif verb == "tree":
            self.answer(200, json.dumps([self.entry(file, content) for file, content in files.items()]).encode())
        else:
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
            repository.refs |= repository.pushed

    @staticmethod
    def entry(file: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, repository: Repository, commit: str, files: Files, file: str) -> None:
        if repository.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif file not in files:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
            self.answer(200, files[file], {"X-Repo-Commit": commit, "ETag": etag}, drop="safetensors" in file)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, drop: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            drop = drop and self.server.drops > 0
            self.server.drops -= drop
            self.wfile.write(body[: len(body) // 2] if drop else body)
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return the files of a repository with a small ESM-1b, including unneeded files."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1}
    folder = tmp_path_factory.mktemp("repository")
    EsmForMaskedLM(EsmConfig(**sizes, **ids, layer_norm_eps=1e-5)).save_pretrained(folder)
    unneeded = {"README.md": b"#", "tf_model.h5": b"h5", "pytorch_model.bin": b"pickle", "model.fp16.safetensors": b""}
    own = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return (
        own | unneeded | {"vocab.txt": "\n".join(TOKENS).encode(), ".gitattributes": b"", "sub/model.safetensors": b""}
    )


@pytest.fixture
def repository(hub: Hub, files: Files) -> Repository:
    """Return a repository of two commits with different dropout: a tag for the first, the branch for the second."""
    older = files | {"config.json": files["config.json"].replace(b'_dropout_prob": 0.1', b'_dropout_prob": 0.0')}
    hub.repositories[NAME] = Repository({FIRST: older, SECOND: files}, {"main": SECOND, "v1": FIRST})
    return hub.repositories[NAME]


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    """Run a process that imports the slow modules once and forks for each job."""
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=clean(OMP_NUM_THREADS="1")) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def clean(**environment: str) -> dict[str, str]:
    """Return the environment without the user's Hub settings."""
    theirs = ("HF_", "HUGGING", "TRANSFORMERS", "XDG_")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)} | environment


@pytest.fixture
def fetch(server: Client, tmp_path: Path) -> Fetch:
    """Return a function that fetches models in sequence in one process, with its cache in `tmp_path`."""

    def ask(url: str, *wanted: str, **environment: str) -> list[dict[str, str]]:
        assert server.stdin is not None and server.stdout is not None
        own = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        job = {"environment": clean(**own | environment), "output": str(tmp_path / "job"), "wanted": wanted}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        errors = (tmp_path / "job.err").read_text() if server.stdout.readline() else "the server has died"
        assert "Traceback" not in errors, errors
        assert "%|" not in errors  # no progress bar without a terminal
        told: list[dict[str, str]] = json.loads((tmp_path / "job.out").read_text())
        return told

    return ask


def refusal(fetch: Fetch, url: str, wanted: str, *parts: str, **environment: str) -> None:
    (told,) = fetch(url, wanted, **environment)
    assert told.get("kind") == "InterchangeError", told
    assert "\n" not in told["error"]
    assert all(part in told["error"] for part in (wanted, *parts)), told


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("repository")
def test_only_needed_files_are_fetched(fetch: Fetch, tmp_path: Path, hub: Hub) -> None:
    (told,) = fetch(hub.url, NAME)
    assert told["commit"] == SECOND
    folder = Path(told["folder"])
    needed = {"config.json", "vocab.txt", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == needed == hub.requests.files()
    assert folder.is_relative_to(tmp_path)
    told_of = [path for _, path, _ in hub.requests.all if not path.startswith(("/api/models/lab/esm/", "/lab/esm/"))]
    assert not told_of  # no request about the user
    assert read_hugging_face(folder).config.num_layers == 1


@pytest.mark.usefixtures("repository")
def test_a_revision_is_pinned_by_branch_tag_or_commit(fetch: Fetch, tmp_path: Path, hub: Hub) -> None:
    told = fetch(hub.url, f"{NAME}@v1", f"{NAME}@main", f"{NAME}@{FIRST}")
    assert [one["commit"] for one in told] == [FIRST, SECOND, FIRST]
    dropouts = [json.loads((Path(one["folder"]) / "config.json").read_text())["hidden_dropout_prob"] for one in told]
    assert dropouts == [0.0, 0.1, 0.0]
    assert not any("/resolve/main/" in path or "/resolve/v1/" in path for _, path, _ in hub.requests.all)


def test_a_push_during_the_download_does_not_mix_two_commits(fetch: Fetch, hub: Hub, repository: Repository) -> None:
    repository.pushed = {"main": FIRST}
    (told,) = fetch(hub.url, NAME)
    assert told["commit"] == SECOND
    assert (Path(told["folder"]) / "model.safetensors").exists()
    assert repository.refs["main"] == FIRST


def test_shards_are_fetched_with_their_index_and_pickles_only_as_a_fallback(
    fetch: Fetch, tmp_path: Path, hub: Hub, files: Files, repository: Repository
) -> None:
    whole = {name: content for name, content in files.items() if name != "model.safetensors"}
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": {"x": shard}}).encode()
    repository.commits[FIRST] = whole
    repository.commits[SECOND] = whole | {shard: b"shard", "model.safetensors.index.json": index}
    sharded, pickled = fetch(hub.url, NAME, f"{NAME}@v1")
    both = {"config.json", "vocab.txt"}
    assert {path.name for path in Path(sharded["folder"]).iterdir()} == both | {shard, "model.safetensors.index.json"}
    assert {path.name for path in Path(pickled["folder"]).iterdir()} == both | {"pytorch_model.bin"}


@pytest.mark.usefixtures("repository")
def test_cached_models_need_no_network(fetch: Fetch, tmp_path: Path, hub: Hub) -> None:
    (online,) = fetch(hub.url, NAME)
    hub.requests.all.clear()
    wanted = (NAME, f"{NAME}@{SECOND}")
    assert fetch(hub.url, *wanted, HF_HUB_OFFLINE="1") == [online, online]
    assert not hub.requests.all
    assert fetch("http://127.0.0.1:9", *wanted) == [online, online]


def test_a_private_repository_is_fetched_with_its_token_only(
    fetch: Fetch, tmp_path: Path, hub: Hub, repository: Repository
) -> None:
    repository.token = "hf_secret"
    refusal(fetch, hub.url, NAME, "no such repository, or a private one", "HF_TOKEN")
    assert fetch(hub.url, NAME, HF_TOKEN="hf_secret")[0]["commit"] == SECOND


@pytest.mark.usefixtures("repository")
def test_a_download_interrupted_once_is_completed(fetch: Fetch, tmp_path: Path, hub: Hub, files: Files) -> None:
    hub.drops = 1
    *_, told = fetch(hub.url, NAME, NAME)  # old versions of huggingface_hub do not retry
    assert (Path(told["folder"]) / "model.safetensors").read_bytes() == files["model.safetensors"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("repository")
def test_a_download_that_keeps_failing_is_an_error_without_a_partial_model(
    fetch: Fetch, tmp_path: Path, hub: Hub
) -> None:
    hub.drops = 100
    refusal(fetch, hub.url, NAME, "the download broke off", "try again")
    assert not list(tmp_path.rglob("model.safetensors"))
    refusal(fetch, hub.url, NAME, "not whole", "HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")


@pytest.mark.usefixtures("repository")
def test_missing_repositories_and_revisions_are_named(fetch: Fetch, tmp_path: Path, hub: Hub) -> None:
    told = fetch(hub.url, "lab/other", f"{NAME}@v9", "../esm", "lab/esm/more", f"{NAME}@../../x", "--help")
    parts = (
        "lab/other: no such repository",
        "no such revision",
        "no name",
        "no name",
        "no name of a branch",
        "no name",
    )
    assert all(one["kind"] == "InterchangeError" for one in told)
    assert all(part in one["error"] for one, part in zip(told, parts, strict=True)), told


def test_without_network_and_cache_the_error_is_one_line(fetch: Fetch, tmp_path: Path) -> None:
    refusal(fetch, "http://127.0.0.1:9", NAME, "http://127.0.0.1:9 cannot be reached", str(tmp_path), "the network")
    refusal(fetch, "http://127.0.0.1:9", NAME, "in the cache", "HF_HUB_OFFLINE", "; unset it, or", HF_HUB_OFFLINE="1")


def test_the_error_for_a_gated_repository_names_its_page(
    fetch: Fetch, tmp_path: Path, hub: Hub, repository: Repository
) -> None:
    repository.gated = True
    refusal(fetch, hub.url, NAME, "is gated", f"{hub.url}/{NAME}", "HF_TOKEN")


@pytest.mark.parametrize(
    ("status", "part"), [(500, "fails (HTTP 500)"), (403, "refuses it (HTTP 403)"), (429, "HTTP 429")]
)
def test_http_errors_are_distinguished_from_an_unreachable_server(
    fetch: Fetch, tmp_path: Path, hub: Hub, status: int, part: str
) -> None:
    hub.status = status
    refusal(fetch, hub.url, NAME, part)


def test_an_html_page_as_a_response_is_an_error(fetch: Fetch, tmp_path: Path, hub: Hub) -> None:
    hub.page = b"<html>Please log in to this network</html>"
    refusal(fetch, hub.url, NAME, "broke off")


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(
    fetch: Fetch, tmp_path: Path, hub: Hub, files: Files, repository: Repository
) -> None:
    repository.commits[SECOND] = files | {"config.json": b'{"model_type": "bert"}'}
    repository.commits[FIRST] = {name: content for name, content in files.items() if name != "config.json"}
    other, none = fetch(hub.url, NAME, f"{NAME}@v1")
    assert "model_type is 'bert'" in other["error"]
    assert all(part in none["error"] for part in ("has no config.json", "merge_and_unload"))
    assert hub.requests.files() == {"config.json", "vocab.txt"}


def test_a_repository_without_weights_is_refused(
    fetch: Fetch, tmp_path: Path, hub: Hub, files: Files, repository: Repository
) -> None:
    repository.commits[SECOND] = {"config.json": files["config.json"], "tf_model.h5": b""}
    refusal(fetch, hub.url, NAME, "neither model.safetensors nor pytorch_model.bin")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full; free some space, or set HF_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full; free some space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "/cache/x cannot be written; set HF_HOME"),
        (PermissionError("token expired"), "refuses it (HTTP 401); set HF_TOKEN"),
        (RuntimeError("Data processing error: CAS service\nmore"), "broke off ('Data processing error: CAS service')"),
    ],
    ids=["no space", "quota", "a folder of others", "hf_xet without a token", "hf_xet breaking off"],
)
def test_errors_of_the_disk_and_of_hf_xet_are_explained_in_one_line(error: Exception, part: str) -> None:
    assert part in _explain(error, NAME)
