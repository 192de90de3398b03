"""bionemo_esm: pretrain ESM-1nv and ESM-1b protein language models, and use them.

Importing this package imports no large library. `ESM1nvModel` imports NeMo and Megatron when it is first named;
`ProteinModel` (a pretrained model) and `FineTunedPredictor` (a fine-tuned one) import torch when they load a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm import nemo_plugin
from bionemo_esm.registry import MODEL_MODULES, ModelModules

__version__ = "0.1.0"
__all__ = ["ESM1nvModel", "FineTunedPredictor", "ProteinModel", "__version__", "config_directory"]

if TYPE_CHECKING:
    from bionemo_esm.finetuning.predictor import FineTunedPredictor
    from bionemo_esm.inference.protein_model import ProteinModel
    from bionemo_esm.model.esm1nv import ESM1nvModel


def config_directory(part: str = "") -> Path:
    """Return the folder of the Hydra configurations: `conf/` of a checkout, or its copy in an installed package.

    part: "inference" or "finetuning", for commands whose key `model` is a path; in `conf/` itself it is a group.
    """
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return (installed if installed.is_dir() else package.parent / "conf") / part


def __getattr__(name: str) -> Any:
    if name == "ESM1nvModel":
        from bionemo_esm.model.esm1nv import ESM1nvModel

        return ESM1nvModel
    if name == "FineTunedPredictor":
        from bionemo_esm.finetuning.predictor import FineTunedPredictor

        return FineTunedPredictor
    if name == "ProteinModel":
        from bionemo_esm.inference.protein_model import ProteinModel

        return ProteinModel
    raise AttributeError(f"module 'bionemo_esm' has no attribute {name!r}")


MODEL_MODULES["ESM1nvModel"] = ModelModules("bionemo_esm.model.esm1nv")
MODEL_MODULES["ESMFineTunedModel"] = ModelModules(
    "bionemo_esm.finetuning.model", extension="bionemo_esm.finetuning.archive"
)
nemo_plugin.announce()
