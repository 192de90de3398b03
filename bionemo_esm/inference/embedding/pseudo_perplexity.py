"""How well a model knows a protein: the pseudo-perplexity of Salazar et al. 2020 (doi:10.18653/v1/2020.acl-main.240).

exp(-1/R * sum over its R residues of log p(residue | all the others)), each residue hidden alone: a pass a residue. The
probabilities are over all 33 tokens. 1 is certainty; 20 is a guess among the standard residues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bionemo_esm.inference.engine import Engine, Question, Residues, masked
from bionemo_esm.inference.windows import window_around


def pseudo_perplexities(
    engine: Engine,
    proteins: Sequence[Residues],
    window: int,
    answered: Callable[[int], None] = lambda residues: None,
) -> Iterator[float]:
    """The pseudo-perplexity of each protein, in order; summed in float64.

    Of a protein over `window` residues, each residue is hidden in the window that has it in its middle, or as near to
    that as the protein's ends allow. `answered` is told of each residue.
    """
    answers = engine.log_probabilities(question for tokens in proteins for question in _each_hidden(tokens, window))
    for tokens in proteins:
        total = 0.0
        for residue in tokens.tolist():
            total += float(next(answers)[0, residue])
            answered(1)
        yield math.exp(-total / len(tokens))


def _each_hidden(tokens: Residues, window: int) -> Iterator[Question]:
    for place in range(len(tokens)):
        begin, end = window_around(place, place, len(tokens), window)
        yield masked(tokens[begin:end], np.array([place - begin], dtype=np.int64))
