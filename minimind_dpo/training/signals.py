"""Stopping early on a signal: the running optimizer step ends, a checkpoint is written, exit code 75."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from minimind_dpo.errors import StoppedEarly

# Windows has no SIGUSR1
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """True once this process was asked to stop.

    A context manager that takes the signals. Before `listen` nothing is there to be saved, so a signal ends the block
    at once with StoppedEarly; afterwards it is noted for the loop to ask. A second SIGINT interrupts at once.

    Args:
        ends_process: the process ends after the block: from there on signals are ignored, so that one that comes late,
            to a process that has done all it should, does not make it look killed. Else the handlers before are put
            back.
    """

    def __init__(self, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._received: signal.Signals | None = None
        self._listens = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def listen(self) -> None:
        """From now on only note a signal.

        Raises:
            StoppedEarly: one came before.
        """
        self._listens = True
        if self._received is not None:  # what it raised was lost in a library's handler of exceptions
            raise StoppedEarly("before the first step")

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._ends_process else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        if not self._listens:
            raise StoppedEarly("before the first step")

    def __bool__(self) -> bool:
        return self._received is not None
