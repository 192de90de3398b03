"""Sets split off a training set at random, the same whatever the order of its records.

A sequence's place is drawn by a keyed hash of the sequence itself, so that equal ones go together. Similar ones may
part: a split by families is for the files to bring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.entries import Entry
from bionemo_esm.finetuning.records import TEST, TRAIN, VALIDATION
from bionemo_esm.finetuning.tasks import SplitConfig


def split_off(entries: Sequence[Entry], shares: SplitConfig, seed: int) -> dict[str, list[Entry]]:
    """The entries of train, validation and test, each in its order; shares of 0 give empty sets, others no empty one.

    Raises `ConfigError` where there are too few different sequences for that.
    """
    drawn = sorted({entry.sequence for entry in entries}, key=lambda sequence: _draw(sequence, seed))
    test = max(round(shares.test * len(drawn)), int(shares.test > 0))
    validation = max(round(shares.validation * len(drawn)), int(shares.validation > 0))
    if test + validation >= len(drawn):
        raise ConfigError(
            f"data.split.validation={shares.validation} and data.split.test={shares.test} leave none of "
            f"{len(drawn):,} different sequences to train on; give more proteins, or files of each set"
        )
    places = dict.fromkeys(drawn, TRAIN) | dict.fromkeys(drawn[test : test + validation], VALIDATION)
    places |= dict.fromkeys(drawn[:test], TEST)
    return {name: [one for one in entries if places[one.sequence] == name] for name in (TRAIN, VALIDATION, TEST)}


def _draw(sequence: bytes, seed: int) -> bytes:
    return hashlib.blake2b(sequence, digest_size=16, key=str(seed).encode()).digest()
