"""Token stores: a folder of memory-mapped sequences, one pair of files a split, under a manifest.

    train.bin validation.bin test.bin    token ids, uint8, one sequence after another without specials
    train.idx validation.idx test.idx    lengths and byte offsets of the sequences, and which form a cluster
    manifest.json                        what is in it, where it came from, SHA-256 of each file

`.bin` and `.idx` are Megatron's IndexedDataset format (megatron/core/datasets/indexed_dataset.py), so Megatron reads
them as well; reading them needs only NumPy here, where importing Megatron takes seconds. A document, in Megatron's
words, is a cluster: the sequences among which one is drawn for an epoch. In a plain store each sequence is its own.
`StoreWriter` writes a store under a temporary name, locked against a second builder, and renames it when complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import struct
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bionemo_esm import __version__
from bionemo_esm.alphabet import VOCABULARY_SIZE
from bionemo_esm.data import kernels
from bionemo_esm.errors import UserError
from bionemo_esm.files import LockedError, fsync_directory, is_still, lock_descriptor

SPLITS = ("train", "validation", "test")
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
UINT8_CODE = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_INDEX_BLOCK = 2**20  # elements handled at once where a whole array would be large
_BUFFER_BYTES = 2**22
_SYNC_BYTES = 2**27
_ADVICE = {
    errno.ENOSPC: "free some space or choose another output; nothing of the store was kept",
    errno.EDQUOT: "free some of your quota or choose another output; nothing of the store was kept",
    errno.EROFS: "choose an output on a disk that can be written to",
    errno.EACCES: "choose an output that you may write to",
    errno.EPERM: "choose an output that you may write to",
    errno.ENOENT: "choose an output whose parent can be made",
    errno.ENOTDIR: "choose an output whose parent is a folder",
    errno.EEXIST: "choose an output whose parent is a folder",
}
_REBUILD = "build the store again"
_BLOCKS, _BLOCK = 1_000, 1_000  # some lengths are read at so many places, so many at each


class StoreError(UserError):
    """A store that cannot be written or must not be read; the message names the file, the key and the remedy."""


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def index_bytes(sequences: int, clusters: int) -> int:
    """Return the size of an index file: header, lengths, offsets, and the start of each cluster."""
    return INDEX_HEADER.size + 4 * sequences + 8 * sequences + 8 * (clusters + 1)


class SplitSummary(NamedTuple):
    """The entry `splits.<name>` of the manifest."""

    sequences: int
    clusters: int  # of sequences, in a clustered store; else as many as there are sequences
    residues: int
    longest: int  # residues of the longest sequence
    residue_counts: list[int]  # how often each of the 33 token ids occurs
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def parse(cls, manifest_path: Path, name: str, entry: object) -> SplitSummary:
        """Check the entry of split `name`. Raises `StoreError` naming the key that is missing or of another type."""
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

    prefix: the path of the two files without `.bin` and `.idx`; summary: the totals they must have. Raises `StoreError`
    for a file that is missing, or whose size or index header differs. Pickled as its path: loader workers map the files
    themselves.
    """

    def __init__(self, prefix: Path, summary: SplitSummary) -> None:
        self.prefix = prefix.absolute()  # the working folder may change later
        self.summary = summary
        sequences, clusters, self.residues = summary.sequences, summary.clusters, summary.residues
        index_path = self.prefix.with_name(f"{prefix.name}.idx")
        index = _map(index_path, index_bytes(sequences, clusters))
        self.tokens: NDArray[np.uint8] = _map(self.prefix.with_name(f"{prefix.name}.bin"), self.residues)
        """Token ids of all sequences, uint8 [residues], read-only, not checked."""
        self._token_bytes = self.tokens.data
        _check_header(index_path, index, sequences, clusters)
        after_lengths = INDEX_HEADER.size + 4 * sequences
        after_pointers = after_lengths + 8 * sequences
        self.lengths: NDArray[np.int32] = index[INDEX_HEADER.size : after_lengths].view("<i4")
        """Residues of each sequence, int32 [sequences], read-only."""
        self.offsets: NDArray[np.int64] = index[after_lengths:after_pointers].view("<i8")
        """The start of each sequence in `tokens`, int64 [sequences], read-only, not checked."""
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
        """Clusters of sequences; in a plain store each sequence is its own cluster."""
        return self.summary.clusters

    def __len__(self) -> int:
        return self.summary.sequences

    def some_lengths(self) -> NDArray[np.int32]:
        """Return up to a million of the lengths, in blocks from all parts: the split may be sorted by length."""
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
        """Return windows of sequences, concatenated: uint8 [sum of lengths], a writable copy.

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
        """The count of each token id in the split, int64 [33], from the manifest."""
        return np.array(self.summary.residue_counts, dtype=np.int64)


def _map(path: Path, expected_bytes: int) -> NDArray[np.uint8]:
    """Map a file as read-only uint8 [bytes]. Raises `StoreError` when it is missing or has another size."""
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


class _TokenFile:
    """Writer of a `.bin` file: one buffer is filled while a thread writes, hashes and counts the other."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._buffers = [np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)]
        self._filled = self._unsynced = 0
        self.counts = np.zeros(VOCABULARY_SIZE, dtype=np.int64)

    def append(self, flat_ids: NDArray[np.uint8], lengths: NDArray[np.int32], chosen: NDArray[np.bool_]) -> int:
        """Append the chosen sequences; return their number of residues."""
        size = int(lengths[chosen].sum(dtype=np.int64))
        if self._filled + size > self._buffers[0].size:
            self._flush()
            if size > self._buffers[0].size:
                self._buffers[0] = np.empty(max(size, _BUFFER_BYTES), dtype=np.uint8)
        kernels.select(flat_ids, lengths, chosen, self._buffers[0][self._filled : self._filled + size])
        self._filled += size
        return size

    def _flush(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, self._buffers[0][: self._filled])
        self._buffers.reverse()
        self._filled = 0

    def _write(self, tokens: NDArray[np.uint8]) -> None:
        rest = tokens.data
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._unsynced += tokens.size
        if self._unsynced > _SYNC_BYTES:  # so that the last sync is short
            os.fsync(self._stream.fileno())
            self._unsynced = 0
        self._sha256.update(tokens.data)
        kernels.count_tokens(tokens, self.counts)

    def finish(self) -> str:
        """Write the rest, sync and close; return the SHA-256 of the file."""
        self._flush()
        self._flush()  # waits for the first
        self._thread.shutdown()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        """Close without finishing, or after it."""
        self._thread.shutdown()
        self._stream.close()


class _SplitWriter:
    """Writer of one split: appends to `.bin`, keeps lengths (4 bytes a sequence), writes `.idx` last."""

    def __init__(self, folder: Path, name: str) -> None:
        self._index_path = folder / f"{name}.idx"
        self.tokens = _TokenFile(folder / f"{name}.bin")
        self._lengths = array("i")
        self._cluster_sizes = array("i")

    def add_many(
        self,
        flat_ids: NDArray[np.uint8],
        lengths: NDArray[np.int32],
        chosen: NDArray[np.bool_],
        cluster_sizes: ArrayLike | None,
    ) -> None:
        self.tokens.append(flat_ids, lengths, chosen)
        clustered = bool(self._cluster_sizes) or not self._lengths
        self._lengths.frombytes(lengths[chosen].tobytes())
        if cluster_sizes is not None:
            assert clustered, "either all sequences of a split are in clusters or none"
            self._cluster_sizes.frombytes(np.asarray(cluster_sizes).astype(np.int32).tobytes())

    def finish(self) -> SplitSummary:
        bin_sha256 = self.tokens.finish()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        sizes = np.frombuffer(self._cluster_sizes, dtype=np.int32) if self._cluster_sizes else None
        assert sizes is None or int(sizes.sum(dtype=np.int64)) == lengths.size
        self._write_index(lengths, sizes)
        return SplitSummary(
            sequences=lengths.size,
            clusters=lengths.size if sizes is None else sizes.size,
            residues=int(self.tokens.counts.sum()),
            longest=int(lengths.max(initial=0)),
            residue_counts=self.tokens.counts.tolist(),
            bin_sha256=bin_sha256,
            idx_sha256=sha256_of_file(self._index_path),
        )

    def _write_index(self, lengths: NDArray[np.int32], cluster_sizes: NDArray[np.int32] | None) -> None:
        clusters = lengths.size if cluster_sizes is None else cluster_sizes.size
        with self._index_path.open("wb") as stream:
            header = (INDEX_MAGIC, INDEX_VERSION, UINT8_CODE, lengths.size, clusters + 1)
            stream.write(INDEX_HEADER.pack(*header))
            stream.write(lengths.astype("<i4", copy=False).data)
            end = _write_starts(stream, lengths)
            if cluster_sizes is None:
                for at in range(0, lengths.size, _INDEX_BLOCK):
                    stream.write(np.arange(at, min(at + _INDEX_BLOCK, lengths.size), dtype="<i8").data)
                end = lengths.size
            else:
                end = _write_starts(stream, cluster_sizes)
            stream.write(np.array([end], dtype="<i8").data)
            _sync_and_close(stream)


def _write_starts(stream: IO[bytes], sizes: NDArray[np.int32]) -> int:
    """Write the starts of pieces of these sizes, int64, in blocks; return the end of the last one."""
    begin = 0
    for at in range(0, sizes.size, _INDEX_BLOCK):
        ends = begin + np.cumsum(sizes[at : at + _INDEX_BLOCK], dtype="<i8")
        stream.write((ends - sizes[at : at + _INDEX_BLOCK]).astype("<i8", copy=False).data)
        begin = int(ends[-1])
    return begin


class StoreWriter:
    """Write a store under a temporary name beside `folder`, and rename it when it is complete.

        with StoreWriter(folder) as writer:
            writer.add_many("train", flat_ids, lengths)
            writer.finish({"seed": 1})

    Leaving the block without `finish` removes everything. A writer that was killed leaves its temporary folder; the
    next writer of the same `folder` empties it. `partial` is that folder: it may hold scratch files until `finish`.
    Raises `StoreError` on entry when `folder` exists, when another process is building it, or when its parent cannot be
    written to; and from any method when the disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._lock = -1
        self._splits: dict[str, _SplitWriter] = {}

    def __enter__(self) -> StoreWriter:
        if os.path.lexists(self.folder):
            raise StoreError(f"{self.folder}: exists already; open it, remove it, or choose another output")
        with disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_folder(self.partial, self.folder)
            for left in self.partial.iterdir():  # by a builder that was killed
                left.unlink()
            self._splits = {name: _SplitWriter(self.partial, name) for name in SPLITS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            with suppress(OSError):  # of a full disk, already reported
                split.tokens.abandon()
        if is_still(self.partial, self._lock):
            shutil.rmtree(self.partial, ignore_errors=True)  # `finish` renames it
        os.close(self._lock)

    def require_space(self, residues: int, sequences: int) -> None:
        """Raise `StoreError` unless the disk has room for so many residues and sequences."""
        needed = residues + index_bytes(sequences, sequences)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise StoreError(
                f"{self.folder}: the store will take about {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free "
                "on its disk; free some or choose another output"
            )

    def add(self, split: str, token_ids: NDArray[np.uint8]) -> None:
        """Append one sequence of token ids, uint8 [residues]; `add_many` is faster for many."""
        self.add_many(split, token_ids, [token_ids.size])

    def add_many(
        self,
        split: str,
        flat_ids: NDArray[np.uint8],
        lengths: ArrayLike,
        cluster_sizes: ArrayLike | None = None,
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append sequences to a split: concatenated token ids, uint8 [sum of lengths], and lengths [sequences].

        chosen: bool [sequences], those to append (default: all). cluster_sizes: [clusters], the sequences of each
        cluster of a clustered split, which are neighbours. Raises `ValueError` for another dtype, an id
        over 32, a length below 1, or sizes that do not sum up.
        """
        counts = np.asarray(lengths).astype(np.int32, copy=False)
        total = int(counts.sum(dtype=np.int64))
        taken = np.ones(counts.size, dtype=np.bool_) if chosen is None else chosen
        if split not in self._splits:
            raise ValueError(f"no split {split!r} is being written; choose one of {', '.join(SPLITS)}")
        if flat_ids.dtype != np.uint8 or flat_ids.ndim != 1:
            raise ValueError(f"token ids must be a 1-D uint8 array, got {flat_ids.ndim}-D {flat_ids.dtype}")
        if counts.size and counts[taken].min(initial=1) < 1:
            raise ValueError(f"a sequence needs at least one residue, got a length of {counts.min()}")
        if total != flat_ids.size:
            raise ValueError(f"the lengths sum to {total}, but there are {flat_ids.size} token ids")
        if flat_ids.size and flat_ids.max() >= VOCABULARY_SIZE:
            raise ValueError(f"token ids lie in 0..{VOCABULARY_SIZE - 1}, got {flat_ids.max()}")
        if cluster_sizes is not None and int(np.sum(cluster_sizes, dtype=np.int64)) != counts.size:
            raise ValueError(f"the clusters have {np.sum(cluster_sizes)} members, not {counts.size}")
        with disk_errors(self.folder):
            self._splits[split].add_many(flat_ids, counts, taken, cluster_sizes)

    def finish(self, manifest_fields: Mapping[str, object]) -> Path:
        """Complete the store: sync all files, write the manifest with these fields, rename. Return the final folder.

        Raises `ValueError` for a field that the manifest sets itself, `StoreError` when `folder` exists by now.
        """
        with disk_errors(self.folder):
            summaries = {name: split.finish()._asdict() for name, split in self._splits.items()}
            own = {"format_version": FORMAT_VERSION, "package_version": __version__, "splits": summaries}
            if clash := own.keys() & manifest_fields.keys():
                raise ValueError(f"the manifest sets {', '.join(sorted(clash))} itself")
            manifest = {"format_version": FORMAT_VERSION, "package_version": __version__, **manifest_fields, **own}
            with (self.partial / MANIFEST_NAME).open("wb") as stream:
                stream.write(_readable(manifest).encode() + b"\n")
                _sync_and_close(stream)
            fsync_directory(self.partial)
            self._rename()
            fsync_directory(self.folder.parent)
        return self.folder

    def _rename(self) -> None:
        try:
            self.partial.rename(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            advice = "this one is discarded; open the other, or choose another output"
            raise StoreError(f"{self.folder}: another builder finished it first; {advice}") from None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise errors of the disk, while the store `folder` is written, as one-line `StoreError`s."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise StoreError(f"{folder}: {os.strerror(error.errno).lower()}; {_ADVICE[error.errno]}") from None


def _lock_folder(partial: Path, folder: Path) -> int:
    """Make the temporary folder, or take over that of a killed builder. Return its descriptor, locked until closed.

    Raises `StoreError` while another process holds it.
    """
    while True:
        is_new = not os.path.lexists(partial)
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            has_locks = lock_descriptor(descriptor)
        except LockedError:
            os.close(descriptor)
            advice = "wait for it, or choose another output"
            raise StoreError(f"{folder}: another process is building it (in {partial.name}); {advice}") from None
        if not has_locks and not is_new:
            os.close(descriptor)
            raise StoreError(f"{partial}: is in use, or was left by a builder that died; remove it then")
        if is_still(partial, descriptor):
            if os.path.lexists(folder):  # finished before it was locked
                os.close(descriptor)
                partial.rmdir()
                raise StoreError(f"{folder}: exists already; open it, remove it, or choose another output")
            return descriptor
        os.close(descriptor)  # its holder has renamed it


def _readable(manifest: Mapping[str, object]) -> str:
    """JSON with an indent of two, the 33 counts of a split on one line."""
    text = json.dumps(manifest, indent=2)
    for split in manifest["splits"].values():  # type: ignore[attr-defined]
        counts = json.dumps(split["residue_counts"])
        text = text.replace(json.dumps(split["residue_counts"], indent=2).replace("\n", "\n" + " " * 6), counts)
    return text


def _sync_and_close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
