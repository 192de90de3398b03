"""How likely a model finds a variant, against its wild type: the four scores of Meier et al. 2021.

"Language models enable zero-shot prediction of the effects of mutations on protein function",
doi:10.1101/2021.07.09.450648. With x the wild type, y the variant, T the places where they differ, and log p the
log-softmax over all 33 tokens:

    masked-marginals       sum over t in T of  log p(y_t | x without T) - log p(x_t | x without T)
    wildtype-marginals     sum over t in T of  log p(y_t | x) - log p(x_t | x)
    mutant-marginals       sum over t in T of  log p(y_t | y) - log p(x_t | y)
    pseudo-log-likelihood  sum over all i of   log p(y_i | y without i) - log p(x_i | x without i)

All are 0 for the wild type and higher for what the model finds more likely. A score is a sum of terms out of some
passes of the model; a pass that several variants need is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.batching import MaskedQuery, Residues, masked, window_around
from bionemo_esm.inference.variants.mutations import (
    Substitution,
    Variant,
    VariantError,
    WildType,
    all_single,
    scan_columns,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from bionemo_esm.inference.engine import Engine

MASKED, WILD_TYPE, MUTANT, PSEUDO = (
    "masked-marginals",
    "wildtype-marginals",
    "mutant-marginals",
    "pseudo-log-likelihood",
)
METHODS = (MASKED, WILD_TYPE, MUTANT, PSEUDO)
TOGETHER, EACH = "together", "each"


@dataclass(frozen=True)
class ScoringOptions:
    """Which scores, and how.

    masks: for masked-marginals, all places of a variant hidden at once ("together", the paper's formula), or each on
    its own in the wild type ("each": the sum of the single mutants' scores, and a pass a place whatever the variants).
    window: residues read at once, of longer proteins; None for as many as the model was trained on.
    """

    methods: tuple[str, ...] = (MASKED,)
    masks: str = TOGETHER
    window: int | None = None

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods) or not set(self.methods) <= set(METHODS):
            raise ConfigError(
                f"method: one or several of {', '.join(METHODS)}, not {', '.join(self.methods) or 'none'}"
            )
        if self.masks not in (TOGETHER, EACH):
            raise ConfigError(f"masks must be together or each, not {self.masks!r}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 residue, not {self.window}")

    def window_of(self, engine: Engine) -> int:
        """Residues read at once. Raises `ConfigError` for more than the model can read."""
        window = engine.window if self.window is None else self.window
        if engine.longest is not None and window > engine.longest:
            raise ConfigError(f"window={window}: the model reads {engine.longest:,} residues at most")
        return window

    def adds_up(self, method: str) -> bool:
        """Whether a score is the sum of its single mutants' scores, so that each place has a window of its own."""
        return method == WILD_TYPE or (method == MASKED and self.masks == EACH)

    def problem(self, variant: Variant, window: int) -> str:
        """Why a variant cannot be scored by all methods, for one that sees so many residues; "" if it can.

        Its places must be seen at once, but by methods that add up.
        """
        method = next((method for method in self.methods if not self.adds_up(method)), None)
        if method is None or not variant or variant[-1].place - variant[0].place < window:
            return ""
        return (
            f"its places span more than the {window:,} residues that the model reads at once, which {method} needs; "
            f"{WILD_TYPE}, and {MASKED} with masks={EACH}, look at each place on its own"
        )


def column_of(method: str) -> str:
    """The name of a method's column in a table: `masked_marginals`, which Python takes for a name."""
    return method.replace("-", "_")


Window = tuple[int, int]  # begin and end in the protein


class Terms(NamedTuple):
    """What a pass adds to scores: of each term the row of the answer, the token, the variant, and 1 or -1.

    Each is [N], or [1] where it is the same for all.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    variants: NDArray[np.int64]
    signs: NDArray[np.float64]


class Pass(NamedTuple):
    """A question to the model, and what becomes of its answer."""

    query: MaskedQuery
    terms: Terms


@dataclass(frozen=True)
class Work:
    """The passes of one method, made as they are needed."""

    passes: int
    residues: int  # of all passes together
    made: Iterator[Pass]


def score(
    engine: Engine,
    wild_type: WildType,
    variants: Sequence[Variant],
    options: ScoringOptions,
    told: Callable[[str, int, int], None] = lambda method, done, total: None,
) -> dict[str, NDArray[np.float64]]:
    """The scores of variants by each method: float64 [V]; 0 for the wild type.

    `told` hears of each method how many residues of how many have been read. Raises `VariantError` for a variant that
    does not fit the window: see `ScoringOptions.problem`.
    """
    window = options.window_of(engine)
    for variant in variants:
        if problem := options.problem(variant, window):
            raise VariantError(f"{wild_type.write(variant)[:60]}: {problem}")
    numbers: dict[Variant, int] = {}
    which = np.array([numbers.setdefault(variant, len(numbers)) for variant in variants], dtype=np.int64)
    scores = {}
    for method in options.methods:
        work = plan(method, wild_type, list(numbers), options, window)
        scores[method] = _carried_out(engine, work, len(numbers), _counting(method, work.residues, told))[which]
    return scores


def scan_frame(
    engine: Engine, wild_type: WildType, options: ScoringOptions, region: tuple[int, int] | None = None
) -> DataFrame:
    """Scores of all single mutants, a row each: `scan_columns`, and a column of each method."""
    import pandas

    variants = all_single(wild_type, region)
    scores = score(engine, wild_type, variants, options)
    return pandas.DataFrame(
        scan_columns(wild_type, variants) | {column_of(method): values for method, values in scores.items()}
    )


def plan(method: str, wild_type: WildType, variants: Sequence[Variant], options: ScoringOptions, window: int) -> Work:
    """The passes that a method needs for variants, each once."""
    x, length = wild_type.tokens, len(wild_type.tokens)
    if method == PSEUDO:
        return _pseudo_likelihoods(wild_type, variants, window)
    if options.adds_up(method):
        parts: list[tuple[int, Variant]] = [
            (index, (one,)) for index, variant in enumerate(variants) for one in variant
        ]
    else:
        parts = [(index, variant) for index, variant in enumerate(variants) if variant]
    around = [_window(part, length, window) for _, part in parts]
    if method == MUTANT:
        made = (Pass(_asked(wild_type.mutated(part), _places(part), at), _marginals([(index, part)], _places(part)))
                for (index, part), at in zip(parts, around, strict=True))  # fmt: skip
        return Work(len(parts), sum(end - begin for begin, end in around), made)
    groups: dict[tuple[Window, tuple[int, ...]], list[tuple[int, Variant]]] = {}
    for part, at in zip(parts, around, strict=True):
        hidden = tuple(place for place, _, _ in part[1]) if method == MASKED else ()
        groups.setdefault((at, hidden), []).append(part)
    made = (_one_of_wild_type(x, at, bool(hidden), members) for (at, hidden), members in groups.items())
    return Work(len(groups), sum(end - begin for (begin, end), _ in groups), made)


# --- passes -----------------------------------------------------------------------------------------------------------


def _one_of_wild_type(x: Residues, at: Window, hide: bool, members: list[tuple[int, Variant]]) -> Pass:
    places = np.unique([place for _, part in members for place, _, _ in part])
    query = _asked(x, places, at)
    return Pass(masked(query.tokens, query.places) if hide else query, _marginals(members, places))


def _pseudo_likelihoods(wild_type: WildType, variants: Sequence[Variant], window: int) -> Work:
    """PLL of each variant over the residues of its window, less that of the wild type over the same."""
    compared: dict[Window, list[int]] = {}
    for index, variant in enumerate(variants):
        if variant:
            compared.setdefault(_window(variant, len(wild_type.tokens), window), []).append(index)

    def made() -> Iterator[Pass]:
        for (begin, end), members in compared.items():
            yield from _each_hidden(wild_type.tokens[begin:end], np.array(members), -1.0)
            for index in members:
                yield from _each_hidden(wild_type.mutated(variants[index])[begin:end], np.array([index]), 1.0)

    lengths = {at: at[1] - at[0] for at in compared}
    passes = sum(lengths[at] * (1 + len(members)) for at, members in compared.items())
    return Work(passes, sum(lengths[at] ** 2 * (1 + len(members)) for at, members in compared.items()), made())


def _each_hidden(tokens: Residues, variants: NDArray[np.int64], sign: float) -> Iterator[Pass]:
    row, signs = np.zeros(1, dtype=np.int64), np.array([sign])  # the same for all variants, however many
    for place in range(len(tokens)):
        terms = Terms(row, tokens[place : place + 1].astype(np.int64), variants, signs)
        yield Pass(masked(tokens, np.array([place], dtype=np.int64)), terms)


def _marginals(members: Sequence[tuple[int, Variant]], places: NDArray[np.int64]) -> Terms:
    """For each substitution + log p(mutant) - log p(wild type), out of the answers at ascending `places`."""
    single: list[tuple[int, Substitution]] = [(index, one) for index, part in members for one in part]
    rows = np.searchsorted(places, [one.place for _, one in single])
    tokens = [[one.mutant, one.wildtype] for _, one in single]
    signs = np.tile([1.0, -1.0], len(single))
    return Terms(np.repeat(rows, 2), np.ravel(tokens), np.repeat([index for index, _ in single], 2), signs)


def _asked(tokens: Residues, places: NDArray[np.int64], at: Window) -> MaskedQuery:
    begin, end = at
    return MaskedQuery(tokens[begin:end], places - begin)


def _places(part: Variant) -> NDArray[np.int64]:
    return np.array([place for place, _, _ in part], dtype=np.int64)


def _window(part: Variant, residues: int, window: int) -> Window:
    return window_around(part[0].place, part[-1].place, residues, window)


# --- carrying out -----------------------------------------------------------------------------------------------------


def _carried_out(engine: Engine, work: Work, variants: int, answered: Callable[[int], None]) -> NDArray[np.float64]:
    scores = np.zeros(variants)
    asked, waiting = tee(work.made)  # a batch lies between the two
    answers = engine.log_probabilities((one.query for one in asked), answered)
    for answer, (_, terms) in zip(answers, waiting, strict=True):
        np.add.at(scores, terms.variants, terms.signs * answer[terms.rows, terms.tokens])
    return scores


def _counting(method: str, total: int, told: Callable[[str, int, int], None]) -> Callable[[int], None]:
    done = 0

    def add(residues: int) -> None:
        nonlocal done
        done += residues
        told(method, done, total)

    return add
