"""NVIDIA's resiliency extension (pip install nvidia-resiliency-ext), where it is installed; beside our own watch.

NeMo 3's exp_manager asks for it under the name of an older package, `ptl_resiliency`, and with arguments of that one,
so its settings `create_straggler_detection_callback` and `create_fault_tolerance_callback` fail with the package that
PyPI has. The callbacks are made here instead.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from bionemo_esm.model.backends import import_problem, importable

_CALLBACKS = "nvidia_resiliency_ext.ptl_resiliency"
_DETECTOR = "nvrx_cupti_module"  # compiled against CUPTI, which comes with CUDA
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # by which ft_launcher's monitor of a rank is reached
_REPORT_SECONDS = 300.0
_LOGGER = "lightning.pytorch.resiliency"  # whose messages reach output.log; NeMo's do not
_SLOW = 0.7  # of the performance of other GPUs, or of what this one had before


def resiliency_callbacks(device_type: str, folder: Path) -> list[Callback]:
    """Straggler detection on GPUs, and heartbeats to ft_launcher where it started this process.

    What is left out, and why, is a line in the log.
    """
    package = importable(_CALLBACKS)
    if package is None:
        rank_zero_info(f"NVIDIA's resiliency extension is off: {import_problem(_CALLBACKS)}")
        return []
    callbacks: list[Callback] = []
    if device_type != "cuda" or import_problem(_DETECTOR):
        why = import_problem(_DETECTOR) if device_type == "cuda" else "it measures GPUs"
        rank_zero_info(f"NVIDIA's straggler detection is off: {why}")
    else:
        callbacks.append(
            package.StragglerDetectionCallback(
                report_time_interval=_REPORT_SECONDS,
                calc_relative_gpu_perf=True,
                calc_individual_gpu_perf=True,
                num_gpu_perf_scores_to_print=5,
                gpu_relative_perf_threshold=_SLOW,
                gpu_individual_perf_threshold=_SLOW,
                stop_if_detected=False,
                enable_ptl_logging=False,
                logger_name=_LOGGER,
            )
        )
    if _SOCKET in os.environ:
        callbacks.append(
            package.FaultToleranceCallback(
                autoresume=False, calculate_timeouts=True, exp_dir=folder, logger_name=_LOGGER
            )
        )
    else:
        rank_zero_info("heartbeats to NVIDIA's ft_launcher are off: it did not start this process")
    return callbacks
