"""A pretraining run from its configuration to its results: the one function behind `examples/pretrain_esm1nv.py`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bionemo_esm.data.pretraining import SampleReader, TrainingStream, ValidationBatches, unigram_perplexity
from bionemo_esm.data.store import ProteinStore
from bionemo_esm.errors import UserError
from bionemo_esm.training.machine import check_machine, is_rank_zero
from bionemo_esm.training.proteins import describe_source, open_proteins
from bionemo_esm.training.recipe import Recipe, load_recipe
from bionemo_esm.training.screen import Screen, duration, third_party_output_in

if TYPE_CHECKING:  # NeMo takes seconds to import: a mistake in the configuration is answered before
    from bionemo_esm.model.esm1nv import ESM1nvModel
    from bionemo_esm.training.fit import FitResult

EXIT_USER_ERROR = 2


def pretrain(cfg: DictConfig) -> None:
    """Run the recipe of a composed Hydra configuration, from where an earlier call left it.

    Exits with 2 after one line for a mistake that the user can mend, and with 130 (SIGINT) or 143 (SIGTERM) after a
    stop on request, its state saved; the same command then goes on.
    """
    try:
        exit_code = _pretrain(cfg)
    except UserError as error:
        if is_rank_zero():
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        exit_code = EXIT_USER_ERROR
    if exit_code:
        raise SystemExit(exit_code)


def _pretrain(cfg: DictConfig) -> int:
    started = time.monotonic()
    recipe = load_recipe(cfg)
    check_machine(recipe)
    folder = recipe.run_folder.absolute()
    if _already_finished(recipe, folder):
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if is_rank_zero():
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    with third_party_output_in(folder / "logs" / "output.log", silent=not is_rank_zero()) as screen:
        run = _open_run(recipe, folder, screen)
        from bionemo_esm.training.fit import fit

        result = fit(run.recipe, folder, run.stream, run.validation, run.unigram_perplexity, screen, run.describe)
        if result.stopped_by is not None:
            screen.say(f"\nStopped by {result.stopped_by.name} at step {result.steps:,}, state saved. The same command goes on.")
            return 128 + result.stopped_by
        if is_rank_zero():
            _finish(run, result, screen, started)
    return 0


@dataclass(frozen=True)
class Run:
    """A recipe with its proteins at hand."""

    recipe: Recipe
    folder: Path
    store: ProteinStore
    stream: TrainingStream
    validation: ValidationBatches
    unigram_perplexity: float

    def describe(self, backends: str, precision: str, resumed_from_step: int) -> str:
        """The one screen at the start of a run."""
        recipe, train = self.recipe, self.store.split("train")
        model, trainer, batch = recipe.model, recipe.trainer, recipe.global_batch_size
        tokens = batch * _mean_tokens(self)
        epochs = recipe.epochs(len(train))
        lines = {
            "model": f"{describe_model(recipe)}, {recipe.model.parameters:,} parameters, up to {model.seq_length} tokens",
            "data": f"{describe_source(recipe)}: {len(train):,} sequences to train on, {train.residues:,} residues; "
            f"{len(self.validation.reader.split):,} to validate on",
            "batch": f"{batch:,} sequences, about {tokens:,.0f} tokens, packed without padding "
            f"({trainer.world_size} x {recipe.data.micro_batch_size} x {recipe.batch_plan().accumulation} accumulated)",
            "steps": f"{trainer.max_steps:,}, {epochs:,.1f} epochs, {trainer.max_steps * tokens:,.0f} tokens"
            + (f"; going on from step {resumed_from_step:,}" if resumed_from_step else ""),
            "device": f"{trainer.world_size} x {trainer.accelerator}, {precision}",
            "fused": backends,
            "results": f"{_short(self.folder)} (log: {_short(self.folder / 'logs' / 'output.log')})",
        }
        return "\n".join([f"\n{recipe.name}", *(f"  {key:<8} {text}" for key, text in lines.items()), ""])


def _open_run(recipe: Recipe, folder: Path, screen: Screen) -> Run:
    store = open_proteins(recipe, folder, screen, is_rank_zero())
    max_tokens, policy = recipe.model.seq_length, recipe.data.masking
    reader = SampleReader(store.split("train"), max_tokens, policy, recipe.seed)
    questions = SampleReader(store.split("validation"), max_tokens, policy.for_evaluation(), recipe.seed)
    validation = ValidationBatches(questions, recipe.data.micro_batch_size)
    stream = TrainingStream(reader, recipe.batch_plan())
    return Run(recipe, folder, store, stream, validation, unigram_perplexity(reader.split, validation))


def describe_model(recipe: Recipe) -> str:
    model = recipe.model
    return f"ESM-1nv, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"


def _mean_tokens(run: Run) -> float:
    """Tokens of a sequence after cropping, on average over a slice of the training set."""
    lengths = run.store.split("train").lengths[:100_000]
    return float((lengths + 2).clip(max=run.recipe.model.seq_length).mean())


def _finish(run: Run, result: FitResult, screen: Screen, started: float) -> None:
    """Write the archive, read it back, score it on the validation set, and report."""
    from bionemo_esm.model.esm1nv import ESM1nvModel
    from bionemo_esm.training.report import write_report

    archive = run.folder / f"{run.recipe.name}.nemo"
    result.model.provenance = _provenance(run, result)
    result.model.save_to(str(archive))
    restored = ESM1nvModel.restore_from(str(archive))
    summary = _summary(run, result, restored, archive) | {"wall_seconds": round(time.monotonic() - started, 1)}
    _write_json(run.folder / "summary.json", summary)
    report = write_report(run.folder)
    screen.say(_closing(summary, report))


def _provenance(run: Run, result: FitResult) -> dict[str, Any]:
    """Where the weights come from: what a reader of the archive can trust and cite."""
    return {
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "steps": result.steps,
        "consumed_samples": result.model.consumed_samples,
        "data": describe_source(run.recipe),
        "data_splits": run.store.manifest["splits"],
        "restored_from": str(run.recipe.restore_from_path) if run.recipe.restore_from_path else None,
    }


def _summary(run: Run, result: FitResult, restored: ESM1nvModel, archive: Path) -> dict[str, Any]:
    recipe = run.recipe
    score = restored.evaluate(run.validation)
    return {
        "name": recipe.name,
        "model": describe_model(recipe),
        "parameters": sum(parameter.numel() for parameter in restored.parameters()),
        "data": describe_source(recipe),
        "store": str(recipe.data.store or run.folder / "store"),
        "train_sequences": len(run.store.split("train")),
        "validation_sequences": len(run.store.split("validation")),
        "global_batch_size": recipe.global_batch_size,
        "steps": result.steps,
        "epochs": result.model.consumed_samples / len(run.store.split("train")),
        "consumed_samples": result.model.consumed_samples,
        "validation_loss": score.loss,
        "validation_perplexity": score.perplexity,
        "unigram_perplexity": run.unigram_perplexity,
        "masked_accuracy": score.accuracy,
        "masked_residues": score.residues,
        "precision": result.precision,
        "fused_backends": result.backends,
        "device": f"{recipe.trainer.world_size} x {recipe.trainer.accelerator}",
        "seed": recipe.seed,
        "nemo": str(archive),
        "seconds": round(result.seconds, 1),
        "residues_per_second": result.residues_per_second,
        "resumed_from_step": result.resumed_from_step,
        "command": shlex.join(["python", *sys.argv]),
    }


def _closing(summary: dict[str, Any], report: Path) -> str:
    folder = report.parent
    return (
        f"\nDone in {duration(summary['wall_seconds'])}: {summary['steps']:,} steps, {summary['epochs']:.1f} epochs.\n"
        f"  validation perplexity {summary['validation_perplexity']:.2f}, against {summary['unigram_perplexity']:.2f} "
        f"for residue frequencies alone; {summary['masked_accuracy']:.1%} of masked residues right\n"
        f"  model    {_short(Path(summary['nemo']))}\n"
        f"  report   {_short(report)}\n"
        f"  summary  {_short(folder / 'summary.json')}"
    )


def _already_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether the run in this folder has come to its end; if so, says what came of it."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["steps"] < recipe.trainer.max_steps:
        return False
    if is_rank_zero():
        print(  # noqa: T201
            f"This run is finished already ({summary['steps']:,} steps): validation perplexity "
            f"{summary['validation_perplexity']:.2f}, against {summary['unigram_perplexity']:.2f} for residue frequencies "
            f"alone.\n  model    {_short(Path(summary['nemo']))}\n  report   {_short(folder / 'report.html')}\n"
            f"To run it again, give it a name: exp_manager.name=again, or remove {_short(folder)}"
        )
    return True


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _short(path: Path) -> str:
    """Relative to where the person is, when it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
