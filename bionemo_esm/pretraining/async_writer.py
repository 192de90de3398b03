"""Writing while training goes on: one job at a time, in order, on a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs jobs one after another on a thread, or at once where `in_background` is false.

    After a job that failed none runs any more: what comes next may delete what the failed one was to replace. The
    failure waits in `failure` and is raised by `drain`. The interpreter does not exit before a running job has ended.
    """

    def __init__(self, in_background: bool = True) -> None:
        self.failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if in_background else None
        self._waiting: list[Future[None]] = []

    def submit(self, job: Callable[[], object]) -> None:
        """Run the job after those submitted before it."""
        if self._thread is None:
            self._run(job)
        else:
            self._waiting.append(self._thread.submit(self._run, job))

    def drain(self) -> None:
        """Wait until every job has ended; raises what one of them raised."""
        while self._waiting:
            self._waiting.pop(0).result()
        if self.failure is not None:
            raise self.failure

    def _run(self, job: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            job()
        except BaseException as error:
            self.failure = error
