"""`bionemo-esm score`: scores of the variants in a table, or of all single mutants of a protein."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from bionemo_esm import __version__
from bionemo_esm.alphabet import decode
from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, hold_output
from bionemo_esm.inference import figures
from bionemo_esm.inference.engine_options import EngineConfig, describe, run
from bionemo_esm.inference.load import load_engine
from bionemo_esm.inference.variants.mutations import (
    Variant,
    WildType,
    all_single,
    read_variants,
    read_wild_type,
    scan_columns,
)
from bionemo_esm.inference.variants.scoring import EACH, MASKED, TOGETHER, ScoringOptions, column_of, plan, score
from bionemo_esm.inference.variants.table import (
    FEWER_MUTATIONS,
    SUBSTITUTION_MATRIX,
    Agreement,
    VariantTable,
    agreement,
    agreements,
    baselines,
    check_ending,
    lines_of,
    read_table,
    verdict_of,
    with_columns,
    write_table,
)
from bionemo_esm.settings import NonNegativeInt, plain_values

if TYPE_CHECKING:
    import pyarrow as arrow

    from bionemo_esm.inference.engine import Engine

_MANY_PASSES = 4  # times the passes of masks=each, from which the command mentions that


class ScoreConfig(EngineConfig, ScoringOptions):
    """The keys of `conf/inference/score.yaml`."""

    sequence: str
    sequence_id: str | None = None
    input: str | None = None
    mutation_column: str = "mutant"
    measurement_column: str | None = None
    offset: int = 1
    bad_rows: Literal["error", "skip"] = "error"
    scan: bool = False
    scan_region: tuple[int, int] | None = None
    output: Path
    picture: Literal["auto", True, False] = "auto"
    resamples: int = Field(default=1000, ge=2)
    seed: NonNegativeInt = 1

    @field_validator("sequence", "input", "mutation_column", mode="before")
    @classmethod
    def _is_text(cls, value: Any, info: Any) -> Any:
        if not (isinstance(value, str) and value) and not (value is None and info.field_name == "input"):
            key = info.field_name
            raise ConfigError(f"{key} must be text, not {value!r}; quotes within quotes help: '{key}=\"...\"'")
        return value

    @field_validator("scan_region", mode="before")
    @classmethod
    def _two_positions(cls, region: Any) -> Any:
        if region is not None and not (isinstance(region, list | tuple) and len(region) == 2):
            raise ConfigError(f"scan_region must be two positions, as in scan_region=[10,90], not {region!r}")
        return region

    @model_validator(mode="after")
    def _table_or_scan(self) -> Self:
        if self.scan == (self.input is not None):
            raise ConfigError("give either input=..., a table of variants, or scan=true, for all single ones")
        if not self.scan and self.scan_region is not None:
            raise ConfigError("scan_region is for scan=true")
        if self.scan and self.measurement_column is not None:
            raise ConfigError("measurement_column is a column of input, which scan=true has none of")
        return self

    @property
    def summary_file(self) -> Path:
        return self.output.with_suffix(".summary.json")

    @property
    def picture_file(self) -> Path:
        return self.output.with_suffix(".png")

    @property
    def outputs(self) -> list[Path]:
        return [self.output, self.summary_file, *([] if self.picture is False else [self.picture_file])]


@dataclass(frozen=True)
class Variants:
    """The variants to score."""

    wild_type: WildType
    table: arrow.Table  # to which the scores are added
    read: VariantTable | None  # None: a scan
    variants: list[Variant | None]  # None: left out
    measured: NDArray[np.float64] | None
    problems: list[str]  # of the variants that are left out


def load_score_config(cfg: DictConfig) -> ScoreConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return ScoreConfig.from_config(plain_values(cfg))


def score_variants(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration. Exits with 2 for a user's error."""
    run(lambda: _score(load_score_config(cfg)), "Stopped; nothing was written.")


def _score(config: ScoreConfig) -> int:
    check_ending("output", config.output)
    with ExitStack() as held:
        for file in config.outputs:
            held.enter_context(hold_output("output", file))
        return _score_held(config)


def _score_held(config: ScoreConfig) -> int:
    console = Console(sys.stdout)
    work = _variants(config)
    console.print_line(
        f"Scoring {_number_of_variants(len(work.variants))} of {work.wild_type.name}, "
        f"{len(work.wild_type.tokens):,} residue{'s' * (len(work.wild_type.tokens) != 1)}"
    )
    engine = load_engine(config)
    console.print_line(f"  model    {describe(engine)}")
    scores = _scored(config, work, engine, console)
    found: dict[str, dict[str, Agreement]] = {}
    if work.measured is not None:
        count = np.array([-1 if variant is None else len(variant) for variant in work.variants])
        measure = partial(agreement, resamples=config.resamples, seed=config.seed)
        found = agreements(scores | baselines(work.variants), work.measured, count, measure)
    grid = _grid(config, work, scores[config.method[0]], console)
    columns = {column_of(method): values for method, values in scores.items()}
    with ExitStack() as stack:  # the table is opened first, and so renamed last
        table = stack.enter_context(atomic_write(config.output))
        summary = stack.enter_context(atomic_write(config.summary_file))
        write_table(with_columns(work.table, columns), table, config.output.suffix, set(columns))
        summary.write((json.dumps(_summary(config, work, engine, found), indent=2) + "\n").encode())
        if grid is not None:
            picture = stack.enter_context(atomic_write(config.picture_file))
            assert engine.source is not None
            figures.draw_heat_map(work.wild_type, *grid, config.method[0], picture, engine.source.name)
    _report(config, work, found, grid is not None, console)
    return 0


# --- variants ---------------------------------------------------------------------------------------------------------


def _variants(config: ScoreConfig) -> Variants:
    """Read and check the whole input, before the model is loaded."""
    wild_type = read_wild_type(config.sequence, config.sequence_id, config.offset)
    if config.input is None:
        import pyarrow as arrow

        every = all_single(wild_type, config.scan_region)
        work = Variants(wild_type, arrow.table(scan_columns(wild_type, every)), None, list(every), None, [])
    else:
        read = read_table(config.input)
        with_columns(read.table, {column_of(method): np.zeros(len(read.rows)) for method in config.method})
        texts = read.texts(config.mutation_column, "mutation_column")
        column, problems = config.measurement_column, list[str]()
        measured = None if column is None else read.numbers(column, "measurement_column")
        variants = read_variants(texts, wild_type, read.where, problems.append if config.bad_rows == "skip" else None)
        work = Variants(wild_type, read.table, read, variants, measured, problems)
    if all(variant is None for variant in work.variants):
        raise ConfigError(f"input: no variant is left: {work.problems[0]}")
    if config.picture is True and (problem := figures.undrawable(work.variants)):
        raise ConfigError(f"picture=true: {problem}")
    return work


def _scored(config: ScoreConfig, work: Variants, engine: Engine, console: Console) -> dict[str, NDArray[np.float64]]:
    """Return the scores of each method, NaN for variants that are left out, those too wide for the window included."""
    window = config.window_of(engine)
    if window < len(work.wild_type.tokens):
        console.print_line(f"  window   {window:,} residues, with the mutated ones in the middle")
    for index, variant in enumerate(work.variants):
        problem = "" if variant is None else config.problem(variant, window)
        if problem:
            assert work.read is not None
            assert variant is not None
            problem = f"{work.read.where(index)}: {work.wild_type.write(variant)[:60]}: {problem}"
            if config.bad_rows == "error":
                raise ConfigError(problem)
            work.problems.append(problem)
            work.variants[index] = None
    kept = [index for index, variant in enumerate(work.variants) if variant is not None]
    variants = [variant for variant in work.variants if variant is not None]
    distinct = list(dict.fromkeys(variants))
    passes = {method: plan(method, work.wild_type, distinct, config, window).passes for method in config.method}
    console.print_line(f"  passes   {', '.join(f'{method} {count:,}' for method, count in passes.items())}")
    sites = len({one.site for variant in variants for one in variant})
    if config.masks == TOGETHER and passes.get(MASKED, 0) > _MANY_PASSES * sites:
        console.print_line(f"           masks={EACH}, an approximation, would need {sites:,} for {MASKED}")
    bars = {method: ProgressBar(console, method, RESIDUES) for method in config.method}
    found = score(engine, work.wild_type, variants, config, lambda method, done, total: bars[method](done, total))
    scores = {method: np.full(len(work.variants), np.nan) for method in config.method}
    for method, values in found.items():
        scores[method][kept] = values
    return scores


# --- figure, summary, report ------------------------------------------------------------------------------------------


def _grid(
    config: ScoreConfig, work: Variants, scores: NDArray[np.float64], console: Console
) -> tuple[NDArray[np.float64], int] | None:
    """Return the content of the heat map; None if there is to be none."""
    problem = figures.undrawable(work.variants)
    if config.picture is False or problem:
        if problem and config.scan and config.picture == "auto":
            console.print_line(f"  no picture: {problem}")
        return None
    grid = figures.grid_of(work.variants, scores)
    return grid if config.picture is True or figures.covered(grid[0]) >= figures.ENOUGH_COVERED else None


def _summary(
    config: ScoreConfig, work: Variants, engine: Engine, found: Mapping[str, Mapping[str, Agreement]]
) -> dict[str, Any]:
    assert engine.source is not None
    left_out = sum(variant is None for variant in work.variants)
    summary: dict[str, Any] = {
        "bionemo_esm": __version__,
        "model": engine.source.name,
        "weights_sha256": engine.weights_sha256,
        "precision": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "wild_type": {"name": work.wild_type.name, "sequence": decode(work.wild_type.tokens)},
        "offset": config.offset,
        "input": "scan" if config.input is None else Path(config.input).name,
        "methods": list(config.method),
        "masks": config.masks,
        "window": config.window_of(engine),
        "variants": len(work.variants),
        "scored": len(work.variants) - left_out,
        "left_out": left_out,
    }
    if work.problems:
        summary["first_problem"] = work.problems[0]
    if work.measured is not None:
        spearman = {method: {group: one.as_json() for group, one in groups.items()} for method, groups in found.items()}
        summary |= {
            "measurement_column": config.measurement_column,
            "not_measured": int(np.isnan(work.measured).sum()),
            "bootstrap": {"resamples": config.resamples, "seed": config.seed, "interval": 0.95},
            "spearman": spearman,
        }
    return summary


def _report(
    config: ScoreConfig, work: Variants, found: Mapping[str, Mapping[str, Agreement]], drawn: bool, console: Console
) -> None:
    if work.problems:
        console.print_line(f"Left out {len(work.problems):,}; the first: {work.problems[0]}")
    if work.measured is not None:
        if missing := int(np.isnan(work.measured).sum()):
            console.print_line(f"Not measured: {_number_of_variants(missing)}; they do not count below")
        for line in lines_of(found):
            console.print_line(line)
        if verdict := verdict_of(found, (FEWER_MUTATIONS, SUBSTITUTION_MATRIX)):
            console.print_line(f"  {verdict}")
    console.print_line(f"Wrote {config.output}, {_number_of_variants(len(work.variants))}")
    console.print_line(f"  summary  {config.summary_file}")
    if drawn:
        console.print_line(f"  picture  {config.picture_file}")


def _number_of_variants(count: int) -> str:
    return f"{count:,} variant{'s' * (count != 1)}"


main = ConfiguredCommand(
    score_variants,
    "score",
    part="inference",
    text_keys=("model", "sequence", "sequence_id", "input", "mutation_column", "measurement_column", "output"),
    other_spellings=INFERENCE_SPELLINGS,
)
"""`bionemo-esm score`."""
