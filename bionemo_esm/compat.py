"""Every use of another library's internals, with the version whose source it was read from.

Each function names its library and version. `tests/test_compat.py` has a test for each, so that an update of a library
names what it broke; `scripts/try_newest.sh` runs the tests with the newest releases. Nothing is imported until a
function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

READ_FROM = {"torch": "2.13.0", "lightning": "2.4.0", "megatron-core": "0.16.1", "nemo_toolkit": "3.0.0"}
"""Distribution and version of each library whose internals are used here."""


# --- Lightning 2.4.0: loops -------------------------------------------------------------------------------------------


def count_skipped_step(trainer: Any) -> None:
    """Count an optimizer step that was not taken, as `optimizer.step()` would under manual optimisation.

    `Trainer.global_step`, and with it checkpoints, validation and `max_steps`, follow this counter
    (lightning/pytorch/loops/optimization/manual.py, `_ManualOptimization.optim_step_progress`).
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def fit_loop_state(trainer: Any, steps: int) -> dict[str, Any]:
    """Return `trainer.fit_loop.state_dict()` as it is after a number of steps, each of one batch.

    A checkpoint stores no loop state; it follows from the number of steps (lightning/pytorch/loops/progress.py).
    """
    loops: dict[str, Any] = trainer.fit_loop.state_dict()
    counts = {"ready": steps, "started": steps, "processed": steps, "completed": steps}
    for key in ("epoch_loop.batch_progress", "epoch_loop.manual_optimization.optim_step_progress"):
        for span in ("total", "current"):
            loops[key][span] = {name: count for name, count in counts.items() if name in loops[key][span]}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    return loops


# --- Megatron-core 0.16.1: process groups and the parts of BERT -------------------------------------------------------


class SingleRankGroup:
    """A process group of one rank, without `torch.distributed`: no store, no socket, no thread.

    Megatron asks a group for its size and rank only, where every collective is skipped for a size of 1
    (megatron/core/tensor_parallel/mappings.py).
    """

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def single_rank_groups() -> Any:
    """Return the `ProcessGroupCollection` of a process that works alone (megatron/core/process_groups_config.py)."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    group = SingleRankGroup()
    return ProcessGroupCollection(tp=group, pp=group, cp=group, embd=None)


def initialize_language_module(model: Any, config: Any, groups: Any) -> None:
    """Initialise a `BertModel` without its parts: `embedding`, `encoder`, `lm_head` and `output_layer`.

    `BertModel.__init__` passes no process groups on, requires Transformer Engine's attention, and chooses norms by what
    can be imported. `LanguageModule.__init__` sets environment variables for Transformer Engine. This function sets the
    attributes that their methods read (megatron/core/models/bert/bert_model.py,
    megatron/core/models/common/language_module/language_module.py).
    """
    from megatron.core.transformer.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    MegatronModule.__init__(model, config=config)
    model.pg_collection, model.tp_group = groups, groups.tp
    model.pre_process = model.post_process = model.parallel_output = True
    model.share_embeddings_and_output_weights = True
    model.add_binary_head = False
    model.binary_head = None
    model.model_type = ModelType.encoder_or_decoder


def split_dimension(parameter: Tensor) -> int | None:
    """Return the dimension in which tensor parallelism splits a parameter, None if every rank holds the whole.

    From the attributes that megatron/core/tensor_parallel/layers.py sets.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def mark_split(parameter: Tensor, dimension: int | None) -> None:
    """Set the attributes that `split_dimension` reads."""
    if dimension is not None:
        parameter.tensor_model_parallel, parameter.partition_dim = True, dimension  # type: ignore[attr-defined]


# --- NeMo 3.0.0: the connector of ModelPT -----------------------------------------------------------------------------


def replace_nemo_connector(connector: type[Any]) -> None:
    """Make `ModelPT.restore_from` and `save_to` use this connector (nemo/core/classes/modelPT.py, module attribute)."""
    from nemo.core.classes import modelPT

    modelPT.SaveRestoreConnector = connector


# --- PyTorch 2.13.0: private operators --------------------------------------------------------------------------------


def onednn_is_available(data_type: dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this CPU: float32, and bfloat16 on CPUs with AVX512."""
    import torch

    if data_type not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    return data_type == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_linear(input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return input x weight^T + bias, [T, O], by oneDNN's operator for inductor (aten/.../mkldnn/Linear.cpp)."""
    import torch

    result: Tensor = torch.ops.mkldnn._linear_pointwise(input_TI, weight_OI, bias_O, "none", [], "")
    return result


def softmax_backward(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of the scores of a softmax over the last dimension, in the dtype of the probabilities."""
    import torch

    return torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; other CPUs emulate bfloat16 products several times slower."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
