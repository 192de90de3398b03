"""Crop and corruption of protein sequences, over a whole packed batch at once.

The policy is that of BERT (Devlin et al. 2019, section 3.1) as the ESM-1nv and ESM-1b model cards state it: 15% of the
residues are chosen; of those 80% show `<mask>`, 10% another amino acid, 10% stay as they are. Special tokens are never
chosen: they are added after. Each draw is a hash of (key of the sample, place of the residue), so what happens to a
sample depends on (seed, epoch, sample) and on nothing around it.

`corrupt` is the definition; `batching.py` does the same in one pass from the store, and is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, MASK_ID, NUM_STANDARD_RESIDUES
from bionemo_esm.data.hashing import UInt64Array, derive_key, mix, threshold, uniform_integers

CROP_STREAM, CHOICE_STREAM, ACTION_STREAM, LETTER_STREAM = 2, 3, 4, 5


@dataclass(frozen=True)
class MaskingPolicy:
    """Fractions of the corruption: `chosen` of all residues; `masked` and `replaced` of the chosen ones.

    Raises `ValueError` when a fraction lies outside 0..1 or `masked + replaced` exceeds 1.
    """

    chosen: float = 0.15
    masked: float = 0.80
    replaced: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.chosen <= 1:  # false for NaN, too
            raise ValueError(f"data.masking.chosen must lie in (0, 1], not {self.chosen}")
        if not (self.masked >= 0 and self.replaced >= 0 and self.masked + self.replaced <= 1 + 1e-9):
            raise ValueError(
                f"data.masking.masked ({self.masked}) and data.masking.replaced ({self.replaced}) "
                "must not be negative, and add up to at most 1; the rest is shown unchanged"
            )

    def for_evaluation(self) -> MaskingPolicy:
        """The same choice of residues, all of them shown as `<mask>`: no answer leaks into the question."""
        return MaskingPolicy(chosen=self.chosen, masked=1.0, replaced=0.0)


class Corruption(NamedTuple):
    """tokens uint8 [residues], what the model is shown; chosen bool [residues], where it has to answer."""

    tokens: NDArray[np.uint8]
    chosen: NDArray[np.bool_]


def sample_keys(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> UInt64Array:
    """The key of each sample in its epoch, uint64 [n]: all that crop and corruption draw from."""
    return derive_key(seed, epochs, samples)


def crop_windows(
    lengths: NDArray[np.int64], max_residues: int, keys: UInt64Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random window of at most `max_residues` in each sequence: (start int64 [n], length int64 [n]).

    Sequences within the limit are kept whole; of longer ones every window is equally likely.
    """
    kept = np.minimum(lengths, max_residues)
    return uniform_integers(derive_key(keys, CROP_STREAM), lengths - kept + 1), kept


def corrupt(
    residues: NDArray[np.uint8], lengths: NDArray[np.int64], keys: UInt64Array, policy: MaskingPolicy
) -> Corruption:
    """Choose and corrupt residues of concatenated sequences.

    residues: uint8 [residues], the sequences one after another, no special tokens; lengths: int64 [sequences];
    keys: uint64 [sequences], from `sample_keys`. The input is not changed.
    """
    ends = np.cumsum(lengths)
    places = np.arange(len(residues), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    draws = np.repeat(derive_key(keys, CHOICE_STREAM), lengths)
    draws ^= places.astype(np.uint64)
    draws = mix(draws)
    chosen = draws < threshold(policy.chosen)

    where = np.flatnonzero(chosen)
    actions = derive_key(draws[where], ACTION_STREAM)
    masked = actions < threshold(policy.masked)
    replaced = ~masked & (actions < threshold(policy.masked + policy.replaced))

    tokens = residues.copy()
    tokens[where[masked]] = MASK_ID
    tokens[where[replaced]] = _another_residue(residues[where[replaced]], draws[where[replaced]])
    return Corruption(tokens, chosen)


def _another_residue(originals: NDArray[np.uint8], draws: UInt64Array) -> NDArray[np.uint8]:
    """A standard amino acid other than the original, each equally likely: uint8 [n] -> uint8 [n]."""
    letters = originals.astype(np.int64) - FIRST_RESIDUE_ID
    standard = (letters >= 0) & (letters < NUM_STANDARD_RESIDUES)
    steps = uniform_integers(derive_key(draws, LETTER_STREAM), np.where(standard, NUM_STANDARD_RESIDUES - 1, 20))
    shifted = np.where(standard, letters + 1 + steps, steps)  # 1..19 places on: never back on the original
    return (shifted % NUM_STANDARD_RESIDUES + FIRST_RESIDUE_ID).astype(np.uint8)
