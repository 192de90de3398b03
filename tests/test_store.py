"""The token store: round trip, compatibility with Megatron, detection of damage, and concurrent builds."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from bionemo_esm import __version__
from bionemo_esm.alphabet import TOKEN_IDS, decode, encode
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit, SplitSummary, StoreError, StoreWriter

PROTEINS = {
    "train": [
        "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",  # ubiquitin
        "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN",  # crambin
        "MTYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE",  # protein G, B1
        "RPDFCLEPPYTGPCKARIIRYFYNAKAGLCQTFVYGGCRAKRNNFKSAEDCMRTCGGA",  # BPTI
        "NLYIQWLKDGGPSSGRPPPS",  # Trp-cage
    ],
    "validation": ["LSDEDFKAVFGMTRSAFANLPLWKQQNLKKEKGLF", "GIGAVLKVLTTGLPALISWIKRKRQQ"],  # villin HP35, melittin
    "test": [],
}


TRAIN_COUNTS = ["".join(PROTEINS["train"]).count(token) for token in TOKEN_IDS]
SUMMARY = SplitSummary(5, 5, 256, 76, TRAIN_COUNTS, "", "")


def write(folder: Path) -> Path:
    with StoreWriter(folder) as writer:
        for split, sequences in PROTEINS.items():
            for sequence in sequences:
                writer.add(split, encode(sequence))
        return writer.finish({"source": "inline", "seed": 7})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


def edit_manifest(folder: Path, *keys: str, value: object) -> None:
    """Set one key of a manifest, or remove it if `value` is None."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest
    for key in keys[:-1]:
        entry = entry[key]
    if value is None:
        del entry[keys[-1]]
    else:
        entry[keys[-1]] = value
    path.write_text(json.dumps(manifest))


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_store_round_trips_its_sequences(folder: Path) -> None:
    store = ProteinStore.open(folder)
    for name, sequences in PROTEINS.items():
        split = store.split(name)
        assert len(split) == len(sequences)
        assert [decode(split[i]) for i in range(len(split))] == sequences
        assert split.lengths.dtype == np.int32
        assert split.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert split.residues == sum(map(len, sequences))
    store.verify()


def test_manifest_describes_the_store(folder: Path) -> None:
    manifest = ProteinStore.open(folder).manifest
    assert manifest["format_version"] == 2
    assert manifest["package_version"] == __version__
    assert (manifest["source"], manifest["seed"]) == ("inline", 7)
    summary = manifest["splits"]["train"]
    assert (summary["sequences"], summary["residues"], summary["longest"]) == (5, 256, 76)
    assert manifest["splits"]["test"]["longest"] == 0


def test_megatron_reads_the_same_sequences(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name in ("train", "validation"):  # Megatron cannot map an empty file
        theirs = IndexedDataset(str(folder / name))
        ours = ProteinStore.open(folder).split(name)
        assert len(theirs) == len(ours)
        assert all(np.array_equal(theirs[i], ours[i]) for i in range(len(ours)))
        assert theirs[0].dtype == ours[0].dtype == np.uint8
        assert theirs.document_indices.tolist() == list(range(len(ours) + 1))


def test_split_written_by_megatron_can_be_read(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint8)
    for sequence in PROTEINS["train"]:
        builder.add_document(encode(sequence), [len(sequence)])
    builder.finalize(str(tmp_path / "train.idx"))
    split = SequenceSplit(tmp_path / "train", SUMMARY)
    assert [decode(split[i]) for i in range(5)] == PROTEINS["train"]


def test_index_written_in_several_blocks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block = write(tmp_path / "one")
    monkeypatch.setattr("bionemo_esm.data.store._INDEX_BLOCK", 2)
    many_blocks = write(tmp_path / "many")
    assert (one_block / "train.idx").read_bytes() == (many_blocks / "train.idx").read_bytes()


def test_add_many_equals_repeated_add(tmp_path: Path, folder: Path) -> None:
    with StoreWriter(tmp_path / "many") as writer:
        for split, sequences in PROTEINS.items():
            writer.add_many(split, encode("".join(sequences)), [len(sequence) for sequence in sequences])
        writer.finish({"source": "inline", "seed": 7})
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "many" / file.name).read_bytes() == file.read_bytes()


def test_gather_joins_windows_in_the_requested_order(folder: Path) -> None:
    train = PROTEINS["train"]
    split = ProteinStore.open(folder).split("train")
    windows = [(3, 0, 58), (0, 10, 5), (4, 20, 0), (3, 57, 1), (0, 10, 5)]
    gathered = split.gather(*(np.array(column) for column in zip(*windows, strict=True)))
    assert decode(gathered) == "".join(train[i][start : start + length] for i, start, length in windows)
    assert gathered.dtype == np.uint8
    assert gathered.flags.writeable
    assert split.gather([], [], []).size == 0


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((5, 0, 1), "which has 5"),
        ((-1, 0, 1), "which has 5"),
        ((4, 0, 21), r"21 residues from 0 of sequence 4 of .*train, which has 20"),
        ((4, 20, 1), "1 residues from 20 of"),
        ((4, -1, 1), "1 residues from -1 of"),
        ((4, 2, -1), "-1 residues from 2 of"),
        ((4, 2**63 - 1, 1), "of sequence 4"),
    ],
)
def test_gather_rejects_windows_outside_their_sequence(
    folder: Path, window: tuple[int, int, int], message: str
) -> None:
    split = ProteinStore.open(folder).split("train")
    sequences, starts, lengths = (np.array([0, value]) for value in window)
    lengths[0] = 5
    with pytest.raises(IndexError, match=message):
        split.gather(sequences, starts, lengths)


@pytest.mark.parametrize("arrays", [([0, 1], [0], [5]), ([[0, 1]], [[0, 0]], [[5, 5]]), (0, 0, 5)])
def test_gather_rejects_arrays_of_different_shapes(
    folder: Path, arrays: tuple[ArrayLike, ArrayLike, ArrayLike]
) -> None:
    with pytest.raises(ValueError, match="three 1-D arrays alike"):
        ProteinStore.open(folder).split("train").gather(*arrays)


def test_empty_split_can_be_used(folder: Path) -> None:
    split = ProteinStore.open(folder).split("test")
    assert (len(split), split.residues, split.lengths.size) == (0, 0, 0)
    assert split.gather([], [], []).size == 0
    assert split.residue_counts().tolist() == [0] * 33
    with pytest.raises(IndexError):
        split[0]


def test_index_outside_the_split_raises_index_error(folder: Path) -> None:
    split = ProteinStore.open(folder).split("validation")
    assert decode(split[-1]) == PROTEINS["validation"][-1]
    for index in (2, -3):
        with pytest.raises(IndexError, match="which has 2"):
            split[index]


def test_sequences_and_lengths_are_read_only(folder: Path) -> None:
    split = ProteinStore.open(folder).split("train")
    for view in (split[0], split.lengths):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1


def test_residue_counts_equal_those_of_the_sequences(folder: Path) -> None:
    counts = ProteinStore.open(folder).split("train").residue_counts()
    text = "".join(PROTEINS["train"])
    assert counts.dtype == np.int64
    assert counts.tolist() == [text.count(token) for token in TOKEN_IDS]


def test_pickled_split_maps_its_files_again(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder.parent)
    contents = [
        pickle.dumps(ProteinStore.open("store").split("train")),
        pickle.dumps(SequenceSplit(Path("store/train"), SUMMARY)),
    ]
    monkeypatch.chdir(tmp_path.parent)  # a worker may have another working directory
    for content in contents:
        assert len(content) < 500
        assert decode(pickle.loads(content)[1]) == PROTEINS["train"][1]


# Damaged stores


def test_missing_folder_or_manifest_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreError, match=r"absent: no such folder; build a store"):
        ProteinStore.open(tmp_path / "absent")
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json: no manifest, so this is no finished store"):
        ProteinStore.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds a JSON list"), ("\xff", "is not JSON"), ("{}", "format_version is None")],
)
def test_invalid_manifest_is_rejected(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=rf"manifest\.json: {message}"):
        ProteinStore.open(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format_version",), 1, "format_version is 1, this release reads 2"),
        (("splits",), None, r"splits\.train is missing"),
        (("splits", "test"), None, r"splits\.test is missing"),
        (("splits", "train", "sequences"), "5", r"splits\.train\.sequences is '5'"),
        (("splits", "train", "residues"), -1, r"splits\.train\.residues is -1"),
        (("splits", "train", "longest"), True, r"splits\.train\.longest is True"),
        (("splits", "train", "residue_counts"), [1, 2], r"splits\.train\.residue_counts is \[1, 2\]"),
        (("splits", "train", "clusters"), 4, r"train\.idx: has 142 bytes, by the manifest 134"),
        (("splits", "train", "idx_sha256"), None, r"splits\.train\.idx_sha256 is None"),
        (("splits", "train", "sequences"), 6, r"train\.idx: has 142 bytes, by the manifest 154"),
        (("splits", "train", "residues"), 255, r"train\.bin: has 256 bytes, by the manifest 255"),
        (("splits", "train", "sequences"), 2**70, r"train\.idx: has 142 bytes"),
    ],
)
def test_edited_manifest_is_rejected(folder: Path, keys: tuple[str, ...], value: object, message: str) -> None:
    edit_manifest(folder, *keys, value=value)
    with pytest.raises(StoreError, match=message):
        ProteinStore.open(folder)


@pytest.mark.parametrize("file", [f"{name}.{suffix}" for name in SPLITS for suffix in ("bin", "idx")])
def test_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(StoreError, match=rf"{file}: the file is missing"):
        ProteinStore.open(folder)


@pytest.mark.parametrize("file", ["train.bin", "train.idx", "test.idx"])
def test_truncated_file_is_rejected_on_opening(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"{file}: has \d+ bytes, by the manifest \d+"):
        ProteinStore.open(folder)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "begins with b'LMIDIDX"),
        (9, "index version 0"),
        (17, "dtype code 0"),
        (18, "holds 4 sequences"),
        (26, "in 6 documents"),
        (54 + 4 * 8, "last sequence does not end where"),  # the lowest byte of the last offset
        (54 + 5 * 8 + 5 * 8, "last cluster does not end with"),
    ],
)
def test_wrong_index_header_is_rejected_on_opening(folder: Path, at: int, message: str) -> None:
    flip_bit(folder / "train.idx", at)
    with pytest.raises(StoreError, match=message):
        ProteinStore.open(folder)


@pytest.mark.parametrize(("file", "at"), [("train.bin", 100), ("train.idx", 34), ("validation.idx", 60)])
def test_verify_finds_a_flipped_bit(folder: Path, file: str, at: int) -> None:
    flip_bit(folder / file, at)
    store = ProteinStore.open(folder)
    with pytest.raises(StoreError, match=rf"{file}: does not match splits\.\w+\.\w+_sha256"):
        store.verify()


def test_offset_beyond_the_file_is_not_followed(folder: Path) -> None:
    flip_bit(folder / "train.idx", 54 + 1)  # moves the first sequence by 256 residues, the size of the whole file
    with pytest.raises(StoreError, match="lies outside"):
        ProteinStore.open(folder).split("train").gather([0], [0], [76])


def test_token_id_outside_the_alphabet_is_rejected_when_read(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[3] = 200
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(StoreError, match="token id 200"):
        ProteinStore.open(folder).split("train").gather([0], [0], [76])


def test_unknown_split_name_is_rejected(folder: Path) -> None:
    with pytest.raises(StoreError, match="no split 'valid'; choose one of train, validation, test"):
        ProteinStore.open(folder).split("valid")


# Writing


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with StoreWriter(tmp_path / "store") as writer:
            writer.add("train", encode(PROTEINS["train"][0]))
            assert writer.partial.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_build_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.add("train", encode(PROTEINS["train"][0]))
    assert list(tmp_path.iterdir()) == []


def test_partly_written_store_is_not_opened(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.add("train", encode(PROTEINS["train"][0]))
        as_after_a_power_failure = shutil.copytree(writer.partial, tmp_path / "store")
    with pytest.raises(StoreError, match="no finished store"):
        ProteinStore.open(as_after_a_power_failure)


def test_existing_store_is_not_overwritten(folder: Path) -> None:
    before = (folder / "train.bin").read_bytes()
    with pytest.raises(StoreError, match="store: exists already; open it, remove it, or choose another"):
        write(folder)
    assert (folder / "train.bin").read_bytes() == before


def test_second_concurrent_builder_is_rejected_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StoreWriter(folder) as first:
        first.add("train", encode(PROTEINS["train"][0]))
        with pytest.raises(StoreError, match=r"store: another process is building it.*wait for it"):
            write(folder)
        first.finish({})
        with pytest.raises(StoreError, match="exists already"):
            write(folder)
    store = ProteinStore.open(folder)
    store.verify()
    assert decode(store.split("train")[0]) == PROTEINS["train"][0]
    assert list(tmp_path.iterdir()) == [folder]


def test_store_that_appears_during_a_build_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StoreWriter(folder) as writer:
        shutil.copytree(write(tmp_path / "copied"), folder)
        with pytest.raises(StoreError, match="another builder finished it first"):
            writer.finish({})
    ProteinStore.open(folder).verify()


def test_leftovers_of_a_killed_builder_are_replaced(tmp_path: Path) -> None:
    code = (
        "import os, sys; from bionemo_esm.alphabet import encode\n"
        "from bionemo_esm.data.store import StoreWriter\n"
        "with StoreWriter(sys.argv[1]) as writer:\n"
        "    writer.add('train', encode('MKV')); os.kill(os.getpid(), 9)"
    )
    folder = tmp_path / "store"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
    ProteinStore.open(write(folder)).verify()
    assert list(tmp_path.iterdir()) == [folder]


def test_clusters_are_documents_in_megatron(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with StoreWriter(tmp_path / "store") as writer:
        lengths = [len(sequence) for sequence in PROTEINS["train"]]
        writer.add_many("train", encode("".join(PROTEINS["train"])), lengths, cluster_sizes=[2, 3])
        split = ProteinStore.open(writer.finish({})).split("train")
    assert IndexedDataset(str(split.prefix)).document_indices.tolist() == [0, 2, 5]
    assert (len(split), split.num_clusters) == (5, 2)
    assert split.cluster_starts.tolist() == [0, 2, 5]


def test_without_clusters_each_sequence_is_its_own_cluster(folder: Path) -> None:
    split = ProteinStore.open(folder).split("train")
    assert split.cluster_starts.tolist() == list(range(6))
    assert split.num_clusters == len(split) == 5


def test_store_has_the_permissions_of_a_new_folder(folder: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert folder.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize(
    ("split", "token_ids", "lengths", "message"),
    [
        ("valid", encode("MK"), [2], "no split 'valid'"),
        ("train", encode("MK").astype(np.int64), [2], "1-D uint8"),
        ("train", encode("MK").reshape(1, 2), [2], "1-D uint8"),
        ("train", encode("MK"), [1], "the lengths sum to 1, but there are 2"),
        ("train", encode("MK"), [2, 0], "at least one residue"),
        ("train", np.array([20, 33], dtype=np.uint8), [2], r"0\.\.32, got 33"),
    ],
)
def test_invalid_tokens_or_lengths_are_rejected(
    tmp_path: Path, split: str, token_ids: NDArray[np.uint8], lengths: list[int], message: str
) -> None:
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(ValueError, match=message):
        writer.add_many(split, token_ids, lengths)


def test_manifest_fields_set_by_the_writer_cannot_be_overridden(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(ValueError, match="sets splits itself"):
        writer.finish({"splits": {}})


def test_sampled_lengths_are_spread_over_the_whole_split(
    monkeypatch: pytest.MonkeyPatch, sample_store: ProteinStore
) -> None:
    train = sample_store.split("train")
    assert train.some_lengths() is train.lengths
    monkeypatch.setattr("bionemo_esm.data.store._BLOCKS", 5)
    monkeypatch.setattr("bionemo_esm.data.store._BLOCK", 20)
    some = train.some_lengths()
    np.testing.assert_array_equal(some[:20], train.lengths[:20])
    np.testing.assert_array_equal(some[40:60], train.lengths[1290:1310])
    np.testing.assert_array_equal(some[-20:], train.lengths[-20:])
    assert len(some) == 100
