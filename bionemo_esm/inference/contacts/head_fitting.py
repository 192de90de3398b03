"""A contact head from a few structures: L1 logistic regression on attention maps (Rao et al. 2020,
doi:10.1101/2020.12.15.422761), and how well it does on other structures.

scikit-learn's liblinear with C = 0.15 on the pairs of residues at least 6 apart, as in the paper; the intercept is
penalised as liblinear does it. Shape suffixes: P pairs of residues, F attention heads of all layers.

What a contact head is fitted on: which structures, which pairs of their residues, and whether memory does for them.

Neither torch nor scikit-learn is imported. Shape suffix: P pairs of residues.

What a contact head is fitted on: for pairs of residues, the corrected attention of every head of every layer.

Shape suffixes: R residues of a protein, N heads of a layer, P pairs of residues, F heads of all layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.batching import Residues
from bionemo_esm.inference.contacts.metrics import Precisions, precisions
from bionemo_esm.inference.contacts.prediction import WindowSpec, predict_contacts
from bionemo_esm.inference.contacts.structures import CONTACT_ANGSTROM, Structure
from bionemo_esm.inference.engine import Engine
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.contact_head import ContactHead, regression_features
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.feature_extraction import observe_attention_maps

_BYTES_OF_A_FEATURE = 40
"""4 as a float32; liblinear turns each into 16 bytes, an index and a float64, and for L1 transposes a copy of those."""


@dataclass(frozen=True)
class FitOptions:
    """What is fitted on what. Raises `ConfigError`, naming the key."""

    train: int | tuple[str, ...] = 20  # how many structures, drawn by the seed, or their ids
    seed: int = 0
    strength: float = 0.15  # C, the inverse of the L1 penalty's
    contact_angstrom: float = CONTACT_ANGSTROM
    separation: int = 6  # |i - j| of a pair, at least
    most_pairs: int | None = None  # to fit on, drawn from those of all structures; None: all

    def __post_init__(self) -> None:
        if not self.train or (isinstance(self.train, int) and self.train < 1):
            raise ConfigError("train must be a number of structures, 1 or more, or a list of their ids")
        for key, value in (("C", self.strength), ("contact_angstrom", self.contact_angstrom)):
            if not 0 < value < np.inf:
                raise ConfigError(f"{key} must be over 0, not {value}")
        for key, count in (("separation", self.separation), ("most_pairs", self.most_pairs)):
            if count is not None and count < 1:
                raise ConfigError(f"{key} must be at least 1, not {count}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 2**32 - 1, not {self.seed}")


class Division(NamedTuple):
    """Which structures are fitted on, and which are asked about."""

    train: list[Structure]
    held_out: list[Structure]
    repeated: int  # left out: of each sequence the first structure stays
    without_pairs: int  # left out: no two resolved residues far enough apart in the sequence


class Pairs(NamedTuple):
    """Some pairs of residues of one protein, the first before the second, and which of them touch."""

    first: NDArray[np.int64]  # [P]
    second: NDArray[np.int64]  # [P]
    touch: NDArray[np.bool_]  # [P]


def pairs_of(structure: Structure, separation: int, below: float) -> Pairs:
    """All pairs at least `separation` apart in the sequence of which both residues are resolved."""
    first, second = np.triu_indices(structure.residues, separation)
    known = structure.resolved[first] & structure.resolved[second]
    first, second = first[known], second[known]
    return Pairs(first, second, structure.contacts(below)[first, second])


def some_of(pairs: list[Pairs], most: int | None, seed: int) -> list[Pairs]:
    """Of the pairs of several proteins at most so many, drawn from all alike, so that contacts keep their share."""
    total = sum(len(part.first) for part in pairs)
    if most is None or total <= most:
        return pairs
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(total)[:most]] = True
    bounds = np.cumsum([len(part.first) for part in pairs])[:-1]
    kept = zip(pairs, np.split(chosen, bounds), strict=True)
    return [Pairs(part.first[keep], part.second[keep], part.touch[keep]) for part, keep in kept]


def divide(structures: Sequence[Structure], options: FitOptions, window: int) -> Division:
    """Structures to fit on, of up to `window` residues, and all others; no sequence is in both, or twice.

    Raises `ConfigError` where there are not as many, or not these.
    """
    distinct = list({structure.tokens.tobytes(): structure for structure in reversed(structures)}.values())[::-1]
    usable = [structure for structure in distinct if len(pairs_of(structure, options.separation, 1.0).first)]
    fitting = [structure for structure in usable if structure.residues <= window]
    if isinstance(options.train, int):
        if options.train > len(fitting):
            raise ConfigError(
                f"train={options.train}: there are {len(fitting)} structures to fit on; it takes different sequences "
                f"of up to {window} residues, with two resolved residues {options.separation} or more apart"
            )
        drawn = np.random.default_rng(options.seed).permutation(len(fitting))[: options.train]
        train = [fitting[place] for place in sorted(drawn.tolist())]
    else:
        train = _named(structures, options.train, {structure.id for structure in fitting}, window)
    seen = {structure.tokens.tobytes() for structure in train}
    held_out = [structure for structure in usable if structure.tokens.tobytes() not in seen]
    return Division(train, held_out, len(structures) - len(distinct), len(distinct) - len(usable))


def _named(structures: Sequence[Structure], ids: Sequence[str], fitting: set[str], window: int) -> list[Structure]:
    by_id = {structure.id: structure for structure in structures}
    for place, identifier in enumerate(ids):
        if identifier not in by_id:
            some = ", ".join(list(by_id)[:10])
            raise ConfigError(
                f"train: no structure is named {identifier}; there are {some}{', ...' * (len(by_id) > 10)}"
            )
        if identifier in ids[:place]:
            raise ConfigError(f"train: {identifier} is named twice")
        if identifier not in fitting:
            raise ConfigError(
                f"train: {identifier} cannot be fitted on: it has the sequence of an earlier structure, over {window} "
                "residues, or no two resolved residues far enough apart"
            )
    return [by_id[identifier] for identifier in ids]


def training_pairs(train: Sequence[Structure], options: FitOptions) -> list[Pairs]:
    """The pairs of each structure that are fitted on. Raises `UserError` where none touches, or all do."""
    pairs = [pairs_of(structure, options.separation, options.contact_angstrom) for structure in train]
    pairs = some_of(pairs, options.most_pairs, options.seed)
    touching, total = sum(int(part.touch.sum()) for part in pairs), sum(len(part.touch) for part in pairs)
    if touching in (0, total):
        raise UserError(f"{touching} of {total:,} pairs touch, so there is nothing to tell apart; give more structures")
    return pairs


def bytes_to_fit(pairs: int, features: int) -> int:
    """Memory that fitting takes at its peak."""
    return pairs * features * _BYTES_OF_A_FEATURE


def check_memory(pairs: int, features: int) -> None:
    """Raises `UserError` where fitting takes more memory than this machine has."""
    needed, there = bytes_to_fit(pairs, features), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        enough = int(0.5 * there / features / _BYTES_OF_A_FEATURE)
        raise UserError(
            f"fitting on {pairs:,} pairs x {features:,} attention heads takes {needed / 1e9:.1f} GB, more than the "
            f"{there / 1e9:.1f} GB of this machine; most_pairs={enough} draws so many of them"
        )


@torch.inference_mode()
def attention_features(engine: Engine, tokens: Residues, pairs: Pairs) -> NDArray[np.float32]:
    """Symmetrised and corrected attention at the pairs: float32 [P, F], in the order of a contact head's weights.

    Of the attention maps one layer's at a time is there, float32 [N, R + 2, R + 2].
    """
    heads = engine.config.num_attention_heads
    features_PF = np.empty((len(pairs.first), heads * engine.layers), dtype=np.float32)
    first, second = (torch.from_numpy(places).to(engine.device) for places in (pairs.first, pairs.second))

    def to_native(layer: int, maps: list[Tensor]) -> None:
        corrected_NRR = regression_features(maps[0])
        features_PF[:, (layer - 1) * heads : layer * heads] = corrected_NRR[:, first, second].T.cpu().numpy()

    observe_attention_maps(engine.encoder, engine.packed([tokens]), to_native)
    return features_PF


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
    options: FitOptions,
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
    return fit_regression(features_PF, np.concatenate([part.touch for part in pairs]), options.strength, options.seed)


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
        torch.default_generator.manual_seed(seed)
        backends = choose_backends(engine.device.type, engine.dtype, 0.0)
        encoder = ESMEncoder(engine.config, engine.dtype, backends).to(engine.device)
    return Engine(encoder, engine.config, engine.batch_tokens)


# --- how well it does -------------------------------------------------------------------------------------------------


def evaluate(
    engine: Engine,
    regression: Regression,
    structures: Sequence[Structure],
    options: FitOptions,
    answered: Callable[[int], None] = lambda residues: None,
) -> list[Precisions]:
    """Of each structure the precisions of what the engine predicts with this regression as its contact head."""
    found: list[Precisions] = [{} for _ in structures]
    with with_head(engine, head_of(regression)):
        tokens = [structure.tokens for structure in structures]
        for place, scores_RR in predict_contacts(engine, tokens, WindowSpec.of(engine)):
            answered(structures[place].residues)
            found[place] = precisions(scores_RR, structures[place], options.contact_angstrom)
    return found


def evaluate_separation(
    pairs: Sequence[Pairs], structures: Sequence[Structure], options: FitOptions
) -> list[Precisions]:
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
        found.append(precisions(scores_RR, structure, options.contact_angstrom))
    return found


def best_possible(structures: Sequence[Structure], options: FitOptions) -> list[Precisions]:
    """The precisions of the true contacts themselves: below 1 where a protein has fewer than are asked for."""
    below = options.contact_angstrom
    return [precisions(structure.contacts(below).astype(np.float32), structure, below) for structure in structures]
