"""The probe's configuration and its labelled set. No torch.

The probe changes nothing of a run: neither the fingerprint nor the identity of a run depends on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import model_validator
from typing_extensions import Self

from bionemo_esm import config_directory
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig
from bionemo_esm.settings import PositiveInt, Settings, plain_values

if TYPE_CHECKING:
    from bionemo_esm.finetuning.config import ReadingConfig
    from bionemo_esm.finetuning.splits import LabelledDataset
    from bionemo_esm.finetuning.tasks import Targets, Task
    from bionemo_esm.model.config import EncoderConfig

MOST_RESIDUES = 20_000  # training residues of a head per residue: the fit must take seconds
_TASK_KEYS, _DATA_KEYS = set(TaskConfig.model_fields), set(DataConfig.model_fields)
_SEED = 0  # of splits and samples: independent of the run's seed, so that runs are comparable
_OWN_TASK = "probe.task={name: mine, level: sequence, kind: regression, target_column: activity}"
_OUR_KEY = re.compile(
    r"(?<![\w./-])(task|data)\.(?=(?:train|validation|test|sequences|mask|split(?:\.\w+)?|max_residues|bad_records|"
    r"missing_targets|unknown_letters|unseen_classes|name|level|kind|metric|classes|unknown|\w+_column|header_pattern)"
    r"\b(?!\.\w))"
)
"""Keys of a fine-tuning in error messages, which the probe has below `probe.`. Does not match file names."""


class ProbeConfig(Settings, section="probe"):
    """The labelled set and the interval of the probe; conf/probe/default.yaml documents the keys."""

    task: TaskConfig
    data: DataConfig
    every_n_train_steps: PositiveInt = 1_000
    proteins: PositiveInt = 500
    layer: int = -1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.download is not None:
            raise ConfigError(
                "probe.data.download: every process of a run would download; name local files by probe.data.train=..."
            )
        if not self.data.train:
            raise ConfigError("probe.data.train must be given: probe.data.train=FILE; or no probe: probe.task=null")
        return self


@dataclass(frozen=True)
class ProbeSet:
    """The proteins of the probe with their targets, in an order that does not depend on the file."""

    config: ProbeConfig
    task: Task
    train: LabelledDataset
    validation: LabelledDataset
    reading: ReadingConfig
    notes: tuple[str, ...] = ()  # of the reader: records that were left out or are missing

    def describe(self) -> str:
        """Return one line for the screen."""
        what = "residues" if self.task.is_per_residue else "proteins"
        sizes = f"fitted on {self.train.known:,} {what}"
        if self.task.is_per_residue:
            sizes += f" of {len(self.train):,} proteins"
        sizes += f", scored on {self.validation.known:,}"
        every = f"every {self.config.every_n_train_steps:,} steps"
        notes = f" (the files: {'; '.join(self.notes)})" if self.notes else ""
        return f"{self.task.name}, {every}: {sizes}{notes}"


def load_probe_config(values: Mapping[str, Any] | None) -> ProbeConfig | None:
    """Return the section `probe`; None if it names no task. Raises `ConfigError`, naming the key."""
    if values is None:
        return None
    _check_keys("probe", values, ProbeConfig.model_fields)
    files = {} if values.get("data") is None else values["data"]
    _check_keys("probe.data", files, _DATA_KEYS)
    if values.get("task") is None:
        if files.get("train") is not None:
            raise ConfigError("probe.data.train is given, but no task: probe.task=secondary_structure, or another")
        return None
    task = _task_values(values["task"])
    try:
        return ProbeConfig(**{**values, "task": TaskConfig.from_config(task), "data": DataConfig.from_config(files)})
    except ConfigError as error:
        raise ConfigError(_with_probe_keys(error), code=error.code) from error


def _check_keys(section: str, values: Any, known: Iterable[str]) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} must be a mapping, not {values!r}", code="config.type")
    if unknown := sorted(values.keys() - set(known)):
        names = ", ".join(sorted(known))
        raise ConfigError(f"unknown key {section}.{unknown[0]}; known are: {names}", code="config.unknown-key")


def read_probe(config: ProbeConfig, model: EncoderConfig) -> ProbeSet:
    """Return the labelled proteins; every label is checked. Raises `UserError`, naming the key, or file and record."""
    from bionemo_esm.finetuning.config import ReadingOptions
    from bionemo_esm.finetuning.splits import read_splits
    from bionemo_esm.inference.engine_options import ModelSizes

    try:
        reading = ReadingOptions(layer=config.layer).resolved(ModelSizes(model))
    except ConfigError as error:
        raise ConfigError(f"probe.{error}") from error
    try:
        splits = read_splits(config.task, config.data, _SEED)
    except ConfigError as error:
        raise ConfigError(_with_probe_keys(error), code=error.code) from error
    except UserError as error:
        raise UserError(f"probe: {_with_probe_keys(error)}", code=error.code) from error
    train = _some_residues(_some_proteins(splits.train, config.proteins))
    values = np.unique(np.concatenate(train.targets))
    if np.isfinite(values).sum() < 2:
        raise ConfigError(
            f"probe.proteins={config.proteins}: the training proteins that were chosen have one and the same target; "
            "choose more of them"
        )
    validation = _some_proteins(splits.validation, config.proteins)
    return ProbeSet(config, splits.task, train, validation, reading, splits.notes)


def _task_values(task: Any) -> Mapping[str, Any]:
    """Return the keys of a task. A mapping with the name of a shipped task overrides keys of that task."""
    folder = config_directory("finetuning") / "task"
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "custom")
    given = task if isinstance(task, Mapping) else {}
    _check_keys("probe.task", given, _TASK_KEYS)
    name = given.get("name") if isinstance(task, Mapping) else task
    if name in names:
        preset = OmegaConf.load(folder / f"{name}.yaml")
        assert isinstance(preset, DictConfig)
        return plain_values(preset) | dict(given)
    if not given:
        raise ConfigError(
            f"probe.task must be one of {', '.join(names)}; or keys of your own: '{_OWN_TASK}'; not {task!r}"
        )
    return given


def _with_probe_keys(error: UserError) -> str:
    return _OUR_KEY.sub(r"probe.\1.", str(error))


# --- samples of the labelled set --------------------------------------------------------------------------------------


def _some_proteins(labelled: LabelledDataset, most: int) -> LabelledDataset:
    """Return up to `most` proteins, chosen and ordered by a hash of sequence and targets, not by the file's order."""
    from bionemo_esm.finetuning.splits import LabelledDataset

    draws = [_draw(p.tokens.tobytes(), t.tobytes()) for p, t in zip(labelled.proteins, labelled.targets, strict=True)]
    chosen = sorted(range(len(draws)), key=draws.__getitem__)[:most]
    return LabelledDataset([labelled.proteins[i] for i in chosen], [labelled.targets[i] for i in chosen])


def _draw(sequence: bytes, targets: bytes) -> tuple[bytes, bytes]:
    return hashlib.blake2b(sequence, digest_size=16, key=str(_SEED).encode()).digest(), targets


def _some_residues(labelled: LabelledDataset) -> LabelledDataset:
    """Return the same proteins with at most `MOST_RESIDUES` known targets; all others become NaN."""
    from bionemo_esm.finetuning.splits import LabelledDataset

    together = np.concatenate(labelled.targets)
    places = np.flatnonzero(np.isfinite(together))
    if len(places) > MOST_RESIDUES:
        places = np.random.default_rng(_SEED).choice(places, MOST_RESIDUES, replace=False)
    fewer: Targets = np.full_like(together, np.nan)
    fewer[places] = together[places]
    ends = np.cumsum([len(target) for target in labelled.targets])[:-1]
    return LabelledDataset(labelled.proteins, np.split(fewer, ends))
