"""Fitting a contact head: L1 logistic regression on attention maps (Rao et al. 2020, doi:10.1101/2020.12.15.422761).

scikit-learn's liblinear with C = 0.15 on the pairs of residues at least 6 apart, as in the paper; liblinear penalises
the intercept too. Shape suffixes: R residues of a protein, N heads of a layer, P pairs of residues, F heads of all
layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.inference.batching import Residues, WindowSpec
from bionemo_esm.inference.contacts.metrics import Precisions, precisions
from bionemo_esm.inference.contacts.structures import CONTACT_ANGSTROM, Structure
from bionemo_esm.settings import PositiveFloat, PositiveInt, Settings

if TYPE_CHECKING:  # torch and Megatron take seconds to import
    from torch import Tensor

    from bionemo_esm.inference.engine import Engine
    from bionemo_esm.model.contact_head import ContactHead

_BYTES_OF_A_FEATURE = 40
"""A float32, and twice 16 bytes in liblinear: an index and a float64, and a transposed copy of both for L1."""


class FitOptions(Settings):
    """The settings of a fit: structures, pairs of residues, regularization."""

    train: int | tuple[str, ...] = 20  # the number of structures, drawn by the seed, or their ids
    seed: int = Field(default=0, ge=0, lt=2**32)
    C: PositiveFloat = Field(default=0.15, allow_inf_nan=False)  # inverse strength of the L1 penalty
    contact_angstrom: PositiveFloat = Field(default=CONTACT_ANGSTROM, allow_inf_nan=False)
    separation: PositiveInt = 6  # |i - j| of a pair, at least
    most_pairs: PositiveInt | None = None  # to fit on, drawn from those of all structures; None: all

    @field_validator("train", mode="before")
    @classmethod
    def _number_or_ids(cls, train: Any) -> Any:
        ids = isinstance(train, list | tuple)
        if not train or isinstance(train, bool) or not (ids or (isinstance(train, int) and train >= 1)):
            raise ConfigError("train must be a number of structures, 1 or more, or a list of their ids")
        return tuple(map(str, train)) if ids else train


class Division(NamedTuple):
    """Structures to fit on, and structures to evaluate on."""

    train: list[Structure]
    held_out: list[Structure]
    repeated: int  # left out; the first structure of each sequence is kept
    without_pairs: int  # left out: no two resolved residues far enough apart in the sequence


class Pairs(NamedTuple):
    """Pairs of residues of one protein, the first before the second, and which of them are in contact."""

    first: NDArray[np.int64]  # [P]
    second: NDArray[np.int64]  # [P]
    touch: NDArray[np.bool_]  # [P]


def pairs_of(structure: Structure, separation: int, below: float) -> Pairs:
    """Return all pairs at least `separation` apart in the sequence whose residues are both resolved."""
    first, second = np.triu_indices(structure.residues, separation)
    known = structure.resolved[first] & structure.resolved[second]
    first, second = first[known], second[known]
    return Pairs(first, second, structure.contacts(below)[first, second])


def some_of(pairs: list[Pairs], most: int | None, seed: int) -> list[Pairs]:
    """Return at most `most` pairs of several proteins, drawn uniformly, so that the share of contacts stays."""
    total = sum(len(part.first) for part in pairs)
    if most is None or total <= most:
        return pairs
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(total)[:most]] = True
    bounds = np.cumsum([len(part.first) for part in pairs])[:-1]
    kept = zip(pairs, np.split(chosen, bounds), strict=True)
    return [Pairs(part.first[keep], part.second[keep], part.touch[keep]) for part, keep in kept]


def divide(structures: Sequence[Structure], options: FitOptions, window: int) -> Division:
    """Return the structures to fit on, of up to `window` residues, and all others; no sequence occurs twice.

    Raises `ConfigError` if there are not that many, or not the named ones.
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
    """Return the pairs of each structure to fit on. Raises `UserError` if none of them, or all, are in contact."""
    pairs = [pairs_of(structure, options.separation, options.contact_angstrom) for structure in train]
    pairs = some_of(pairs, options.most_pairs, options.seed)
    touching, total = sum(int(part.touch.sum()) for part in pairs), sum(len(part.touch) for part in pairs)
    if touching in (0, total):
        raise UserError(f"{touching} of {total:,} pairs touch, so there is nothing to tell apart; give more structures")
    return pairs


def bytes_to_fit(pairs: int, features: int) -> int:
    """Return the peak memory of a fit."""
    return pairs * features * _BYTES_OF_A_FEATURE


def check_memory(pairs: int, features: int) -> None:
    """Raise `UserError` for a fit that needs more memory than this machine has."""
    needed, there = bytes_to_fit(pairs, features), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        enough = int(0.5 * there / features / _BYTES_OF_A_FEATURE)
        raise UserError(
            f"fitting on {pairs:,} pairs x {features:,} attention heads takes {needed / 1e9:.1f} GB, more than the "
            f"{there / 1e9:.1f} GB of this machine; most_pairs={enough} draws so many of them"
        )


def attention_features(engine: Engine, tokens: Residues, pairs: Pairs) -> NDArray[np.float32]:
    """Return symmetrised and corrected attention at the pairs: float32 [P, F], in the order of a contact head's
    weights.

    One layer's attention maps are in memory at a time, float32 [N, R + 2, R + 2].
    """
    import torch

    from bionemo_esm.model.contact_head import regression_features
    from bionemo_esm.model.feature_extraction import observe_attention_maps

    heads = engine.config.num_attention_heads
    features_PF = np.empty((len(pairs.first), heads * engine.layers), dtype=np.float32)
    first, second = (torch.from_numpy(positions).to(engine.device) for positions in (pairs.first, pairs.second))

    def keep(layer: int, maps: list[Tensor]) -> None:
        corrected_NRR = regression_features(maps[0])
        features_PF[:, (layer - 1) * heads : layer * heads] = corrected_NRR[:, first, second].T.cpu().numpy()

    with torch.inference_mode():
        observe_attention_maps(engine.encoder, engine.packed([tokens]), keep)
    return features_PF


_MOST_ROUNDS = 1000


class Regression(NamedTuple):
    """A fitted regression."""

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
    """Fit the regression on an engine's attention at the pairs; deterministic."""
    features = engine.layers * engine.config.num_attention_heads
    features_PF = np.empty((sum(len(part.first) for part in pairs), features), dtype=np.float32)
    at = 0
    for structure, part in zip(train, pairs, strict=True):
        features_PF[at : at + len(part.first)] = attention_features(engine, structure.tokens, part)
        at += len(part.first)
        answered(structure.residues)
    return fit_regression(features_PF, np.concatenate([part.touch for part in pairs]), options.C, options.seed)


def fit_regression(
    features_PF: NDArray[np.float32], touch_P: NDArray[np.bool_], strength: float, seed: int
) -> Regression:
    """Fit an L1 logistic regression with liblinear."""
    import sklearn
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    lasso = {"l1_ratio": 1.0} if version >= (1, 8) else {"penalty": "l1"}
    model = LogisticRegression(C=strength, solver="liblinear", random_state=seed, max_iter=_MOST_ROUNDS, **lasso)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported by `converged`
        model.fit(features_PF, touch_P)
    rounds = int(model.n_iter_[0])
    return Regression(model.coef_[0].astype(np.float64), float(model.intercept_[0]), rounds, rounds < _MOST_ROUNDS)


def head_of(regression: Regression) -> ContactHead:
    """Return the regression as a module of a model, in float32."""
    import torch

    from bionemo_esm.model.contact_head import ContactHead

    head = ContactHead(len(regression.weight))
    assert isinstance(head.weight, torch.Tensor) and isinstance(head.bias, torch.Tensor)
    head.weight.copy_(torch.from_numpy(regression.weight)[None])
    head.bias.fill_(regression.bias)
    return head


@contextmanager
def with_head(engine: Engine, head: ContactHead) -> Iterator[None]:
    """Use this contact head in the engine for the length of a block."""
    before = engine.encoder.contact_head
    engine.encoder.contact_head = head.to(engine.device)
    try:
        yield
    finally:
        engine.encoder.contact_head = before


def untrained(engine: Engine, seed: int) -> Engine:
    """Return a model of the same shape and precision with the random weights of an untrained one."""
    import torch

    from bionemo_esm.inference.engine import Engine
    from bionemo_esm.model.backends import choose_backends
    from bionemo_esm.model.encoder import ESMEncoder

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, where neither Apex nor Transformer Engine is installed
        torch.default_generator.manual_seed(seed)
        backends = choose_backends("cpu", engine.dtype, 0.0, engine.config.head_size)
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
    """Return the precisions of each structure, predicted with this regression as the contact head."""
    from bionemo_esm.inference.contacts.prediction import predict_contacts

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
    """Return the precisions of a predictor without a sequence: the training share of contacts at each separation."""
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
    """Return the precisions of the true contacts: below 1 for a protein with fewer contacts than are counted."""
    below = options.contact_angstrom
    return [precisions(structure.contacts(below).astype(np.float32), structure, below) for structure in structures]
