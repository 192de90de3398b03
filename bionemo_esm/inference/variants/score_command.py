"""`bionemo-esm score`: effects of variants, those of a table or all single ones of a protein."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from bionemo_esm import __version__
from bionemo_esm.alphabet import decode
from bionemo_esm.command_line import ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, check_absent, check_writable
from bionemo_esm.inference import figures
from bionemo_esm.inference.engine_options import ENGINE_KEYS, EngineConfig, describe, run
from bionemo_esm.inference.protein_model import load_engine
from bionemo_esm.inference.variants.mutations import (
    Variant,
    WildType,
    all_single,
    read_variants,
    read_wild_type,
    scan_columns,
)
from bionemo_esm.inference.variants.scoring import EACH, MASKED, TOGETHER, ScoringOptions, column_of
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
from bionemo_esm.settings import boolean, integer, known, path, plain_values

if TYPE_CHECKING:
    import pyarrow as arrow

    from bionemo_esm.inference.engine import Engine

_KEYS = ENGINE_KEYS | {
    *("sequence", "sequence_id", "input", "mutation_column", "measurement_column", "offset", "bad_rows", "scan"),
    *("scan_region", "method", "masks", "window", "output", "picture", "resamples", "seed"),
}
_MANY_PASSES = 4  # times as many as masks=each would make, from which on it is worth a word
_STOPPED = "nothing was written"


@dataclass(frozen=True)
class ScoreConfig:
    """Of which protein which variants are scored, how, and into which files."""

    engine: EngineConfig
    options: ScoringOptions
    sequence: str
    sequence_id: str | None
    input: str | None
    mutation_column: str
    measurement_column: str | None
    offset: int
    skip_bad_rows: bool
    scan_region: tuple[int, int] | None
    output: Path
    picture: bool | None  # None: where enough is there to be drawn
    resamples: int
    seed: int

    @property
    def summary_file(self) -> Path:
        return self.output.with_suffix(".summary.json")

    @property
    def picture_file(self) -> Path:
        return self.output.with_suffix(".png")

    def check_outputs(self) -> None:
        """Raises `ConfigError` for an output that is there, or could not be written."""
        check_ending("output", self.output)
        for file in (self.output, self.summary_file, *([] if self.picture is False else [self.picture_file])):
            check_absent("output", file)
        check_writable("output", self.output)


@dataclass(frozen=True)
class Variants:
    """What is to be scored."""

    wild_type: WildType
    table: arrow.Table  # to which the scores are added
    read: VariantTable | None  # None: a scan
    variants: list[Variant | None]  # None: left out
    measured: NDArray[np.float64] | None
    problems: list[str]  # of those that are left out


def load_score_config(cfg: DictConfig) -> ScoreConfig:
    """Raises `ConfigError`, naming the key, for one that is unknown, missing or of the wrong kind."""
    values = known("", plain_values(cfg), _KEYS)
    scan, source, region = boolean("scan", values["scan"]), values["input"], values["scan_region"]
    if scan == (source is not None):
        raise ConfigError("give either input=..., a table of variants, or scan=true, for all single ones")
    if not scan and region is not None:
        raise ConfigError("scan_region is for scan=true")
    if scan and values["measurement_column"] is not None:
        raise ConfigError("measurement_column is a column of input, which scan=true has none of")
    if region is not None and (not isinstance(region, list) or len(region) != 2):
        raise ConfigError(f"scan_region must be two positions, as in scan_region=[10,90], not {region!r}")
    methods, window = values["method"], values["window"]
    methods = tuple(map(str, methods)) if isinstance(methods, list) else (str(methods),)
    output = path("output", values["output"])
    if output is None:
        raise ConfigError("output must be given: output=scores.csv")
    return ScoreConfig(
        engine=EngineConfig.of(values),
        options=ScoringOptions(methods, str(values["masks"]), None if window is None else integer("window", window)),
        sequence=_text("sequence", values["sequence"]),
        sequence_id=None if values["sequence_id"] is None else str(values["sequence_id"]),
        input=None if source is None else _text("input", source),
        mutation_column=_text("mutation_column", values["mutation_column"]),
        measurement_column=None if values["measurement_column"] is None else str(values["measurement_column"]),
        offset=integer("offset", values["offset"]),
        skip_bad_rows=_one_of("bad_rows", values["bad_rows"], {"error": False, "skip": True}),
        scan_region=None if region is None else (integer("scan_region", region[0]), integer("scan_region", region[1])),
        output=output,
        picture=_one_of("picture", values["picture"], {"auto": None, True: True, False: False}),
        resamples=_at_least("resamples", values["resamples"], 2),
        seed=_at_least("seed", values["seed"], 0),
    )


def score_variants(cfg: DictConfig) -> None:
    """Score as a composed Hydra configuration says. Exits with 2 for what a user can mend."""
    run(lambda: _score(load_score_config(cfg)), f"Stopped; {_STOPPED}.")


def _score(config: ScoreConfig) -> int:
    console = Console(sys.stdout)
    config.check_outputs()
    work = _variants(config)
    console.print_line(
        f"Scoring {_variants_in_words(len(work.variants))} of {work.wild_type.name}, "
        f"{len(work.wild_type.tokens):,} residue{'s' * (len(work.wild_type.tokens) != 1)}"
    )
    engine = load_engine(config.engine)
    console.print_line(f"  model    {describe(engine)}")
    scores = _scored(config, work, engine, console)
    found: dict[str, dict[str, Agreement]] = {}
    if work.measured is not None:
        count = np.array([-1 if variant is None else len(variant) for variant in work.variants])
        measure = partial(agreement, resamples=config.resamples, seed=config.seed)
        found = agreements(scores | baselines(work.variants), work.measured, count, measure)
    drawn = _grid(config, work, scores[config.options.methods[0]], console)
    columns = {column_of(method): values for method, values in scores.items()}
    with ExitStack() as stack:  # the table, which comes first, takes its name last
        table = stack.enter_context(atomic_write(config.output))
        summary = stack.enter_context(atomic_write(config.summary_file))
        write_table(with_columns(work.table, columns), table, config.output.suffix, set(columns))
        summary.write((json.dumps(_summary(config, work, engine, found), indent=2) + "\n").encode())
        if drawn is not None:
            picture = stack.enter_context(atomic_write(config.picture_file))
            assert engine.source is not None
            figures.draw_heat_map(work.wild_type, *drawn, config.options.methods[0], picture, engine.source.name)
    _tell(config, work, found, drawn is not None, console)
    return 0


# --- what is scored ---------------------------------------------------------------------------------------------------


def _variants(config: ScoreConfig) -> Variants:
    """Everything that can be wrong with the input is found here, before the model is loaded."""
    wild_type = read_wild_type(config.sequence, config.sequence_id, config.offset)
    if config.input is None:
        import pyarrow as arrow

        every = all_single(wild_type, config.scan_region)
        work = Variants(wild_type, arrow.table(scan_columns(wild_type, every)), None, list(every), None, [])
    else:
        read = read_table(config.input)
        with_columns(read.table, {column_of(method): np.zeros(len(read.rows)) for method in config.options.methods})
        texts = read.texts(config.mutation_column, "mutation_column")
        column, problems = config.measurement_column, list[str]()
        measured = None if column is None else read.numbers(column, "measurement_column")
        variants = read_variants(texts, wild_type, read.where, problems.append if config.skip_bad_rows else None)
        work = Variants(wild_type, read.table, read, variants, measured, problems)
    if all(variant is None for variant in work.variants):
        raise ConfigError(f"input: no variant is left: {work.problems[0]}")
    if config.picture:
        problem = figures.undrawable(work.variants)
        if problem:
            raise ConfigError(f"picture=true: {problem}")
    return work


def _scored(config: ScoreConfig, work: Variants, engine: Engine, console: Console) -> dict[str, NDArray[np.float64]]:
    """The scores of each method, NaN for what is left out; those whose places lie too far apart are left out too."""
    from bionemo_esm.inference.variants.scoring import plan, score

    options, window = config.options, config.options.window_of(engine)
    if window < len(work.wild_type.tokens):
        console.print_line(f"  window   {window:,} residues, with the mutated ones in the middle")
    for index, variant in enumerate(work.variants):
        problem = "" if variant is None else options.problem(variant, window)
        if problem:
            assert work.read is not None
            assert variant is not None
            problem = f"{work.read.where(index)}: {work.wild_type.write(variant)[:60]}: {problem}"
            if not config.skip_bad_rows:
                raise ConfigError(problem)
            work.problems.append(problem)
            work.variants[index] = None
    kept = [index for index, variant in enumerate(work.variants) if variant is not None]
    variants = [variant for variant in work.variants if variant is not None]
    passes = {method: plan(method, work.wild_type, list(dict.fromkeys(variants)), options, window).passes
              for method in options.methods}  # fmt: skip
    console.print_line(f"  passes   {', '.join(f'{method} {count:,}' for method, count in passes.items())}")
    places = len({one.place for variant in variants for one in variant})
    if options.masks == TOGETHER and passes.get(MASKED, 0) > _MANY_PASSES * places:
        console.print_line(f"           masks={EACH}, an approximation, would need {places:,} for {MASKED}")
    meters = {method: ProgressBar(console, method, RESIDUES) for method in options.methods}
    found = score(engine, work.wild_type, variants, options, lambda method, done, total: meters[method](done, total))
    scores = {method: np.full(len(work.variants), np.nan) for method in options.methods}
    for method, values in found.items():
        scores[method][kept] = values
    return scores


# --- what is drawn, and told ------------------------------------------------------------------------------------------


def _grid(
    config: ScoreConfig, work: Variants, scores: NDArray[np.float64], console: Console
) -> tuple[NDArray[np.float64], int] | None:
    """What a picture would show, where there is to be one."""
    problem = figures.undrawable(work.variants)
    if config.picture is False or problem:
        if problem and config.input is None and config.picture is None:
            console.print_line(f"  no picture: {problem}")
        return None
    grid = figures.grid_of(work.variants, scores)
    return grid if config.picture or figures.covered(grid[0]) >= figures.ENOUGH_COVERED else None


def _summary(
    config: ScoreConfig, work: Variants, engine: Engine, found: Mapping[str, Mapping[str, Agreement]]
) -> dict[str, Any]:
    assert engine.source is not None
    options, left_out = config.options, sum(variant is None for variant in work.variants)
    summary: dict[str, Any] = {
        "bionemo_esm": __version__,
        "model": engine.source.name,
        "weights_sha256": engine.weights_sha256,
        "precision": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "wild_type": {"name": work.wild_type.name, "sequence": decode(work.wild_type.tokens)},
        "offset": config.offset,
        "input": "scan" if config.input is None else Path(config.input).name,
        "methods": list(options.methods),
        "masks": options.masks,
        "window": options.window_of(engine),
        "variants": len(work.variants),
        "scored": len(work.variants) - left_out,
        "left_out": left_out,
    }
    if work.problems:
        summary["first_problem"] = work.problems[0]
    if work.measured is not None:
        told = {method: {group: one.as_json() for group, one in groups.items()} for method, groups in found.items()}
        summary |= {
            "measurement_column": config.measurement_column,
            "not_measured": int(np.isnan(work.measured).sum()),
            "bootstrap": {"resamples": config.resamples, "seed": config.seed, "interval": 0.95},
            "spearman": told,
        }
    return summary


def _tell(
    config: ScoreConfig, work: Variants, found: Mapping[str, Mapping[str, Agreement]], drawn: bool, console: Console
) -> None:
    if work.problems:
        console.print_line(f"Left out {len(work.problems):,}; the first: {work.problems[0]}")
    if work.measured is not None:
        if missing := int(np.isnan(work.measured).sum()):
            console.print_line(f"Not measured: {_variants_in_words(missing)}; they do not count below")
        for line in lines_of(found):
            console.print_line(line)
        if verdict := verdict_of(found, (FEWER_MUTATIONS, SUBSTITUTION_MATRIX)):
            console.print_line(f"  {verdict}")
    console.print_line(f"Wrote {config.output}, {_variants_in_words(len(work.variants))}")
    console.print_line(f"  summary  {config.summary_file}")
    if drawn:
        console.print_line(f"  picture  {config.picture_file}")


def _variants_in_words(count: int) -> str:
    return f"{count:,} variant{'s' * (count != 1)}"


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be text, not {value!r}; quotes within quotes help: '{key}=\"...\"'")
    return value


def _one_of(key: str, value: Any, meanings: Mapping[Any, Any]) -> Any:
    if value not in meanings:
        raise ConfigError(f"{key} must be one of {', '.join(str(word).lower() for word in meanings)}, not {value!r}")
    return meanings[value]


def _at_least(key: str, value: Any, least: int) -> int:
    count = integer(key, value)
    if count < least:
        raise ConfigError(f"{key} must be at least {least}, not {count}")
    return count


main = ConfiguredCommand(
    score_variants,
    "score",
    part="inference",
    text_keys=("model", "sequence", "sequence_id", "input", "mutation_column", "measurement_column", "output"),
)
"""`bionemo-esm score`."""
