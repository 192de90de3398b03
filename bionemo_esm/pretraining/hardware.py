"""What devices can do at best: the yardstick of MFU, and memory to plan with.

All figures are NVIDIA's own, of the document named beside each device; dense, so halved where a data sheet quotes
sparsity. Precisions: "bf16" (tensor cores, float32 sums), "tf32" (tensor cores; half of bf16 on every device here)
and "32" (plain float32 units, which PyTorch uses for float32 unless it is told that TF32 will do).
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
    """One kind of GPU. `bf16` is None where it has no units for it."""

    pattern: str  # regular expression over the name that the driver gives it; matches whole words
    bf16: float | None  # TFLOP/s
    float32: float  # TFLOP/s
    gigabytes: float  # as the data sheet has it; the driver shows a little less


# Where a chip comes in versions, the more special pattern stands first.
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
_ANOTHER_CHIP = re.compile(r"\bMIG\b|Laptop|Max-Q|\d Ti\b|\d D\b")  # or a part of one: behind a name that we know


def find_device(name: str) -> Device | None:
    """The device of that name, as in `torch.cuda.get_device_name()`; None where it is not in the table."""
    if _ANOTHER_CHIP.search(name):
        return None
    return next((device for device in DEVICES if re.search(rf"(?<!\w){device.pattern}(?!\w)", name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s at best, or None: unknown. `precision` is one of `PRECISIONS`."""
    device = find_device(device_name)
    if device is None:
        return None
    tf32 = device.bf16 / 2 if device.bf16 else device.float32  # chips without bf16 have no TF32 either
    tera = {"32": device.float32, "bf16": device.bf16, "tf32": tf32}[precision]
    return tera * _TERA if tera else None


def memory_bytes(device_name: str) -> int | None:
    """Memory of the device by its data sheet, or None: unknown."""
    device = find_device(device_name)
    return int(device.gigabytes * _GB) if device else None


def cpu_name() -> str:
    """What the processor calls itself."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
