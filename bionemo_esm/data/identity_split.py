"""A split without relatives: no held-out protein has one over a given identity in train, or in the other held-out set.

All sequences are searched in all, with MMseqs2 and the options of `leakage`. Sequences that a chain of hits connects
are a family (single linkage, not a cluster around a representative: two members of different clusters may be
relatives). Families are dealt whole, in the order of a keyed hash, so the split depends on the seed and the sequences
alone. A family that is larger than the room left in a held-out set is passed over; single proteins fill the rest, so
the sizes are nearly always exact.

The search needs about 120 bytes of disk a sequence beside its residues, and its time grows with the square of their
number at worst: minutes for 50,000 proteins on two cores. UniRef50 (54 million) is split at random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.data.hashing import derive_key
from bionemo_esm.data.kernels import compiled
from bionemo_esm.data.leakage import DEFAULT_SENSITIVITY, LeakageError, mmseqs_version, similar_pairs
from bionemo_esm.data.preprocess import BuildPolicy, PathLike, Progress, build_store
from bionemo_esm.data.store import SPLITS, ProteinStore, SequenceSplit, StoreError, StoreWriter

COVERAGE = 0.8  # of both sequences, as in `check-leakage`
LOW_IDENTITY, HIGH_SENSITIVITY = 0.5, 7.5
"""Identity below which the search is as sensitive as it can be; at 4 it finds every pair of half-identical ones."""
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))
_FAMILY_STREAM = 8  # keeps the order of families apart from other keyed hashes
_SEQUENCES = 2**14  # written at once


class Families(NamedTuple):
    """Families of sequences: `family` int64 [sequences] is the number of each one's family, from 0."""

    family: NDArray[np.int64]
    sizes: NDArray[np.int64]  # [families]


def build_identity_store(
    fasta: PathLike | Sequence[PathLike],
    output: PathLike,
    policy: BuildPolicy,
    identity: float = 0.3,
    *,
    release: str | None = None,
    licence: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> ProteinStore:
    """Build a store whose held-out sequences have no relative of at least this identity in another split.

    The counts of the policy are reached but for the size of one family. Raises as `build_store` does; `LeakageError`
    without MMseqs2, or if it fails; `StoreError` if the families are too large to hold out any.
    """
    version = mmseqs_version()
    if not 0 < identity <= 1:
        raise LeakageError(f"split.identity is {identity}; it is a share, over 0 and at most 1")
    sensitivity = HIGH_SENSITIVITY if identity < LOW_IDENTITY else DEFAULT_SENSITIVITY
    folder = Path(output).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with StoreWriter(folder) as writer, tempfile.TemporaryDirectory(prefix=".identity-", dir=folder.parent) as scratch:
        whole_policy = policy.replace(validation_sequences=0, test_sequences=0)
        given: dict[str, Any] = {"release": release, "licence": licence, "threads": threads, "progress": progress}
        whole = build_store(fasta, Path(scratch) / "all", whole_policy, **given)
        everything = whole.split("train")
        wanted = policy.held_out(len(everything), "split.by=identity")
        tell(f"searching {len(everything):,} sequences in themselves for relatives of {identity:.0%} identity")
        options: dict[str, Any] = {
            "identity": identity,
            "coverage": COVERAGE,
            "sensitivity": sensitivity,
            "threads": threads,
        }
        families = families_of(len(everything), similar_pairs(whole, "train", Path(scratch), **options))
        codes = deal(families, wanted, policy.seed)
        _write(everything, codes, writer)
        provenance = {key: whole.manifest[key] for key in ("source", "release", "licence", "counts")}
        split = {
            **{"by": "identity", "identity": identity, "coverage": COVERAGE, "sensitivity": sensitivity},
            **{"mmseqs_version": version, "families": len(families.sizes)},
            "largest_family": int(families.sizes.max()),
        }
        writer.finish({**provenance, "policy": policy.model_dump(), "split": split})
    return ProteinStore.open(output)


def families_of(sequences: int, pairs: Any) -> Families:
    """Return the families of so many sequences. pairs: blocks int64 [n, 2] of the numbers of two relatives."""
    parents = np.arange(sequences, dtype=np.int64)
    for block in pairs:
        _join(parents, np.ascontiguousarray(block, dtype=np.int64))
    _flatten(parents)
    _, family, sizes = np.unique(parents, return_inverse=True, return_counts=True)
    return Families(family.astype(np.int64), sizes.astype(np.int64))


@compiled
def _root(parents: Any, at: Any) -> Any:
    """Return the root of a tree, and halve the path to it; parents int64 [n], changed."""
    while parents[at] != at:
        parents[at] = parents[parents[at]]
        at = parents[at]
    return at


@compiled
def _join(parents: Any, pairs: Any) -> None:
    """Join the trees of each pair under the smaller root; parents int64 [n], changed; pairs int64 [m, 2]."""
    for row in range(pairs.shape[0]):
        first, second = _root(parents, pairs[row, 0]), _root(parents, pairs[row, 1])
        parents[max(first, second)] = min(first, second)


@compiled
def _flatten(parents: Any) -> None:
    for at in range(parents.size):
        parents[at] = _root(parents, at)


def deal(families: Families, wanted: tuple[int, int], seed: int) -> NDArray[np.int8]:
    """Return the split of each sequence, int8 [sequences]: 0 train, 1 validation, 2 test.

    wanted: sequences of validation and test. Raises `StoreError` if one of them gets no family although it should.
    """
    order = np.argsort(derive_key(seed, _FAMILY_STREAM, np.arange(len(families.sizes))), kind="stable")
    of_family = np.full(len(families.sizes), _TRAIN, dtype=np.int8)
    sizes = families.sizes[order]
    for code, count in ((_VALIDATION, wanted[0]), (_TEST, wanted[1])):
        free = of_family[order] == _TRAIN
        left = _fill(sizes, free, count, of_family, order, code)
        if count and left == count:
            raise StoreError(
                f"split.by=identity: no family of relatives is left with at most the {count:,} sequences of "
                f"{SPLITS[code]} (the largest has {int(sizes.max()):,}); raise split.identity or "
                f"split.{SPLITS[code]}, or set split.by=random",
                code="preprocess.large-families",
            )
    return of_family[families.family]


def _fill(
    sizes: NDArray[np.int64], free: NDArray[np.bool_], room: int, codes: NDArray[np.int8], order: Any, code: int
) -> int:
    """Give free families to a split while they fit; return the room that is left."""
    for place in np.flatnonzero(free).tolist():
        if room == 0:
            break
        if sizes[place] <= room:
            codes[order[place]] = code
            room -= int(sizes[place])
    return room


def _write(split: SequenceSplit, codes: NDArray[np.int8], writer: StoreWriter) -> None:
    for begin in range(0, len(split), _SEQUENCES):
        numbers = np.arange(begin, min(begin + _SEQUENCES, len(split)))
        lengths = split.lengths[numbers]
        tokens = split.gather(numbers, np.zeros_like(numbers), lengths)
        for code, name in enumerate(SPLITS):
            writer.add_many(name, tokens, lengths, chosen=codes[numbers] == code)
