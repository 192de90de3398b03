"""A pretrained model and its baselines, fitted to the same data from the same seeds, and their report.

The methods are rows of the report: the pretrained encoder; one-hot features under the same head; an encoder of the same
shape with random weights, tuned in the same way; and composition, which needs no network.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES, VOCABULARY_SIZE
from bionemo_esm.console import RESIDUES, Console, ProgressBar, duration, is_rank_zero
from bionemo_esm.files import atomic_write
from bionemo_esm.finetuning.archive import archive_config
from bionemo_esm.finetuning.config import (
    COMPOSITION,
    FROZEN,
    ONE_HOT,
    UNTRAINED,
    FinetuneConfig,
    ReadingConfig,
)
from bionemo_esm.finetuning.features import FeatureCache, Moments, OneHot, StoredFeatures, moments
from bionemo_esm.finetuning.fitting import FitPlan, Fitted, Sources, fit
from bionemo_esm.finetuning.heads import HEADS
from bionemo_esm.finetuning.metrics import decimal_places, differences, estimates, format_score, scores
from bionemo_esm.finetuning.model import merged, write_fine_tuned
from bionemo_esm.finetuning.report import (
    TEST,
    VALIDATION,
    Detail,
    Difference,
    Report,
    Row,
    SetFacts,
    as_json,
    lines,
    page,
)
from bionemo_esm.finetuning.report_figure import draw
from bionemo_esm.finetuning.splits import LabelledDataset, Splits
from bionemo_esm.finetuning.tasks import Prediction, Task
from bionemo_esm.inference.engine import Engine
from bionemo_esm.inference.engine_options import ModelSizes
from bionemo_esm.inference.inputs import Protein
from bionemo_esm.model.archive import ArchiveFile
from bionemo_esm.model.backends import choose_backends, parameter_dtype
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.parallel import destroy_groups

PRETRAINED, ONE_HOT_ROW = "pretrained", "one-hot"
"""Rows of the report; the second is that of the baseline `ONE_HOT`."""
_FITS, _CACHE = "fits", "cache"
_SAMPLE_RESIDUES = 2**17  # whose states give mean and deviation of the features before the encoder is tuned


Floats = NDArray[np.float64]
Predict = Callable[[Sequence[Protein]], list[Prediction]]
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C of a logistic regression; 1 / C is a ridge's alpha
_MANY_CLASSES = 100  # from which on the penalty is not chosen, as a fit takes long
_STEPS, _STEPS_OF_MANY = 1000, 50  # of L-BFGS, at most


@dataclass(frozen=True)
class Method:
    """One method, with the predictions of each of its training runs."""

    name: str
    description: str
    validation: list[list[Prediction]] = field(default_factory=list)
    test: list[list[Prediction]] = field(default_factory=list)
    fitted: list[Fitted] = field(default_factory=list)


class Comparison:
    """The fits of one command, one after another."""

    def __init__(
        self, config: FinetuneConfig, base: ArchiveFile, splits: Splits, folder: Path, console: Console
    ) -> None:
        self.config, self.base, self.splits, self.folder, self.console = config, base, splits, folder, console
        self.encoder = EncoderConfig.from_config(base.config["encoder"])
        self.parts = config.parts(ModelSizes(self.encoder))
        if not config.is_frozen:
            self.encoder = self.encoder.replace(contact_head=False)
        self.test: Sequence[Protein] = () if splits.test is None else splits.test.proteins
        self.cache = FeatureCache(config.cache or folder / _CACHE)

    @property
    def pooled(self) -> bool:
        """Whether the head reads only the mean over a protein's residues, so that means are stored."""
        head = self.config.head
        return not self.splits.task.is_per_residue and HEADS.get(head.kind).reads_means(head)

    def fit_all(self) -> list[Method]:
        """Fit the pretrained model and the configured baselines."""
        found = [self._fit_method(PRETRAINED, f"{self.encoder.family}, {self.config.tuning.mode}")]
        if ONE_HOT in self.config.baselines:
            found.append(self._fit_method(ONE_HOT_ROW, "20 amino acids, the same head"))
        if UNTRAINED in self.config.baselines:
            found.append(self._fit_method("untrained", f"random weights, {self.config.tuning.mode}"))
        if COMPOSITION in self.config.baselines:
            self.console.print_line("  composition")
            predict = fitted_composition(self.splits)
            test = [predict(self.test)] if self.test else []
            validation = predict(self.splits.validation.proteins)
            found.append(Method("composition", "amino-acid composition, linear", [validation], test))
        return found

    def _sets(self) -> tuple[Sequence[Protein], Sequence[Protein], Sequence[Protein]]:
        return self.splits.train.proteins, self.splits.validation.proteins, self.test

    def _fit_method(self, name: str, description: str) -> Method:
        method = Method(name, description)
        sources, standard = self._sources(name)
        for seed in self.config.seeds:
            fitted = fit(self._plan(name, seed, sources, standard), self.console)
            method.fitted.append(fitted)
            method.validation.append(fitted.validation)
            method.test.extend([fitted.test] if self.test else [])
            metric = self.splits.task.metric
            found = fitted.scores[metric]
            self.console.print_line(
                f"  {name}, seed {seed}: {len(fitted.history)} epochs, the best {fitted.best_epoch}, "
                f"validation {metric} {format_score(found, decimal_places(metric, found))}, {duration(fitted.seconds)}"
            )
        return method

    def _plan(
        self,
        name: str,
        seed: int,
        sources: Sources | ReadingConfig,
        standard: Moments,
    ) -> FitPlan:
        config, one_hot = self.config, name == ONE_HOT_ROW
        tuning = config.tuning.replace(mode=FROZEN, keep_adapters=False) if one_hot else config.tuning
        parts = replace(self.parts, adapters=None) if one_hot else self.parts
        return FitPlan(
            name=f"{name}, seed {seed}",
            file=self.folder / _FITS / f"{name}-{seed}.ckpt",
            config=archive_config(self.encoder, config.trainer.precision, seed, self.splits.task, parts),
            initial_weights=self.base.path if name == PRETRAINED else None,
            tuning=tuning,
            train=self.splits.train,
            validation=self.splits.validation,
            test=self.test,
            sources=sources,
            standard=standard,
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.num_nodes,
        )

    # --- features of the heads ----------------------------------------------------------------------------------------

    def _sources(self, name: str) -> tuple[Sources | ReadingConfig, Moments]:
        """Return the features of the three sets, and their mean and deviation over the training set."""
        if name == ONE_HOT_ROW:
            one_hot = [OneHot(proteins, self.pooled) for proteins in self._sets()]
            return (one_hot[0], one_hot[1], one_hot[2]), moments(one_hot[0], range(len(self.splits.train)))
        engine = _Once(lambda: self._engine(name))
        if not self.config.is_frozen:
            return self.parts.reading, self._sample_moments(name, engine)
        proteins = [protein for part in self._sets() for protein in part]
        stored = self._stored(name, engine, proteins)
        bounds = np.cumsum([0, *map(len, self._sets())]).tolist()
        parts = [stored.part(begin, end) for begin, end in pairwise(bounds)]
        return (parts[0], parts[1], parts[2]), moments(parts[0], range(len(self.splits.train)))

    def _stored(self, name: str, engine: Callable[[], Engine], proteins: Sequence[Protein]) -> StoredFeatures:
        total = sum(protein.residues for protein in proteins)
        meter, done = ProgressBar(self.console, f"{name}, states", RESIDUES), 0

        def advance(residues: int) -> None:
            nonlocal done
            done += residues
            meter(done, total)

        first, reading = is_rank_zero(), self.parts.reading
        return self.cache.features(engine, self._identity(name), proteins, reading, self.pooled, advance, first)

    def _identity(self, name: str) -> str:
        """Return the identity of an encoder's states, for the cache."""
        model = self.base.model_identity if name == PRETRAINED else f"untrained {self.encoder!r} {self.config.seeds[0]}"
        return f"{model} {parameter_dtype(self.config.trainer.precision, self._device_type)}"

    def _sample_moments(self, name: str, engine: Callable[[], Engine]) -> Moments:
        """Return mean and deviation of the states of some training proteins, before the encoder is tuned."""
        train, some, filled = self.splits.train.proteins, list[Protein](), 0
        for number in np.random.default_rng(0).permutation(len(train)).tolist():
            if filled and filled + train[number].residues > _SAMPLE_RESIDUES:
                break
            some.append(train[number])
            filled += train[number].residues
        cache = FeatureCache(self.folder / _CACHE)
        first, identity = is_rank_zero(), self._identity(name)
        stored = cache.features(engine, identity, some, self.parts.reading, self.pooled, is_writer=first)
        return moments(stored, range(len(some)))

    @property
    def _device_type(self) -> str:
        """The device type that computes a frozen encoder's states."""
        accelerator = self.config.trainer.accelerator
        return "cuda" if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()) else "cpu"

    def _engine(self, name: str) -> Engine:
        precision, place = self.config.trainer.precision, self._device_type
        if name == PRETRAINED:
            return Engine.load(self.base.path, place, precision)
        dtype = parameter_dtype(precision, place)
        quiet = self.encoder.replace(hidden_dropout=0.0, attention_dropout=0.0, contact_head=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seeds[0])
            encoder = ESMEncoder(quiet, dtype, choose_backends("cpu", dtype, 0.0, quiet.head_size))
        return Engine(encoder.to(place), quiet)


class _Once:
    """A model that is loaded on first use."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        self._engine = self._engine or self._load()
        return self._engine


def compare(
    config: FinetuneConfig, base: ArchiveFile, splits: Splits, folder: Path, console: Console, started: float
) -> None:
    """Fit all methods, then open the test set, and write model and report."""
    comparison = Comparison(config, base, splits, folder, console)
    try:
        methods = comparison.fit_all()
    finally:
        destroy_groups()
    if not is_rank_zero():
        return
    test = None if splits.test is None else splits.test.open()
    report = _report(comparison, methods, test)
    best = _best(methods[0], comparison)
    model = _save(comparison, methods[0].fitted[best], config.seeds[best], report, folder / "model.nemo")
    written = write_report(folder, report)
    shutil.rmtree(folder / _FITS, ignore_errors=True)
    shutil.rmtree(folder / _CACHE, ignore_errors=True)
    for line in _closing(report, model, written, started):
        console.print_line(line)


def _best(method: Method, comparison: Comparison) -> int:
    """Return the index of the run with the best validation score; of equal ones the first."""
    task = comparison.splits.task
    best = 0
    for index, fitted in enumerate(method.fitted):
        if task.is_better(fitted.scores[task.metric], method.fitted[best].scores[task.metric]):
            best = index
    return best


# --- report and model -------------------------------------------------------------------------------------------------


def _report(comparison: Comparison, methods: Sequence[Method], test: LabelledDataset | None) -> Report:
    config, splits = comparison.config, comparison.splits
    task, on = splits.task, TEST if test is not None else VALIDATION
    resamples = config.resamples
    rows = [
        Row(
            method.name,
            method.description,
            [scores(task, splits.validation.targets, run) for run in method.validation],
            estimates(task, splits.validation.targets, method.validation, resamples),
            None if test is None else estimates(task, test.targets, method.test, resamples),
            sum(fitted.seconds for fitted in method.fitted) if method.fitted else None,
            [fitted.best_epoch for fitted in method.fitted],
            method.fitted[0].parameters if method.fitted else None,
            [len(fitted.history) for fitted in method.fitted],
        )
        for method in methods
    ]
    compared = []
    for which, labelled in ((VALIDATION, splits.validation), (TEST, test)):
        for other in methods[1:] if labelled is not None else ():
            runs = [(method.validation if which == VALIDATION else method.test) for method in (methods[0], other)]
            assert labelled is not None
            found = differences(task, labelled.targets, runs[0], runs[1], resamples)
            compared.append(Difference(methods[0].name, other.name, which, found))
    best = _best(methods[0], comparison)
    shown = (splits.validation, methods[0].validation) if test is None else (test, methods[0].test)
    sets = {"train": splits.train, VALIDATION: splits.validation} | ({} if test is None else {TEST: test})
    return Report(
        task=task,
        sets={name: SetFacts.of(task, labelled) for name, labelled in sets.items()},
        rows=rows,
        differences=compared,
        detail=Detail.of(task, methods[0].name, on, config.seeds[best], shown[0].targets, shown[1][best]),
        seeds=config.seeds,
        resamples=resamples,
        notes=splits.notes,
        files=splits.files,
        model={
            "file": comparison.base.path.name,
            "weights_sha256": comparison.base.weights_sha256,
            "family": comparison.encoder.family,
            "layers": comparison.encoder.num_layers,
            "hidden_size": comparison.encoder.hidden_size,
            "parameters": comparison.encoder.parameters,
        },
        settings=config.record() | {"reading": comparison.parts.reading.model_dump()},
    )


def _save(comparison: Comparison, fitted: Fitted, seed: int, report: Report, path: Path) -> Path:
    """Write the model of one run, with its provenance."""
    config, base, parts = comparison.config, comparison.base, comparison.parts
    trained = fitted.weights
    if parts.adapters is not None and not config.tuning.keep_adapters:
        trained, parts = merged(base, trained, parts), replace(parts, adapters=None)
    row = report.rows[0]
    account: dict[str, Any] = {
        "base_model": base.path.name,
        "base_weights_sha256": base.weights_sha256,
        "mode": config.tuning.mode,
        "seed": seed,
        "epochs": fitted.best_epoch,
        "validation": _rounded(fitted.scores),
        "data": dict(report.files),
        "training_proteins": len(comparison.splits.train),
        "settings": {key: value for key, value in report.settings.items() if key != "seeds"},
    }
    if row.test is not None:
        account[f"test, mean of {len(config.seeds)} seeds"] = _rounded({name: e.value for name, e in row.test.items()})
    provenance = {key: value for key, value in base.provenance.items() if key != "package_versions"}
    if config.tuning.mode != FROZEN:
        provenance.pop("contact_head", None)
    return write_fine_tuned(
        path, base, trained, comparison.splits.task, parts, config.tuning.mode, seed,
        {**provenance, "finetuning": account},
    )  # fmt: skip


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write report.json, report.png and report.md, each whole, over existing ones; return report.md's path first."""
    texts = {"report.json": json.dumps(as_json(report), indent=1, allow_nan=False) + "\n", "report.md": page(report)}
    draw(report, folder / "report.png")
    for name, text in texts.items():
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    return [folder / name for name in ("report.md", "report.json", "report.png")]


def _rounded(found: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else round(value, 6) for name, value in found.items()}


def _closing(report: Report, model: Path, written: Sequence[Path], started: float) -> list[str]:
    return [
        "",
        *lines(report),
        "",
        f"Done in {duration(time.monotonic() - started)}.",
        f"  model    {model}",
        f"  report   {written[0]}",
        f"Predict:  bionemo-esm predict model={shlex.quote(str(model))} input=proteins.fasta output=predictions.csv",
    ]


# --- composition ------------------------------------------------------------------------------------------------------


def fitted_composition(splits: Splits) -> Predict:
    """Fit the composition baseline to the training set; return a function from proteins to predictions.

    Per protein: a linear model (scikit-learn) of the shares of the 20 amino acids and the logarithm of the length, as
    in the first predictors of subcellular localization (Nakashima & Nishikawa 1994); its penalty is chosen on the
    validation set by the task's metric. Per residue: the class frequencies, or the mean, of training residues of the
    same amino acid. The result is deterministic.
    """
    return _per_residue(splits) if splits.task.is_per_residue else _per_protein(splits)


def composition(proteins: Sequence[Protein]) -> Floats:
    """Return the shares of the 20 standard amino acids and the natural logarithm of the length, [S, 21]."""
    found = np.zeros((len(proteins), NUM_STANDARD_RESIDUES + 1))
    for row, protein in zip(found, proteins, strict=True):
        counts = np.bincount(protein.tokens, minlength=VOCABULARY_SIZE)
        row[:-1] = counts[FIRST_RESIDUE_ID : FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES] / protein.residues
        row[-1] = np.log(protein.residues)
    return found


def _per_residue(splits: Splits) -> Predict:
    """Predict by look-up in [33, C]: frequencies by token id; of all residues for ids that training lacks."""
    train = splits.train
    tokens = np.concatenate([protein.tokens for protein in train.proteins])
    targets = np.concatenate(train.targets).astype(np.float64)
    tokens, targets = tokens[~np.isnan(targets)], targets[~np.isnan(targets)]
    if splits.task.is_classification:
        shown: Floats = np.zeros((VOCABULARY_SIZE, splits.task.outputs))
        np.add.at(shown, (tokens, targets.astype(np.int64)), 1.0)
    else:
        shown = np.bincount(tokens, weights=targets, minlength=VOCABULARY_SIZE)[:, None].astype(np.float64)
    seen = np.bincount(tokens, minlength=VOCABULARY_SIZE)[:, None].astype(np.float64)
    table = np.where(seen > 0, shown / np.maximum(seen, 1), shown.sum(axis=0) / seen.sum()).astype(np.float32)
    return lambda proteins: [table[protein.tokens] for protein in proteins]


def _per_protein(splits: Splits) -> Predict:
    """Return the fit whose penalty validates best; of equal ones the stronger penalty."""
    task, validation = splits.task, splits.validation
    best: tuple[float, Predict] | None = None
    for inverse_penalty in (1.0,) if task.outputs > _MANY_CLASSES else INVERSE_PENALTIES:
        predict = _fitted(task, splits.train, inverse_penalty)
        score = scores(task, validation.targets, predict(validation.proteins))[task.metric]
        if best is None or task.is_better(score, best[0]):
            best = score, predict
    assert best is not None
    return best[1]


def _fitted(task: Task, train: LabelledDataset, inverse_penalty: float) -> Predict:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    targets = np.concatenate(train.targets)
    there = ~np.isnan(targets)
    features = composition(train.proteins)[there]
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    steps = _STEPS_OF_MANY if task.outputs > _MANY_CLASSES else _STEPS
    model = (
        LogisticRegression(C=inverse_penalty, max_iter=steps)
        if task.is_classification
        else Ridge(alpha=1 / inverse_penalty)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - mean) / scale, targets[there])

    def predict(proteins: Sequence[Protein]) -> list[Prediction]:
        predicted = np.zeros((len(proteins), task.outputs), dtype=np.float32)
        if len(proteins):
            standard = (composition(proteins) - mean) / scale
            if task.is_classification:  # classes in the training set
                predicted[:, model.classes_.astype(np.int64)] = model.predict_proba(standard)
            else:
                predicted[:, 0] = model.predict(standard)
        return [predicted[begin:end] for begin, end in pairwise(range(len(proteins) + 1))]

    return predict
