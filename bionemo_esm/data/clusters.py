"""Stores of clusters: UniRef90 sequences as the members of UniRef50 clusters, of which an epoch shows one.

ESM-2 was trained this way (Lin et al., Science 379, 1123, 2023): draw a UniRef50 cluster, then one of its UniRef90
members. Here the epoch permutation draws the clusters, and a hash of seed, epoch and cluster draws the member. Clusters
are split by the keyed hash of their names. A held-out cluster keeps its representative, the first member in the map.

Memory: 25 bytes for each member in the map and 28 for each sequence; while sorting, some 16 more for either.
"""

from __future__ import annotations

import mmap
import os
from array import array
from dataclasses import asdict
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data import kernels
from bionemo_esm.data.fasta import Source
from bionemo_esm.data.preprocess import (
    BuildCounts,
    BuildPolicy,
    CleanBlock,
    ExpectedTotals,
    PathLike,
    Progress,
    RecordCleaner,
    scratch_file,
)
from bionemo_esm.data.store import ProteinStore, StoreError, StoreWriter, disk_errors

_CLUSTER_PREFIX = b"UniRef50_"
_BLOCK_BYTES = 2**22
_WRITTEN_AT_ONCE = 2**14  # sequences, or one cluster where that is larger


class ClusterMap(NamedTuple):
    """The cluster of each member, by keyed hashes of the names, in the order of the members' hashes."""

    members: NDArray[np.uint64]
    clusters: NDArray[np.uint64]
    places: NDArray[np.int64]
    """The position of each member in the file, counted in members."""
    manifest_entry: dict[str, object]

    def look_up(self, members: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the index of each of members uint64 [n] in these arrays, and whether it exists: two arrays [n]."""
        at = np.minimum(np.searchsorted(self.members, members), self.members.size - 1)
        return at, self.members[at] == members


def read_cluster_map(path: PathLike, key: np.uint64) -> ClusterMap:
    """Read a table of two columns: `cluster<TAB>member,member,...`, as of MMseqs2 with one member a line, or
    `member<TAB>cluster`, which is recognised by the second column's `UniRef50_`. Plain, gzip or zstd.

    Raises `SourceError` when it cannot be read, and `StoreError`, naming the line, for a line without a tab, for a
    member of two clusters, and for an empty table.
    """
    with Source(path) as source:
        table = _Table(source.name, key)
        rest, at_end = b"", False
        while not at_end:
            block = bytearray(_BLOCK_BYTES)
            filled = source.fill(memoryview(block))
            if source.damage:
                raise StoreError(f"{source.name}: {source.damage}; download or copy the file again")
            at_end = filled < len(block)
            text = rest + block[:filled]
            end = len(text) if at_end else text.rfind(b"\n") + 1
            table.add(text[:end])
            rest = text[end:]
    if not table.members:
        raise StoreError(f"{path}: names no cluster; give a table of clusters and their members")
    names, cluster_names = (np.frombuffer(values, dtype=np.uint64) for values in (table.members, table.clusters))
    places = np.argsort(names, kind="stable")
    names, cluster_names = names[places], cluster_names[places]
    first = np.ones(names.size, dtype=np.bool_)
    first[1:] = names[1:] != names[:-1]
    elsewhere = int((~first[1:] & (cluster_names[1:] != cluster_names[:-1])).sum())
    if elsewhere:
        raise StoreError(f"{path}: {elsewhere} members stand in more than one cluster; keep one line for each")
    return ClusterMap(names[first], cluster_names[first], places[first], source.manifest_entry)


class _Table:
    """The hashed pairs of a table of clusters."""

    def __init__(self, name: str, key: np.uint64) -> None:
        self.name, self._key = name, key
        self.members, self.clusters = array("Q"), array("Q")
        self._lines = 0
        self._cluster_first: bool | None = None  # not known before the first lines

    def add(self, text: bytes) -> None:
        """Add whole lines. Raises `StoreError`, naming the line, for a line without two columns."""
        if self._cluster_first is None:
            given = text.count(b"\n")
            text = text.lstrip(b"\r\n")
            if not text:
                self._lines += given
                return
            text, self._cluster_first = _without_heading(text)
            self._lines += given - text.count(b"\n")
        pairs = np.empty((2, len(text) // 2 + 1), dtype=np.uint64)
        content = np.frombuffer(text, dtype=np.uint8)
        words = kernels.words_of(content)
        count, bad = kernels.parse_map(content, words, self._key, self._cluster_first, pairs[0], pairs[1])
        if bad < len(text):
            line = self._lines + text.count(b"\n", 0, int(bad)) + 1
            shown = text[int(bad) : int(bad) + 40].decode(errors="replace").splitlines()[0]
            advice = "give a cluster, a tab and its members, divided by commas"
            raise StoreError(f"{self.name}, line {line}: not two columns in {shown!r}; {advice}")
        self._lines += text.count(b"\n")
        self.members.frombytes(pairs[0, :count].tobytes())
        self.clusters.frombytes(pairs[1, :count].tobytes())


def _without_heading(text: bytes) -> tuple[bytes, bool]:
    """Return the table without column names, and whether the cluster is the first column."""
    first, _, others = text.partition(b"\n")
    second = others.partition(b"\n")[0]
    is_heading = _CLUSTER_PREFIX not in first and _CLUSTER_PREFIX in second
    columns = (second if is_heading else first).split(b"\t")
    member_first = len(columns) > 1 and columns[1].startswith(_CLUSTER_PREFIX) and _CLUSTER_PREFIX not in columns[0]
    return others if is_heading else text, not member_first


def build_clustered_store(
    members: PathLike,
    cluster_map: PathLike,
    output: PathLike,
    policy: BuildPolicy,
    *,
    release: str | None = None,
    licence: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ProteinStore:
    """Build a clustered store at `output` from a FASTA file of members and a table of clusters.

    `validation_sequences` and `test_sequences` count clusters, and so representatives. Members that the map does not
    name are dropped and counted, and so are clusters of which no sequence was found. Of equal sequences one is kept.
    Raises as `build_store` does, as `read_cluster_map` does, and `StoreError` when the map names none of the members or
    the policy is to keep duplicates.
    """
    if policy.duplicate_sequences != "drop":
        raise StoreError(f"duplicate_sequences is {policy.duplicate_sequences!r}; for clusters it must be drop")
    with StoreWriter(output) as writer, scratch_file(writer) as scratch:
        intake = RecordCleaner(policy, threads or os.cpu_count() or 1, progress)
        by_member = read_cluster_map(cluster_map, policy.key)
        collected = _Collected(by_member, policy, writer, scratch, intake.counts)
        intake.read(members, collected.add, collected.expect)
        if not collected.lengths:
            advice = "the first word of its headers must be what the map calls a member"
            raise StoreError(f"{members}: none of its identifiers is in {cluster_map}; {advice}")
        found = by_member.manifest_entry | collected.write()
        writer.finish(
            {
                "source": intake.sources,
                "cluster_map": found,
                "release": release,
                "licence": licence,
                "counts": asdict(intake.counts),
                "policy": policy.model_dump(),
            }
        )
    return ProteinStore.open(output)


class _Collected:
    """Members in a scratch file, until all have been read and can be written cluster by cluster."""

    def __init__(
        self, by_member: ClusterMap, policy: BuildPolicy, writer: StoreWriter, scratch: IO[bytes], counts: BuildCounts
    ) -> None:
        self._map, self._policy, self._writer, self._scratch, self._counts = by_member, policy, writer, scratch, counts
        self._was_met = np.zeros(by_member.members.size, dtype=np.bool_)
        self.lengths, self._clusters, self._places, self._digests = array("i"), array("Q"), array("q"), array("Q")

    def expect(self, expected: ExpectedTotals) -> None:
        """Check the disk for twice the totals of the members' file."""
        self._writer.require_space(2 * expected.residues, expected.records)

    def add(self, block: CleanBlock) -> None:
        """Add the sequences of a block that are in a cluster."""
        at, known = self._map.look_up(block.id_digests)
        self._was_met[at[known]] = True
        self._counts.dropped_without_cluster += int((~known).sum())
        chosen = block.select(known)
        with disk_errors(self._writer.folder):
            self._scratch.write(chosen.tokens.data)
        self.lengths.frombytes(chosen.lengths.tobytes())
        self._digests.frombytes(chosen.digests.tobytes())
        self._clusters.frombytes(self._map.clusters[at[known]].tobytes())
        self._places.frombytes(self._map.places[at[known]].tobytes())

    def _ordered(self) -> NDArray[np.int64]:
        """Return the order of the sequences: by cluster hash, then by the map; the first of equal ones, int64 [n].

        Held-out clusters come first, so a sequence in one of them is dropped from those of train.
        """
        clusters = np.frombuffer(self._clusters, dtype=np.uint64)
        order = np.lexsort((np.frombuffer(self._places, dtype=np.int64), clusters))
        _, first = np.unique(np.frombuffer(self._digests, dtype=np.uint64)[order], return_index=True)
        self._counts.duplicate_sequences = self._counts.dropped_duplicate = order.size - first.size
        return order[np.sort(first)]

    def write(self) -> dict[str, int]:
        """Write the clusters in the order of their hashes: validation, test, train. Return the counts of the map."""
        order = self._ordered()
        clusters = np.frombuffer(self._clusters, dtype=np.uint64)[order]
        firsts = np.flatnonzero(np.diff(clusters, prepend=clusters[0] + np.uint64(1)))
        sizes = np.diff(firsts, append=order.size)
        validation, test = self._policy.held_out(firsts.size, "the clusters, each by its representative")
        held_out = firsts[: validation + test]
        with disk_errors(self._writer.folder):
            self._scratch.flush()
        with mmap.mmap(self._scratch.fileno(), 0, access=mmap.ACCESS_READ) as tokens:
            pieces = _Pieces(tokens, np.frombuffer(self.lengths, dtype=np.int32))
            self._write_split("validation", pieces, order[held_out[:validation]], None)
            self._write_split("test", pieces, order[held_out[validation:]], None)
            train = order[firsts[validation + test] :]
            self._write_split("train", pieces, train, sizes[validation + test :])
        self._counts.records_kept = validation + test + train.size
        self._counts.dropped_held_out_members = order.size - self._counts.records_kept
        named = np.unique(self._map.clusters).size
        return {
            "clusters": named,
            "clusters_without_sequence": named - firsts.size,
            "members": self._map.members.size,
            "members_without_sequence": int((~self._was_met).sum()),
        }

    def _write_split(
        self, name: str, pieces: _Pieces, sequences: NDArray[np.int64], sizes: NDArray[np.int64] | None
    ) -> None:
        """Write sequences in this order. sizes: the sequences of each cluster; None: each is its own cluster."""
        ends = np.cumsum(sizes) if sizes is not None else np.arange(1, sequences.size + 1)
        begin = cluster = 0
        while begin < sequences.size:
            last = max(int(np.searchsorted(ends, begin + _WRITTEN_AT_ONCE, side="right")), cluster + 1)
            end = int(ends[last - 1])
            tokens, lengths = pieces.gather(sequences[begin:end])
            self._writer.add_many(name, tokens, lengths, None if sizes is None else sizes[cluster:last])
            begin, cluster = end, last


class _Pieces:
    """The sequences of a scratch file."""

    def __init__(self, tokens: mmap.mmap, lengths: NDArray[np.int32]) -> None:
        self._tokens, self._lengths = tokens, lengths
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def gather(self, sequences: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return the concatenated token ids of sequences [n], and their lengths [n]."""
        lengths = self._lengths[sequences]
        ends = self._ends[sequences]
        spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
        return np.frombuffer(b"".join([self._tokens[begin:end] for begin, end in spans]), dtype=np.uint8), lengths
