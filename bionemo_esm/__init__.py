"""bionemo_esm: pretrain ESM-1nv and ESM-1b protein language models, and use them.

Importing this package is cheap. `bionemo_esm.ESM1nvModel` brings in NeMo and Megatron when it is first named;
`bionemo_esm.ProteinModel` asks a pretrained model, `bionemo_esm.FineTunedPredictor` a fine-tuned one; both import what
they need when they load one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bionemo_esm import nemo_plugin

__version__ = "0.1.0"
__all__ = ["ESM1nvModel", "FineTunedPredictor", "ProteinModel", "__version__", "config_directory"]

if TYPE_CHECKING:
    from bionemo_esm.finetuning.predictor import FineTunedPredictor
    from bionemo_esm.inference.protein_model import ProteinModel
    from bionemo_esm.model.esm1nv import ESM1nvModel


def config_directory(part: str = "") -> Path:
    """Where the Hydra configurations lie: `conf/` of a checkout, or their copy inside an installed package.

    `part` "inference": those of jobs over a model. They have a key `model`, which in `conf/` is a group.
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


nemo_plugin.announce()
