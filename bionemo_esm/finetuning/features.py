"""Feature extraction before training: one-hot, or the states of a frozen encoder, computed once and kept on disk.

An epoch of a head then takes seconds. Shape suffixes: R residues of a protein, F features.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES
from bionemo_esm.errors import UserError
from bionemo_esm.files import atomic_write
from bionemo_esm.finetuning.config import ReadingConfig
from bionemo_esm.inference.batching import group_by_size
from bionemo_esm.inference.embedding.embeddings import embed_proteins
from bionemo_esm.inference.embedding.options import EmbeddingOptions
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.inputs import Protein

_RESIDUES_AT_ONCE = 2**17
_SECONDS_BETWEEN_LOOKS = 0.2
_IDENTITY = np.eye(NUM_STANDARD_RESIDUES, dtype=np.float32)


class Moments(NamedTuple):
    """Mean and standard deviation of each feature, float32 [F]."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


class OneHot:
    """One-hot encoding of the 20 amino acids; zeros for any other letter."""

    size = NUM_STANDARD_RESIDUES

    def __init__(self, proteins: Sequence[Protein], pooled: bool = False) -> None:
        """pooled: the mean over each protein's residues, which is its composition."""
        self.proteins, self.pooled = proteins, pooled

    def of(self, number: int) -> NDArray[np.float32]:
        kinds = self.proteins[number].tokens.astype(np.int64) - FIRST_RESIDUE_ID
        is_standard = (kinds >= 0) & (kinds < NUM_STANDARD_RESIDUES)
        rows_RF = _IDENTITY[np.where(is_standard, kinds, 0)] * is_standard[:, None].astype(np.float32)
        return rows_RF.mean(axis=0, keepdims=True) if self.pooled else rows_RF


class StoredFeatures:
    """States of a frozen encoder in a memory-mapped file: float32 [all rows, F], protein by protein."""

    def __init__(self, table: NDArray[np.float32], first: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """first, rows: int64 [proteins], the first row and the number of rows of each protein."""
        self.table, self.first, self.rows = table, first, rows

    @property
    def size(self) -> int:
        return int(self.table.shape[1])

    def of(self, number: int) -> NDArray[np.float32]:
        begin = int(self.first[number])
        return np.array(self.table[begin : begin + int(self.rows[number])])

    def part(self, begin: int, end: int) -> StoredFeatures:
        """Return the features of proteins `begin` to `end` - 1."""
        return StoredFeatures(self.table, self.first[begin:end], self.rows[begin:end])


def moments(source: OneHot | StoredFeatures, numbers: Iterable[int]) -> Moments:
    """Return the moments of each feature over all rows of these proteins; sums are float64."""
    total, squares = np.zeros(source.size), np.zeros(source.size)
    count = 0
    for number in numbers:
        rows = source.of(number).astype(np.float64)
        total, squares, count = total + rows.sum(axis=0), squares + (rows * rows).sum(axis=0), count + len(rows)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean * mean, 0.0))
    return Moments(mean.astype(np.float32), deviation.astype(np.float32))


class FeatureCache:
    """A folder of states of frozen encoders, each computed once.

    A file's name is a hash of all that its content depends on: model, layer, windows, precision, and sequences.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def features(
        self,
        load: Callable[[], Engine],
        identity: str,
        proteins: Sequence[Protein],
        reading: ReadingConfig,
        pooled: bool,
        progress: Callable[[int], None] = lambda residues: None,
        is_writer: bool = True,
    ) -> StoredFeatures:
        """Return the features of these proteins; equal sequences are computed and stored once.

        load: returns the encoder; called only if it is needed. identity: of the encoder and its precision. progress:
        called with the residues of finished proteins. is_writer: False if another process writes the file, and this one
        waits for it. A file is written whole or not at all.
        """
        texts = [protein.tokens.tobytes() for protein in proteins]
        place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        distinct = _first_of_each(proteins, texts)
        sizes = np.array([1 if pooled else protein.residues for protein in distinct], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        path = self.folder / f"{_digest(identity, reading, pooled, place_of)}.npy"
        if not is_writer:
            _wait_for(path)
        if not path.exists():
            self._compute(path, load(), distinct, reading, pooled, int(starts[-1]), progress)
        places = np.array([place_of[text] for text in texts], dtype=np.int64)
        table = np.load(path, mmap_mode="r")
        return StoredFeatures(table, starts[places], sizes[places])

    def _compute(
        self,
        path: Path,
        engine: Engine,
        proteins: Sequence[Protein],
        reading: ReadingConfig,
        pooled: bool,
        rows: int,
        progress: Callable[[int], None],
    ) -> None:
        options = EmbeddingOptions(
            layers=(reading.layer,), mean=pooled, residues=not pooled, window=reading.window, overlap=reading.overlap
        )
        name = f"{'mean' if pooled else 'residues'}_{reading.layer}"
        with atomic_write(path) as stream:
            shape = (rows, engine.config.hidden_size)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
            for some in group_by_size(_RESIDUES_AT_ONCE, proteins, lambda protein: protein.residues):
                for embedding in embed_proteins(engine, some, options, progress):
                    stream.write(np.atleast_2d(embedding.arrays[name]).astype("<f4").tobytes())


def _wait_for(path: Path) -> None:
    """Wait until the first process has written a file. Raises `UserError` if that process ended before."""
    launcher = os.getppid()
    while not path.exists():
        if os.getppid() != launcher:
            raise UserError("the process that computes the encoder's states has ended; see its message")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _first_of_each(proteins: Sequence[Protein], texts: Sequence[bytes]) -> list[Protein]:
    first: dict[bytes, Protein] = {}
    for protein, text in zip(proteins, texts, strict=True):
        first.setdefault(text, protein)
    return list(first.values())


def _digest(identity: str, reading: ReadingConfig, pooled: bool, texts: dict[bytes, int]) -> str:
    digest = hashlib.sha256(f"{identity} {reading!r} {pooled}\n".encode())
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:32]
