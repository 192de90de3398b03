"""Packing against a reference in plain Python; the model never sees padding."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from bionemo_esm.alphabet import CLS_ID, EOS_ID, PAD_ID
from bionemo_esm.data.collate import PackedBatch, pack, unpack
from bionemo_esm.data.masking import MaskedResidues, MaskingPolicy, mask_sequences
from bionemo_esm.data.store import ProteinStore, SequenceSplit
from reference_masking import sample_keys


class Case(NamedTuple):
    """True residues uint8 [residues], lengths int64 [n], and the masked residues."""

    residues: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    corruption: MaskedResidues


class Expected(NamedTuple):
    """The fields of a packed batch as plain lists."""

    tokens: list[int]
    positions: list[int]
    cu_seqlens: list[int]
    max_seqlen: int
    target_index: list[int]
    targets: list[int]


def slowly_packed(case: Case) -> Expected:
    """Return what `pack` should return, computed residue by residue."""
    expected = Expected([], [], [0], max(case.lengths.tolist(), default=-2) + 2, [], [])
    residue = 0
    for length in case.lengths.tolist():
        expected.tokens.append(CLS_ID)
        for _ in range(length):
            if case.corruption.chosen[residue]:
                expected.target_index.append(len(expected.tokens))
                expected.targets.append(int(case.residues[residue]))
            expected.tokens.append(int(case.corruption.tokens[residue]))
            residue += 1
        expected.tokens.append(EOS_ID)
        expected.positions.extend(range(length + 2))
        expected.cu_seqlens.append(len(expected.tokens))
    return expected


def corrupted_case(pieces: list[NDArray[np.uint8]], seed: int) -> Case:
    residues = np.concatenate([np.zeros(0, dtype=np.uint8), *pieces])
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    keys = sample_keys(seed, np.zeros_like(lengths), np.arange(len(lengths)))
    return Case(residues, lengths, mask_sequences(residues, lengths, keys, MaskingPolicy(mlm_probability=0.3)))


def random_case(split: SequenceSplit, seed: int) -> Case:
    """Up to 40 pieces of real proteins: lengths 1 and 510, and others up to 510, in random order."""
    random = np.random.default_rng(seed)
    lengths = np.append(random.integers(1, 511, random.integers(0, 38)), [1, 510])
    random.shuffle(lengths)
    long_enough = np.flatnonzero(split.lengths >= 510)
    return corrupted_case([split[int(random.choice(long_enough))][-length:] for length in lengths], seed)


def values(batch: PackedBatch) -> Expected:
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Expected(**{name: v.tolist() if isinstance(v, Tensor) else v for name, v in named.items()})


@pytest.fixture(scope="module")
def case(sample_store: ProteinStore) -> Case:
    return random_case(sample_store.split("train"), seed=0)


@pytest.fixture(scope="module")
def batch(case: Case) -> PackedBatch:
    return pack(*case)


@pytest.mark.parametrize("seed", range(8))
def test_packing_equals_the_reference(sample_store: ProteinStore, seed: int) -> None:
    case = random_case(sample_store.split("train"), seed)
    assert {1, 510} <= set(case.lengths.tolist())
    assert values(pack(*case)) == slowly_packed(case)


@pytest.mark.parametrize("lengths", [[1], [510], [1, 1, 1], [510, 1], [0, 4, 0], [0], []], ids=str)
def test_packing_equals_the_reference_at_edge_lengths(sample_store: ProteinStore, lengths: list[int]) -> None:
    train = sample_store.split("train")
    protein = train[int(train.lengths.argmax())]
    case = corrupted_case([protein[:length] for length in lengths], seed=3)
    assert values(pack(*case)) == slowly_packed(case)


def test_dtypes_match_the_input_of_the_encoder(batch: PackedBatch) -> None:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "max_seqlen"}
    wide = dict.fromkeys(("tokens", "positions", "target_index", "targets"), torch.int64)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {**wide, "cu_seqlens": torch.int32}
    assert type(batch.max_seqlen) is int


def test_lengths_of_any_integer_dtype_are_accepted(case: Case, batch: PackedBatch) -> None:
    """The store has int32 lengths; sums over them must be int64."""
    assert values(pack(case.residues, case.lengths.astype(np.int32), case.corruption)) == values(batch)


def test_packed_row_contains_no_padding(case: Case, batch: PackedBatch) -> None:
    assert not (batch.tokens == PAD_ID).any()
    assert len(batch.tokens) == case.lengths.sum() + 2 * len(case.lengths)
    assert batch.cu_seqlens[-1] == len(batch.tokens)


def test_targets_restore_the_true_proteins(case: Case, batch: PackedBatch) -> None:
    restored = batch.tokens.clone()
    assert not torch.equal(restored, pack(case.residues, case.lengths).tokens)
    restored[batch.target_index] = batch.targets
    assert torch.equal(restored, pack(case.residues, case.lengths).tokens)


def test_sequences_and_residues_are_counted_without_special_tokens(case: Case, batch: PackedBatch) -> None:
    assert batch.sequences == len(case.lengths)
    assert batch.residues == len(case.residues)


def test_batch_without_masking_has_no_targets(case: Case) -> None:
    plain = pack(case.residues, case.lengths)
    assert plain.target_index.shape == plain.targets.shape == (0,)
    assert plain.target_index.dtype == plain.targets.dtype == torch.int64
    unchanged = MaskedResidues(case.residues, np.zeros(len(case.residues), dtype=np.bool_))
    assert values(plain) == slowly_packed(case._replace(corruption=unchanged))


def test_batch_shares_no_memory_with_its_inputs(case: Case) -> None:
    before = case.residues.copy(), case.corruption.tokens.copy()
    packed = pack(*case)
    packed.tokens.zero_()
    packed.targets.zero_()
    np.testing.assert_array_equal(case.residues, before[0])
    np.testing.assert_array_equal(case.corruption.tokens, before[1])


def test_unpack_pads_each_sequence_at_its_end(case: Case) -> None:
    plain = pack(case.residues, case.lengths)
    tokens_SL = unpack(plain.tokens, plain.cu_seqlens)
    assert tokens_SL.shape == (len(case.lengths), 512)
    residues = np.split(case.residues, np.cumsum(case.lengths)[:-1])
    for row, protein in zip(tokens_SL.tolist(), residues, strict=True):
        assert row == [CLS_ID, *protein.tolist(), EOS_ID] + [PAD_ID] * (510 - len(protein))
    assert torch.equal(tokens_SL[tokens_SL != PAD_ID], plain.tokens)


def test_unpack_accepts_hidden_states(batch: PackedBatch) -> None:
    hidden_TH = torch.randn(len(batch.tokens), 3)
    hidden_SLH = unpack(hidden_TH, batch.cu_seqlens, padding=-7.0)
    inside_SL = unpack(batch.positions, batch.cu_seqlens, padding=-1) >= 0
    assert hidden_SLH.shape == (batch.sequences, batch.max_seqlen, 3)
    assert torch.equal(hidden_SLH[inside_SL], hidden_TH)
    assert (hidden_SLH[~inside_SL] == -7).all()


def test_moving_a_batch_moves_every_tensor(batch: PackedBatch) -> None:
    """The meta device stands in for a GPU."""
    assert values(batch.to("cpu")) == values(batch)
    moved = batch.to("meta", non_blocking=True)
    assert moved.max_seqlen == batch.max_seqlen
    for field in fields(batch):
        tensor = getattr(moved, field.name)
        if isinstance(tensor, Tensor):
            assert tensor.device.type == "meta", field.name
            assert tensor.shape == getattr(batch, field.name).shape
    assert batch.tokens.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinning_a_batch_pins_every_tensor(batch: PackedBatch) -> None:
    pinned = batch.pin_memory()
    assert all(getattr(pinned, f.name).is_pinned() for f in fields(batch) if f.name != "max_seqlen")
    assert values(pinned) == values(batch)


def test_batch_survives_pickling_and_a_loader_worker(case: Case, batch: PackedBatch) -> None:
    assert values(pickle.loads(pickle.dumps(batch))) == values(batch)
    plain = pack(case.residues, case.lengths)
    loaded = list(DataLoader([batch, plain], batch_size=None, num_workers=1))
    assert [type(item) for item in loaded] == [PackedBatch, PackedBatch]
    assert [values(item) for item in loaded] == [values(batch), values(plain)]
