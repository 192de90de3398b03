"""Token stores: a folder of memory-mapped sequences, one pair of files a split, under a manifest.

    train.bin validation.bin test.bin    token ids, uint8, one sequence after another without specials
    train.idx validation.idx test.idx    lengths and byte offsets of the sequences, and which form a cluster
    manifest.json                        what is in it, where it came from, SHA-256 of each file

`.bin` and `.idx` are Megatron's IndexedDataset format (megatron/core/datasets/indexed_dataset.py), so Megatron reads
them as well; reading them needs only NumPy here, where importing Megatron takes seconds. A document, in Megatron's
words, is a cluster: the sequences among which one is drawn for an epoch. In a plain store each sequence is its own.
Stores are written by `writing.py`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.errors import UserError

SPLITS = ("train", "validation", "test")
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
UINT8_CODE = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_REBUILD = "build the store again"
_BLOCKS, _BLOCK = 1_000, 1_000  # some lengths are read at so many places, so many at each


class StoreError(UserError):
    """A store that cannot be written or must not be read; the message names the file, the key, and what to do."""


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def index_bytes(sequences: int, clusters: int) -> int:
    """Size of an index file: header, lengths, offsets, and where each cluster begins."""
    return INDEX_HEADER.size + 4 * sequences + 8 * sequences + 8 * (clusters + 1)


class SplitSummary(NamedTuple):
    """What the manifest says of one split, under `splits.<name>`."""

    sequences: int
    clusters: int  # of sequences, in a clustered store; else as many as there are sequences
    residues: int
    longest: int  # residues of the longest sequence
    residue_counts: list[int]  # how often each of the 33 token ids occurs
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def parse(cls, manifest_path: Path, name: str, entry: object) -> SplitSummary:
        """The entry of split `name`; raises `StoreError` naming the key that is missing or of another type."""
        if not isinstance(entry, dict):
            raise StoreError(f"{manifest_path}: the key splits.{name} is missing or no mapping; {_REBUILD}")
        for key in cls._fields:
            value = entry.get(key)
            if key == "residue_counts":
                valid = isinstance(value, list) and len(value) == VOCABULARY_SIZE and all(map(_is_count, value))
            else:
                valid = type(value) is str if key.endswith("sha256") else _is_count(value)
            if not valid:
                raise StoreError(f"{manifest_path}: the key splits.{name}.{key} is {value!r}; {_REBUILD}")
        return cls(**{key: entry[key] for key in cls._fields})


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


class SequenceSplit:
    """The sequences of one split, memory-mapped read-only; opening costs no memory, however many there are.

    `prefix` is the path of the two files without `.bin` and `.idx`; `summary` the totals they must have. Raises
    `StoreError` for a file that is missing or whose size or index header says otherwise. Pickles as its path, so that
    loader workers map the files themselves.
    """

    def __init__(self, prefix: Path, summary: SplitSummary) -> None:
        self.prefix = prefix.absolute()  # a later change of the working folder must not matter
        self.summary = summary
        sequences, clusters, self.residues = summary.sequences, summary.clusters, summary.residues
        index_path = self.prefix.with_name(f"{prefix.name}.idx")
        index = _map(index_path, index_bytes(sequences, clusters))
        self.tokens: NDArray[np.uint8] = _map(self.prefix.with_name(f"{prefix.name}.bin"), self.residues)
        """Token ids of all sequences, uint8 [residues], read-only, as they are in the file: not checked."""
        self._token_bytes = self.tokens.data
        _check_header(index_path, index, sequences, clusters)
        after_lengths = INDEX_HEADER.size + 4 * sequences
        after_pointers = after_lengths + 8 * sequences
        self.lengths: NDArray[np.int32] = index[INDEX_HEADER.size : after_lengths].view("<i4")
        """Residues of each sequence, int32 [sequences], read-only."""
        self.offsets: NDArray[np.int64] = index[after_lengths:after_pointers].view("<i8")
        """Where each sequence begins in `tokens`, int64 [sequences], read-only, as it is in the file: not checked."""
        self.cluster_starts: NDArray[np.int64] = index[after_pointers:].view("<i8")
        """The first sequence of each cluster, and the number of all, int64 [clusters + 1], read-only, not checked."""
        if sequences and int(self.offsets[-1]) + int(self.lengths[-1]) != self.residues:
            raise StoreError(f"{index_path}: its last sequence does not end where the .bin file does; {_REBUILD}")
        if int(self.cluster_starts[-1]) != sequences:
            raise StoreError(f"{index_path}: its last cluster does not end with the last sequence; {_REBUILD}")

    def __reduce__(self) -> tuple[type[SequenceSplit], tuple[Path, SplitSummary]]:
        return SequenceSplit, (self.prefix, self.summary)

    @property
    def num_clusters(self) -> int:
        """Clusters of sequences; as many as sequences where every one is its own."""
        return self.summary.clusters

    def __len__(self) -> int:
        return self.summary.sequences

    def some_lengths(self) -> NDArray[np.int32]:
        """Up to a million of the lengths, in blocks from everywhere: files sorted by length are not rare."""
        if len(self) <= _BLOCKS * _BLOCK:
            return self.lengths
        starts = np.linspace(0, len(self) - _BLOCK, _BLOCKS).astype(np.int64)
        return np.concatenate([self.lengths[start : start + _BLOCK] for start in starts.tolist()])

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Token ids of one sequence, uint8 [residues], a read-only view; raises `IndexError` outside the split."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self)}")
        begin = int(self.offsets[position])
        return self.tokens[begin : begin + int(self.lengths[position])]

    def gather(self, sequences: ArrayLike, starts: ArrayLike, lengths: ArrayLike) -> NDArray[np.uint8]:
        """Windows of sequences, one after another: uint8 [sum of lengths], a writable copy.

        Window i holds the residues `starts[i] : starts[i] + lengths[i]` of sequence `sequences[i]`; the three are
        integers [windows]. Raises `IndexError` for a sequence outside the split or a window outside its sequence.
        """
        chosen, first, count = (np.asarray(a, dtype=np.int64) for a in (sequences, starts, lengths))
        if not chosen.ndim == first.ndim == count.ndim == 1 or not chosen.shape == first.shape == count.shape:
            raise ValueError(f"gather takes three 1-D arrays alike, got {chosen.shape}, {first.shape}, {count.shape}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"sequences {chosen.min()}..{chosen.max()} of {self.prefix}, which has {len(self)}")
        outside = (first < 0) | (count < 0) | (count > self.lengths[chosen] - first)
        if outside.any():
            at = int(outside.argmax())
            window = f"{count[at]} residues from {first[at]} of sequence {chosen[at]}"
            raise IndexError(f"{window} of {self.prefix}, which has {self.lengths[chosen[at]]}")
        begins = self.offsets[chosen] + first
        ends = begins + count
        if chosen.size and not 0 <= begins.min() <= ends.max() <= self.residues:
            raise StoreError(f"{self.prefix}.idx: a sequence lies outside the .bin file; {_REBUILD}")
        # A join of slices is 2.5 times as fast as copying into one array, and 3 times as fast as fancy indexing.
        joined = bytearray().join([self._token_bytes[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True)])
        tokens = np.frombuffer(joined, dtype=np.uint8)
        if tokens.size and tokens.max() >= VOCABULARY_SIZE:
            raise StoreError(f"{self.prefix}.bin: holds the token id {tokens.max()}, over 32; {_REBUILD}")
        return tokens

    def residue_counts(self) -> NDArray[np.int64]:
        """How often each token id occurs in the split, int64 [33], from the manifest."""
        return np.array(self.summary.residue_counts, dtype=np.int64)


def _map(path: Path, expected_bytes: int) -> NDArray[np.uint8]:
    """A file as a read-only uint8 [bytes]; `StoreError` when it is missing or not of the expected size."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise StoreError(f"{path}: the file is missing, though the manifest lists it; {_REBUILD}") from None
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size != expected_bytes:
            raise StoreError(f"{path}: has {size} bytes, by the manifest {expected_bytes}; copy it again or {_REBUILD}")
        if size == 0:
            return np.frombuffer(b"", dtype=np.uint8)  # an empty file cannot be mapped
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _check_header(path: Path, index: NDArray[np.uint8], sequences: int, clusters: int) -> None:
    magic, version, code, found, documents = INDEX_HEADER.unpack(index[: INDEX_HEADER.size].tobytes())
    if magic != INDEX_MAGIC:
        raise StoreError(f"{path}: begins with {magic!r}, not with {INDEX_MAGIC!r} as an index does; {_REBUILD}")
    if (version, code) != (INDEX_VERSION, UINT8_CODE):
        raise StoreError(f"{path}: has index version {version} and dtype code {code}, 1 and 1 are read; {_REBUILD}")
    if (found, documents) != (sequences, clusters + 1):
        totals = f"{found} sequences in {documents - 1} documents"
        raise StoreError(f"{path}: holds {totals}, by the manifest {sequences} in {clusters}; {_REBUILD}")


class ProteinStore:
    """A finished store, opened for reading; any number of processes may open it at once."""

    def __init__(self, folder: Path, manifest: dict[str, Any], summaries: dict[str, SplitSummary]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.summaries = summaries
        self._splits = {name: SequenceSplit(folder / name, summary) for name, summary in summaries.items()}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ProteinStore:
        """Open a store; checks manifest, sizes and index headers, not the content (see `verify`).

        Raises `StoreError` naming the file and key: no such folder, no manifest (a build that did not finish), a
        manifest that cannot be read or is of another format version, a file that is missing or does not match.
        """
        path = Path(folder).absolute()
        if not path.is_dir():
            raise StoreError(f"{path}: no such folder; build a store there or correct the path")
        manifest_path = path / MANIFEST_NAME
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{manifest_path}: no manifest, so this is no finished store; {_REBUILD}") from None
        except ValueError as error:
            raise StoreError(f"{manifest_path}: is not JSON ({error}); restore it or {_REBUILD}") from None
        if not isinstance(manifest, dict):
            raise StoreError(f"{manifest_path}: holds a JSON {type(manifest).__name__}, not an object; {_REBUILD}")
        if manifest.get("format_version") != FORMAT_VERSION:
            found = f"format_version is {manifest.get('format_version')!r}, this release reads {FORMAT_VERSION}"
            raise StoreError(f"{manifest_path}: {found}; {_REBUILD} or install the release that wrote it")
        splits = manifest.get("splits")
        entries = splits if isinstance(splits, dict) else {}
        return cls(
            path, manifest, {name: SplitSummary.parse(manifest_path, name, entries.get(name)) for name in SPLITS}
        )

    def split(self, name: str) -> SequenceSplit:
        """The split `train`, `validation` or `test`; raises `StoreError` for another name."""
        if name not in self._splits:
            raise StoreError(f"{self.folder}: no split {name!r}; choose one of {', '.join(SPLITS)}")
        return self._splits[name]

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; raises `StoreError` naming one that differs."""
        for name, summary in self.summaries.items():
            for suffix, expected in (("bin", summary.bin_sha256), ("idx", summary.idx_sha256)):
                path = self.folder / f"{name}.{suffix}"
                if sha256_of_file(path) != expected:
                    key = f"splits.{name}.{suffix}_sha256"
                    raise StoreError(f"{path}: does not match {key} of the manifest; copy it again or {_REBUILD}")
