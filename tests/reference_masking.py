"""NumPy reference of crop, draw of a cluster member, and masking, for comparison with the compiled loops."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, MASK_ID, NUM_STANDARD_RESIDUES
from bionemo_esm.data.collate import CROP_STREAM, MEMBER_STREAM
from bionemo_esm.data.hashing import UInt64Array, derive_key, mix, threshold, uniform_integers
from bionemo_esm.data.masking import ACTION_STREAM, CHOICE_STREAM, RESIDUE_STREAM, MaskedResidues, MaskingPolicy
from bionemo_esm.data.store import SequenceSplit


def sample_keys(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> UInt64Array:
    """Return the key of each sample in its epoch: uint64 [n]. Crop and masking are drawn from it."""
    return derive_key(seed, epochs, samples)


def crop_windows(
    lengths: NDArray[np.int64], max_residues: int, keys: UInt64Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a random window of at most `max_residues` in each sequence: (start int64 [n], length int64 [n])."""
    kept = np.minimum(lengths, max_residues)
    return uniform_integers(derive_key(keys, CROP_STREAM), lengths - kept + 1), kept


def member_words(keys: UInt64Array) -> UInt64Array:
    """Return uniform words that draw the member of a cluster, from the keys of samples in their epochs: uint64 [n]."""
    return derive_key(keys, MEMBER_STREAM)


def draw_members(split: SequenceSplit, clusters: ArrayLike, words: UInt64Array) -> NDArray[np.int64]:
    """Return a sequence of each cluster, drawn by a uniform 64-bit word: integers [n], uint64 [n] -> int64 [n]."""
    chosen = np.asarray(clusters, dtype=np.int64)
    first = split.cluster_starts[chosen]
    return first + uniform_integers(words, split.cluster_starts[chosen + 1] - first)


def mask_by_formula(
    residues: NDArray[np.uint8], lengths: NDArray[np.int64], keys: UInt64Array, policy: MaskingPolicy
) -> MaskedResidues:
    """Select and corrupt residues of concatenated sequences, as `mask_sequences` does."""
    ends = np.cumsum(lengths)
    places = np.arange(len(residues), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    draws = mix(np.repeat(derive_key(keys, CHOICE_STREAM), lengths) ^ places.astype(np.uint64))
    chosen = draws < threshold(policy.mlm_probability)

    where = np.flatnonzero(chosen)
    actions = derive_key(draws[where], ACTION_STREAM)
    masked = actions < threshold(policy.mask_fraction)
    replaced = ~masked & (actions < threshold(policy.mask_fraction + policy.random_fraction))

    tokens = residues.copy()
    tokens[where[masked]] = MASK_ID
    tokens[where[replaced]] = _another_residue(residues[where[replaced]], draws[where[replaced]])
    return MaskedResidues(tokens, chosen)


def _another_residue(originals: NDArray[np.uint8], draws: UInt64Array) -> NDArray[np.uint8]:
    """Return a standard amino acid other than the original, uniformly drawn: uint8 [n] -> uint8 [n]."""
    letters = originals.astype(np.int64) - FIRST_RESIDUE_ID
    standard = (letters >= 0) & (letters < NUM_STANDARD_RESIDUES)
    steps = uniform_integers(derive_key(draws, RESIDUE_STREAM), np.where(standard, NUM_STANDARD_RESIDUES - 1, 20))
    shifted = np.where(standard, letters + 1 + steps, steps)  # shifted by 1 to 19: never the original
    return (shifted % NUM_STANDARD_RESIDUES + FIRST_RESIDUE_ID).astype(np.uint8)
