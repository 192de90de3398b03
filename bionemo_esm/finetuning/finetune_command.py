"""`bionemo-esm finetune`: fit a pretrained model to a task, compare it with baselines, and write a report.

All data are read and checked before the first model is loaded. Every fit has a file, so that the same command resumes
after a stop. The labels of the test set are used only after the last fit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from bionemo_esm.command_line import TRAINER_SPELLINGS, ConfiguredCommand
from bionemo_esm.console import Console, is_rank_zero, redirect_output, run_to_exit_code, sigterm_as_exit
from bionemo_esm.errors import ConfigError
from bionemo_esm.files import check_writable, hold_name
from bionemo_esm.finetuning.config import ATTENTION, CONVNET, FinetuneConfig
from bionemo_esm.finetuning.tasks import RESIDUE
from bionemo_esm.inference.engine_options import ModelSizes, open_model_file
from bionemo_esm.model.archive import WEIGHTS, ArchiveError, ArchiveFile
from bionemo_esm.model.validate import check_sizes
from bionemo_esm.settings import plain_values

if TYPE_CHECKING:
    from bionemo_esm.finetuning.splits import Splits

_CONFIG, _LOG, _REPORT = "config.yaml", "output.log", "report.json"
_PRETRAINED = "ESM1nvModel"
_STOPPED = "Stopped; the same command goes on from the last epoch that was saved."


def finetune(cfg: DictConfig) -> None:
    """Run the command for a composed Hydra configuration; exits with 2 after one line for a user error."""
    with sigterm_as_exit(_STOPPED) if is_rank_zero() else nullcontext():
        run_to_exit_code(lambda: _finetune(cfg), _STOPPED, silent=not is_rank_zero())


def _finetune(cfg: DictConfig) -> int:
    started = time.monotonic()
    config = finetune_config(cfg)
    folder = config.output.absolute()
    if _is_finished(cfg, folder) if is_rank_zero() else (folder / _REPORT).exists():
        if is_rank_zero():
            print(f"Finished already: {folder / 'report.md'}, {folder / 'model.nemo'}")  # noqa: T201
        return 0
    base, sizes = _pretrained(config.model)
    config.parts(sizes)
    from bionemo_esm.finetuning.splits import read_splits

    splits = read_splits(config.task, config.data, config.seeds[0])
    if is_rank_zero():
        base.verify(WEIGHTS)
    with _working_folder(folder, cfg) as console:
        _print_data(console, splits)
        from bionemo_esm.finetuning.comparison import compare

        compare(config, base, splits, folder, console, started)
    return 0


def finetune_config(cfg: DictConfig) -> FinetuneConfig:
    """Return the settings of a composed configuration. Raises `ConfigError`, naming the key.

    A head's settings are those of its kind (default: convnet per residue, attention per protein).
    """
    from bionemo_esm.finetuning.heads import HEADS, head_config

    values = plain_values(cfg)
    head, task = values.get("head"), values.get("task")
    if isinstance(head, dict) and isinstance(task, dict):
        default = CONVNET if task.get("level") == RESIDUE else ATTENTION
        values["head"] = head_config({**head, "kind": head.get("kind") or default})
    config = FinetuneConfig.from_config(values)
    HEADS.get(config.head.kind).check_task(config.task.name, config.task.is_per_residue)
    return config


def _pretrained(path: Path) -> tuple[ArchiveFile, ModelSizes]:
    """Open the pretrained archive. Raises `ArchiveError` for a file that holds none."""
    file = open_model_file(path)
    if file.model_class != _PRETRAINED:
        raise ArchiveError(
            f"model: {path}: holds a model of class {file.model_class}, which has learned a task already; "
            "give the pretrained archive that it came from"
        )
    return file, ModelSizes(check_sizes(file))


def _is_finished(cfg: DictConfig, folder: Path) -> bool:
    """Whether this command has finished in the folder.

    Raises `ConfigError` unless the folder is new, or belongs to this command.
    """
    check_writable("output", folder)
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; give a folder that is not there yet")
    if not (folder / _CONFIG).exists():
        if any(folder.iterdir()):
            raise ConfigError(f"output: {folder} has other files in it; give a folder that is not there yet")
        return False
    earlier = OmegaConf.to_container(OmegaConf.load(folder / _CONFIG))
    now = OmegaConf.to_container(cfg, resolve=True)
    if different := _first_difference("", earlier, now):
        raise ConfigError(
            f"output: {folder} is of another fine-tuning, whose {different}; give its command to go on with it, remove "
            "the folder, or choose another name"
        )
    return (folder / _REPORT).exists()


def _first_difference(key: str, earlier: object, now: object) -> str:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in [*earlier, *(name for name in now if name not in earlier)]:
            place = f"{key}.{name}" if key else str(name)
            if found := _first_difference(place, earlier.get(name), now.get(name)):
                return found
        return ""
    return "" if earlier == now else f"{key} was {earlier}, not {now}"


@contextmanager
def _working_folder(folder: Path, cfg: DictConfig) -> Iterator[Console]:
    """Hold the folder on rank 0, and redirect the messages of other libraries to its log."""
    first = is_rank_zero()
    with ExitStack() as stack:
        if first:
            stack.enter_context(hold_name("output", folder, otherwise="choose another output"))
        folder.mkdir(parents=True, exist_ok=True)
        console = stack.enter_context(redirect_output(folder / _LOG, silent=not first))
        if first and not (folder / _CONFIG).exists():
            OmegaConf.save(cfg, folder / _CONFIG, resolve=True)
        yield console


def _print_data(console: Console, splits: Splits) -> None:
    task = splits.task
    what = f"{len(task.classes):,} classes" if task.is_classification else "a number"
    console.print_line(f"{task.name}: {what} for each {'residue' if task.is_per_residue else 'protein'}")
    test = "none" if splits.test is None else f"{len(splits.test):,}"
    console.print_line(
        f"  data     {len(splits.train):,} proteins to train on, {len(splits.validation):,} to validate on, test {test}"
    )
    for note in splits.notes:
        console.print_line(f"  note     {note}")


main = ConfiguredCommand(
    finetune,
    "finetune",
    part="finetuning",
    text_keys=(
        *("model", "output", "cache", "data.sequences", "data.mask", "data.download", "task.name"),
        *("task.target_column", "task.sequence_column", "task.id_column", "task.set_column", "task.validation_column"),
        "task.header_pattern",
    ),
    list_keys=("data.train", "data.validation", "data.test"),
    other_spellings={"restore_from_path": "model"} | TRAINER_SPELLINGS,
    open_sections=("head.",),
    rank_file=str(Path(__file__).with_name("__main__.py")),
)
"""`bionemo-esm finetune`."""
