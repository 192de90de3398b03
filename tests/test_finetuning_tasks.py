"""Task configurations: complete, commented, and refused with the key if invalid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.parsing import _AS_BY_PATTERN
from bionemo_esm.finetuning.tasks import DataConfig, SplitConfig, TaskConfig
from labelled_files import ROOT, preset

TASKS = sorted((ROOT / "conf" / "finetuning" / "task").glob("*.yaml"))
PUBLISHED = {
    "secondary_structure": ("residue", "classification", "accuracy"),
    "conservation": ("residue", "classification", "accuracy"),
    "subcellular_localization": ("sequence", "classification", "accuracy"),
    "meltome": ("sequence", "regression", "mse"),
    "gb1": ("sequence", "regression", "mse"),
    "remote_homology": ("sequence", "classification", "accuracy"),
    "stability": ("sequence", "regression", "spearman"),
}
"""Level, kind and metric from FLIP, TAPE and ESM-1nv's model card."""
BASE = {"name": "mine", "level": "sequence", "kind": "classification"}


def test_every_benchmark_task_has_its_level_kind_and_metric() -> None:
    assert {path.stem for path in TASKS} == {*PUBLISHED, "custom"}
    for name, expected in PUBLISHED.items():
        task = TaskConfig.from_config(preset(name))
        assert (task.name, task.level, task.kind, task.metric) == (name, *expected)


def test_a_custom_task_requires_level_and_kind() -> None:
    with pytest.raises(ConfigError, match=r"level must be given"):
        TaskConfig.from_config(preset("custom"))
    task = TaskConfig.from_config(preset("custom", level="residue", kind="regression"))
    assert (task.name, task.metric, task.target_column) == ("custom", "mse", "target")
    assert TaskConfig.from_config(preset("custom", level="residue", kind="classification")).metric == "accuracy"


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_file_explains_every_key_and_gives_its_command(path: Path) -> None:
    text = path.read_text()
    header = text.split("\n\n")[0]
    assert f"task={path.stem} " in header
    if path.stem != "custom":
        assert "Source: " in header
        assert "doi:" in header
    keys = {line.split(":")[0] for line in text.splitlines() if line and line[0] not in "# "}
    assert keys == set(TaskConfig.model_fields)
    for line in text.splitlines():
        key, _, value = line.strip().partition(":")
        if value and not key.startswith("#") and key != "url":
            assert "#" in value, line


def test_flip_downloads_have_a_commit_and_checksum_and_tape_tasks_have_none() -> None:
    for name in PUBLISHED:
        download = TaskConfig.from_config(preset(name)).download
        if name in ("remote_homology", "stability"):
            assert download is None
            continue
        assert download is not None
        assert download.url.startswith(
            "https://raw.githubusercontent.com/J-SNACKKB/FLIP/15e441ff9a36a1c43ee8558697bc7a3dbbade863/splits/"
        )
        assert len(download.checksum.partition(":")[2]) in (40, 64)
        assert (download.sequences is not None) == (TaskConfig.from_config(preset(name)).level == "residue")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({**BASE, "colour": 1}, r"unknown key task\.colour"),
        ({"level": "residue", "kind": "regression"}, r"task\.name must be given"),
        ({**BASE, "level": "atom"}, r"task\.level must be one of residue, sequence, not 'atom'"),
        ({**BASE, "kind": "ranking"}, r"task\.kind must be one of classification, regression"),
        ({**BASE, "metric": "mse"}, r"task\.metric must be one of accuracy, f1, mcc, not 'mse'"),
        ({**BASE, "name": "../x"}, r"task\.name must be made of letters"),
        ({**BASE, "classes": ["a"]}, r"two or more different labels"),
        ({**BASE, "classes": ["a", "b", "a"]}, r"two or more different labels"),
        ({**BASE, "classes": [True, False]}, r"must be in quotes"),
        ({**BASE, "classes": [0.5, 1.5]}, r"in quotes"),
        ({**BASE, "classes": "ab"}, r"must be a list of labels"),
        ({**BASE, "classes": ["a", "b"], "unknown": ["b"]}, r"'b' is in task\.classes and in task\.unknown"),
        ({**BASE, "classes": ["a", "${b}"]}, r"task\.classes: '\$\{b\}' cannot be kept .*; rename it"),
        ({**BASE, "kind": "regression", "classes": ["a", "b"]}, r"task\.classes is for a classification"),
        ({**BASE, "header_pattern": "("}, r"no regular expression"),
        ({**BASE, "header_pattern": "a"}, r"must have one group"),
        ({**BASE, "header_pattern": "(a)(b)"}, r"must have one group"),
        ({**BASE, "target_column": 3}, r"task\.target_column must be text"),
        ({**BASE, "download": {"url": "https://x/y.zip"}}, r"task\.download\.checksum must be given"),
        ({**BASE, "download": {"url": "https://x/y", "checksum": "md5:1", "train": "t"}}, r"sha256: and 64"),
    ],
)
def test_an_invalid_task_is_refused_with_its_key(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TaskConfig.from_config(values)


def test_the_suggested_header_pattern_is_a_valid_hydra_override() -> None:
    text = next(path for path in TASKS if path.stem == "custom").read_text()
    (given,) = re.findall(r"'(task\.header_pattern=[^']+)'", text)
    assert given in _AS_BY_PATTERN
    override = OverridesParser.create().parse_override(given)
    assert TaskConfig.from_config({**BASE, "header_pattern": override.value()}).header_pattern == r"class=(\S+)"


def test_class_names_may_be_integers() -> None:
    assert TaskConfig.from_config({**BASE, "classes": [1, 2, 10]}).classes == ("1", "2", "10")


def test_data_accepts_one_or_several_files_and_an_optional_split() -> None:
    assert DataConfig.from_config({"train": None}) == DataConfig()
    data = DataConfig.from_config({"train": ["a.csv", "b.csv"], "validation": "c.csv", "split": {"test": 0.1}})
    assert (data.train, data.validation, data.test) == (("a.csv", "b.csv"), ("c.csv",), ())
    assert data.split == SplitConfig(validation=0.0, test=0.1)
    assert DataConfig.from_config({"train": "a", "split": None}).split == SplitConfig()
    assert DataConfig.from_config({"train": "a", "split": {"validation": 0.1, "test": None}}).split == SplitConfig(
        validation=0.1
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"trian": "a.csv"}, r"unknown key data\.trian"),
        ({"train": 3}, r"data\.train must be a path"),
        ({"train": []}, r"data\.train must be a path, or a list of paths"),
        ({"train": ["a.csv", "a.csv"]}, r"data\.train names a file twice"),
        ({"train": "-"}, r"standard input can be read only once"),
        ({"split": {"train": 0.8}}, r"unknown key data\.split\.train"),
        ({"split": 0.1}, r"data\.split must be a mapping"),
        ({"split": {"validation": 0.5, "test": 0.5}}, r"shares that leave some to train on"),
        ({"split": {"validation": -0.1}}, r"shares that leave some to train on"),
        (
            {"validation": "v.csv", "split": {"validation": 0.1}},
            r"data\.validation names files, data\.split\.validation",
        ),
        ({"test": "t.csv", "split": {"test": 0.1}}, r"data\.test names files, data\.split\.test"),
        ({"max_residues": 0}, r"data\.max_residues must be at least 1"),
        ({"max_residues": "long"}, r"data\.max_residues must be an integer"),
        ({"bad_records": "ignore"}, r"data\.bad_records must be one of error, skip, not 'ignore'"),
        ({"unknown_letters": "skip"}, r"data\.unknown_letters must be one of error, X"),
        ({"missing_targets": "X"}, r"data\.missing_targets must be one of error, skip"),
        ({"unseen_classes": None}, r"data\.unseen_classes must be one of error, skip"),
        ({"train": "a.csv", "download": "flip"}, r"give one of both"),
        ({"mask": "a.fasta", "download": "flip"}, r"data\.download brings all files"),
    ],
)
def test_invalid_data_settings_are_refused_with_their_key(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DataConfig.from_config(values)
