"""The jobs around a store: build one, show its card, look for leakage. Behind `examples/` and the command line."""

from __future__ import annotations

import argparse
import glob
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, duration, run_to_exit_code
from bionemo_esm.data.clusters import build_clustered_store
from bionemo_esm.data.fasta import STANDARD_INPUT
from bionemo_esm.data.leakage import check_leakage
from bionemo_esm.data.preprocess import BuildPolicy, CleaningPolicy, build_store
from bionemo_esm.data.store import ProteinStore, StoreError
from bionemo_esm.data.store_summary import StoreSummary, draw_summary
from bionemo_esm.data.uniprot_release import fetch_release
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import integer, known, path, plain_values, typed

MODEL_CARD_RELEASE = "2022_05"
PICTURE_NAME = "card.png"
_KEYS = {"input", "release", "download_folder", "output", "licence", "seed", "threads", "split", "policy", "clusters"}


@dataclass(frozen=True)
class Preprocessing:
    """What `preprocess` is told."""

    inputs: tuple[str, ...]  # none: download the release
    release: str | None
    download_folder: Path
    output: Path
    licence: str | None
    policy: BuildPolicy
    cluster_map: Path | None
    threads: int | None

    @classmethod
    def of(cls, cfg: DictConfig) -> Preprocessing:
        """From a composed configuration. Raises `ConfigError` naming the key."""
        values = known("", plain_values(cfg), _KEYS)
        split = known("split", values["split"], {"validation", "test"})
        clusters = known("clusters", values["clusters"], {"map"})
        cluster_map = path("clusters.map", clusters.get("map"))
        policy = typed("policy", values["policy"], CleaningPolicy)
        validation, test = (
            None if split.get(name) is None else integer(f"split.{name}", split[name])
            for name in ("validation", "test")
        )
        threads = None if values.get("threads") is None else integer("threads", values["threads"])
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, or null for one a core, not {threads}")
        for name, count in (("validation", validation), ("test", test)):
            if count is not None and count < 0:
                raise ConfigError(f"split.{name} is {count}; give a count of 0 or more, or null for one in twenty")
        output, downloads = path("output", values["output"]), path("download_folder", values["download_folder"])
        if output is None or downloads is None:
            raise ConfigError("output and download_folder must each name a folder")
        inputs = _inputs(values.get("input"))
        if cluster_map is not None and len(inputs) != 1:
            raise ConfigError("clusters.map needs one `input`, the FASTA file of the clusters' members")
        return cls(
            inputs=inputs,
            release=_release(values.get("release")),
            download_folder=downloads,
            output=output,
            licence=values.get("licence"),
            policy=_policy({**policy, "validation_sequences": validation, "test_sequences": test}, values["seed"]),
            cluster_map=cluster_map,
            threads=threads,
        )


def _policy(values: dict[str, Any], seed: Any) -> BuildPolicy:
    try:
        return BuildPolicy(**values, seed=integer("seed", seed))
    except StoreError as error:
        raise ConfigError(f"policy: {error}") from None


def _inputs(value: Any) -> tuple[str, ...]:
    """The files that `input` names, patterns expanded in the order of names."""
    patterns = [] if value is None else value if isinstance(value, list) else [value]
    found: list[str] = []
    for pattern in map(str, patterns):
        if not pattern:
            raise ConfigError("input is empty; name a FASTA file, a pattern, or - for standard input")
        if not re.search(r"[*?\[]", pattern):
            found.append(pattern if pattern == STANDARD_INPUT else str(Path(pattern).expanduser()))
        elif matches := sorted(glob.glob(str(Path(pattern).expanduser()))):  # noqa: PTH207
            found += matches
        else:
            raise ConfigError(f"input: no file matches {pattern}; check the pattern and the working folder")
    if len({Path(name).resolve() for name in found}) < len(found):
        raise ConfigError("input: names a file twice; each is read once")
    return tuple(found)


def _release(value: Any) -> str | None:
    """2022_05 is a number to YAML: 202205."""
    text = None if value is None else str(value)
    return f"{text[:4]}_{text[4:]}" if text and re.fullmatch(r"\d{6}", text) else text


def preprocess(cfg: DictConfig) -> None:
    """Build the store of a composed configuration, and show its card.

    Exits with 2 after one line for what the user can mend, and with 130 on Ctrl-C: an unfinished store is removed then,
    an unfinished download stays and goes on with the next call.
    """
    run_to_exit_code(
        lambda: _preprocess(Preprocessing.of(cfg)), "Interrupted; no store was made. A download goes on next time."
    )


def _preprocess(job: Preprocessing) -> int:
    started, console = time.monotonic(), Console(sys.stdout)
    if job.output.exists():
        raise ConfigError(f"output: {job.output} exists already; name another folder, or remove it")
    inputs, release, licence = job.inputs, job.release, job.licence
    if not inputs:
        release = release or MODEL_CARD_RELEASE
        console.print_line(
            f"Fetching UniRef50 {release} from UniProt into {job.download_folder}; interrupted, it goes on later"
        )
        fetched = fetch_release(release, job.download_folder, progress=ProgressBar(console, f"download {release}"))
        inputs, release, licence = (str(fetched.path),), fetched.version, fetched.licence
    console.print_line(f"Building {job.output} from {', '.join(map(_named, inputs))}")
    meter = ProgressBar(console, "read")

    def progress(records: int, done: int, total: int | None) -> None:
        meter(done, total, f", {records:,} records")

    given: dict[str, Any] = {"release": release, "licence": licence, "threads": job.threads, "progress": progress}
    if job.cluster_map is not None:
        store = build_clustered_store(inputs[0], job.cluster_map, job.output, job.policy, **given)
    else:
        store = build_store(inputs, job.output, job.policy, **given)
    with _written(job.output / PICTURE_NAME) as picture:
        draw_summary(store, picture)
    console.print_line(f"\n{StoreSummary.of(store).text()}\n\nDone in {duration(time.monotonic() - started)}.")
    console.print_line(f"  store    {job.output}\n  picture  {picture}")
    console.print_line(f"  train    bionemo-esm pretrain recipe=laptop data.store={shlex.quote(str(job.output))}")
    return 0


def _named(source: str) -> str:
    return "standard input" if source == STANDARD_INPUT else source


def inspect(arguments: Sequence[str]) -> None:
    """`bionemo-esm inspect STORE [--verify] [--picture FILE] [--json]`: a store's card."""
    parser = argparse.ArgumentParser("bionemo-esm inspect", description="Show what is in a store.")
    parser.add_argument("store", type=Path, help="folder of the store")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its hash with the manifest")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw lengths and composition as a PNG")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    options = parser.parse_args(arguments)
    run_to_exit_code(lambda: _inspect(options), "Interrupted.")


def _inspect(options: argparse.Namespace) -> int:
    console, store = Console(sys.stdout), ProteinStore.open(options.store)
    card = StoreSummary.of(store)
    console.print_line(json.dumps(card.to_dict(), indent=2) if options.json else card.text())
    if options.picture:
        with _written(options.picture) as picture:
            draw_summary(card, picture)
    if options.verify:
        store.verify()
        if not options.json:
            console.print_line("\nEvery file matches its hash in the manifest.")
    return 0


def leakage(arguments: Sequence[str]) -> None:
    """`bionemo-esm check-leakage STORE [...]`: near-duplicates between the splits of a store."""
    parser = argparse.ArgumentParser(
        "bionemo-esm check-leakage", description="Look for near-duplicates between the splits of a store, with MMseqs2."
    )
    parser.add_argument("store", type=Path, help="folder of the store")
    parser.add_argument("--identity", type=float, default=0.5, help="share of equal residues (%(default)s)")
    parser.add_argument("--coverage", type=float, default=0.8, help="share of both sequences aligned (%(default)s)")
    parser.add_argument("--max-queries", type=int, help="search for so many of each held-out split, drawn at random")
    parser.add_argument("--threads", type=int, help="of MMseqs2 (one a core)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all pairs found as TSV")
    options = parser.parse_args(arguments)
    run_to_exit_code(lambda: _leakage(options), "Interrupted.")


def _leakage(options: argparse.Namespace) -> int:
    console, store = Console(sys.stdout), ProteinStore.open(options.store)
    report = check_leakage(
        store,
        identity=options.identity,
        coverage=options.coverage,
        max_queries=options.max_queries,
        threads=options.threads,
    )
    console.print_line(report.text())
    if options.output:
        with _written(options.output) as table:
            report.write(table)
        console.print_line(f"\nAll pairs: {options.output}")
    return 0


@contextmanager
def _written(file: Path) -> Iterator[Path]:
    """Say in one line why a result cannot be written."""
    try:
        yield file
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); choose another file") from None


main = ConfiguredCommand(
    preprocess,
    "preprocess_uniref50",
    text_keys=("release", "download_folder", "output", "licence", "clusters.map"),
    list_keys=("input",),
)
"""`bionemo-esm preprocess`."""
