"""Tests of clustered stores: table formats, held-out clusters, counts and the samples of a training epoch."""

from __future__ import annotations

import gzip
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from bionemo_esm.alphabet import decode
from bionemo_esm.data import clusters as clusters_module
from bionemo_esm.data import fasta
from bionemo_esm.data.clusters import build_clustered_store, read_cluster_map
from bionemo_esm.data.collate import PackedBatch, SampleReader
from bionemo_esm.data.dataloader import BatchPlan, RankBatch, TrainingBatches
from bionemo_esm.data.fasta import FastaError, SourceError, read_fasta
from bionemo_esm.data.hashing import uniform_integers
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.preprocess import BuildPolicy
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit, StoreError
from conftest import SAMPLE
from reference_masking import crop_windows, draw_members, member_words, sample_keys

PROTEINS = {f"UniRef90_{record.id}": record.sequence.decode() for record in read_fasta(SAMPLE / "test.fasta.gz")}
"""200 real proteins."""


def _clusters() -> dict[str, list[str]]:
    """Return clusters of 1, 2, 3, 4, 5, 1, 2, ... members, each named after its first member as in UniRef50."""
    members, grouped = [*PROTEINS], {}
    while members:
        size = len(grouped) % 5 + 1
        grouped[members[0].replace("90", "50", 1)] = members[:size]
        members = members[size:]
    return grouped


CLUSTERS = _clusters()
POLICY = BuildPolicy(validation_sequences=6, test_sequences=9, seed=5)


def by_cluster(clusters: Mapping[str, Iterable[str]]) -> str:
    return "".join(f"{cluster}\t{','.join(members)}\n" for cluster, members in clusters.items())


def pairs(clusters: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    return [(cluster, member) for cluster, members in clusters.items() for member in members]


def build(
    folder: Path,
    table: str | bytes | None = None,
    proteins: Iterable[tuple[str, str]] = PROTEINS.items(),
    policy: BuildPolicy = POLICY,
    threads: int | None = None,
) -> ProteinStore:
    """Build a store in its own folder. Without a table, use `CLUSTERS`."""
    folder.mkdir(parents=True)
    (folder / "members.fasta").write_text("".join(f">{name} n=1\n{residues}\n" for name, residues in proteins))
    content = by_cluster(CLUSTERS) if table is None else table
    (folder / "clusters.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = (folder / "members.fasta", folder / "clusters.tsv", folder / "store")
    return build_clustered_store(*paths, policy, threads=threads)


def documents(split: SequenceSplit) -> list[list[str]]:
    """Return the sequences of each cluster of a split in their stored order."""
    none = np.zeros(split.num_clusters, dtype=np.uint64)  # the word 0 draws the first member
    firsts = [*draw_members(split, np.arange(split.num_clusters), none).tolist(), len(split)]
    return [[decode(split[i]) for i in range(*span)] for span in itertools.pairwise(firsts)]


def content(store: ProteinStore) -> dict[str, list[list[str]]]:
    return {name: documents(store.split(name)) for name in SPLITS}


def members_of(clusters: Iterable[str]) -> list[list[str]]:
    """Return the sequences of the given `CLUSTERS`, sorted."""
    return sorted([PROTEINS[member] for member in CLUSTERS[cluster]] for cluster in clusters)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ProteinStore:
    return build(tmp_path_factory.mktemp("clusters") / "reference")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_train_has_whole_clusters_and_held_out_splits_one_representative_each(store: ProteinStore) -> None:
    found = content(store)
    assert [len(found[name]) for name in SPLITS] == [len(CLUSTERS) - 15, 6, 9]
    cluster_of = {PROTEINS[members[0]]: cluster for cluster, members in CLUSTERS.items()}
    held_out = [cluster_of[sequence] for name in ("validation", "test") for (sequence,) in found[name]]
    assert len(set(held_out)) == 15  # all of them are representatives
    assert any(len(CLUSTERS[cluster]) > 1 for cluster in held_out)
    assert sorted(found["train"]) == members_of(CLUSTERS.keys() - set(held_out))
    store.verify()


def test_megatron_reads_clusters_as_documents(store: ProteinStore) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name in SPLITS:
        theirs, ours = IndexedDataset(str(store.folder / name)), documents(store.split(name))
        bounds = theirs.document_indices.tolist()
        read = [[decode(theirs[i]) for i in range(*span)] for span in itertools.pairwise(bounds)]
        assert read == ours


def test_store_does_not_depend_on_the_order_of_sequences_or_clusters(store: ProteinStore, tmp_path: Path) -> None:
    for trial in range(3):
        shuffler = random.Random(trial)
        proteins, lines = [*PROTEINS.items()], by_cluster(CLUSTERS).splitlines(keepends=True)
        shuffler.shuffle(proteins)
        shuffler.shuffle(lines)
        other = build(tmp_path / str(trial), "".join(lines), proteins)
        assert other.manifest["splits"] == store.manifest["splits"]  # includes the hashes of the files


def test_first_member_of_the_table_is_held_out_at_any_position_in_the_fasta(
    store: ProteinStore, tmp_path: Path
) -> None:
    turned = {cluster: members[::-1] for cluster, members in CLUSTERS.items()}
    found = content(build(tmp_path / "turned", by_cluster(turned)))
    last_of = {PROTEINS[members[0]]: PROTEINS[members[-1]] for members in CLUSTERS.values()}
    for name in ("validation", "test"):
        assert found[name] == [[last_of[sequence]] for (sequence,) in content(store)[name]]


def test_next_member_is_held_out_if_the_first_has_no_sequence(store: ProteinStore, tmp_path: Path) -> None:
    absent = {members[0] for members in CLUSTERS.values() if len(members) > 1}
    found = content(build(tmp_path / "less", proteins=[item for item in PROTEINS.items() if item[0] not in absent]))
    heir = {PROTEINS[members[0]]: PROTEINS[members[min(1, len(members) - 1)]] for members in CLUSTERS.values()}
    for name in ("validation", "test"):
        assert found[name] == [[heir[sequence]] for (sequence,) in content(store)[name]]


def test_held_out_clusters_depend_on_the_seed(store: ProteinStore, tmp_path: Path) -> None:
    other = build(tmp_path / "seed", policy=POLICY.replace(seed=6))
    assert content(other)["test"] != content(store)["test"]


def test_one_cluster_in_twenty_is_held_out_by_default(tmp_path: Path) -> None:
    found = build(tmp_path / "in", policy=BuildPolicy())
    assert len(CLUSTERS) == 68
    assert [found.split(name).num_clusters for name in SPLITS] == [62, 3, 3]


@pytest.mark.parametrize("threads", [1, 4])
def test_block_size_and_threads_do_not_change_the_store(
    store: ProteinStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(clusters_module, "_BLOCK_BYTES", 150)
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 3_000)
    monkeypatch.setattr(clusters_module, "_WRITTEN_AT_ONCE", 3)  # fewer members than some clusters have
    assert build(tmp_path / "in", threads=threads).manifest == store.manifest


def test_clustered_store_opens_like_any_other_and_its_summary_counts_clusters(store: ProteinStore) -> None:
    from bionemo_esm.data.store_summary import StoreSummary

    rows = [line.split() for line in StoreSummary.of(ProteinStore.open(store.folder)).text().splitlines()]
    assert ["clusters", "53", "6", "9"] in rows
    assert any(row[:2] == ["cluster", "map"] for row in rows)


# --- table formats ----------------------------------------------------------------------------------------------------

HEADING = "cluster id\tmembers\n"
SHUFFLED_PAIRS = [pair for cluster in [*CLUSTERS][::-1] for pair in pairs({cluster: CLUSTERS[cluster]})]
FORMATS = {
    "a heading": HEADING + by_cluster(CLUSTERS),
    "CRLF": by_cluster(CLUSTERS).replace("\n", "\r\n"),
    "CRLF and a heading": (HEADING + by_cluster(CLUSTERS)).replace("\n", "\r\n"),
    "no final newline": by_cluster(CLUSTERS).rstrip("\n"),
    "blank lines": by_cluster(CLUSTERS).replace("\n", "\n\n") + "\r\n\n",
    "a comma at the end": by_cluster(CLUSTERS).replace("\n", ",\n"),
    "one member a line, as MMseqs2": "".join(f"{cluster}\t{member}\n" for cluster, member in pairs(CLUSTERS)),
    "clusters in another order": "".join(f"{cluster}\t{member}\n" for cluster, member in SHUFFLED_PAIRS),
    "member and cluster": "".join(f"{member}\t{cluster}\n" for cluster, member in pairs(CLUSTERS)),
    "member and cluster, a heading": "member\tcluster\n" + "".join(f"{m}\t{c}\n" for c, m in pairs(CLUSTERS)),
    "member and cluster, CRLF": "".join(f"{member}\t{cluster}\r\n" for cluster, member in pairs(CLUSTERS)),
    "gzip": gzip.compress((HEADING + by_cluster(CLUSTERS)).encode()),
    "zstd": zstandard.compress(by_cluster(CLUSTERS).encode()),
}


@pytest.mark.parametrize("block_bytes", [2**22, 1_000, 150])
@pytest.mark.parametrize("form", FORMATS)
def test_all_table_formats_give_the_same_cluster_map(
    store: ProteinStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, block_bytes: int
) -> None:
    """Blocks of several sizes; lines cross the ends of blocks."""
    key = POLICY.key
    reference = read_cluster_map(store.folder.with_name("clusters.tsv"), key)
    given = FORMATS[form]
    (tmp_path / "table").write_bytes(given if isinstance(given, bytes) else given.encode())
    monkeypatch.setattr(clusters_module, "_BLOCK_BYTES", block_bytes)
    found = read_cluster_map(tmp_path / "table", key)
    assert (found.members.tolist(), found.clusters.tolist()) == (
        reference.members.tolist(),
        reference.clusters.tolist(),
    )
    if form == "clusters in another order":
        return
    assert found.places.tolist() == reference.places.tolist()


@pytest.mark.parametrize(
    "blank",
    ["\n", "\n\n", "\r\n"],
)
def test_leading_blank_lines_do_not_change_which_column_is_the_cluster(tmp_path: Path, blank: str) -> None:
    table = blank + "".join(f"{member}\t{cluster}\n" for cluster, member in pairs(CLUSTERS))
    (tmp_path / "blank.tsv").write_text(table)
    (tmp_path / "plain.tsv").write_text(table[len(blank) :])
    found, plain = (read_cluster_map(tmp_path / f"{name}.tsv", POLICY.key) for name in ("blank", "plain"))
    assert found.clusters.tolist() == plain.clusters.tolist()


def test_comma_separated_members_may_precede_their_cluster(store: ProteinStore, tmp_path: Path) -> None:
    table = "".join(f"{', '.join(members)}\t{cluster}\n" for cluster, members in CLUSTERS.items())
    assert build(tmp_path / "in", table).manifest["splits"] == store.manifest["splits"]


@pytest.mark.parametrize("form", ["member and cluster", "one member a line, as MMseqs2", "clusters in another order"])
def test_all_table_formats_give_the_same_store(store: ProteinStore, tmp_path: Path, form: str) -> None:
    assert build(tmp_path / "in", FORMATS[form]).manifest["splits"] == store.manifest["splits"]


def test_cluster_in_the_first_column_may_have_any_name(tmp_path: Path) -> None:
    """MMseqs2 names a cluster after its representative, which is also a member."""
    table = "".join(f"{members[0]}\t{member}\n" for members in CLUSTERS.values() for member in members)
    found = build(tmp_path / "in", table)
    assert sum(found.split(name).num_clusters for name in SPLITS) == 68
    train = content(found)["train"]
    assert all(cluster in members_of(CLUSTERS) for cluster in train)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_members_without_cluster_and_clusters_without_sequence_are_counted(store: ProteinStore, tmp_path: Path) -> None:
    clusters = {**CLUSTERS, "UniRef50_P99999": ["UniRef90_P99999", "UniRef90_P00001"], "UniRef50_P62988": ["P62988"]}
    others = list(read_fasta(SAMPLE / "validation.fasta.gz"))[:7]
    proteins = [*PROTEINS.items(), *((f"UniRef90_{r.id}", r.sequence.decode()) for r in others)]
    found = build(tmp_path / "in", by_cluster(clusters), proteins)
    assert found.manifest["splits"] == store.manifest["splits"]
    counts, told = found.manifest["counts"], found.manifest["cluster_map"]
    assert (counts["records_read"], counts["dropped_without_cluster"]) == (207, 7)
    assert told["file"] == "clusters.tsv"
    assert (told["clusters"], told["clusters_without_sequence"]) == (70, 2)
    assert (told["members"], told["members_without_sequence"]) == (203, 3)


def test_every_record_is_counted_as_kept_or_dropped(store: ProteinStore) -> None:
    counts, found = store.manifest["counts"], content(store)
    held_out = {sequence for name in ("validation", "test") for (sequence,) in found[name]}
    left_out = sum(len(members) - 1 for members in CLUSTERS.values() if PROTEINS[members[0]] in held_out)
    assert counts["dropped_held_out_members"] == left_out > 0
    dropped = sum(count for key, count in counts.items() if key.startswith("dropped_"))
    assert counts["records_read"] == 200 == counts["records_kept"] + dropped
    assert counts["records_kept"] == sum(len(store.split(name)) for name in SPLITS)


def test_member_repeated_within_its_cluster_counts_once(store: ProteinStore, tmp_path: Path) -> None:
    found = build(tmp_path / "in", by_cluster(CLUSTERS) + by_cluster(dict([*CLUSTERS.items()][:1])))
    assert found.manifest["splits"] == store.manifest["splits"]
    assert found.manifest["cluster_map"]["members"] == 200
    assert found.manifest["cluster_map"]["members_without_sequence"] == 0


# --- repeated sequences -----------------------------------------------------------------------------------------------


def test_clustered_store_refuses_to_keep_repeated_sequences(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="duplicate_sequences is 'keep'; for clusters it must be drop"):
        build(tmp_path / "in", policy=POLICY.replace(duplicate_sequences="keep"))


def test_sequence_in_two_clusters_is_never_in_two_splits(tmp_path: Path) -> None:
    """Cropped UniRef90 members may be equal. Here each third protein has the residues of the next one."""
    names, sequences = [*PROTEINS], [*PROTEINS.values()]
    repeated = [sequences[min(i + 1, 199)] if i % 3 == 0 else sequence for i, sequence in enumerate(sequences)]
    found = content(build(tmp_path / "in", proteins=zip(names, repeated, strict=True)))
    distinct = {name: {s for cluster in found[name] for s in cluster} for name in SPLITS}
    assert not distinct["train"] & (distinct["validation"] | distinct["test"])
    assert not distinct["validation"] & distinct["test"]


def test_store_with_repeated_sequences_does_not_depend_on_the_fasta_order(tmp_path: Path) -> None:
    names, sequences = [*PROTEINS], [*PROTEINS.values()]
    proteins = [(name, sequences[(i + 2) % 200] if i % 3 == 0 else sequences[i]) for i, name in enumerate(names)]
    stores = [build(tmp_path / str(step), proteins=proteins[::step]) for step in (1, -1)]
    assert stores[0].manifest["splits"] == stores[1].manifest["splits"]


# --- refused inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "UniRef50_A\tUniRef90_A\nUniRef50_B UniRef90_B\n",
            r"line 2: not two columns in 'UniRef50_B UniRef90_B'; give a cl",
        ),
        ("UniRef50_A UniRef90_A\n", "line 1: not two columns in 'UniRef50_A UniRef90_A'"),
        ("UniRef50_A,UniRef90_A", "line 1: not two columns in 'UniRef50_A,UniRef90_A'"),
        (by_cluster(CLUSTERS) + "UniRef50_B", "line 69: not two columns in 'UniRef50_B'"),
        (by_cluster(CLUSTERS) + "\nUniRef50_B\t\r\nUniRef50_B\r\n", "line 70: not two columns"),
        (HEADING + by_cluster(CLUSTERS) + "UniRef50_B\n", "line 70: not two columns"),
        (by_cluster(CLUSTERS) + "UniRef50_B\tUniRef90_B\tmore\n", "line 69: not two columns"),
        ("", "names no cluster"),
        ("\n\n", "names no cluster"),
        (by_cluster(CLUSTERS) + "UniRef50_X\tUniRef90_A0A022QUA2\n", "1 members stand in more than one cluster; keep"),
    ],
)
@pytest.mark.parametrize("block_bytes", [2**22, 150])
def test_unusable_table_is_refused_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(clusters_module, "_BLOCK_BYTES", block_bytes)
    with pytest.raises(StoreError, match=rf"clusters\.tsv.*({message})"):
        build(tmp_path / "in", table)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["clusters.tsv", "members.fasta"]


def test_table_with_other_identifiers_is_refused_with_an_explanation(tmp_path: Path) -> None:
    table = by_cluster(CLUSTERS).replace("UniRef90_", "sp|")
    with pytest.raises(StoreError, match=r"members\.fasta: none of its identifiers is in .*clusters\.tsv; the first w"):
        build(tmp_path / "in", table)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["clusters.tsv", "members.fasta"]


def test_holding_out_more_clusters_than_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"the clusters, each by its representative: 68 .* are too few for 60 in validation, 9 in test"
    ):
        build(tmp_path / "in", policy=POLICY.replace(validation_sequences=60))
    assert not (tmp_path / "in" / "store").exists()


def test_unreadable_files_are_named_and_leave_no_files(tmp_path: Path) -> None:
    fasta_path = SAMPLE / "test.fasta.gz"
    table = tmp_path / "clusters.tsv.gz"
    with pytest.raises(SourceError, match=r"clusters\.tsv\.gz: no such file"):
        build_clustered_store(fasta_path, table, tmp_path / "store", POLICY)
    table.write_text(by_cluster(CLUSTERS))
    with pytest.raises(SourceError, match=r"absent\.fasta: no such file"):
        build_clustered_store(tmp_path / "absent.fasta", table, tmp_path / "store", POLICY)
    (tmp_path / "dna.fasta").write_text(">UniRef90_A0A022QUA2\n" + "ACGT" * 99)
    with pytest.raises(FastaError, match=r"dna\.fasta: looks like DNA"):
        build_clustered_store(tmp_path / "dna.fasta", table, tmp_path / "store", POLICY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters.tsv.gz", "dna.fasta"]


def test_truncated_table_is_reported_as_damaged(tmp_path: Path) -> None:
    table = gzip.compress(by_cluster(CLUSTERS).encode())[:-20]
    with pytest.raises(
        StoreError, match=r"clusters\.tsv: the gzip stream is damaged .*download or copy the file again"
    ):
        build(tmp_path / "in", table)
    assert not (tmp_path / "in" / "store").exists()


# --- training ---------------------------------------------------------------------------------------------------------


def residues_shown(share: RankBatch | list[PackedBatch]) -> list[str]:
    """Return the proteins of micro batches before corruption."""
    proteins = []
    for batch in share.micro_batches if isinstance(share, RankBatch) else share:
        tokens = batch.tokens.clone()
        tokens[batch.target_index] = batch.targets.to(tokens.dtype)
        bounds = batch.cu_seqlens.tolist()
        spans = itertools.pairwise(bounds)
        proteins += [decode(tokens[begin + 1 : end - 1].numpy().astype(np.uint8)) for begin, end in spans]
    return proteins


def stream(split: SequenceSplit, plan: BatchPlan, seed: int = 1) -> TrainingBatches:
    return TrainingBatches(SampleReader(split, 1026, MaskingPolicy(), seed), plan)


def test_epoch_contains_each_cluster_once(store: ProteinStore) -> None:
    train = store.split("train")
    cluster_of = {sequence: number for number, cluster in enumerate(documents(train)) for sequence in cluster}
    assert train.num_clusters == 53
    source, orders, members = stream(train, BatchPlan(53, 53)), set(), set()
    for epoch in range(6):
        proteins = residues_shown(source[53 * epoch])
        clusters = [cluster_of[protein] for protein in proteins]
        assert sorted(clusters) == list(range(53))
        orders.add(tuple(clusters))
        members.add(tuple(sorted(proteins)))
    assert len(orders) == len(members) == 6


def test_drawn_members_do_not_depend_on_batch_size_or_world_size(store: ProteinStore) -> None:
    train = store.split("train")
    whole = residues_shown(stream(train, BatchPlan(48, 48))[48])  # the end of one epoch and the start of the next
    parts = [stream(train, BatchPlan(48, 4, rank, 3)) for rank in range(3)]
    assert sorted(protein for part in parts for protein in residues_shown(part[48])) == sorted(whole)
    small = stream(train, BatchPlan(6, 6))
    assert [protein for step in range(8) for protein in residues_shown(small[48 + 6 * step])] == whole
    assert residues_shown(stream(train, BatchPlan(48, 48), seed=2)[48]) != whole


def draws(split: SequenceSplit, epochs: int, seed: int = 1) -> NDArray[np.int64]:
    """Return the index of the member drawn for each cluster in each epoch: int64 [epochs, clusters]."""
    epoch, cluster = (grid.ravel() for grid in np.indices((epochs, split.num_clusters)))
    return draw_members(split, cluster, member_words(sample_keys(seed, epoch, cluster))).reshape(epochs, -1)


def test_members_are_drawn_as_by_the_reference(store: ProteinStore) -> None:
    train = store.split("train")
    drawn = draws(train, epochs=3)
    for epoch in range(3):
        shown = residues_shown(stream(train, BatchPlan(53, 53))[53 * epoch])
        assert Counter(shown) == Counter(decode(train[int(sequence)]) for sequence in drawn[epoch])


def test_members_of_a_cluster_are_equally_likely_and_epochs_independent(store: ProteinStore) -> None:
    train, epochs = store.split("train"), 4_000
    drawn = draws(train, epochs)
    sizes = np.array([len(cluster) for cluster in documents(train)])
    expected = np.repeat(epochs / sizes, sizes)
    observed = np.bincount(drawn.ravel(), minlength=len(train))
    assert observed.min() > 0
    freedom = len(train) - train.num_clusters
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)
    again = (drawn[1:] == drawn[:-1]).mean(axis=0)  # the same member in the next epoch
    assert np.abs(again - 1 / sizes).max() < 4 * np.sqrt(0.25 / epochs)
    place = drawn - (np.cumsum(sizes) - sizes)
    fives = place[:, sizes == 5]
    together = (fives[:, 1:] == fives[:, :-1]).mean()  # clusters of one epoch are independent too
    assert together == pytest.approx(0.2, abs=0.01)


def test_drawn_member_depends_only_on_seed_epoch_and_cluster(store: ProteinStore) -> None:
    train = store.split("train")
    drawn = draws(train, epochs=20)
    for epoch, cluster in ((0, 0), (3, 17), (19, 52)):
        words = member_words(sample_keys(1, np.array([epoch]), np.array([cluster])))
        assert draw_members(train, [cluster], words).tolist() == [drawn[epoch, cluster]]
    assert (drawn != draws(train, epochs=20, seed=2)).any()
    assert np.array_equal(drawn, draws(ProteinStore.open(store.folder).split("train"), epochs=20))


def test_drawn_members_are_independent_of_their_crops() -> None:
    keys = sample_keys(1, np.zeros(20_000, dtype=np.int64), np.arange(20_000))
    starts, _ = crop_windows(np.full(20_000, 1_000), 500, keys)
    words = member_words(keys)
    for power in (1, 2, 4):  # members per cluster
        members = uniform_integers(words, np.full(20_000, 2**power))
        assert abs(np.corrcoef(members, starts)[0, 1]) < 0.03


def test_held_out_splits_show_the_same_sequence_in_every_epoch(store: ProteinStore) -> None:
    reader = SampleReader(store.split("validation"), 1026, MaskingPolicy().for_evaluation(), seed=1)
    assert reader.num_samples == 6
    samples = np.arange(6)
    shown = [residues_shown([reader.collate(np.full(6, epoch), samples)]) for epoch in (0, 7)]
    assert shown[0] == shown[1] == [sequence for (sequence,) in documents(store.split("validation"))]
