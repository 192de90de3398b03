"""Makes the plugin known to NeMo: `import bionemo_esm`, and `ModelPT.restore_from` reads our archives.

NeMo has no registry that a plugin could enter, so our connector takes the place of NeMo's in the module of `ModelPT`
(see `bionemo_esm.model.nemo_connector`). NeMo takes seconds to import, which reading FASTA must not wait for:
where NeMo is not there yet, the connector is put in place at the moment when it arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_NEMO_MODULE = "nemo.core.classes.modelPT"
_OUR_MODULE = "bionemo_esm.model.nemo_connector"


def announce() -> None:
    """Put our connector in place, now or when NeMo is imported."""
    if _NEMO_MODULE in sys.modules:
        import_module(_OUR_MODULE)
    else:
        sys.meta_path.insert(0, _Arrival())


class _Arrival:
    """Waits for one module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NEMO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_announce(module: ModuleType) -> None:
                execute(module)
                import_module(_OUR_MODULE)

            spec.loader.exec_module = execute_then_announce  # type: ignore[method-assign]
        return spec
