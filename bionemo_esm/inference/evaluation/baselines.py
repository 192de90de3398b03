"""Baselines without a model: residue frequencies, and n-grams of the neighbours, counted over a training split.

An n-gram predicts a residue from its visible neighbours: one on each side, or two. A neighbour that is masked itself is
unknown: the counts are then summed over it. Counts of few occurrences are mixed with the smaller context (Dirichlet
prior; MacKay and Peto 1995); the weight of the prior maximises the likelihood of the validation split, or, without one,
the leave-one-out likelihood of the training split.
Shape suffixes: K masked residues, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, MASK_ID, NUM_STANDARD_RESIDUES, VOCABULARY_SIZE
from bionemo_esm.data.kernels import compiled
from bionemo_esm.data.store import SequenceSplit
from bionemo_esm.inference.evaluation.masked import MaskedProtein

Floats = NDArray[np.float64]

FREQUENCIES, TWO_NEIGHBOURS, FOUR_NEIGHBOURS = "residue frequencies", "two neighbours", "four neighbours"
BASELINES = (FREQUENCIES, TWO_NEIGHBOURS, FOUR_NEIGHBOURS)
MOST_RESIDUES = 50_000_000
"""Residues that n-grams are counted over at most, of sequences that are spread evenly over the split."""

OTHER, OUTSIDE, UNKNOWN = NUM_STANDARD_RESIDUES, NUM_STANDARD_RESIDUES + 1, NUM_STANDARD_RESIDUES + 2
"""Classes after the 20 standard residues: other residues, beyond an end of the protein, masked."""
_TARGETS, _CONTEXTS = OTHER + 1, UNKNOWN + 1
_PRIORS = tuple(4.0**power for power in range(11))  # weights that are tried, in occurrences


def _class_table() -> NDArray[np.int64]:
    classes = np.full(256, OTHER, dtype=np.int64)  # of any byte: a store's tokens are not checked
    classes[FIRST_RESIDUE_ID : FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES] = np.arange(NUM_STANDARD_RESIDUES)
    classes[MASK_ID] = UNKNOWN
    return classes


_CLASS_OF = _class_table()
_TARGET_OF = np.minimum(_CLASS_OF[:VOCABULARY_SIZE], OTHER)


@compiled
def _count(tokens: Any, begins: Any, lengths: Any, class_of: Any, counts: Any) -> None:
    """Add each residue to the counts of its four neighbours' classes.

    tokens uint8 [residues of the split]; begins, lengths int64 [sequences]; class_of int64 [256]; counts int64
    [C, C, C, C, targets], changed: two neighbours before, two after, and the residue's own class.
    """
    for at in range(begins.size):
        begin, length = begins[at], lengths[at]
        second = first = OUTSIDE
        own = class_of[tokens[begin]] if length > 0 else OUTSIDE
        after = class_of[tokens[begin + 1]] if length > 1 else OUTSIDE
        for place in range(length):
            beyond = class_of[tokens[begin + place + 2]] if place + 2 < length else OUTSIDE
            counts[second, first, after, beyond, own] += 1
            second, first, own, after = first, own, after, beyond


@dataclass(frozen=True)
class NeighbourCounts:
    """Counts over a training split, and the n-grams of them."""

    counts: NDArray[np.float32]  # [C, C, C, C, targets]; index UNKNOWN of a neighbour is the sum over it
    frequencies: Floats  # [33], of the whole split; one is added to each count
    share: Floats  # [33], of each token within its class
    two_prior: float  # weight of the frequencies in the two-neighbour n-gram, in occurrences
    four_prior: float  # weight of the two-neighbour n-gram in the four-neighbour n-gram

    @classmethod
    def of(
        cls, train: SequenceSplit, validation: SequenceSplit | None = None, most_residues: int = MOST_RESIDUES
    ) -> NeighbourCounts:
        """Count the sequences of a training split, or so many of them that they have about `most_residues`."""
        occurrences = train.residue_counts().astype(np.float64) + 1.0
        held_out = counted(validation, most_residues) if validation is not None and len(validation) else None
        return cls.of_counts(counted(train, most_residues), occurrences, held_out)

    @classmethod
    def of_counts(
        cls, counts: NDArray[np.int64], occurrences: Floats, held_out: NDArray[np.int64] | None = None
    ) -> NeighbourCounts:
        """Return the n-grams of `counted` sequences. occurrences: float64 [33], of each token, all positive."""
        of_class = np.bincount(_TARGET_OF, occurrences, _TARGETS)
        unigram = of_class / of_class.sum()
        two = counts.sum(axis=(0, 3))
        two_prior = _best_prior(two, unigram, None if held_out is None else held_out.sum(axis=(0, 3)))
        four_prior = _best_prior(counts, _mixed(two, unigram, two_prior)[None, :, :, None], held_out)
        for axis in range(4):
            index: list[Any] = [slice(None)] * 5
            index[axis] = UNKNOWN
            counts[tuple(index)] = counts.sum(axis=axis)
        return cls(
            counts.astype(np.float32),
            occurrences / occurrences.sum(),
            occurrences / of_class[_TARGET_OF],
            two_prior,
            four_prior,
        )

    def log_probabilities(self, baseline: str, protein: MaskedProtein) -> Floats:
        """Return log-probabilities of the 33 tokens at the masked residues of a protein: float64 [K, 33]."""
        if baseline == FREQUENCIES:
            return np.broadcast_to(np.log(self.frequencies), (len(protein.positions), VOCABULARY_SIZE))
        padded = np.full(len(protein.tokens) + 4, OUTSIDE)
        padded[2:-2] = _CLASS_OF[protein.shown]
        second, first, after, beyond = (padded[protein.positions + 2 + shift] for shift in (-2, -1, 1, 2))
        unigram = np.bincount(_TARGET_OF, self.frequencies, _TARGETS)
        found = _mixed(self.counts[UNKNOWN, first, after, UNKNOWN].astype(np.float64), unigram, self.two_prior)
        if baseline == FOUR_NEIGHBOURS:
            found = _mixed(self.counts[second, first, after, beyond].astype(np.float64), found, self.four_prior)
        return np.log(found[:, _TARGET_OF] * self.share)


def counted(split: SequenceSplit, most_residues: int = MOST_RESIDUES) -> NDArray[np.int64]:
    """Return how often each class occurs between its four neighbours' classes: int64 [C, C, C, C, targets]."""
    wanted = max(1, int(len(split) * min(1.0, most_residues / max(split.residues, 1))))
    chosen = np.unique(np.linspace(0, len(split) - 1, wanted).astype(np.int64))
    counts = np.zeros((_CONTEXTS,) * 4 + (_TARGETS,), dtype=np.int64)
    _count(split.tokens, split.offsets[chosen], split.lengths[chosen].astype(np.int64), _CLASS_OF, counts)
    return counts


def _mixed(counts: NDArray[Any], smaller: NDArray[Any], prior: float) -> NDArray[Any]:
    """Return probabilities of counts [..., targets], mixed with those of the smaller context."""
    mixed: NDArray[Any] = (counts + prior * smaller) / (counts.sum(axis=-1, keepdims=True) + prior)
    return mixed


def _best_prior(counts: NDArray[np.int64], smaller: NDArray[Any], held_out: NDArray[np.int64] | None) -> float:
    """Return the weight under which the held-out residues are likeliest; without them, each residue given all others.

    Proteins without relatives in training need more weight than the leave-one-out choice, which sees paralogs.
    """
    asked = counts if held_out is None else held_out
    left_out = 1 if held_out is None else 0
    places = np.nonzero(asked)
    often, found = asked[places].astype(np.float64), counts[places].astype(np.float64) - left_out
    total = counts.sum(axis=-1)[places[:-1]].astype(np.float64) - left_out
    below = np.broadcast_to(smaller, counts.shape)[places]
    scores = [float(often @ np.log((found + prior * below) / (total + prior))) for prior in _PRIORS]
    return _PRIORS[int(np.argmax(scores))]
