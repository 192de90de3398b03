"""Bytes of the tensors that are alive, counted by allocation: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators in the context return and that are still alive. `known` are not counted."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        result = operator(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Return the bytes that are alive."""
        alive = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self._storages = alive
        return sum(size for _, size in alive.values())
