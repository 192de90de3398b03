"""A Lightning strategy that brings Megatron's process groups up and takes them down again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from bionemo_esm.model.parallel import destroy_groups, ensure_groups


class MegatronStrategy(DDPStrategy):
    """Data parallelism over Megatron's groups, without a wrapper around the model.

    `ESM1nvModel` adds up its gradients in one float32 buffer and reduces that once a step, so Lightning's
    DistributedDataParallel, which would reduce bfloat16 gradients of every micro batch, is left out. Works over NCCL
    and gloo, under Lightning's own launcher, torchrun and Slurm.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._owns_groups = False

    @property
    def _works_alone(self) -> bool:
        return bool(self.num_processes * self.num_nodes == 1)

    def _configure_launcher(self) -> None:
        """Alone, nothing is launched, and no rendezvous is left behind in the environment."""
        if not self._works_alone:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        if self._works_alone:
            self.set_world_ranks()
        else:
            super().setup_distributed()
        ensure_groups()
        self._owns_groups = True

    def configure_ddp(self) -> None:
        """Nothing is wrapped: see the class."""

    def teardown(self) -> None:
        super().teardown()
        if self._owns_groups:
            destroy_groups()
            self._owns_groups = False
