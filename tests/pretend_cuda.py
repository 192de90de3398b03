"""A pretend CUDA device: tensors that say they are on cuda:0 go through models and optimizers on a machine without one.

Fake tensors (`torch._subclasses.fake_tensor`) have a shape, a dtype and a device, and no numbers. `Recorder` lists what
would happen on a GPU: reads of a value by the host, for which it waits for the device, copies between host and device,
and operators. It sees neither numerics nor the limits of real kernels.

`pretend` must run before torch is imported, so the tests run a program in a process of its own. It needs g++.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMPILER = shutil.which("g++")
CAPABILITY = (9, 0)  # of an H200
PACKAGE = Path(__file__).resolve().parents[1] / "bionemo_esm"


def _library() -> Path:
    """Return the compiled device guard, which is compiled once for a version of torch."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None and COMPILER is not None
    root, source = Path(spec.origin).parent, Path(__file__).with_suffix(".cpp")
    path = Path(tempfile.gettempdir()) / f"bionemo_esm_pretend_cuda_{version('torch')}_{source.stat().st_mtime_ns}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", str(source), "-o", str(built)]
            places = [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
            subprocess.run([*command, *places, "-lc10", "-ltorch_cpu"], check=True)
            built.replace(path)
    return path


def pretend(world_size: int = 1) -> Any:
    """Make torch believe in one H200, and return torch. With `world_size` ranks, this process is rank 0 of them."""
    assert "torch" not in sys.modules, "the device must be there before torch"
    ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._dynamo  # before the functions below are replaced
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nested._internal import nested_tensor, sdpa
    from torch.nn.attention import SDPBackend

    class Event:
        def __init__(self, **_: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, _: Event) -> float:
            return 1.0

    def choice(query: Any, *_: Any) -> SDPBackend:
        return SDPBackend.EFFICIENT_ATTENTION if query.dtype == torch.float32 else SDPBackend.FLASH_ATTENTION

    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": False, "device_count": 1, "current_device": 0, "manual_seed": None,
        "is_bf16_supported": True, "manual_seed_all": None, "get_device_name": "NVIDIA H200", "set_device": None,
        "max_memory_allocated": 0, "synchronize": None, "empty_cache": None, "get_device_capability": CAPABILITY,
        "set_rng_state": None, "_lazy_init": None,
    }  # fmt: skip
    cuda: Any = torch.cuda
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.Event = Event
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    FakeTensorMode.avoid_device_init = True  # type: ignore[attr-defined]  # torch.tensor(..., device="cuda") must not copy
    nested_tensor._nt_view_dummy()  # a real tensor, for all modes
    sdpa._select_sdp_backend = choice
    if world_size > 1:
        from megatron.core import parallel_state
        from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend

        whole = parallel_state.initialize_model_parallel
        parallel_state.initialize_model_parallel = functools.partial(whole, create_gloo_process_groups=False)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return torch


@contextmanager
def fake_tensors() -> Iterator[Any]:
    """Make every new tensor a fake one, of fixed sizes; yields the mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True) as mode:
        yield mode


def on_cuda(module: Any) -> Any:
    """Replace all parameters and buffers of a module by fake ones on cuda:0, as `module.cuda()` would; return it.

    Call it inside `fake_tensors`. The module's own reaction to a move takes place.
    """
    import torch

    def moved(tensor: Any) -> Any:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")

    swap = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module._apply(moved)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(swap)
    for part in module.modules():
        if hasattr(part, "_device"):  # Lightning's record, which `to` keeps
            part._device = torch.device("cuda", 0)
    return module


def recorder() -> Any:
    """Return a mode to enter inside `fake_tensors`: it answers reads of a value by 1 and records them.

    Its counters: `waits` (reads of a value by the host) and `copies` (between host and device), both by the line of the
    package; `operators`, a list of names.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.waits: Counter[str] = Counter()
            self.copies: Counter[str] = Counter()
            self.operators: list[str] = []

        def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name == "aten._local_scalar_dense.default":
                if args[0].device.type == "cuda":
                    self.waits[_line()] += 1
                return 1.0 if args[0].is_floating_point() else 1
            result = func(*args, **(kwargs or {}))
            if name.startswith(("aten._to_copy", "aten.copy_")):
                source, target = (args[1], args[0]) if name.startswith("aten.copy_") else (args[0], result)
                kinds = source.device.type, target.device.type
                if len(set(kinds)) == 2:
                    self.copies[f"{kinds[0]} to {kinds[1]}: {_line()}"] += 1
            self.operators.append(name)
            return result

    return Recorder()


def _line() -> str:
    """Return file and function of the innermost call inside the package: `esm1nv.py training_step`."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(PACKAGE):
            return f"{Path(frame.filename).name} {frame.name}"
    return "elsewhere"
