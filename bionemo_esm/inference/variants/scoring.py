"""Scores of variants: the log-likelihood of a variant against the wild type, in the four forms of Meier et al. 2021.

"Language models enable zero-shot prediction of the effects of mutations on protein function",
doi:10.1101/2021.07.09.450648. With x the wild type, y the variant, T the sites where they differ, and log p the
log-softmax over all 33 tokens:

    masked-marginals       sum over t in T of  log p(y_t | x without T) - log p(x_t | x without T)
    wildtype-marginals     sum over t in T of  log p(y_t | x) - log p(x_t | x)
    mutant-marginals       sum over t in T of  log p(y_t | y) - log p(x_t | y)
    pseudo-log-likelihood  sum over all i of   log p(y_i | y without i) - log p(x_i | x without i)

All are 0 for the wild type, and higher for what the model finds more likely. A score is a sum of terms from some
forward passes of the model; a pass that several variants share is computed once. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.batching import MaskedQuery, Residues, WindowSpec, masked, window_around
from bionemo_esm.inference.variants.mutations import (
    Substitution,
    Variant,
    VariantError,
    WildType,
    all_single,
    scan_columns,
)
from bionemo_esm.settings import PositiveInt, Settings

if TYPE_CHECKING:
    from pandas import DataFrame

    from bionemo_esm.inference.engine import Engine
    from bionemo_esm.inference.engine_options import ModelSizes

MASKED, WILD_TYPE, MUTANT, PSEUDO = (
    "masked-marginals",
    "wildtype-marginals",
    "mutant-marginals",
    "pseudo-log-likelihood",
)
METHODS = (MASKED, WILD_TYPE, MUTANT, PSEUDO)
TOGETHER: Literal["together"] = "together"
EACH: Literal["each"] = "each"


class ScoringOptions(Settings):
    """The scores to compute.

    method: one or several of `METHODS`. masks: for masked-marginals, all sites of a variant masked in one pass
    ("together", the paper's formula), or each alone in the wild type ("each": the sum of the single mutants' scores, in
    one pass for each site, however many variants). window: residues read at once of a longer protein; None: the trained
    length.
    """

    method: tuple[str, ...] = (MASKED,)
    masks: Literal["together", "each"] = TOGETHER
    window: PositiveInt | None = None

    @field_validator("method", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(METHODS):
            raise ConfigError(f"method: one or several of {', '.join(METHODS)}, not {', '.join(methods) or 'none'}")
        return methods

    def window_of(self, model: ModelSizes) -> int:
        """Return the residues read at once. Raises `ConfigError` for more than the model can read."""
        return WindowSpec.of(model, self.window, 0).window

    def adds_up(self, method: str) -> bool:
        """Return whether a score is the sum of the single mutants' scores, so that each site has its own window."""
        return method == WILD_TYPE or (method == MASKED and self.masks == EACH)

    def problem(self, variant: Variant, window: int) -> str:
        """Return why a variant cannot be scored by all methods with this window; "" if it can.

        Its sites must fit into one window, except for methods whose scores add up.
        """
        method = next((method for method in self.method if not self.adds_up(method)), None)
        if method is None or not variant or variant[-1].site - variant[0].site < window:
            return ""
        return (
            f"its places span more than the {window:,} residues that the model reads at once, which {method} needs; "
            f"{WILD_TYPE}, and {MASKED} with masks={EACH}, look at each place on its own"
        )


def check_one_method(method: object) -> None:
    """Raise `ConfigError` for anything but one method: a score for each variant is one column."""
    if not isinstance(method, str):
        raise ConfigError(
            f"method: score_variants takes one of {', '.join(METHODS)}, not {method!r}; call it for each, or use scan",
            code="scoring.one-method",
        )


def column_of(method: str) -> str:
    """Return the name of a method's column in a table, a valid Python name: `masked_marginals`."""
    return method.replace("-", "_")


Window = tuple[int, int]  # begin and end within the protein


class Terms(NamedTuple):
    """The contribution of a pass to scores: for each term the row of the result, the token, the variant, and 1 or -1.

    Each is [N], or [1] where all terms share it.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    variants: NDArray[np.int64]
    signs: NDArray[np.float64]


class Pass(NamedTuple):
    """A query to the model, and the terms that its result contributes."""

    query: MaskedQuery
    terms: Terms


@dataclass(frozen=True)
class Work:
    """The passes of one method, created as they are needed."""

    passes: int
    residues: int  # of all passes together
    created: Iterator[Pass]


def score(
    engine: Engine,
    wild_type: WildType,
    variants: Sequence[Variant],
    options: ScoringOptions,
    progress: Callable[[str, int, int], None] = lambda method, done, total: None,
) -> dict[str, NDArray[np.float64]]:
    """Return the scores of variants by each method: float64 [V]; 0 for the wild type.

    `progress` is called with the method, its residues read so far, and its residues in total. Raises `VariantError` for
    a variant that does not fit the window: see `ScoringOptions.problem`.
    """
    window = options.window_of(engine)
    for variant in variants:
        if problem := options.problem(variant, window):
            raise VariantError(f"{wild_type.write(variant)[:60]}: {problem}")
    numbers: dict[Variant, int] = {}
    which = np.array([numbers.setdefault(variant, len(numbers)) for variant in variants], dtype=np.int64)
    scores = {}
    for method in options.method:
        work = plan(method, wild_type, list(numbers), options, window)
        scores[method] = _computed(engine, work, len(numbers), _counting(method, work.residues, progress))[which]
    return scores


def scan_frame(
    engine: Engine, wild_type: WildType, options: ScoringOptions, region: tuple[int, int] | None = None
) -> DataFrame:
    """Return the scores of all single mutants, a row each: `scan_columns`, and a column for each method."""
    import pandas

    variants = all_single(wild_type, region)
    scores = score(engine, wild_type, variants, options)
    return pandas.DataFrame(
        scan_columns(wild_type, variants) | {column_of(method): values for method, values in scores.items()}
    )


def plan(method: str, wild_type: WildType, variants: Sequence[Variant], options: ScoringOptions, window: int) -> Work:
    """Return the passes that a method needs for variants, without duplicates."""
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
        passes = (
            Pass(_query(wild_type.mutated(part), _sites(part), at), _marginals([(index, part)], _sites(part)))
            for (index, part), at in zip(parts, around, strict=True)
        )
        return Work(len(parts), sum(end - begin for begin, end in around), passes)
    groups: dict[tuple[Window, tuple[int, ...]], list[tuple[int, Variant]]] = {}
    for part, at in zip(parts, around, strict=True):
        hidden = tuple(site for site, _, _ in part[1]) if method == MASKED else ()
        groups.setdefault((at, hidden), []).append(part)
    passes = (_wild_type_pass(x, at, bool(hidden), members) for (at, hidden), members in groups.items())
    return Work(len(groups), sum(end - begin for (begin, end), _ in groups), passes)


# --- passes -----------------------------------------------------------------------------------------------------------


def _wild_type_pass(x: Residues, at: Window, hide: bool, members: list[tuple[int, Variant]]) -> Pass:
    sites = np.unique([site for _, part in members for site, _, _ in part])
    query = _query(x, sites, at)
    return Pass(masked(query.tokens, query.positions) if hide else query, _marginals(members, sites))


def _pseudo_likelihoods(wild_type: WildType, variants: Sequence[Variant], window: int) -> Work:
    """Return passes for the PLL of each variant over its window, minus that of the wild type over the same window."""
    compared: dict[Window, list[int]] = {}
    for index, variant in enumerate(variants):
        if variant:
            compared.setdefault(_window(variant, len(wild_type.tokens), window), []).append(index)

    def created() -> Iterator[Pass]:
        for (begin, end), members in compared.items():
            yield from _each_masked(wild_type.tokens[begin:end], np.array(members), -1.0)
            for index in members:
                yield from _each_masked(wild_type.mutated(variants[index])[begin:end], np.array([index]), 1.0)

    lengths = {at: at[1] - at[0] for at in compared}
    passes = sum(lengths[at] * (1 + len(members)) for at, members in compared.items())
    return Work(passes, sum(lengths[at] ** 2 * (1 + len(members)) for at, members in compared.items()), created())


def _each_masked(tokens: Residues, variants: NDArray[np.int64], sign: float) -> Iterator[Pass]:
    row, signs = np.zeros(1, dtype=np.int64), np.array([sign])  # the same for all variants, however many
    for site in range(len(tokens)):
        terms = Terms(row, tokens[site : site + 1].astype(np.int64), variants, signs)
        yield Pass(masked(tokens, np.array([site], dtype=np.int64)), terms)


def _marginals(members: Sequence[tuple[int, Variant]], sites: NDArray[np.int64]) -> Terms:
    """Return + log p(mutant) - log p(wild type) for each substitution, from the results at ascending `sites`."""
    single: list[tuple[int, Substitution]] = [(index, one) for index, part in members for one in part]
    rows = np.searchsorted(sites, [one.site for _, one in single])
    tokens = [[one.mutant, one.wildtype] for _, one in single]
    signs = np.tile([1.0, -1.0], len(single))
    return Terms(np.repeat(rows, 2), np.ravel(tokens), np.repeat([index for index, _ in single], 2), signs)


def _query(tokens: Residues, sites: NDArray[np.int64], at: Window) -> MaskedQuery:
    begin, end = at
    return MaskedQuery(tokens[begin:end], sites - begin)


def _sites(part: Variant) -> NDArray[np.int64]:
    return np.array([site for site, _, _ in part], dtype=np.int64)


def _window(part: Variant, residues: int, window: int) -> Window:
    return window_around(part[0].site, part[-1].site, residues, window)


# --- computing --------------------------------------------------------------------------------------------------------


def _computed(engine: Engine, work: Work, variants: int, answered: Callable[[int], None]) -> NDArray[np.float64]:
    scores = np.zeros(variants)
    asked, waiting = tee(work.created)  # `waiting` is a batch behind
    answers = engine.log_probabilities((one.query for one in asked), answered)
    for answer, (_, terms) in zip(answers, waiting, strict=True):
        np.add.at(scores, terms.variants, terms.signs * answer[terms.rows, terms.tokens])
    return scores


def _counting(method: str, total: int, progress: Callable[[str, int, int], None]) -> Callable[[int], None]:
    done = 0

    def add(residues: int) -> None:
        nonlocal done
        done += residues
        progress(method, done, total)

    return add
