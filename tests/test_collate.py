"""Tests of the compiled collate: it equals the NumPy reference bit for bit and refuses damaged stores."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from bionemo_esm.alphabet import TOKEN_IDS, VOCABULARY_SIZE, encode
from bionemo_esm.data import collate, dataloader, masking
from bionemo_esm.data.collate import PackedBatch, SampleReader, pack
from bionemo_esm.data.dataloader import BatchPlan, EpochPermutation, TrainingBatches
from bionemo_esm.data.hashing import UInt64Array, derive_key, mix, uniform_integers
from bionemo_esm.data.masking import MaskingPolicy
from bionemo_esm.data.store import ProteinStore, SequenceSplit, StoreError, StoreWriter
from reference_masking import crop_windows, draw_members, mask_by_formula, member_words, sample_keys

POLICIES = (
    MaskingPolicy(),
    MaskingPolicy().for_evaluation(),
    MaskingPolicy(mlm_probability=0.4, mask_fraction=0.5, random_fraction=0.3),
    MaskingPolicy(mlm_probability=1.0, mask_fraction=0.0, random_fraction=1.0),
    MaskingPolicy(mlm_probability=1.0, mask_fraction=0.0, random_fraction=0.0),
    MaskingPolicy(mlm_probability=1e-9),
)


def by_formula(reader: SampleReader, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> PackedBatch:
    """Return the expected result of `collate`, computed by the NumPy reference."""
    keys = sample_keys(reader.seed, epochs, samples)
    sequences = draw_members(reader.split, samples, member_words(keys))
    starts, kept = crop_windows(reader.split.lengths[sequences].astype(np.int64), reader.max_tokens - 2, keys)
    residues = reader.split.gather(sequences, starts, kept)
    return pack(residues, kept, mask_by_formula(residues, kept, keys, reader.policy))


def assert_same(batch: PackedBatch, expected: PackedBatch) -> None:
    for field in fields(PackedBatch):
        ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        else:
            assert type(ours) is type(theirs), field.name
            assert ours == theirs, field.name


def feistel(values: UInt64Array, keys: UInt64Array, bits: int) -> UInt64Array:
    """Return a keyed permutation of [0, 2**bits) by eight Feistel rounds."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_number in range(8):
        scrambled = mix(keys ^ mix(right + np.uint64(round_number << 56)))
        left, right = right, left ^ (scrambled & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def order_by_formula(size: int, seed: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sample at each position of the epoch permutation, by cycle walking with the key of its epoch."""
    epochs, places = np.divmod(positions, size)
    keys, values = derive_key(seed, 1, epochs), places.astype(np.uint64)
    outside = np.arange(len(values))
    while outside.size:
        values[outside] = feistel(values[outside], keys[outside], max(2, (size - 1).bit_length()))
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


@pytest.fixture(scope="module")
def clustered(sample_store: ProteinStore, tmp_path_factory: pytest.TempPathFactory) -> SequenceSplit:
    """Return 200 proteins in clusters of 1, 2, 3, 4, 1, 2, 3, 4..."""
    train = sample_store.split("train")
    with StoreWriter(tmp_path_factory.mktemp("clustered") / "store") as writer:
        tokens = np.concatenate([train[i] for i in range(200)])
        writer.add_many("train", tokens, train.lengths[:200], cluster_sizes=[1, 2, 3, 4] * 20)
        return ProteinStore.open(writer.finish({})).split("train")


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Return a store of three proteins for tests that damage it."""
    with StoreWriter(tmp_path / "store") as writer:
        writer.add_many("train", encode("MKTAYIAKQR"), [3, 4, 3])
        return writer.finish({})


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("max_tokens", [3, 66, 130, 512, 1026])
def test_batches_equal_the_reference(tiny_split: SequenceSplit, max_tokens: int, policy: MaskingPolicy) -> None:
    """`tiny_split` has proteins of 1 to 1,000 residues, all letters, and lengths near 64 and 512."""
    samples = np.random.default_rng(0).permutation(np.arange(3 * len(tiny_split)) % len(tiny_split))
    reader = SampleReader(tiny_split, max_tokens, policy, seed=5)
    epochs = np.arange(len(samples), dtype=np.int64) ** 2
    assert_same(reader.collate(epochs, samples), by_formula(reader, epochs, samples))


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_whole_split_equals_the_reference(sample_store: ProteinStore, seed: int) -> None:
    reader = SampleReader(sample_store.split("train"), 512, MaskingPolicy(), seed)
    epochs, samples = EpochPermutation(reader.num_samples, seed).samples(np.arange(7, 7 + reader.num_samples))
    assert_same(reader.collate(epochs, samples), by_formula(reader, epochs, samples))


@pytest.mark.parametrize("letter", ["L", "C", *"XBUZO", "<unk>"])
def test_every_letter_is_replaced_as_in_the_reference(tmp_path: Path, letter: str) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.add("train", np.full(5000, TOKEN_IDS[letter], dtype=np.uint8))
        split = ProteinStore.open(writer.finish({})).split("train")
    reader = SampleReader(
        split, 6000, MaskingPolicy(mlm_probability=0.9, mask_fraction=0.1, random_fraction=0.8), seed=3
    )
    one = np.zeros(1, dtype=np.int64)
    batch = reader.collate(one, one)
    assert_same(batch, by_formula(reader, one, one))
    assert (batch.tokens != batch.tokens[1]).sum() > 3000


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 510])
def test_lengths_near_a_machine_word_equal_the_reference(sample_store: ProteinStore, length: int) -> None:
    reader = SampleReader(sample_store.split("train"), length + 2, MaskingPolicy(mlm_probability=0.5), seed=9)
    samples = np.flatnonzero(reader.split.lengths >= length)
    epochs = np.full_like(samples, 4)
    assert_same(reader.collate(epochs, samples), by_formula(reader, epochs, samples))


def test_cluster_members_equal_those_of_the_reference(clustered: SequenceSplit) -> None:
    reader = SampleReader(clustered, 258, MaskingPolicy(), seed=11)
    epochs, samples = EpochPermutation(reader.num_samples, 1).samples(np.arange(10 * reader.num_samples))
    expected = by_formula(reader, epochs, samples)
    assert_same(reader.collate(epochs, samples), expected)
    np.testing.assert_array_equal(reader.token_counts(epochs, samples), np.diff(expected.cu_seqlens.numpy()))


def test_token_counts_equal_the_lengths_without_building_the_batch(sample_store: ProteinStore) -> None:
    reader = SampleReader(sample_store.split("train"), 200, MaskingPolicy(), seed=1)
    samples = np.arange(reader.num_samples)
    lengths = reader.token_counts(np.zeros_like(samples), samples)
    np.testing.assert_array_equal(lengths, np.minimum(reader.split.lengths + 2, 200))
    assert lengths.dtype == np.int64


@pytest.mark.parametrize("max_tokens", [2, 512])
def test_empty_batches_and_empty_sequences_are_supported(tiny_split: SequenceSplit, max_tokens: int) -> None:
    reader = SampleReader(tiny_split, max_tokens, MaskingPolicy(), seed=1)
    for count in (0, 3):
        samples = np.arange(count)
        assert_same(reader.collate(samples, samples), by_formula(reader, samples, samples))


def test_sample_indices_of_any_integer_type_and_stride_are_accepted(tiny_split: SequenceSplit) -> None:
    reader = SampleReader(tiny_split, 512, MaskingPolicy(), seed=1)
    samples = np.arange(30)
    expected = reader.collate(samples[::3], samples[::3])
    assert_same(reader.collate(samples[::3].astype(np.int32), samples[::3].copy()), expected)


def test_row_with_more_targets_than_the_expected_capacity_is_correct(
    monkeypatch: pytest.MonkeyPatch, tiny_split: SequenceSplit
) -> None:
    reader = SampleReader(tiny_split, 512, MaskingPolicy(mlm_probability=0.6), seed=1)
    samples = np.arange(len(tiny_split))
    monkeypatch.setattr(MaskingPolicy, "capacity", lambda self, tokens, longest: longest)
    assert_same(reader.collate(samples, samples), by_formula(reader, samples, samples))


def test_batch_is_one_block_of_memory_with_little_slack(sample_store: ProteinStore) -> None:
    """Collate writes into one block without a later copy. A loader worker transfers one block."""
    reader = SampleReader(sample_store.split("train"), 512, MaskingPolicy(), seed=1)
    samples = np.arange(370)
    batch = reader.collate(samples, samples)
    parts = batch.tokens, batch.positions, batch.target_index, batch.targets
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    needed = sum(part.numel() * part.element_size() for part in parts)
    assert needed <= batch.tokens.untyped_storage().nbytes() < 1.04 * needed


def test_batches_share_no_memory_with_each_other_or_the_store(tiny_split: SequenceSplit) -> None:
    reader = SampleReader(tiny_split, 512, MaskingPolicy(), seed=1)
    samples = np.arange(len(tiny_split))
    first = reader.collate(samples, samples)
    for part in (first.tokens, first.positions, first.cu_seqlens, first.target_index, first.targets):
        part.zero_()
    assert_same(reader.collate(samples, samples), by_formula(reader, samples, samples))


def test_compiled_loops_release_the_gil() -> None:
    loops = (collate.measure, collate.crop, collate.fill, masking.mask_row, dataloader._permute)
    assert all(loop.targetoptions["nogil"] for loop in loops)  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_produce_the_same_batches(tiny_split: SequenceSplit, start: str) -> None:
    stream = TrainingBatches(SampleReader(tiny_split, 512, MaskingPolicy(), seed=1), BatchPlan(8, 8))
    loader = DataLoader(stream, sampler=[0, 8, 16], batch_size=None, num_workers=1, multiprocessing_context=start)
    for consumed, share in zip((0, 8, 16), loader, strict=True):
        assert_same(share.micro_batches[0], stream[consumed].micro_batches[0])


@pytest.mark.parametrize("sample", [-1, 3, 2**40])
def test_sample_outside_the_split_is_refused(spoiled: Path, sample: int) -> None:
    split = ProteinStore.open(spoiled).split("train")
    reader = SampleReader(split, 512, MaskingPolicy(), seed=1)
    for ask in (reader.collate, reader.token_counts):
        with pytest.raises(IndexError, match=rf"sample {sample} of .*train, which has 3"):
            ask(np.zeros(2, dtype=np.int64), np.array([0, sample]))


def test_cluster_outside_the_split_is_refused(clustered: SequenceSplit) -> None:
    reader = SampleReader(clustered, 512, MaskingPolicy(), seed=1)
    for ask, sample in itertools.product((reader.collate, reader.token_counts), (-1, 80)):
        with pytest.raises(IndexError, match=rf"sample {sample} of .*train, which has 80"):
            ask(np.zeros(1, dtype=np.int64), np.array([sample]))


@pytest.mark.parametrize("token", [VOCABULARY_SIZE, 200, 255])
def test_token_id_outside_the_alphabet_is_refused(spoiled: Path, token: int) -> None:
    content = bytearray((spoiled / "train.bin").read_bytes())
    content[5] = token
    (spoiled / "train.bin").write_bytes(content)
    reader = SampleReader(ProteinStore.open(spoiled).split("train"), 512, MaskingPolicy(), seed=1)
    samples = np.arange(3)
    with pytest.raises(StoreError, match=rf"train\.bin: holds the token id {token}"):
        reader.collate(samples, samples)
    assert reader.collate(samples[[0, 2]], samples[[0, 2]]).residues == 6


@pytest.mark.parametrize("offset", [-1, 8, 2**62])
def test_sequence_outside_the_file_is_refused(spoiled: Path, offset: int) -> None:
    index = bytearray((spoiled / "train.idx").read_bytes())
    index[34 + 3 * 4 : 34 + 3 * 4 + 8] = offset.to_bytes(8, "little", signed=True)  # offset of the first sequence
    (spoiled / "train.idx").write_bytes(index)
    reader = SampleReader(ProteinStore.open(spoiled).split("train"), 512, MaskingPolicy(), seed=1)
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(StoreError, match=r"train\.idx: a sequence lies outside the \.bin file"):
        reader.collate(one, one)


def test_negative_length_is_refused(spoiled: Path) -> None:
    index = bytearray((spoiled / "train.idx").read_bytes())
    index[34:38] = (-4).to_bytes(4, "little", signed=True)
    (spoiled / "train.idx").write_bytes(index)
    reader = SampleReader(ProteinStore.open(spoiled).split("train"), 512, MaskingPolicy(), seed=1)
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(IndexError, match=r"sequence 0 of .*train, which has -4"):
        reader.collate(one, one)


@pytest.mark.parametrize("size", [1, 2, 3, 37, 1024, 1025, 52_000_000, 2**48])
def test_epoch_permutation_equals_the_formula(size: int) -> None:
    for seed, first in itertools.product((0, 7, 2**62), (0, 5 * size - 3 if size > 3 else 0, 2**50)):
        positions = np.arange(first, first + 500, dtype=np.int64)
        _, samples = EpochPermutation(size, seed).samples(positions)
        np.testing.assert_array_equal(samples, order_by_formula(size, seed, positions))


def test_member_draw_equals_the_formula() -> None:
    keys = sample_keys(1, np.zeros(1000, dtype=np.int64), np.arange(1000))
    for members in (2, 3, 1000):
        drawn = [collate.draw_member(10, 10 + members, key) for key in keys]
        np.testing.assert_array_equal(drawn, 10 + uniform_integers(member_words(keys), members))
