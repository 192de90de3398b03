"""Gradients summed over data-parallel ranks while the backward pass still runs, bucket by bucket.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.2. PyTorch's own
DistributedDataParallel is not used: it reduces in the parameters' dtype, and we add up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, distributed

from bionemo_esm.model.parallel import data_parallel_group, data_parallel_size

BUCKET_BYTES = 25 * 2**20
"""Large enough that each reduction uses the network's full width, small enough that the first starts early."""


class OverlappedReduction:
    """Sums slices of a flat gradient buffer over data-parallel ranks, each as soon as it is complete.

    Slices (buckets) hold whole gradients, in the order of the buffer, and are sent in that order on every rank,
    whatever order gradients arrive in: ranks that disagreed on the order would wait for one another forever.
    """

    def __init__(self, buffer: Tensor, sizes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> None:
        """`buffer`: float32 [sum of sizes], one gradient after another; a bucket is closed once it has `bucket_bytes`.

        The buffer is best laid out in the order in which backward makes gradients: the reverse of the parameters'.
        """
        self._bucket_of: list[int] = []  # by gradient
        lengths = [0]
        for size in sizes:
            if lengths[-1] * buffer.element_size() >= bucket_bytes:
                lengths.append(0)
            self._bucket_of.append(len(lengths) - 1)
            lengths[-1] += size
        self.buckets: tuple[Tensor, ...] = buffer.split(lengths)
        self._missing: list[set[int]] = []  # of each bucket, the gradients to come; empty while nothing is reduced
        self._under_way: list[distributed.Work] = []

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Within it: one backward pass, the step's last. After it, the buffer holds the sums over all ranks.

        Every rank takes part once a step. Parameters that this backward does not reach hold nobody up: what was not
        sent by its end is sent then. With one data-parallel rank nothing is sent.
        """
        if data_parallel_size() == 1:
            yield
            return
        assert not self._missing, "the backward passes of one step are reduced once"
        self._missing = [set() for _ in self.buckets]
        for gradient, bucket in enumerate(self._bucket_of):
            self._missing[bucket].add(gradient)
        try:
            yield
            while len(self._under_way) < len(self.buckets):
                self._send_next()
            for work in self._under_way:
                work.wait()
        finally:
            self._missing, self._under_way = [], []

    def gradient_is_complete(self, gradient: int) -> None:
        """To be called when backward has added to a gradient (by its place in `sizes`), in any backward pass."""
        if not self._missing:
            return
        missing = self._missing[self._bucket_of[gradient]]
        assert gradient in missing, "a gradient came twice: only the last backward pass of a step may be reduced"
        missing.remove(gradient)
        while len(self._under_way) < len(self.buckets) and not self._missing[len(self._under_way)]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self.buckets[len(self._under_way)]
        work = distributed.all_reduce(bucket, group=data_parallel_group(), async_op=True)
        assert work is not None
        self._under_way.append(work)
