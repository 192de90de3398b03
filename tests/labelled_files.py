"""Helpers for tests of labelled proteins: the shipped task configurations and small files in FLIP's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bionemo_esm.finetuning.splits import Splits, read_splits
from bionemo_esm.finetuning.tasks import DataConfig, TaskConfig
from bionemo_esm.settings import plain_values

ROOT = Path(__file__).resolve().parent.parent

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
STRUCTURE = (
    ">a SET=train VALIDATION=False\nHHE\nEC\n>b SET=train VALIDATION=True\nCCE\n>c SET=test VALIDATION=False\nHC\n"
)
SEQUENCES = ">a some words\nMKVLA\n>b\nACD\n>c\nWY\n>not-labelled\nGGG\n"
GB1 = "sequence,target,set,validation\nMKVLA,1.5,train,\nACDEF,0.5,train,False\nWYWYW,-2,train,True\nGGGGG,7,test,\n"
CLASSES = {"level": "sequence", "kind": "classification"}
NUMBERS = {"level": "sequence", "kind": "regression"}
RESIDUES = {"level": "residue", "kind": "classification"}
MASK = ">a\n11111\n>b\n111\n>c\n11\n"


def preset(name: str, **values: Any) -> dict[str, Any]:
    """Return the configuration of a task as composed by Hydra."""
    loaded = OmegaConf.load(ROOT / "conf" / "finetuning" / "task" / f"{name}.yaml")
    return plain_values(OmegaConf.merge(loaded, values))  # type: ignore[arg-type]


def read(folder: Path, files: dict[str, str], task: dict[str, Any], seed: int = 1, **data: Any) -> Splits:
    """Write the files and return the splits of the task. Values of `data` that name such a file refer to the folder."""
    for name, text in files.items():
        (folder / name).write_text(text)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(one) for one in value]
        return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value

    return read_splits(
        TaskConfig.from_config({"name": "mine", **task}),
        DataConfig.from_config({key: placed(value) for key, value in data.items()}),
        seed,
    )
