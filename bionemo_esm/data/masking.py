"""Masking for masked language modelling: the policy of `data.masking`, and the compiled rule that applies it.

The policy is that of BERT (Devlin et al. 2019, section 3.1), as the ESM-1nv and ESM-1b model cards state it: 15% of the
residues are predicted. Of those 80% show `<mask>`, 10% show another standard amino acid, 10% stay unchanged. Special
tokens are never chosen. Each draw is a hash of (key of the sample, position of the residue), so the masking of a sample
depends on (seed, epoch, sample) alone: not on rank, worker or batch neighbours.

Training, validation, the probe and `plan` all use this file. Another masking rule replaces `mask_row`, `MaskingPolicy`,
and their test `tests/test_masking.py`, which compares them with a NumPy reference bit for bit.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, MASK_ID, NUM_STANDARD_RESIDUES, SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.hashing import UInt64Array, drawn, mixed, scaled, threshold
from bionemo_esm.data.kernels import compiled
from bionemo_esm.errors import ConfigError
from bionemo_esm.settings import Settings

CHOICE_STREAM, ACTION_STREAM, RESIDUE_STREAM = 3, 4, 5  # one stream of draws per decision
NO_ROOM = -1

_U = np.uint64
_WORD_BITS = 64
_DE_BRUIJN = _U(0x03F79D71B4CB0A89)  # all 64 windows of six bits differ: the top six bits of a power of two ...
_BIT_INDEX = np.zeros(64, dtype=np.uint64)  # ... times this constant identify its exponent
_BIT_INDEX[(_DE_BRUIJN << np.arange(64, dtype=np.uint64)) >> _U(58)] = np.arange(64)


class MaskingPolicy(Settings, section="data.masking"):
    """Fractions of the masking rule. The keys of the configuration are the aliases `chosen`, `masked`, `replaced`.

    mlm_probability: fraction of all residues that are predicted; mask_fraction: fraction of those that show `<mask>`;
    random_fraction: fraction of those that show another standard amino acid. The rest stays unchanged.

    Raises `ConfigError` for a fraction outside 0..1 or `mask_fraction + random_fraction` over 1.
    """

    model_config = ConfigDict(populate_by_name=True)

    mlm_probability: Annotated[float, Field(alias="chosen")] = 0.15
    mask_fraction: Annotated[float, Field(alias="masked")] = 0.80
    random_fraction: Annotated[float, Field(alias="replaced")] = 0.10

    @model_validator(mode="after")
    def _check_fractions(self) -> Self:
        if not 0 < self.mlm_probability <= 1:  # false for NaN, too
            raise ConfigError(
                f"data.masking.chosen must lie in (0, 1], not {self.mlm_probability}", code="masking.fraction"
            )
        masked, replaced = self.mask_fraction, self.random_fraction
        if not (masked >= 0 and replaced >= 0 and masked + replaced <= 1 + 1e-9):
            raise ConfigError(
                f"data.masking.masked ({masked}) and data.masking.replaced ({replaced}) must not be negative, and add "
                "up to at most 1; the rest is shown unchanged",
                code="masking.fraction",
            )
        return self

    def for_evaluation(self) -> MaskingPolicy:
        """Return the policy that chooses the same residues and shows all of them as `<mask>`, so that none leaks."""
        return MaskingPolicy(mlm_probability=self.mlm_probability, mask_fraction=1.0, random_fraction=0.0)

    @property
    def thresholds(self) -> UInt64Array:
        """Bounds below which a draw chooses a residue, masks it, and masks or replaces it: uint64 [3]."""
        fractions = self.mlm_probability, self.mask_fraction, self.mask_fraction + self.random_fraction
        return np.array(list(map(threshold, fractions)))

    def capacity(self, tokens: int, longest: int) -> int:
        """Return how many targets to allocate for a row of `tokens` whose longest sequence has `longest`.

        Eight standard deviations over the mean, plus one sequence: `mask_row` stops before a sequence that might not
        fit. A row with more targets is masked again with more room.
        """
        return min(tokens, math.ceil(self.mlm_probability * tokens + 4 * math.sqrt(tokens)) + longest)

    def to_dict(self) -> dict[str, float]:
        """Return the fractions under the keys of the configuration."""
        return self.model_dump(by_alias=True)

    @property
    def record(self) -> str:
        """The text that checkpoints store and compare on resume. It must never change for equal fractions."""
        return f"MaskingPolicy({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"


@compiled
def mask_row(keys: Any, cu_seqlens: Any, thresholds: Any, tokens: Any, index: Any, targets: Any) -> Any:
    """Choose residues of a packed row, store the true ones, and mask, replace or keep them in the row.

    keys uint64 [S], one per sequence; cu_seqlens int32 [S + 1]; thresholds uint64 [3], from `MaskingPolicy`.
    Changed: tokens int64 [T]. Filled: index int64 [room], positions in the row of the chosen residues, ascending;
    targets int64 [room], the true residues there. Returns the number of chosen residues, or `NO_ROOM`.
    """
    draws = np.empty(index.size, dtype=np.uint64)
    count = _choose(keys, thresholds[0], cu_seqlens, index, draws)
    if count > 0:
        _corrupt(index[:count], draws, thresholds[1], thresholds[2], tokens, targets)
    return count


@compiled
def _choose(keys: Any, below: Any, cu_seqlens: Any, index: Any, draws: Any) -> Any:
    """Write the chosen positions of the row to `index` and their draws to `draws`; return their number, or `NO_ROOM`.

    index int64, draws uint64 [room].
    """
    found = _U(0)
    for at in range(keys.size):
        key, base = drawn(keys[at], CHOICE_STREAM), _U(cu_seqlens[at]) + _U(1)
        residues = _U(cu_seqlens[at + 1]) - base - _U(1)
        if found + residues > _U(index.size):
            return NO_ROOM
        begun = found
        for begin in range(_U(0), residues, _U(_WORD_BITS)):
            word = _U(0)  # one bit per residue
            for lane in range(_U(_WORD_BITS)):
                word |= _U(mixed(key ^ (begin + lane)) < below) << lane
            if begin + _U(_WORD_BITS) > residues:
                word &= (_U(1) << (residues - begin)) - _U(1)
            while word != _U(0):
                lowest = word & (~word + _U(1))
                index[found] = begin + _BIT_INDEX[(lowest * _DE_BRUIJN) >> _U(58)]
                found += _U(1)
                word ^= lowest
        for one in range(begun, found):
            draws[one] = mixed(key ^ _U(index[one]))
            index[one] += np.int64(base)
    return np.int64(found)


@compiled
def _corrupt(index: Any, draws: Any, masked: Any, replaced: Any, tokens: Any, targets: Any) -> None:
    """Store the true residues at the chosen positions, and write what the model is shown there.

    index int64, draws uint64 [M], from `_choose`; tokens int64 [T], changed; targets int64 [M], filled.
    """
    actions, rest, kept = np.empty(index.size, dtype=np.uint64), np.empty(index.size, dtype=np.int64), 0
    for at in range(index.size):
        actions[at] = drawn(draws[at], ACTION_STREAM)
    for at in range(index.size):
        true = tokens[index[at]]
        targets[at] = true
        tokens[index[at]] = MASK_ID if actions[at] < masked else true
    for at in range(index.size):
        rest[kept] = at
        kept += (actions[at] >= masked) & (actions[at] < replaced)
    for at in rest[:kept]:
        word, letter = drawn(draws[at], RESIDUE_STREAM), targets[at] - FIRST_RESIDUE_ID
        if 0 <= letter < NUM_STANDARD_RESIDUES:  # shift by 1 to 19: never the original residue
            letter += 1 + scaled(word, NUM_STANDARD_RESIDUES - 1)
        else:
            letter = scaled(word, NUM_STANDARD_RESIDUES)
        tokens[index[at]] = letter % NUM_STANDARD_RESIDUES + FIRST_RESIDUE_ID


class MaskedResidues(NamedTuple):
    """tokens uint8 [residues], what the model is shown; chosen bool [residues], where it predicts."""

    tokens: NDArray[np.uint8]
    chosen: NDArray[np.bool_]


def mask_sequences(
    residues: NDArray[np.uint8], lengths: NDArray[np.int64], keys: UInt64Array, policy: MaskingPolicy
) -> MaskedResidues:
    """Apply `mask_row` to concatenated sequences without special tokens. The input is not changed.

    residues: uint8 [residues]; lengths: int64 [sequences]; keys: uint64 [sequences], `derive_key(seed, epoch, sample)`.
    """
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(np.asarray(lengths) + SPECIAL_TOKENS_PER_SEQUENCE, out=cu_seqlens[1:])
    positions = residue_positions(lengths)
    row = np.zeros(cu_seqlens[-1], dtype=np.int64)
    row[positions] = residues
    index, targets, chosen = np.empty_like(row), np.empty_like(row), np.zeros(row.size, dtype=np.bool_)
    count = mask_row(np.ascontiguousarray(keys), cu_seqlens, policy.thresholds, row, index, targets)
    chosen[index[:count]] = True
    return MaskedResidues(row[positions].astype(np.uint8), chosen[positions])


def residue_positions(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in a packed row of the residues of concatenated sequences: lengths int64 [S] -> int64 [residues].

    A residue moves right by the special tokens before it: one `<cls>`, and two for each earlier sequence.
    """
    shift = SPECIAL_TOKENS_PER_SEQUENCE * np.arange(len(lengths)) + 1
    return np.arange(np.sum(lengths, dtype=np.int64)) + np.repeat(shift, lengths)
