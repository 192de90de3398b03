"""Peak FLOP/s of devices, for MFU, and their memory, for the plan.

All figures are NVIDIA's, from the document beside each device, for dense products: half of a figure with sparsity.
Precisions: "bf16" (tensor cores, float32 sums), "tf32" (tensor cores; half of bf16 on every device here) and "32"
(float32 units, which PyTorch uses unless TF32 is allowed).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("bf16", "tf32", "32")
_TERA, _GB = 1e12, 10**9


@dataclass(frozen=True)
class Device:
    """A GPU model. bf16 is None if it has no units for it."""

    pattern: str  # regular expression for the driver's name; matches whole words
    bf16: float | None  # TFLOP/s
    float32: float  # TFLOP/s
    gigabytes: float  # of the data sheet; the driver reports a little less


# The more specific pattern comes first.
DEVICES = (
    Device(r"GB[23]00", 2500, 80, 186),  # GB200 NVL72 data sheet, a 72nd of it
    Device(r"B200", 2250, 75, 180),  # DGX B200 data sheet, an eighth of it
    Device(r"GH200 144G.*", 989, 67, 144),  # GH200 Grace Hopper data sheet
    Device(r"GH200", 989, 67, 96),
    Device(r"H200 NVL", 835, 60, 141),  # H200 data sheet
    Device(r"H200", 989, 67, 141),
    Device(r"H100 PCIe", 756, 51, 80),  # H100 data sheet
    Device(r"H100 NVL", 835, 60, 94),
    Device(r"H100", 989, 67, 80),
    Device(r"A100.*80GB", 312, 19.5, 80),  # A100 data sheet
    Device(r"A100", 312, 19.5, 40),
    Device(r"V100-SXM\d-32GB", None, 15.7, 32),  # V100 data sheet
    Device(r"V100-SXM\d.*", None, 15.7, 16),
    Device(r"V100-PCIE-32GB", None, 14, 32),
    Device(r"V100-PCIE", None, 14, 16),
    Device(r"L40S", 362, 91.6, 48),  # L40S data sheet
    Device(r"L40", 181, 90.5, 48),  # L40 data sheet
    Device(r"L4", 121, 30.3, 24),  # L4 data sheet
    Device(r"A40", 149.7, 37.4, 48),  # A40 data sheet
    Device(r"A30", 165, 10.3, 24),  # A30 data sheet
    Device(r"A10G", 70, 35, 24),  # A10G data sheet
    Device(r"A10", 125, 31.2, 24),  # A10 data sheet
    Device(r"RTX 6000 Ada.*", 364.2, 91.1, 48),  # RTX 6000 Ada data sheet
    Device(r"RTX A6000", 154.8, 38.7, 48),  # Ampere GA102 white paper
    Device(r"RTX 5090", 209.5, 104.8, 32),  # RTX Blackwell white paper
    Device(r"RTX 4090", 165.2, 82.6, 24),  # Ada white paper
    Device(r"RTX 3090", 71, 35.6, 24),  # Ampere GA102 white paper
    Device(r"T4", None, 8.1, 16),  # T4 data sheet
)
_ANOTHER_CHIP = re.compile(r"\bMIG\b|Laptop|Max-Q|\d Ti\b|\d D\b")  # or a part of one, with a name of the table


def find_device(name: str) -> Device | None:
    """Return the device of a name of `torch.cuda.get_device_name()`; None if it is not in the table."""
    if _ANOTHER_CHIP.search(name):
        return None
    return next((device for device in DEVICES if re.search(rf"(?<!\w){device.pattern}(?!\w)", name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak dense FLOP/s; None: unknown. precision: one of `PRECISIONS`."""
    device = find_device(device_name)
    if device is None:
        return None
    tf32 = device.bf16 / 2 if device.bf16 else device.float32  # chips without bf16 have no TF32 either
    tera = {"32": device.float32, "bf16": device.bf16, "tf32": tf32}[precision]
    return tera * _TERA if tera else None


def memory_bytes(device_name: str) -> int | None:
    """Return the bytes of memory on the data sheet; None: unknown."""
    device = find_device(device_name)
    return int(device.gigabytes * _GB) if device else None


def cpu_name() -> str:
    """Return the model name of the processor."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
