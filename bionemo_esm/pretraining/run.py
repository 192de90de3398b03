"""A pretraining run, from its configuration to its results: `examples/pretrain_esm1nv.py` calls `pretrain`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bionemo_esm.command_line import TRAINER_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import Console, ProgressBar, duration, is_rank_zero, redirect_output, run_to_exit_code
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.files import write_atomically
from bionemo_esm.pretraining.preflight import check_requirements, large_imports, launched_ranks, versions
from bionemo_esm.pretraining.recipe import Recipe, load_recipe
from bionemo_esm.pretraining.run_context import (
    OUTPUT_LOG,
    RunContext,
    build_run_store,
    describe_model,
    describe_source,
    make_folder,
    open_run_store,
    run_directory,
    short,
)

if TYPE_CHECKING:  # NeMo takes seconds to import; configuration errors are reported before
    from bionemo_esm.model.esm1nv import ESM1nvModel
    from bionemo_esm.pretraining.trainer import FitResult

EXIT_GAVE_UP = 3


def pretrain(cfg: DictConfig) -> None:
    """Run the recipe of a composed Hydra configuration. A repeated call resumes the run.

    Exits with 2 after a one-line error that the user can fix; with 130 (SIGINT) or 143 (SIGTERM) after a stop on
    request, its state saved; with 3 after too many skipped steps in a row, its state saved.
    """
    interrupted = "Interrupted; the same command resumes from the last checkpoint, if there is one."
    run_to_exit_code(lambda: _pretrain(cfg), interrupted, silent=not is_rank_zero())


def _pretrain(cfg: DictConfig) -> int:
    started = time.monotonic()
    if OmegaConf.select(cfg, "plan") is True:  # needs no other rank
        _show_plan(cfg)
        return 0
    with launched_ranks() as ranks, ExitStack() as stack:
        recipe = ranks.on_every_rank(lambda: load_recipe(cfg), lambda recipe: recipe.settings_text)
        ranks.on_every_rank(lambda: check_requirements(recipe, ranks.launched), lambda _: versions())
        folder = recipe.run_folder.absolute()
        if ranks.on_every_rank(lambda: _already_finished(recipe, folder), lambda finished: {"finished": finished}):
            return 0
        console = ranks.on_every_rank(lambda: stack.enter_context(_recorded_run(folder, cfg)))
        ranks.on_rank_zero(lambda: build_run_store(recipe, folder, console))
        run = ranks.on_every_rank(
            lambda: RunContext.of(recipe, folder, open_run_store(recipe, folder)), lambda run: run.identity
        )
        with large_imports():
            from bionemo_esm.pretraining.trainer import fit

        result = fit(run, console, ranks)
        if result.stopped_by is not None:
            console.print_line(f"\nStopped by {result.stopped_by.name} at step {result.steps:,}, state saved.")
            console.print_line("The same command resumes from there.")
            return 128 + result.stopped_by
        if result.model.gave_up:
            console.print_line(_gave_up_message(recipe, folder, result.steps))
            return EXIT_GAVE_UP
        if is_rank_zero():
            _finish(run, result, console, started)
    return 0


def _show_plan(cfg: DictConfig) -> None:
    from bionemo_esm.pretraining.plan_report import show_plan

    if is_rank_zero():
        show_plan(load_recipe(cfg))


@contextmanager
def _recorded_run(folder: Path, cfg: DictConfig) -> Iterator[Console]:
    """Hold the run directory, and send the messages of other libraries to its log."""
    with ExitStack() as stack:
        if is_rank_zero():
            stack.enter_context(run_directory(folder))
        else:
            make_folder(folder)
        console = stack.enter_context(redirect_output(folder / OUTPUT_LOG, silent=not is_rank_zero()))
        if is_rank_zero() and not (folder / "config.yaml").exists():  # a refused run must not replace it
            OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        yield console


def _finish(run: RunContext, result: FitResult, console: Console, started: float) -> None:
    """Write the archive, read it back, score it on the validation set, and write the report."""
    from bionemo_esm.model.esm1nv import ESM1nvModel
    from bionemo_esm.pretraining.report import write_report

    archive = run.folder / f"{run.recipe.name}.nemo"
    result.model.save_to(str(archive))
    restored = ESM1nvModel.restore_from(str(archive))
    summary = _summary(run, result, restored, archive) | _averaged(run, result, console)
    summary |= _tested(run, summary, console)
    summary |= {"wall_seconds": round(time.monotonic() - started, 1)}
    _write_json(run.folder / "summary.json", summary)
    report = write_report(run.folder)
    console.print_line(_closing(summary, report))


def _averaged(run: RunContext, result: FitResult, console: Console) -> dict[str, Any]:
    """Write the average of the last checkpoints, read it back, score it, and return its part of the summary."""
    from bionemo_esm.model.esm1nv import ESM1nvModel

    output = run.folder / f"{run.recipe.name}-averaged.nemo"
    try:
        if result.averaging is None or not result.averaging.finish(output, ProgressBar(console, "averaging")):
            return {}
    except UserError as error:  # the run has ended, and its model is on disk
        console.print_line(f"warning: no average was made: {error}")
        return {}
    restored = ESM1nvModel.restore_from(str(output))
    saving, found = run.recipe.exp_manager.checkpoints, len(restored.provenance["averaged_from"])
    written = -(-result.steps // saving.every_n_train_steps) - result.first_step // saving.every_n_train_steps
    wanted = min(saving.average_last, written)
    if found < wanted:
        console.print_line(
            f"warning: the average is of {found}, not {wanted} checkpoints; others are missing in averaging/"
        )
    score = restored.evaluate(run.validation)
    return {
        "averaged_nemo": str(output),
        "averaged_checkpoints": found,
        "averaged_from_step": restored.provenance["averaged_from"][0]["steps"],
        "averaged_validation_loss": score.loss,
        "averaged_validation_perplexity": score.perplexity,
        "averaged_masked_accuracy": score.accuracy,
    }


def _tested(run: RunContext, summary: dict[str, Any], console: Console) -> dict[str, Any]:
    """Return what the test split says about the model and its average."""
    from bionemo_esm.inference.evaluation.figures import MODEL
    from bionemo_esm.pretraining.held_out import AVERAGED, evaluate_test_split

    archives = {MODEL: summary["nemo"], AVERAGED: summary.get("averaged_nemo")}
    return evaluate_test_split(run, {name: Path(path) for name, path in archives.items() if path}, console)


def _gave_up_message(recipe: Recipe, folder: Path, steps: int) -> str:
    return (
        f"\nStopped at step {steps:,}, state saved: {recipe.optim.max_skipped_steps} steps in a row were skipped.\n"
        f"Their samples are in {short(folder / 'metrics.jsonl')}, lines of kind skipped.\nThe same command tries "
        "again with the samples after them; a lower optim.lr needs another exp_manager.name, which may begin with "
        "restore_from_path=....nemo."
    )


def _summary(run: RunContext, result: FitResult, restored: ESM1nvModel, archive: Path) -> dict[str, Any]:
    recipe = run.recipe
    score = restored.evaluate(run.validation)
    return {
        "name": recipe.name,
        "fingerprint": recipe.fingerprint,
        "model": describe_model(recipe),
        "parameters": sum(parameter.numel() for parameter in restored.parameters()),
        "data": describe_source(recipe),
        "store": str(recipe.data.store or run.folder / "store"),
        "train_sequences": len(run.train),
        "validation_sequences": len(run.validation.reader.split),
        **_batch_of(recipe),
        "steps": result.steps,
        "epochs": result.model.consumed_samples / run.train.num_clusters,
        "consumed_samples": result.model.consumed_samples,
        "validation_loss": score.loss,
        "validation_perplexity": score.perplexity,
        "unigram_perplexity": run.unigram_perplexity,
        "masked_accuracy": score.accuracy,
        "masked_residues": score.residues,
        "initial_validation_loss": result.initial and result.initial.loss,
        "initial_validation_perplexity": result.initial and result.initial.perplexity,
        "initial_masked_residues": result.initial and result.initial.residues,
        "probe": result.probe,
        "precision": result.precision,
        "fused_backends": result.backends,
        "device": f"{recipe.trainer.world_size} x {recipe.trainer.accelerator} ({result.device_name})",
        "seed": recipe.seed,
        "nemo": str(archive),
        "seconds": round(result.seconds, 1),
        **{name: result.measured.get(name) for name in ("residues_per_second", "tokens_per_second", "mfu")},
        **{name: result.measured.get(name) for name in ("data_wait_share", "memory_gb")},
        "resumed_from_step": result.resumed_from_step,
        "continued_from": result.model.provenance.get("continued_from"),
        "best_checkpoint": str(result.best_checkpoint) if result.best_checkpoint else None,
        "command": shlex.join(["python", *sys.argv]),
    }


def _batch_of(recipe: Recipe) -> dict[str, int]:
    if recipe.global_batch_size is not None:
        return {"global_batch_size": recipe.global_batch_size}
    assert recipe.data.global_batch_tokens is not None
    return {"global_batch_tokens": recipe.data.global_batch_tokens}


def _steps(summary: dict[str, Any]) -> str:
    return f"{summary['steps']:,} step{'' if summary['steps'] == 1 else 's'}"


def _closing(summary: dict[str, Any], report: Path) -> str:
    folder = report.parent
    before = averaged = files = tested = ""
    if summary["initial_masked_residues"] == summary["masked_residues"]:  # scored on the same batches
        before = f"{summary['initial_validation_perplexity']:.2f} before training and "
    if "averaged_nemo" in summary:
        averaged = (
            f"  averaged over the last {summary['averaged_checkpoints']} checkpoints (from step "
            f"{summary['averaged_from_step']:,} on) {summary['averaged_validation_perplexity']:.2f}; "
            f"{summary['averaged_masked_accuracy']:.1%} right\n"
        )
        files = f"  averaged {short(Path(summary['averaged_nemo']))}\n"
    if "test" in summary:
        figures = summary["test"]["predictors"]
        low, high = figures["model"]["perplexity_interval"]
        also = f", averaged {summary['averaged_test_perplexity']:.2f}" if "averaged" in figures else ""
        tested = (
            f"  test perplexity {summary['test_perplexity']:.2f} ({low:.2f} to {high:.2f}){also}, against "
            f"{summary['test_unigram_perplexity']:.2f} for residue frequencies and "
            f"{summary['test_ngram_perplexity']:.2f} for an n-gram of four neighbours\n"
        )
    return (
        f"\nDone in {duration(summary['wall_seconds'])}: {_steps(summary)}, {summary['epochs']:.1f} epochs.\n"
        f"  validation perplexity {summary['validation_perplexity']:.2f}, against {before}"
        f"{summary['unigram_perplexity']:.2f} for residue frequencies alone; {summary['masked_accuracy']:.1%} of "
        "masked residues right\n"
        f"{averaged}"
        f"{tested}"
        f"  model    {short(Path(summary['nemo']))}\n"
        f"{files}"
        f"  report   {short(report)}\n"
        f"  summary  {short(folder / 'summary.json')}"
    )


def _already_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether the run in this directory is finished; if so, print its result."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    summary = json.loads(path.read_text(encoding="utf-8"))
    results = [summary["nemo"], *([summary["averaged_nemo"]] if "averaged_nemo" in summary else [])]
    if summary["steps"] < recipe.trainer.max_steps or not all(Path(result).is_file() for result in results):
        return False
    if summary["fingerprint"] != recipe.fingerprint:
        raise ConfigError(
            f"{short(folder)} holds a finished run of another configuration ({short(folder / 'config.yaml')}); "
            "give this one another exp_manager.name"
        )
    if is_rank_zero():
        report = short(folder / "report.html")
        print(  # noqa: T201
            f"This run is finished already ({_steps(summary)}): validation perplexity "
            f"{summary['validation_perplexity']:.2f}, against {summary['unigram_perplexity']:.2f} for residue "
            f"frequencies alone.\n  model    {short(Path(summary['nemo']))}\n  report   {report}\n"
            f"To run it again, give it a name: exp_manager.name=again, or remove {short(folder)}"
        )
    return True


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")


main = ConfiguredCommand(
    pretrain,
    "pretrain_esm1nv",
    text_keys=(
        *("data.fasta", "data.store", "restore_from_path", "continue_from_path", "exp_manager.exp_dir"),
        *("exp_manager.name", "exp_manager.wandb_logger_kwargs.project", "exp_manager.wandb_logger_kwargs.name"),
        *("probe.data.sequences", "probe.data.mask"),
    ),
    list_keys=("probe.data.train", "probe.data.validation", "probe.data.test"),
    other_spellings=TRAINER_SPELLINGS,
    archive_keys=("restore_from_path={}", "model=of_archive"),
    open_sections=("optim.options.",),
    rank_file=str(Path(__file__).with_name("__main__.py")),
)
"""`bionemo-esm pretrain`."""
