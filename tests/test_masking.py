"""Cropping and masking: the policy's fractions on a million real residues, and independence from the batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from bionemo_esm.alphabet import (
    CLS_ID,
    EOS_ID,
    FIRST_RESIDUE_ID,
    MASK_ID,
    NUM_STANDARD_RESIDUES,
    TOKEN_IDS,
    decode,
    encode,
)
from bionemo_esm.data.collate import SampleReader, pack
from bionemo_esm.data.hashing import UInt64Array
from bionemo_esm.data.masking import MaskedResidues, MaskingPolicy, mask_sequences
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit
from errors import refused
from reference_masking import crop_windows, mask_by_formula, sample_keys

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"  # UniProt P0CG48, 1-76
STANDARD_IDS = np.arange(FIRST_RESIDUE_ID, FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES)
ALWAYS_REPLACED = MaskingPolicy(mlm_probability=1.0, mask_fraction=0.0, random_fraction=1.0)


class Proteins(NamedTuple):
    """Concatenated sequences: residues uint8 [residues], lengths int64 [n], keys uint64 [n]."""

    residues: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    keys: UInt64Array

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths) - self.lengths

    @property
    def places(self) -> NDArray[np.int64]:
        """Position of each residue in its protein, int64 [residues]."""
        return np.arange(len(self.residues)) - np.repeat(self.starts, self.lengths)


def keys_for(count: int, seed: int = 1, epoch: int = 0) -> UInt64Array:
    return sample_keys(seed, np.full(count, epoch), np.arange(count))


@pytest.fixture(scope="module")
def proteins(sample_store: ProteinStore) -> Proteins:
    """All splits of the sample: 3,000 proteins, about a million residues."""
    splits = [sample_store.split(name) for name in SPLITS]
    lengths = np.concatenate([split.lengths for split in splits]).astype(np.int64)
    residues = np.concatenate([split[i] for split in splits for i in range(len(split))])
    assert len(residues) > 1_000_000
    return Proteins(residues, lengths, keys_for(len(lengths)))


@pytest.fixture(scope="module")
def masked_sample(proteins: Proteins) -> MaskedResidues:
    """The sample, masked with the policy of the model cards."""
    return mask_sequences(*proteins, MaskingPolicy())


def assert_binomial(count: int, trials: int, probability: float) -> None:
    """Assert that `count` is within five standard deviations of its binomial mean."""
    deviation = np.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) < 5 * deviation + 1e-9, f"{count} of {trials}, expected {probability}"


def assert_uniform(counts: NDArray[np.int64]) -> None:
    """Assert that chi-square is within five standard deviations of its degrees of freedom, on either side."""
    expected, degrees = counts.sum() / counts.size, counts.size - 1
    assert expected >= 5, "too few draws for chi-square"
    assert abs(((counts - expected) ** 2 / expected).sum() - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "policy",
    [
        MaskingPolicy(),
        MaskingPolicy(mlm_probability=0.4, mask_fraction=0.5, random_fraction=0.3),
        MaskingPolicy(mask_fraction=0.0, random_fraction=0.0),
    ],
    ids=str,
)
def test_residues_are_chosen_masked_and_replaced_at_the_policy_rates(proteins: Proteins, policy: MaskingPolicy) -> None:
    tokens, chosen = mask_sequences(*proteins, policy)
    assert tokens.dtype == np.uint8
    shown, true = tokens[chosen], proteins.residues[chosen]
    assert_binomial(chosen.sum(), chosen.size, policy.mlm_probability)
    assert_binomial((shown == MASK_ID).sum(), shown.size, policy.mask_fraction)
    assert_binomial(((shown != MASK_ID) & (shown != true)).sum(), shown.size, policy.random_fraction)
    assert_binomial((shown == true).sum(), shown.size, 1 - policy.mask_fraction - policy.random_fraction)
    np.testing.assert_array_equal(tokens[~chosen], proteins.residues[~chosen])


def test_default_policy_matches_the_model_cards() -> None:
    assert MaskingPolicy() == MaskingPolicy(mlm_probability=0.15, mask_fraction=0.80, random_fraction=0.10)


@pytest.mark.parametrize("policy", [ALWAYS_REPLACED, MaskingPolicy()], ids=["always", "default"])
def test_replacement_is_uniform_over_the_other_standard_residues(proteins: Proteins, policy: MaskingPolicy) -> None:
    """Test the default policy too: the replacement must not depend on the draws that chose the residue."""
    tokens, chosen = mask_sequences(*proteins, policy)
    replaced = chosen & (tokens != MASK_ID) & (tokens != proteins.residues)
    assert_binomial(replaced.sum(), chosen.sum(), policy.random_fraction)
    pairs = np.zeros((256, 256), dtype=np.int64)
    np.add.at(pairs, (proteins.residues[replaced], tokens[replaced]), 1)
    standard = pairs[np.ix_(STANDARD_IDS, STANDARD_IDS)]
    assert standard.sum() == replaced.sum()
    others = standard[~np.eye(NUM_STANDARD_RESIDUES, dtype=bool)].reshape(NUM_STANDARD_RESIDUES, -1)
    for counts in others:
        assert_uniform(counts)


@pytest.mark.parametrize("policy", [ALWAYS_REPLACED, MaskingPolicy()], ids=["always", "default"])
@pytest.mark.parametrize("letter", [*"XBUZO", "<unk>"])
def test_rare_letters_are_chosen_like_others_and_replaced_by_standard_residues(
    letter: str, policy: MaskingPolicy
) -> None:
    lengths = np.full(1000, 400)
    residues = np.full(lengths.sum(), TOKEN_IDS[letter], dtype=np.uint8)
    tokens, chosen = mask_sequences(residues, lengths, keys_for(1000), policy)
    assert_binomial(chosen.sum(), chosen.size, policy.mlm_probability)
    replaced = tokens[(tokens != residues) & (tokens != MASK_ID)]
    assert_binomial(len(replaced), chosen.sum(), policy.random_fraction)
    counts = np.bincount(replaced, minlength=256)
    assert counts[STANDARD_IDS].sum() == len(replaced)
    assert_uniform(counts[STANDARD_IDS])


def test_mask_of_a_sample_does_not_depend_on_the_batch(proteins: Proteins, masked_sample: MaskedResidues) -> None:
    """Mask the proteins one by one, and all of them in another order."""
    pieces = [slice(start, start + length) for start, length in zip(proteins.starts, proteins.lengths, strict=True)]
    for i in range(0, len(pieces), 10):
        alone = mask_sequences(proteins.residues[pieces[i]], proteins.lengths[[i]], proteins.keys[[i]], MaskingPolicy())
        np.testing.assert_array_equal(alone.tokens, masked_sample.tokens[pieces[i]])
        np.testing.assert_array_equal(alone.chosen, masked_sample.chosen[pieces[i]])
    order = np.random.default_rng(0).permutation(len(pieces))
    residues = np.concatenate([proteins.residues[pieces[i]] for i in order])
    other = mask_sequences(residues, proteins.lengths[order], proteins.keys[order], MaskingPolicy())
    np.testing.assert_array_equal(other.tokens, np.concatenate([masked_sample.tokens[pieces[i]] for i in order]))
    np.testing.assert_array_equal(other.chosen, np.concatenate([masked_sample.chosen[pieces[i]] for i in order]))


@pytest.mark.parametrize("changed", ["seed", "epoch", "sample"])
def test_another_seed_epoch_or_sample_gives_an_independent_mask(
    proteins: Proteins, masked_sample: MaskedResidues, changed: str
) -> None:
    """By chance, 15% of 15% are chosen in both; of those, 64% are masked in both and 1% replaced in both."""
    count = len(proteins.lengths)
    keys = {
        "seed": keys_for(count, seed=2),
        "epoch": keys_for(count, epoch=1),
        "sample": sample_keys(1, np.zeros(count, dtype=np.int64), np.arange(count) + 1),
    }[changed]
    tokens, chosen = mask_sequences(proteins.residues, proteins.lengths, keys, MaskingPolicy())
    both = chosen & masked_sample.chosen
    assert_binomial(both.sum(), both.size, 0.15**2)
    assert_binomial((both & (tokens == MASK_ID) & (masked_sample.tokens == MASK_ID)).sum(), both.sum(), 0.8**2)
    replaced = [both & (t != MASK_ID) & (t != proteins.residues) for t in (tokens, masked_sample.tokens)]
    assert_binomial((replaced[0] & replaced[1]).sum(), both.sum(), 0.1**2)


def test_masking_a_sample_twice_gives_the_same_result(proteins: Proteins, masked_sample: MaskedResidues) -> None:
    again = mask_sequences(proteins.residues, proteins.lengths, keys_for(len(proteins.lengths)), MaskingPolicy())
    np.testing.assert_array_equal(again.tokens, masked_sample.tokens)
    np.testing.assert_array_equal(again.chosen, masked_sample.chosen)


def test_equal_proteins_get_different_masks() -> None:
    """Mask ubiquitin 5,000 times: positions are chosen and masked uniformly, and no two masks are equal."""
    residues = np.tile(encode(UBIQUITIN), 5000)
    tokens, chosen = mask_sequences(residues, np.full(5000, 76), keys_for(5000), MaskingPolicy())
    assert_uniform(chosen.reshape(5000, 76).sum(axis=0))
    assert_uniform((tokens == MASK_ID).reshape(5000, 76).sum(axis=0))
    assert len(np.unique(chosen.reshape(5000, 76), axis=0)) == 5000


def test_masking_does_not_modify_its_input(proteins: Proteins) -> None:
    before = proteins.residues.copy()
    mask_sequences(*proteins, ALWAYS_REPLACED)
    np.testing.assert_array_equal(proteins.residues, before)


def test_read_only_view_of_the_store_can_be_masked(sample_store: ProteinStore) -> None:
    protein = sample_store.split("test")[0]
    assert not protein.flags.writeable
    tokens, _ = mask_sequences(protein, np.array([len(protein)]), keys_for(1), ALWAYS_REPLACED)
    assert (tokens != protein).all()


def test_evaluation_policy_chooses_the_same_residues_and_masks_them_all(
    proteins: Proteins, masked_sample: MaskedResidues
) -> None:
    tokens, chosen = mask_sequences(*proteins, MaskingPolicy().for_evaluation())
    np.testing.assert_array_equal(chosen, masked_sample.chosen)
    assert (tokens[chosen] == MASK_ID).all()
    np.testing.assert_array_equal(tokens[~chosen], proteins.residues[~chosen])
    assert MaskingPolicy(mlm_probability=0.3, random_fraction=0.2).for_evaluation().mlm_probability == 0.3


def test_neighbouring_residues_are_chosen_independently(proteins: Proteins, masked_sample: MaskedResidues) -> None:
    for lag in (1, 2, 3, 4, 8, 64):
        inside = proteins.places[lag:] >= lag  # pairs within one protein
        left, right = masked_sample.chosen[:-lag][inside], masked_sample.chosen[lag:][inside]
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(len(left))


def test_every_position_and_letter_is_chosen_at_the_same_rate(
    proteins: Proteins, masked_sample: MaskedResidues
) -> None:
    """No position (first and last included) and no letter is favoured; the count per protein is binomial."""
    for place in (*range(8), 15, 16, 63, 64, 127, 128, 255, 256):
        at = proteins.places == place
        assert_binomial(masked_sample.chosen[at].sum(), at.sum(), 0.15)
    last = masked_sample.chosen[np.cumsum(proteins.lengths) - 1]
    assert_binomial(last.sum(), last.size, 0.15)
    for letter in STANDARD_IDS:
        at = proteins.residues == letter
        assert_binomial(masked_sample.chosen[at].sum(), at.sum(), 0.15)
    per_protein = np.add.reduceat(masked_sample.chosen.astype(np.int64), proteins.starts)
    dispersion = ((per_protein - 0.15 * proteins.lengths) ** 2 / (0.15 * 0.85 * proteins.lengths)).mean()
    assert abs(dispersion - 1) < 5 * np.sqrt(2 / len(per_protein))


def test_crop_windows_of_a_long_protein_are_uniform() -> None:
    keys = keys_for(60_000)
    starts, kept = crop_windows(np.full(60_000, 1000), 700, keys)
    assert (kept == 700).all()
    assert starts.min() == 0
    assert starts.max() == 300  # the last window that fits
    assert_uniform(np.bincount(starts, minlength=301))
    _, chosen = mask_sequences(np.tile(encode("M"), 60_000), np.ones(60_000, dtype=np.int64), keys, MaskingPolicy())
    assert abs(np.corrcoef(starts, chosen)[0, 1]) < 5 / np.sqrt(60_000)  # crop and mask are independent


def test_protein_within_the_limit_is_not_cropped() -> None:
    lengths = np.arange(1, 1025)
    starts, kept = crop_windows(lengths, 510, keys_for(1024))
    assert (starts[:510] == 0).all()
    np.testing.assert_array_equal(kept, np.minimum(lengths, 510))
    assert (starts >= 0).all()
    assert (starts + kept <= lengths).all()
    assert (starts[510:] > 0).mean() > 0.8


def test_crop_differs_between_epochs_and_does_not_depend_on_the_batch() -> None:
    lengths = np.random.default_rng(0).integers(600, 1024, 500)
    starts, _ = crop_windows(lengths, 510, keys_for(500))
    for i in range(0, 500, 50):
        assert crop_windows(lengths[[i]], 510, keys_for(500)[[i]])[0] == starts[i]
    next_epoch, _ = crop_windows(lengths, 510, keys_for(500, epoch=1))
    assert (next_epoch == starts).mean() < 0.05


def test_reader_counts_special_tokens_in_the_length_limit(tiny_split: SequenceSplit) -> None:
    samples = np.arange(len(tiny_split))
    batch = SampleReader(tiny_split, 512, MaskingPolicy(), seed=1).collate(np.zeros_like(samples), samples)
    expected = np.minimum(tiny_split.lengths, 510) + 2
    assert set(tiny_split.lengths[:10]) > {509, 510, 511, 512, 1000}
    assert np.diff(batch.cu_seqlens.numpy()).tolist() == expected.tolist()
    assert batch.max_seqlen == 512


def test_reader_crops_before_it_masks(sample_store: ProteinStore) -> None:
    """The mask is drawn over the positions of the window, as if the window were the whole protein."""
    train = sample_store.split("train")
    samples = np.flatnonzero(train.lengths > 400)
    epochs = np.full_like(samples, 3)
    batch = SampleReader(train, 258, MaskingPolicy(), seed=7).collate(epochs, samples)
    assert_binomial(len(batch.targets), batch.residues, 0.15)
    rows = [row.numpy() for row in batch.tokens.split(np.diff(batch.cu_seqlens.numpy()).tolist())]
    for row, sample, key in zip(rows, samples, sample_keys(7, epochs, samples), strict=True):
        start, kept = (int(value[0]) for value in crop_windows(train.lengths[[sample]], 256, key[None]))
        window = train[int(sample)][start : start + kept]
        expected = mask_sequences(window, np.array([256]), key[None], MaskingPolicy()).tokens
        np.testing.assert_array_equal(row, [CLS_ID, *expected, EOS_ID])


@pytest.mark.parametrize(
    ("fractions", "keys"),
    [
        ({"chosen": 0.0}, ["data.masking.chosen"]),
        ({"chosen": -0.1}, ["data.masking.chosen"]),
        ({"chosen": 15}, ["data.masking.chosen"]),
        ({"chosen": float("nan")}, ["data.masking.chosen"]),
        ({"masked": -0.1}, ["data.masking.masked"]),
        ({"replaced": -0.1}, ["data.masking.replaced"]),
        ({"masked": 1.1, "replaced": 0.0}, ["data.masking.masked"]),
        ({"masked": 0.8, "replaced": 0.3}, ["data.masking.masked", "data.masking.replaced"]),
    ],
    ids=str,
)
def test_fraction_out_of_range_is_rejected_by_key(fractions: dict[str, float], keys: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.masking") as error:
        MaskingPolicy(**fractions)
    for key in (*keys, *map(str, fractions.values())):
        assert key in str(error.value)


def test_configuration_keys_are_the_field_aliases() -> None:
    policy = MaskingPolicy.from_config({"chosen": 0.2, "masked": 0.5, "replaced": 0.25})
    assert policy == MaskingPolicy(mlm_probability=0.2, mask_fraction=0.5, random_fraction=0.25)
    assert policy.to_dict() == {"chosen": 0.2, "masked": 0.5, "replaced": 0.25}
    with refused("config.unknown-key", "data.masking.rate; known are: chosen, masked, replaced"):
        MaskingPolicy.from_config({"rate": 0.2})
    with refused("config.unknown-key", "data.masking.mlm_probability"):
        MaskingPolicy.from_config({"chosen": 0.2, "mlm_probability": 0.3})


@pytest.mark.parametrize("section", [0, 5, False, None, "none", [0.15]])
def test_section_that_is_not_a_mapping_is_rejected(section: object) -> None:
    with refused("config.type", f"data.masking must be a mapping, not {section!r}"):
        MaskingPolicy.from_config(section)


def test_policy_record_in_checkpoints_is_frozen() -> None:
    """A resumed run compares this text with the text in its checkpoint."""
    assert MaskingPolicy().record == "MaskingPolicy(chosen=0.15, masked=0.8, replaced=0.1)"
    assert MaskingPolicy(mask_fraction=1, random_fraction=0).record == (
        "MaskingPolicy(chosen=0.15, masked=1.0, replaced=0.0)"
    )


@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [0, 3, 0, 700], [127, 128, 129, 1]], ids=str)
@pytest.mark.parametrize(
    "policy",
    [
        MaskingPolicy(),
        MaskingPolicy().for_evaluation(),
        MaskingPolicy(mlm_probability=0.6, mask_fraction=0.2, random_fraction=0.7),
        ALWAYS_REPLACED,
        MaskingPolicy(mlm_probability=1e-9),
    ],
    ids=str,
)
def test_compiled_masking_equals_the_reference_bit_for_bit(policy: MaskingPolicy, lengths: list[int]) -> None:
    residues = np.random.default_rng(0).integers(0, 33, sum(lengths)).astype(np.uint8)
    keys = keys_for(len(lengths), seed=9)
    compiled = mask_sequences(residues, np.array(lengths), keys, policy)
    expected = mask_by_formula(residues, np.array(lengths), keys, policy)
    np.testing.assert_array_equal(compiled.tokens, expected.tokens)
    np.testing.assert_array_equal(compiled.chosen, expected.chosen)


def test_masking_a_million_residues_equals_the_reference_bit_for_bit(
    proteins: Proteins, masked_sample: MaskedResidues
) -> None:
    expected = mask_by_formula(*proteins, MaskingPolicy())
    np.testing.assert_array_equal(masked_sample.tokens, expected.tokens)
    np.testing.assert_array_equal(masked_sample.chosen, expected.chosen)


def test_fractions_that_sum_to_one_are_accepted() -> None:
    assert MaskingPolicy(mlm_probability=1.0, mask_fraction=0.7, random_fraction=0.3)  # 0.7 + 0.3 in floating point
    assert 0.7 + 4e-16 + 0.3 > 1  # a sum of rounded fractions can exceed 1
    assert MaskingPolicy(mask_fraction=0.7 + 4e-16, random_fraction=0.3)


def test_empty_input_and_empty_sequences_are_accepted() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    tokens, chosen = mask_sequences(nothing.astype(np.uint8), nothing, keys_for(0), MaskingPolicy())
    assert tokens.shape == chosen.shape == (0,)
    residues = encode("MKT" + "AV")
    with_gaps = mask_sequences(residues, np.array([0, 3, 0, 0, 2]), keys_for(5), ALWAYS_REPLACED)
    without = mask_sequences(residues, np.array([3, 2]), keys_for(5)[[1, 4]], ALWAYS_REPLACED)
    np.testing.assert_array_equal(with_gaps.tokens, without.tokens)


def test_special_tokens_are_never_chosen(proteins: Proteins) -> None:
    everything = mask_sequences(*proteins, MaskingPolicy(mlm_probability=1.0))
    batch = pack(proteins.residues, proteins.lengths, everything)
    boundaries = batch.cu_seqlens.numpy()
    assert (batch.tokens[boundaries[:-1]] == CLS_ID).all()
    assert (batch.tokens[boundaries[1:] - 1] == EOS_ID).all()
    assert not np.isin(batch.target_index, np.concatenate([boundaries[:-1], boundaries[1:] - 1])).any()
    assert len(batch.targets) == len(proteins.residues)
    assert batch.targets.min() >= FIRST_RESIDUE_ID


def test_crop_and_mask_are_frozen_across_releases() -> None:
    """A change here breaks every run that resumes. If it is unavoidable, state it in the release notes."""
    keys = sample_keys(1, np.array([0, 419]), np.array([5, 51_999_999]))
    starts, _ = crop_windows(np.array([1000, 1000]), 510, keys)
    tokens, chosen = mask_sequences(np.tile(encode(UBIQUITIN), 2), np.array([76, 76]), keys, MaskingPolicy())
    shown = decode(tokens).replace("<mask>", "_")
    assert starts.tolist() == [71, 255]
    assert [shown[:76], shown[76:]] == [
        "MQIF_KTLTGKTITLEVEPGDTI_NV_AKIQDKEGI_P_QQRLI_AGKQLEDGRT_SDYN_QKESTLHLVLRLR_G",
        "MQI__KTLTGKT_TLEVEPSDTIENVKAKIQDK_GIPPDQ__LIFAGKQLEDG_TL_DY_IQKESTLHLVLRLRGG",
    ]
    assert np.flatnonzero(chosen).tolist() == [
        4,
        14,
        19,
        23,
        26,
        36,
        38,
        44,
        55,
        60,
        74,
        79,
        80,
        88,
        109,
        116,
        117,
        129,
        132,
        135,
        142,
    ]
