"""`bionemo-esm evaluate`: how well a model predicts masked residues of proteins that it was not trained on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from pydantic import Field, model_validator
from typing_extensions import Self

from bionemo_esm import __version__
from bionemo_esm.command_line import INFERENCE_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import RESIDUES, Console, ProgressBar
from bionemo_esm.data.dataloader import EpochPermutation
from bionemo_esm.data.store import MANIFEST_NAME, SPLITS, ProteinStore, SequenceSplit, sha256_of_file
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import atomic_write, hold_output
from bionemo_esm.inference.batching import Residues
from bionemo_esm.inference.engine_options import EngineConfig, describe, run
from bionemo_esm.inference.inputs import InputPolicy, read_proteins, scan_input
from bionemo_esm.settings import STANDARD_INPUT, InputPath, NonNegativeInt, PositiveInt, plain_values

if TYPE_CHECKING:  # torch takes seconds to import
    from bionemo_esm.inference.evaluation.evaluation import Part, PartResult

_MODEL_KEYS = ("device", "precision", "batch_tokens")
_JOB = "job.json"


class EvaluateConfig(EngineConfig, InputPolicy):
    """The keys of `conf/inference/evaluate.yaml`."""

    reference: Path | None = None
    input: InputPath
    split: str = "test"
    sequences: PositiveInt | None = None
    store: Path | None = None
    output: Path | None = None
    picture: bool = True
    masked: float = Field(default=0.15, gt=0, le=1)
    window: PositiveInt | None = None
    pseudo_perplexity: bool = False
    devices: PositiveInt = 1
    resamples: int = Field(default=1000, ge=2)
    seed: NonNegativeInt = 42

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.split not in SPLITS:
            raise ConfigError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if self.input == STANDARD_INPUT:
            raise ConfigError("input=-: the input is read twice; give a file, or the folder of a store")
        if self.devices > 1 and ":" in self.device:
            raise ConfigError(f"device={self.device} names one GPU, devices={self.devices} wants more; device=cuda")
        return self

    @property
    def models(self) -> dict[str, EngineConfig]:
        """The models by the names of `figures`."""
        shared = {key: getattr(self, key) for key in _MODEL_KEYS}
        given = {"model": self.model, **({"reference": self.reference} if self.reference else {})}
        return {name: EngineConfig(model=path, **shared) for name, path in given.items()}

    @property
    def output_file(self) -> Path:
        name = Path(self.input).name.split(".")[0] or "input"
        return self.output or Path(f"{self.model.stem}-{name}.json")

    @property
    def picture_file(self) -> Path:
        return self.output_file.with_suffix(".png")

    @property
    def work(self) -> Path:
        """The folder of the finished parts, until the output exists."""
        return self.output_file.with_name(f".{self.output_file.name}.partial")


@dataclass(frozen=True)
class ProteinInput:
    """The proteins of an evaluation, which are read as needed."""

    name: str
    identity: str  # a hash of the content
    proteins: int
    residues: int  # of the chosen proteins; of a file that is not used whole, about
    asked: int | None
    read: Callable[[], Iterable[tuple[int, Residues]]]


def load_evaluate_config(cfg: DictConfig) -> EvaluateConfig:
    """Return the checked configuration. Raises `ConfigError`, naming the key."""
    return EvaluateConfig.from_config(plain_values(cfg))


def evaluate(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration. Exits with 2 for a user's error."""
    run(lambda: _evaluate(load_evaluate_config(cfg)), "Stopped; the same command continues with the missing parts.")


def _evaluate(config: EvaluateConfig) -> int:
    if config.output_file.suffix != ".json":
        raise ConfigError(f"output: {config.output_file} must end in .json")
    sizes = {name: model.check() for name, model in config.models.items()}
    for model in sizes.values():
        if config.window is not None and model.longest is not None and config.window > model.longest:
            raise ConfigError(f"window={config.window}: a model reads up to {model.longest} residues at once")
    with ExitStack() as held:
        for file in (config.output_file, *([config.picture_file] if config.picture else [])):
            held.enter_context(hold_output("output", file))
        return _evaluate_held(config, Console(sys.stdout))


def _evaluate_held(config: EvaluateConfig, console: Console) -> int:
    proteins = open_input(config)
    console.print_line(f"Evaluating on {proteins.proteins:,} proteins of {proteins.name}")
    if proteins.asked is not None and proteins.asked > proteins.proteins:
        console.print_line(f"  note      sequences={proteins.asked:,}: there are {proteins.proteins:,}; all are used")
    training = _training_split(config)
    from bionemo_esm.inference.evaluation import figures as shown
    from bionemo_esm.inference.evaluation.baselines import NeighbourCounts

    if training is None:
        console.print_line("  note      no baselines: store=... names the store that the model was trained on")
    counts = None if training is None else NeighbourCounts.of(*training)
    result = _computed(config, proteins, counts, console)
    if not result.counts.any():
        raise ConfigError(f"input: no residue of {proteins.name} is masked; give more proteins, or a larger `masked`")
    figures = shown.figures_of(result, config.resamples, 1)
    names = {name: path.model.name for name, path in config.models.items()}
    if len(set(names.values())) < len(names):
        names = {name: str(model.model) for name, model in config.models.items()}
    about = _about(config, proteins, training and training[0])
    with atomic_write(config.output_file) as stream:
        stream.write((json.dumps({**about, **figures}, indent=2) + "\n").encode())
    if config.picture:
        shown.draw(figures, names, f"{config.model.name} on {proteins.name}", config.picture_file)
    shutil.rmtree(config.work, ignore_errors=True)
    console.print_line(f"  masked    {figures['masked_residues']:,} of {figures['residues']:,} residues")
    for line in shown.lines_of(figures, names):
        console.print_line(line)
    console.print_line(f"Wrote {config.output_file}")
    if config.picture:
        console.print_line(f"  picture   {config.picture_file}")
    return 0


def _computed(config: EvaluateConfig, proteins: ProteinInput, counts: Any, console: Console) -> PartResult:
    """Return the sums over all proteins, of parts that are finished already or are computed now."""
    from bionemo_esm.inference.evaluation.evaluation import (
        EvaluationOptions,
        Predictors,
        evaluate_parts,
        load_engines,
        one_by_one,
        parts_of,
        worker_pool,
    )

    options = EvaluationOptions.from_config({key: getattr(config, key) for key in EvaluationOptions.model_fields})
    work = _work_folder(config, _job(config, proteins, counts), console)
    bar, done = ProgressBar(console, "evaluating", RESIDUES), 0

    def finished(residues: int) -> None:
        nonlocal done
        done += residues
        bar(done, proteins.residues)

    with ExitStack() as stack:
        compute: Callable[[Iterable[Part]], Iterator[tuple[Part, PartResult]]]
        if config.devices > 1:
            compute = stack.enter_context(worker_pool(config.models, counts, options, config.devices))
        else:
            predictors = Predictors(load_engines(config.models), counts, options)
            for name, engine in predictors.engines.items():
                console.print_line(f"  {name:<10}{describe(engine)}")
            compute = partial(one_by_one, predictors)
        return evaluate_parts(parts_of(proteins.read()), compute, work, finished)


# --- input ------------------------------------------------------------------------------------------------------------


def open_input(config: EvaluateConfig) -> ProteinInput:
    """Read and check the input: a split of a store, or a file. Raises `ConfigError`, `StoreError`, `InputError`."""
    folder = Path(config.input)
    if folder.is_dir():
        split = ProteinStore.open(folder).split(config.split)
        if not len(split):
            raise ConfigError(
                f"split: {folder} has no sequence in {config.split}; choose another split, or build the store with one"
            )
        return split_input(split, f"split {config.split} of {folder}", config.sequences, config.seed)
    inventory = scan_input(config.input, config)
    chosen = choose(inventory.proteins, config.sequences, config.seed)
    wanted = None if chosen is None else set(chosen.tolist())

    def read() -> Iterator[tuple[int, Residues]]:
        for number, protein in enumerate(read_proteins(config.input, config)):
            if wanted is None or number in wanted:
                yield number, protein.tokens

    number = inventory.proteins if wanted is None else len(wanted)
    residues = inventory.residues * number // inventory.proteins
    return ProteinInput(config.input, sha256_of_file(folder), number, residues, config.sequences, read)


def split_input(split: SequenceSplit, name: str, sequences: int | None, seed: int) -> ProteinInput:
    """Return a split, or so many sequences of it, chosen at random, as input."""
    chosen = choose(len(split), sequences, seed)
    numbers = np.arange(len(split)) if chosen is None else chosen
    residues = int(split.lengths[numbers].sum(dtype=np.int64))

    def read() -> Iterator[tuple[int, Residues]]:
        return ((number, split.gather([number], [0], [split.lengths[number]])) for number in numbers.tolist())

    return ProteinInput(name, split.summary.bin_sha256, len(numbers), residues, sequences, read)


def choose(there: int, wanted: int | None, seed: int) -> Any:
    """Return the ascending numbers of the chosen proteins, int64; None for all. Fewer are part of more."""
    if wanted is None or wanted >= there:
        return None
    return np.sort(EpochPermutation(there, seed).samples(np.arange(wanted))[1])


def _training_split(config: EvaluateConfig) -> tuple[SequenceSplit, SequenceSplit] | None:
    """Return the training and the validation split of the baselines; None if no store is known."""
    folder = config.store or Path(config.input)
    if config.store is None and not (folder / MANIFEST_NAME).is_file():
        return None
    store = ProteinStore.open(folder)
    if not len(store.split("train")):
        raise ConfigError(f"store: {folder} has no sequence to train on, which the baselines need")
    return store.split("train"), store.split("validation")


# --- the finished parts -----------------------------------------------------------------------------------------------


def _job(config: EvaluateConfig, proteins: ProteinInput, counts: Any) -> dict[str, Any]:
    """Return what determines the result of a part."""
    from bionemo_esm.inference.engine_options import open_model_file

    return {
        "version": __version__,
        "input": proteins.identity,
        "proteins": proteins.proteins,
        "models": {name: open_model_file(model.model).model_identity for name, model in config.models.items()},
        "settings": {
            key: getattr(config, key)
            for key in ("precision", "masked", "window", "pseudo_perplexity", "seed", "split", "unknown_letters")
        },
        "frequencies": None if counts is None else counts.frequencies.tolist(),
    }


def _work_folder(config: EvaluateConfig, job: dict[str, Any], console: Console) -> Path:
    """Return the folder of finished parts; those of another job are removed."""
    folder, text = config.work, json.dumps(job, indent=2)
    if folder.is_dir() and (not (folder / _JOB).is_file() or (folder / _JOB).read_text(encoding="utf-8") != text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _JOB).write_text(text, encoding="utf-8")
    if found := len(list(folder.glob("part-*.npz"))):
        console.print_line(f"  resumed   {found:,} part{'s' * (found != 1)} of an earlier run")
    return folder


def _about(config: EvaluateConfig, proteins: ProteinInput, training: SequenceSplit | None) -> dict[str, Any]:
    from bionemo_esm.inference.engine_options import open_model_file

    return {
        "bionemo_esm": __version__,
        "models": {
            name: {"file": model.model.name, "weights_sha256": open_model_file(model.model).weights_sha256}
            for name, model in config.models.items()
        },
        "input": proteins.name,
        "input_sha256": proteins.identity,
        "baselines_of": None if training is None else str(training.prefix.parent),
        "masked": config.masked,
        "seed": config.seed,
        "precision": config.precision,
    }


main = ConfiguredCommand(
    evaluate,
    "evaluate",
    part="inference",
    text_keys=("model", "reference", "input", "store", "output", "id_column", "sequence_column"),
    other_spellings=INFERENCE_SPELLINGS | {"trainer.devices": "devices"},
)
"""`bionemo-esm evaluate`."""
