"""Which scores of a variant, and how they are computed; `scoring` has the formulas. torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bionemo_esm.errors import ConfigError
from bionemo_esm.inference.variants.mutations import Variant

if TYPE_CHECKING:  # it imports torch
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
