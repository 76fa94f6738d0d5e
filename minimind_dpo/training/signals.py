"""Stopping early on a signal: the running optimizer step ends, a checkpoint is written, exit code 75."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once this process was asked to stop.

    A context manager: from `listen` to its end it takes the signals, then the handlers before are put back. A second
    SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        return self

    def listen(self) -> None:
        """Take the signals from now on; before, they end the process as usual."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def __bool__(self) -> bool:
        return self._received is not None
