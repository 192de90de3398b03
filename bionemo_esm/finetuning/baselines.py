"""The composition baseline: predictions from amino-acid frequencies, without a neural network.

Per protein: a linear model (scikit-learn) of the shares of the 20 amino acids and the logarithm of the length, as in
the first predictors of subcellular localization (Nakashima & Nishikawa 1994); its penalty is chosen on the validation
set by the task's metric. Per residue: the class frequencies, or the mean, of training residues of the same amino acid.
The result is deterministic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES, VOCABULARY_SIZE
from bionemo_esm.finetuning.metrics import scores
from bionemo_esm.finetuning.splits import LabelledDataset, Splits
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.inputs import Protein

Floats = NDArray[np.float64]
Predict = Callable[[Sequence[Protein]], list[Prediction]]
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C of a logistic regression; 1 / C is a ridge's alpha
_MANY_CLASSES = 100  # from which on the penalty is not chosen, as a fit takes long
_STEPS, _STEPS_OF_MANY = 1000, 50  # of L-BFGS, at most


def fitted_composition(splits: Splits) -> Predict:
    """Fit the baseline to the training set; return a function from proteins to predictions."""
    return _per_residue(splits) if splits.task.is_per_residue else _per_protein(splits)


def composition(proteins: Sequence[Protein]) -> Floats:
    """Return the shares of the 20 standard amino acids and the natural logarithm of the length, [S, 21]."""
    found = np.zeros((len(proteins), NUM_STANDARD_RESIDUES + 1))
    for row, protein in zip(found, proteins, strict=True):
        counts = np.bincount(protein.tokens, minlength=VOCABULARY_SIZE)
        row[:-1] = counts[FIRST_RESIDUE_ID : FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES] / protein.residues
        row[-1] = np.log(protein.residues)
    return found


def _per_residue(splits: Splits) -> Predict:
    """Predict by look-up in [33, C]: frequencies by token id; of all residues for ids that training lacks."""
    train = splits.train
    tokens = np.concatenate([protein.tokens for protein in train.proteins])
    targets = np.concatenate(train.targets).astype(np.float64)
    tokens, targets = tokens[~np.isnan(targets)], targets[~np.isnan(targets)]
    if splits.task.is_classification:
        shown: Floats = np.zeros((VOCABULARY_SIZE, splits.task.outputs))
        np.add.at(shown, (tokens, targets.astype(np.int64)), 1.0)
    else:
        shown = np.bincount(tokens, weights=targets, minlength=VOCABULARY_SIZE)[:, None].astype(np.float64)
    seen = np.bincount(tokens, minlength=VOCABULARY_SIZE)[:, None].astype(np.float64)
    table = np.where(seen > 0, shown / np.maximum(seen, 1), shown.sum(axis=0) / seen.sum()).astype(np.float32)
    return lambda proteins: [table[protein.tokens] for protein in proteins]


def _per_protein(splits: Splits) -> Predict:
    """Return the fit whose penalty validates best; of equal ones the stronger penalty."""
    task, validation = splits.task, splits.validation
    best: tuple[float, Predict] | None = None
    for inverse_penalty in (1.0,) if task.outputs > _MANY_CLASSES else INVERSE_PENALTIES:
        predict = _fitted(task, splits.train, inverse_penalty)
        score = scores(task, validation.targets, predict(validation.proteins))[task.metric]
        if best is None or task.is_better(score, best[0]):
            best = score, predict
    assert best is not None
    return best[1]


def _fitted(task: Task, train: LabelledDataset, inverse_penalty: float) -> Predict:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    targets = np.concatenate(train.targets)
    there = ~np.isnan(targets)
    features = composition(train.proteins)[there]
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    steps = _STEPS_OF_MANY if task.outputs > _MANY_CLASSES else _STEPS
    model = (
        LogisticRegression(C=inverse_penalty, max_iter=steps)
        if task.is_classification
        else Ridge(alpha=1 / inverse_penalty)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - mean) / scale, targets[there])

    def predict(proteins: Sequence[Protein]) -> list[Prediction]:
        predicted = np.zeros((len(proteins), task.outputs), dtype=np.float32)
        if len(proteins):
            standard = (composition(proteins) - mean) / scale
            if task.is_classification:  # classes in the training set
                predicted[:, model.classes_.astype(np.int64)] = model.predict_proba(standard)
            else:
                predicted[:, 0] = model.predict(standard)
        return [predicted[begin:end] for begin, end in pairwise(range(len(proteins) + 1))]

    return predict
