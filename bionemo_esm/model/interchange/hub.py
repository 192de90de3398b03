"""Download of the needed files of a model from the Hugging Face Hub, or from its local cache.

`huggingface_hub` handles downloads, cache, proxies and tokens, and reads the environment variables HF_HOME,
HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT. The configuration is fetched first, so an unsupported model is refused before
its weights are downloaded. All other files are fetched by the commit hash to which the branch or tag pointed then.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bionemo_esm.model.interchange.huggingface import (
    CONFIG,
    INDEX_SUFFIX,
    PICKLE,
    SAFETENSORS,
    TOKENIZER,
    VOCABULARY,
    read_config,
)
from bionemo_esm.model.interchange.state_dict_adapter import InterchangeError
from bionemo_esm.model.tar_format import quoted

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[\w.+-]+)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = [CONFIG, VOCABULARY, TOKENIZER]
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _patterns(name: str) -> list[str]:
    """Return the file patterns for weights in one file, or in shards with an index."""
    stem, suffix = name.rsplit(".", 1)
    return [name, f"{stem}-?????-of-?????.{suffix}", f"{name}{INDEX_SUFFIX}"]


def fetch_from_hub(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder in the cache with the model's files, and the hash of their commit.

    revision: a branch, a tag, a commit hash or `refs/pr/1`; None is the branch `main`. Cached files are not fetched
    again. In offline mode only the cache is used. safetensors are preferred to pickles.

    Raises `InterchangeError` with a one-line message for an invalid name, a repository or revision that does not exist
    or is not open to this user, an unsupported model, and failures of network, server or disk.
    """
    wanted = f"{repo_id}@{revision}" if revision else repo_id
    if not _REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise InterchangeError(
            f"{quoted(repo_id)} is no name of a repository; those are like facebook/esm2_t6_8M_UR50D"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InterchangeError(f"revision {quoted(revision)} of {repo_id} is no name of a branch, a tag or a commit")
    folder = _snapshot(repo_id, revision, _SMALL, wanted)
    commit = folder.name
    if not _COMMIT.fullmatch(commit):
        raise InterchangeError(
            f"{wanted}: the cache has it under {quoted(commit)}, which is no commit; empty the cache"
        )
    if not (folder / CONFIG).is_file():
        raise InterchangeError(
            f"{wanted}: has no {CONFIG}; it is no model of transformers. An adapter has to be merged into its model "
            "first, with `merge_and_unload` of peft"
        )
    read_config(folder)
    for name in (SAFETENSORS, PICKLE):
        _snapshot(repo_id, commit, [*_SMALL, *_patterns(name)], wanted)
        if (folder / name).exists() or (folder / f"{name}{INDEX_SUFFIX}").exists():
            return folder, commit
    if (offline := _offline()) is not None:  # older versions of huggingface_hub return an incomplete snapshot
        raise InterchangeError(f"{wanted}: {offline}")
    raise InterchangeError(
        f"{wanted}: has neither {SAFETENSORS} nor {PICKLE}, in one file or in shards; the files of its page on the Hub "
        "tell whether another revision has"
    )


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], wanted: str) -> Path:
    """Fetch the files that match these patterns. Return their folder in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # re-exported from its HTTP library
    from huggingface_hub.utils.tqdm import tqdm

    class WatchedBar(tqdm):
        """Progress bar that appears only on a terminal."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **{"disable": None} | keywords)  # type: ignore[no-untyped-call]

    try:
        with _no_telemetry():
            path = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, tqdm_class=WatchedBar)
            return Path(path)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # hf_xet raises RuntimeError
        raise InterchangeError(f"{wanted}: {_explain(error, repo_id)}") from error


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Disable the requests and headers with which huggingface_hub reports usage."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _explain(error: Exception, repo_id: str) -> str:
    """Return a one-line description of the error and its remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return _explain_absence(error, repo_id)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; agree to its terms on {_page(repo_id)}, and set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no such revision; {_page(repo_id)} lists its branches and tags"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one; check the name, or set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code if error.response is not None else 0, repo_id)
    if isinstance(error, OSError) and error.errno in _FULL:
        return "the disk of the cache is full; free some space, or set HF_HOME to a folder on a larger disk"
    if isinstance(error, PermissionError) and not error.filename:  # raised by hf_xet for a token
        return _explain_status(401, repo_id)
    if isinstance(error, PermissionError):
        return f"{error.filename} cannot be written; set HF_HOME to a folder of your own"
    return f"the download broke off ({_line(error)}); try again, files that have come whole are kept"


def _explain_absence(error: Exception, repo_id: str) -> str:
    """Return why files are missing: offline mode or no response, with an incomplete cache."""
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if (offline := _offline()) is not None:
        return offline
    if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
        return _explain_status(cause.response.status_code, repo_id)
    return (
        f"{constants.ENDPOINT} cannot be reached ({_line(cause or error)}), and the cache {constants.HF_HUB_CACHE} "
        "does not have it all; check the network, or bring the cache from a machine that has it"
    )


def _offline() -> str | None:
    """Return the reason for offline mode; None if fetching is allowed."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    return (
        f"is not, or not whole, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; unset "
        "it, or bring the cache from a machine that has it"
    )


def _explain_status(status: int, repo_id: str) -> str:
    from huggingface_hub import constants

    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} refuses it (HTTP {status}); set HF_TOKEN to a token that may read it, and see "
            f"{_page(repo_id)} for terms to agree to"
        )
    if status == 429:
        return f"{constants.ENDPOINT} has had too many requests (HTTP 429); wait some minutes, or set HF_TOKEN"
    return f"{constants.ENDPOINT} fails (HTTP {status}); try again later"


def _page(repo_id: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def _line(error: BaseException) -> str:
    """Return the first line of an error's message without control characters, or the name of its class."""
    lines = str(error).strip().splitlines()
    return quoted(lines[0]) if lines else type(error).__name__
