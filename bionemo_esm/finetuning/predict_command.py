"""`bionemo-esm predict`: the predictions of a fine-tuned model for all proteins of an input, as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from omegaconf import DictConfig

from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, hold_output
from bionemo_esm.finetuning.archive import FineTunedFile
from bionemo_esm.finetuning.predictor import FineTunedPredictor, Layout, check_ending, describe_task, table_writer
from bionemo_esm.inference.embedding.options import plural
from bionemo_esm.inference.engine_options import EngineConfig, describe, run
from bionemo_esm.inference.inputs import InputPolicy, Protein, read_proteins, scan_input
from bionemo_esm.settings import STANDARD_INPUT, InputPath, plain_values


class PredictConfig(EngineConfig, InputPolicy):
    """The keys of `conf/finetuning/predict.yaml`."""

    input: InputPath
    output: Path
    residues: bool | None = None
    probabilities: bool = True


def load_predict_config(cfg: DictConfig) -> PredictConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return PredictConfig.from_config(plain_values(cfg))


def predict(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration; exits with 2 after one line for a user error."""
    run(lambda: _predict(load_predict_config(cfg)), "Stopped; nothing was written. The same command begins anew.")


def _predict(config: PredictConfig) -> int:
    with hold_output("output", config.output):
        return _predict_held(config)


def _predict_held(config: PredictConfig) -> int:
    console = Console(sys.stdout)
    task = FineTunedFile.open(config.model).task
    check_ending("output", config.output, task, config.residues)
    layout = Layout.of(task, config.residues, config.probabilities)
    proteins, residues = _input(config, console)
    predictor = FineTunedPredictor.load(config.model, config.device, config.precision, config.batch_tokens)
    if predictor.task != task:
        raise ConfigError(f"model: {config.model} was replaced while the input was read; run the same command again")
    reading = predictor.reading
    console.print_line(f"  model    {describe(predictor.engine)}")
    console.print_line(f"  task     {describe_task(task)}")
    console.print_line(
        f"           proteins over {reading.window:,} residues in windows that share {reading.overlap:,}"
    )
    count = 0
    with atomic_write(config.output) as stream, table_writer(stream, config.output, layout) as add:
        for protein, prediction in predictor.stream(proteins, _progress(console, residues)):
            add(protein, prediction)
            count += 1
    console.print_line(f"Wrote {config.output}, {plural(count, 'protein')}, {config.output.stat().st_size:,} bytes")
    return 0


def _input(config: PredictConfig, console: Console) -> tuple[Iterable[Protein], int]:
    """Return the proteins, all checked, and their number of residues. Raises `InputError`, `SourceError`.

    A file is read a second time for the predictions; standard input is held in memory.
    """
    name = "standard input" if config.input == STANDARD_INPUT else config.input
    console.print_line(f"Reading {name}")
    if config.input == STANDARD_INPUT:
        problems: list[str] = []
        held = list(read_proteins(config.input, config, problems.append))
        if not held:
            raise ConfigError(f"input=-: no protein {f'is left: {problems[0]}' if problems else 'in standard input'}")
        lengths = [protein.residues for protein in held]
        _print_input(console, len(held), sum(lengths), max(lengths), len(problems), (problems or [""])[0])
        return held, sum(lengths)
    stock = scan_input(config.input, config)
    _print_input(console, stock.proteins, stock.residues, stock.longest, stock.skipped, stock.first_problem)
    return read_proteins(config.input, config), stock.residues


def _print_input(
    console: Console, proteins: int, residues: int, longest: int, skipped: int, first_problem: str
) -> None:
    sizes = f"{plural(proteins, 'protein')}, {plural(residues, 'residue')}, the longest of {longest:,}"
    console.print_line(f"  input    {sizes}")
    if skipped:
        console.print_line(f"           {plural(skipped, 'record')} left out; the first: {first_problem}")


def _progress(console: Console, residues: int) -> Callable[[int], None]:
    """Return a function that shows how many of the residues are done."""
    meter, done = ProgressBar(console, "predicting", RESIDUES), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        meter(done, residues)

    return advance


main = ConfiguredCommand(
    predict,
    "predict",
    part="finetuning",
    text_keys=("model", "input", "output", "id_column", "sequence_column"),
    other_spellings=INFERENCE_SPELLINGS,
)
"""`bionemo-esm predict`."""
