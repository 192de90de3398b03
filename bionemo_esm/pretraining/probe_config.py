"""A labelled set that is watched while a model is pretrained: as it is configured, and as it is read. No torch.

It is no part of what a run computes: neither its folder's name nor what a run that goes on must share with itself
depends on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from bionemo_esm import config_directory
from bionemo_esm.errors import ConfigError, UserError
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig, load_data_config, load_task_config
from bionemo_esm.settings import integer, known, plain_values

if TYPE_CHECKING:
    from bionemo_esm.finetuning.config import ReadingConfig
    from bionemo_esm.finetuning.dataset import LabelledDataset
    from bionemo_esm.finetuning.tasks import Targets, Task
    from bionemo_esm.model.config import EncoderConfig

MOST_RESIDUES = 20_000  # that a head per residue is fitted on: the fit must take seconds
_KEYS = {"task", "data", "every_n_train_steps", "proteins", "layer"}
_TASK_KEYS, _DATA_KEYS = ({item.name for item in fields(kind)} for kind in (TaskConfig, DataConfig))
_SEED = 0  # of what is split off and chosen: runs of any seed are asked the same
_OWN_TASK = "probe.task={name: mine, level: sequence, kind: regression, target_column: activity}"
_OUR_KEY = re.compile(
    r"(?<![\w./-])(task|data)\.(?=(?:train|validation|test|sequences|mask|split(?:\.\w+)?|max_residues|bad_records|"
    r"missing_targets|unknown_letters|unseen_classes|name|level|kind|metric|classes|unknown|\w+_column|header_pattern)"
    r"\b(?!\.\w))"
)
"""Keys of a fine-tuning in its messages, which are below `probe` here; not files of such a name."""


@dataclass(frozen=True)
class ProbeConfig:
    """What is watched, and how often; conf/probe/default.yaml has what keys mean."""

    task: TaskConfig
    data: DataConfig
    every_n_train_steps: int = 1_000
    proteins: int = 500
    layer: int = -1

    def __post_init__(self) -> None:
        for key in ("every_n_train_steps", "proteins"):
            if getattr(self, key) < 1:
                raise ConfigError(f"probe.{key} must be at least 1, not {getattr(self, key)}")
        if self.data.download is not None:
            raise ConfigError(
                "probe.data.download: every process of a run would download; name local files by probe.data.train=..."
            )
        if not self.data.train:
            raise ConfigError("probe.data.train must be given: probe.data.train=FILE; or no probe: probe.task=null")


@dataclass(frozen=True)
class ProbeSet:
    """The proteins that are looked at, with the targets that count, in an order that no file decides."""

    config: ProbeConfig
    task: Task
    train: LabelledDataset
    validation: LabelledDataset
    reading: ReadingConfig
    notes: tuple[str, ...] = ()  # of the reader: what was left out, or missing

    def describe(self) -> str:
        """For a person."""
        what = "residues" if self.task.is_per_residue else "proteins"
        sizes = f"fitted on {self.train.known:,} {what}"
        if self.task.is_per_residue:
            sizes += f" of {len(self.train):,} proteins"
        sizes += f", scored on {self.validation.known:,}"
        every = f"every {self.config.every_n_train_steps:,} steps"
        notes = f" (the files: {'; '.join(self.notes)})" if self.notes else ""
        return f"{self.task.name}, {every}: {sizes}{notes}"


def load_probe_config(values: Any) -> ProbeConfig | None:
    """The section `probe`; None where it asks for none. Raises `ConfigError`, naming the key."""
    if values is None:
        return None
    values = known("probe", values, _KEYS)
    files = known("probe.data", {} if values.get("data") is None else values["data"], _DATA_KEYS)
    if values.get("task") is None:
        if files.get("train") is not None:
            raise ConfigError("probe.data.train is given, but no task: probe.task=secondary_structure, or another")
        return None
    numbers = {
        key: integer(f"probe.{key}", values[key])
        for key in ("every_n_train_steps", "proteins", "layer")
        if key in values
    }
    task = _task_values(values["task"])
    try:
        return ProbeConfig(load_task_config(task), load_data_config(files), **numbers)
    except ConfigError as error:
        raise ConfigError(_in_terms_of_the_probe(error)) from error


def read_probe(config: ProbeConfig, model: EncoderConfig) -> ProbeSet:
    """The labelled proteins, every label checked. Raises `UserError`, naming the key, or file and record."""
    from bionemo_esm.finetuning.config import ReadingOptions
    from bionemo_esm.finetuning.dataset import read_splits
    from bionemo_esm.inference.engine_options import ModelSizes

    try:
        reading = ReadingOptions(config.layer).resolved(ModelSizes(model))
    except ConfigError as error:
        raise ConfigError(f"probe.{error}") from error
    try:
        splits = read_splits(config.task, config.data, _SEED)
    except ConfigError as error:
        raise ConfigError(_in_terms_of_the_probe(error)) from error
    except UserError as error:
        raise UserError(f"probe: {_in_terms_of_the_probe(error)}") from error
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
    """The keys of a task: of the shipped one of this name; those of a mapping go over those of its name, if any."""
    folder = config_directory("finetuning") / "task"
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "custom")
    given = known("probe.task", task, _TASK_KEYS) if isinstance(task, dict) else {}
    name = given.get("name") if isinstance(task, dict) else task
    if name in names:
        preset = OmegaConf.load(folder / f"{name}.yaml")
        assert isinstance(preset, DictConfig)
        return plain_values(preset) | given
    if not given:
        raise ConfigError(
            f"probe.task must be one of {', '.join(names)}; or keys of your own: '{_OWN_TASK}'; not {task!r}"
        )
    return given


def _in_terms_of_the_probe(error: UserError) -> str:
    return _OUR_KEY.sub(r"probe.\1.", str(error))


# --- what is looked at ------------------------------------------------------------------------------------------------


def _some_proteins(labelled: LabelledDataset, most: int) -> LabelledDataset:
    """Up to so many, by a hash of sequence and targets: the same ones, in the same order, whatever that of the file."""
    from bionemo_esm.finetuning.dataset import LabelledDataset

    draws = [_draw(p.tokens.tobytes(), t.tobytes()) for p, t in zip(labelled.proteins, labelled.targets, strict=True)]
    chosen = sorted(range(len(draws)), key=draws.__getitem__)[:most]
    return LabelledDataset([labelled.proteins[i] for i in chosen], [labelled.targets[i] for i in chosen])


def _draw(sequence: bytes, targets: bytes) -> tuple[bytes, bytes]:
    return hashlib.blake2b(sequence, digest_size=16, key=str(_SEED).encode()).digest(), targets


def _some_residues(labelled: LabelledDataset) -> LabelledDataset:
    """The same proteins with up to `MOST_RESIDUES` known targets, drawn among all; of the others nothing is known."""
    from bionemo_esm.finetuning.dataset import LabelledDataset

    together = np.concatenate(labelled.targets)
    places = np.flatnonzero(np.isfinite(together))
    if len(places) > MOST_RESIDUES:
        places = np.random.default_rng(_SEED).choice(places, MOST_RESIDUES, replace=False)
    fewer: Targets = np.full_like(together, np.nan)
    fewer[places] = together[places]
    ends = np.cumsum([len(target) for target in labelled.targets])[:-1]
    return LabelledDataset(labelled.proteins, np.split(fewer, ends))
