"""How a command ends: its exit code, and signals that ask it to end early."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from minimind_dpo.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, code_of, report
from minimind_dpo.files import remove_unfinished

# Windows has no SIGUSR1
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Ending:
    """Around a command: the exit code that it ends with, whatever happens in it.

    A user's mistake ends it with 2 and one message, a failure with 1 and a traceback. Where a launcher started several
    processes on a machine, they are taken to make the same mistake, and one speaks. A signal ends it at once with 75,
    files half written are removed; a training run takes signals in its own way (`StopRequest`).

    Attributes:
        code: the command's own where it ended well; set it in the block.
    """

    code = EXIT_DONE

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # one that is ignored stays so: nohup, or a shell that keeps it from us
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    signal.signal(number, _leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if isinstance(error, KeyboardInterrupt):  # the second Ctrl-C, while a step was to end
            print("minimind-dpo: interrupted; no checkpoint of the last steps was written", file=sys.stderr, flush=True)
            self.code = EXIT_FAILED
            return True
        if not isinstance(error, Exception):
            return False
        if os.environ.get("LOCAL_RANK", "0") == "0":
            report(error)
        self.code = code_of(error)
        return True


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process: an exception raised here, amid a library's import, could be lost or come out as another."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"minimind-dpo: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    remove_unfinished()
    os._exit(EXIT_STOPPED)


class StopRequest:
    """True once this process was asked to stop, by a signal or since its time is over.

    A context manager that takes the signals and only notes them: each phase of a run asks, and all ranks stop at the
    same place. A second SIGINT interrupts at once.

    Args:
        ends_process: the process ends after the block: from there on signals are ignored, so that one that comes late,
            to a process that has done all it should, does not make it look killed. Else the handlers before are put
            back.
        max_hours: after which it is true without a signal, counted from here. What would have to begin anew the next
            time asks for signals only (`signalled`): else a run whose start takes longer would never come to a step.
    """

    def __init__(self, ends_process: bool = False, max_hours: float | None = None) -> None:
        self._ends_process = ends_process
        self._deadline = float("inf") if max_hours is None else time.monotonic() + 3600 * max_hours
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._ends_process else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def signalled(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    def __bool__(self) -> bool:
        return self.signalled() or time.monotonic() > self._deadline
