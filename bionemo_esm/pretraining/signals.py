"""SIGINT and SIGTERM as requests that training answers when its state is in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Notes the first signal in `received`. A second SIGINT interrupts at once; files on disk stay whole.

    SIGTERM is noted as often as it comes: schedulers repeat it, and follow it with SIGKILL when they will not wait.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Listen for the length of a block, then leave signals to those who had them before."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Put our handlers in place, over whatever is there."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def note_another_rank(self) -> None:
        """Another rank was asked to stop, and this one stops with it."""
        self.received = signal.SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> Any:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
