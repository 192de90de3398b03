"""Tests of the cleaning policy and its counts, of threads and sources, and of disk errors."""

from __future__ import annotations

import errno
import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zstandard

from bionemo_esm.alphabet import decode
from bionemo_esm.data import fasta, kernels
from bionemo_esm.data import fasta as sources
from bionemo_esm.data.fasta import FastaError, read_fasta
from bionemo_esm.data.preprocess import BuildPolicy, CleaningPolicy, build_store
from bionemo_esm.data.store import SPLITS, ProteinStore, StoreError
from conftest import SAMPLE
from errors import refused

P1 = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
P2 = "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN"
P3 = "MTYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
ALL_TO_TRAIN = {"validation_sequences": 0, "test_sequences": 0}


def build(folder: Path, text: str, **policy: object) -> ProteinStore:
    (folder / "in.fasta").write_text(text)
    return build_store(folder / "in.fasta", folder / "store", BuildPolicy(**{**ALL_TO_TRAIN, **policy}))  # type: ignore[arg-type]


def texts(store: ProteinStore, name: str = "train") -> list[str]:
    split = store.split(name)
    return [decode(split[index]) for index in range(len(split))]


IRREGULAR = {
    # policy key: (record, result for `x`, `remove`, `truncate` or `keep`, counter if dropped, problem in the error)
    "unknown_letters": ("MKJV1", {"x": "MKXVX"}, "dropped_unknown_letters", "a letter outside the alphabet"),
    "internal_stops": ("MK*VV*", {"x": "MKXVV"}, "dropped_internal_stop", "a '*' amid the residues"),
    "gaps": ("MK-V.V", {"remove": "MKVV"}, "dropped_gaps", "a gap symbol"),
    "long_sequences": ("M" * 100, {"truncate": "M" * 80, "keep": "M" * 100}, "dropped_too_long", "over 80 residues"),
}


@pytest.mark.parametrize("key", IRREGULAR)
def test_irregular_records_are_repaired_dropped_or_refused_by_the_policy(tmp_path: Path, key: str) -> None:
    record, mended, counter, problem = IRREGULAR[key]
    text = f">first\n{P1}\n>odd one\n{record}\n>last\n{P2}\n"
    for options in get_args(CleaningPolicy.model_fields[key].annotation):
        folder = tmp_path / options
        folder.mkdir()
        if options == "error":
            with pytest.raises(
                FastaError, match=rf"in\.fasta, record 2, byte {text.find('>odd')}: has {re.escape(problem)}"
            ):
                build(folder, text, max_residues=80, **{key: options})
            assert [path.name for path in folder.iterdir()] == ["in.fasta"]
            continue
        store = build(folder, text, max_residues=80, **{key: options})
        assert texts(store) == [P1, *([mended[options]] if options in mended else []), P2]
        assert store.manifest["counts"][counter] == (options == "drop")
        assert store.manifest["policy"][key] == options


def test_repeated_identifiers_are_counted_dropped_or_refused(tmp_path: Path) -> None:
    text = f">sp|P1|X one\n{P1}\n>b\n{P2}\n>sp|P1|X two\n{P3}\n>\nMKV\n>\nMKL\n"
    for options, expected in (("keep", 5), ("drop", 4)):
        (tmp_path / options).mkdir()
        store = build(tmp_path / options, text, duplicate_ids=options)
        assert len(texts(store)) == expected
        assert store.manifest["counts"]["duplicate_ids"] == 1  # records without an identifier are not duplicates
        assert store.manifest["counts"]["dropped_duplicate_id"] == 5 - expected
    with pytest.raises(FastaError, match=r"record 3, byte \d+: has an identifier that an earlier record has"):
        build(tmp_path, text, duplicate_ids="error")


def test_repeated_identifiers_are_found_across_files(tmp_path: Path) -> None:
    for name, sequence in (("a", P1), ("b", P2)):
        (tmp_path / f"{name}.fasta").write_text(f">same\n{sequence}\n>{name}\n{P3[:-1]}{name}\n")
    paths = [tmp_path / "a.fasta", tmp_path / "b.fasta"]
    store = build_store(paths, tmp_path / "store", BuildPolicy(duplicate_ids="drop", **ALL_TO_TRAIN))
    assert texts(store) == [P1, f"{P3[:-1]}A", f"{P3[:-1]}B"]
    assert [source["file"] for source in store.manifest["source"]] == ["a.fasta", "b.fasta"]


def test_kept_repeated_sequences_are_never_in_two_splits(tmp_path: Path) -> None:
    sample = [record.sequence.decode() for record in read_fasta(SAMPLE / "test.fasta.gz")]
    text = "".join(f">{number}\n{sequence}\n" for number, sequence in enumerate([*sample, *sample[::2], *sample[::5]]))
    policy = {"validation_sequences": 30, "test_sequences": 40, "duplicate_sequences": "keep"}
    store = build(tmp_path, text, **policy)
    split = {name: texts(store, name) for name in SPLITS}
    assert (len(split["validation"]), len(split["test"])) == (30, 40)
    held_out = {*split["validation"], *split["test"]}
    assert len(held_out) == 70
    assert not held_out & set(split["train"])
    assert {*held_out, *split["train"]} == set(sample)
    copies = [sequence for sequence in [*sample, *sample[::2], *sample[::5]] if sequence not in held_out]
    assert sorted(split["train"]) == sorted(copies)
    counts = store.manifest["counts"]
    assert counts["records_read"] == 340 == counts["records_kept"] + counts["dropped_duplicate"]
    assert counts["duplicate_sequences"] == 140


@pytest.mark.parametrize("key", [key for key in CleaningPolicy.model_fields if key != "max_residues"])
def test_unknown_policy_value_is_refused(key: str) -> None:
    with refused("config.value", f"{key} must be one of ", "not 'ignore'"):
        BuildPolicy(**{key: "ignore"})  # type: ignore[arg-type]


# --- sources, threads and blocks --------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the block size to 20 kB, so that a small file has many blocks."""
    monkeypatch.setattr(sources, "_UNPACKED_BYTES", 5_000)
    monkeypatch.setattr(fasta, "_BLOCK_BYTES", 20_000)


def test_threads_and_compression_do_not_change_the_store(tmp_path: Path, small_blocks: None) -> None:
    packed = (SAMPLE / "train.fasta.gz").read_bytes()
    text = gzip.decompress(packed)
    hashes = set()
    for threads, content in ((1, packed), (2, text), (5, text), (3, zstandard.compress(text))):
        path = tmp_path / f"in{threads}"
        path.write_bytes(content)
        output = tmp_path / f"out{threads}{len(content)}"
        manifest = build_store(path, output, BuildPolicy(), threads=threads).manifest
        hashes.add(str(manifest["splits"]) + str(manifest["counts"]))
    assert len(hashes) == 1


def test_store_from_standard_input_equals_the_store_from_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from bionemo_esm.data.preprocess import BuildPolicy, build_store\n"
        "build_store('-', sys.argv[1], BuildPolicy())"
    )
    packed = (SAMPLE / "test.fasta.gz").read_bytes()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "piped")], input=packed, check=True)
    piped = ProteinStore.open(tmp_path / "piped")
    direct = build_store(SAMPLE / "test.fasta.gz", tmp_path / "direct", BuildPolicy())
    assert piped.manifest["splits"] == direct.manifest["splits"]
    assert piped.manifest["source"][0] == direct.manifest["source"][0] | {"file": "standard input"}


@pytest.mark.parametrize(("validation", "test"), [(5, 7), (None, 3), (None, None), (600, 900)])
def test_streaming_split_equals_the_sort_of_all_digests(
    tmp_path: Path, small_blocks: None, validation: int | None, test: int | None
) -> None:
    """Held-out sequences have the smallest digests. The streaming split selects them from candidates."""
    policy = BuildPolicy(seed=3, validation_sequences=validation, test_sequences=test)
    store = build_store(SAMPLE / "train.fasta.gz", tmp_path / "store", policy)
    text = gzip.decompress((SAMPLE / "train.fasta.gz").read_bytes())
    digests = np.empty((2_600, 2), dtype=np.uint64)
    fields, tokens = np.empty((2_600, kernels.FIELDS), dtype=np.int32), np.empty(len(text), dtype=np.uint8)
    content = np.frombuffer(text, dtype=np.uint8)
    words = kernels.words_of(content), kernels.words_of(tokens)
    kernels.parse(content, words[0], kernels.BYTE_CLASSES, 1024, policy.key, tokens, words[1], fields, digests)
    proteins = [record.sequence.decode() for record in read_fasta(SAMPLE / "train.fasta.gz")]
    by_digest = [proteins[record] for record in np.argsort(digests[:, 0])]
    first, second = policy.held_out(2_600, "")
    assert sorted(texts(store, "validation")) == sorted(by_digest[:first])
    assert sorted(texts(store, "test")) == sorted(by_digest[first : first + second])
    assert sorted(texts(store)) == sorted(by_digest[first + second :])


def test_held_out_candidates_are_few_and_always_sufficient() -> None:
    """The bound exceeds the final share and decreases, so most of a large set goes to train at once."""
    policy = BuildPolicy(validation_sequences=5_000, test_sequences=1_000_000)
    seen = np.array([10**6, 10**7, 54 * 10**6])
    bound = policy.held_out_bound(seen)
    assert (np.diff(bound) < 0).all()
    assert (bound * seen > 1_005_000).all()
    assert bound[-1] < 1.02 * 1_005_000 / seen[-1]
    rng = np.random.default_rng(0)
    for _ in range(50):  # the smallest of uniform digests were below the bound at their position
        digests = rng.random(20_000)
        met = digests < BuildPolicy(validation_sequences=3, test_sequences=9).held_out_bound(np.arange(1, 20_001))
        assert np.isin(np.argsort(digests)[:12], np.flatnonzero(met)).all()


# --- disk -------------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 400 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_root
def test_too_small_disk_is_found_before_the_work(small_disk: Path) -> None:
    with pytest.raises(StoreError, match=r"store: the store will take about 0\.0 GB, but 0\.0 GB are free on its disk"):
        build_store(SAMPLE / "train.fasta.gz", small_disk / "store", BuildPolicy())
    assert list(small_disk.iterdir()) == []


@needs_root
def test_disk_that_fills_up_leaves_no_files(small_disk: Path, small_blocks: None) -> None:
    """Input from a pipe, whose size is unknown in advance."""
    code = (
        "import sys; from bionemo_esm.data.preprocess import BuildPolicy, build_store\n"
        "build_store('-', sys.argv[1], BuildPolicy())"
    )
    command = [sys.executable, "-c", code, str(small_disk / "store")]
    done = subprocess.run(command, input=(SAMPLE / "train.fasta.gz").read_bytes(), capture_output=True, check=False)
    assert b"store: no space left on device; free some space or choose another output" in done.stderr
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EROFS, "read-only file system"), (errno.EACCES, "permission denied")]
)
def test_unwritable_output_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(StoreError, match=rf"store: {message}; choose an output"):
        build_store(SAMPLE / "test.fasta.gz", tmp_path / "store", BuildPolicy())


def test_parent_of_the_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose an output whose parent is a folder"):
        build_store(SAMPLE / "test.fasta.gz", tmp_path / "file" / "store", BuildPolicy())


# --- damaged input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b">bad \xe9\nMKV\n", r"record 201, byte \d+: the header is not UTF-8"),
        (b">bad\nMK\0V\n", r"record 201, byte \d+: a NUL byte"),
        (b">bad\nMK>V\n", r"record 201, byte \d+: a '>' amid a sequence line"),
    ],
)
def test_damage_after_many_records_is_located(tmp_path: Path, small_blocks: None, damage: bytes, message: str) -> None:
    good = gzip.decompress((SAMPLE / "validation.fasta.gz").read_bytes())
    (tmp_path / "in.fasta").write_bytes(good + damage + good)
    with pytest.raises(FastaError, match=message) as caught:
        build_store(tmp_path / "in.fasta", tmp_path / "store", BuildPolicy())
    offset = int(str(caught.value).split("byte ")[1].split(":")[0])
    assert len(good) <= offset < len(good) + len(damage)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_headers_in_other_scripts_are_accepted(tmp_path: Path) -> None:
    store = build(tmp_path, f">α-синуклеин\n{P1}\n>蛋白质\n{P2}\n")
    assert texts(store) == [P1, P2]


def test_truncated_gzip_is_located_and_leaves_no_files(tmp_path: Path, small_blocks: None) -> None:
    (tmp_path / "in.gz").write_bytes((SAMPLE / "train.fasta.gz").read_bytes()[:-50_000])
    with pytest.raises(FastaError, match=r"in\.gz, record \d{4}, byte \d+: the gzip stream is damaged"):
        build_store(tmp_path / "in.gz", tmp_path / "store", BuildPolicy())
    assert [path.name for path in tmp_path.iterdir()] == ["in.gz"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_damage_before_the_first_record_is_reported_as_damage(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "in").write_bytes(pack(b">a\n" + P1.encode())[:-30])
    with pytest.raises(FastaError, match=r"record 1, byte 0: the (gzip|zstd) stream is damaged"):
        build_store(tmp_path / "in", tmp_path / "store", BuildPolicy())


def test_endless_line_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 2**20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b">bomb\n" + b"A" * 50_000_000))
    with pytest.raises(FastaError, match="record 1, byte 0: the record is longer than 1 MiB"):
        build_store(tmp_path / "bomb.gz", tmp_path / "store", BuildPolicy())


def test_manifest_stores_the_whole_policy(tmp_path: Path) -> None:
    policy = BuildPolicy(max_residues=50, gaps="drop", seed=9, **ALL_TO_TRAIN)  # type: ignore[arg-type]
    store = build_store(SAMPLE / "test.fasta.gz", tmp_path / "store", policy)
    assert BuildPolicy(**store.manifest["policy"]) == policy
    assert store.manifest["policy"] == policy.model_dump()
