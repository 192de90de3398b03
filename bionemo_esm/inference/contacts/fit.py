"""A contact head from a few structures: L1 logistic regression on attention maps (Rao et al. 2020,
doi:10.1101/2020.12.15.422761), and how well it does on other structures.

scikit-learn's liblinear with C = 0.15 on the pairs of residues at least 6 apart, as in the paper; the intercept is
penalised as liblinear does it. Shape suffixes: P pairs of residues, F attention heads of all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bionemo_esm.inference.contacts.features import attention_features
from bionemo_esm.inference.contacts.metrics import Precisions, precisions
from bionemo_esm.inference.contacts.pairs import FitChoice, Pairs
from bionemo_esm.inference.contacts.prediction import Reach, predict_contacts
from bionemo_esm.inference.contacts.structures import Structure
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.contact_head import ContactHead
from bionemo_esm.model.encoder import ESMEncoder

_MOST_ROUNDS = 1000


class Regression(NamedTuple):
    """A fitted one."""

    weight: NDArray[np.float64]  # [F]
    bias: float
    rounds: int
    converged: bool


def fit_head(
    engine: Engine,
    train: Sequence[Structure],
    pairs: Sequence[Pairs],
    choice: FitChoice,
    answered: Callable[[int], None] = lambda residues: None,
) -> Regression:
    """The regression over an engine's attention at some pairs; the same for the same input."""
    features = engine.layers * engine.config.num_attention_heads
    features_PF = np.empty((sum(len(part.first) for part in pairs), features), dtype=np.float32)
    at = 0
    for structure, part in zip(train, pairs, strict=True):
        features_PF[at : at + len(part.first)] = attention_features(engine, structure.tokens, part)
        at += len(part.first)
        answered(structure.residues)
    return fit_regression(features_PF, np.concatenate([part.touch for part in pairs]), choice.strength, choice.seed)


def fit_regression(
    features_PF: NDArray[np.float32], touch_P: NDArray[np.bool_], strength: float, seed: int
) -> Regression:
    """L1 logistic regression by liblinear."""
    import sklearn
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    lasso = {"l1_ratio": 1.0} if version >= (1, 8) else {"penalty": "l1"}
    model = LogisticRegression(C=strength, solver="liblinear", random_state=seed, max_iter=_MOST_ROUNDS, **lasso)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        model.fit(features_PF, touch_P)
    rounds = int(model.n_iter_[0])
    return Regression(model.coef_[0].astype(np.float64), float(model.intercept_[0]), rounds, rounds < _MOST_ROUNDS)


def head_of(regression: Regression) -> ContactHead:
    """The regression as a part of a model, in float32."""
    head = ContactHead(len(regression.weight))
    assert isinstance(head.weight, torch.Tensor) and isinstance(head.bias, torch.Tensor)
    head.weight.copy_(torch.from_numpy(regression.weight)[None])
    head.bias.fill_(regression.bias)
    return head


@contextmanager
def with_head(engine: Engine, head: ContactHead) -> Iterator[None]:
    """The engine has this contact head within."""
    before = engine.encoder.contact_head
    engine.encoder.contact_head = head.to(engine.device)
    try:
        yield
    finally:
        engine.encoder.contact_head = before


def untrained(engine: Engine, seed: int) -> Engine:
    """A model of the same shape and precision with the random weights that pretraining would begin with."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, where neither Apex nor Transformer Engine is installed
        torch.manual_seed(seed)
        backends = choose_backends(engine.device.type, engine.dtype, 0.0)
        encoder = ESMEncoder(engine.config, engine.dtype, backends).to(engine.dtype).to(engine.device)
    return Engine(encoder, engine.config, engine.batch_tokens)


# --- how well it does -------------------------------------------------------------------------------------------------


def evaluate(
    engine: Engine,
    regression: Regression,
    structures: Sequence[Structure],
    choice: FitChoice,
    answered: Callable[[int], None] = lambda residues: None,
) -> list[Precisions]:
    """Of each structure the precisions of what the engine predicts with this regression as its contact head."""
    found: list[Precisions] = [{} for _ in structures]
    with with_head(engine, head_of(regression)):
        tokens = [structure.tokens for structure in structures]
        for place, scores_RR in predict_contacts(engine, tokens, Reach.of(engine)):
            answered(structures[place].residues)
            found[place] = precisions(scores_RR, structures[place], choice.contact_angstrom)
    return found


def evaluate_separation(pairs: Sequence[Pairs], structures: Sequence[Structure], choice: FitChoice) -> list[Precisions]:
    """The precisions of a predictor that sees no sequence: how often pairs as far apart as these touch in training."""
    apart = np.concatenate([part.second - part.first for part in pairs])
    touch = np.concatenate([part.touch for part in pairs])
    longest = max([int(apart.max()), *(structure.residues for structure in structures)])
    all_of, touching = np.bincount(apart, minlength=longest + 1), np.bincount(apart[touch], minlength=longest + 1)
    share = touching / np.maximum(all_of, 1)
    found = []
    for structure in structures:
        places = np.arange(structure.residues)
        scores_RR = share[np.abs(places[:, None] - places[None, :])]
        found.append(precisions(scores_RR, structure, choice.contact_angstrom))
    return found


def best_possible(structures: Sequence[Structure], choice: FitChoice) -> list[Precisions]:
    """The precisions of the true contacts themselves: below 1 where a protein has fewer than are asked for."""
    below = choice.contact_angstrom
    return [precisions(structure.contacts(below).astype(np.float32), structure, below) for structure in structures]
