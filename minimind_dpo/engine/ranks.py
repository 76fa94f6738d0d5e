"""The ranks of a run among themselves: who goes first, who decides, and how all leave when one fails."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import StoppedEarly, TrainingError, UserError, code_of, report

_LEAVING_SECONDS = 60  # for a failed rank's teardown
_ANSWERING_SECONDS = 10  # for a store that is there
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def on_main(engine: Engine, function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, or the UserError it raises there, on every rank."""
    outcome: list[Any] = [None]
    if engine.is_main:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def decide(answer: Any) -> Any:
    """The main process's answer, on every rank. Collective."""
    return broadcast_object_list([answer])[0]


def stop_together(engine: Engine, stop: Callable[[], bool], when: str) -> None:
    """End the run here on every rank if any of them was asked to stop. Collective.

    Raises:
        StoppedEarly: with `when`, which completes "stopped early ...".
    """
    if engine.largest(stop()):
        raise StoppedEarly(when)


@contextmanager
def main_first(engine: Engine, task: str, stop: Callable[[], bool], patience: float) -> Iterator[Callable[[], None]]:
    """Run a block on the main process, then on the others, which wait for it as long as it goes on.

    Not a barrier: what the main process does here may last longer than a collective may.

    Args:
        engine: of the run.
        task: a name for the block, used once in a run.
        stop: whether this process was asked to stop.
        patience: seconds without a sign of the main process after which the others fail.

    Yields:
        What the block calls every now and then: the main process's sign that it goes on, which raises StoppedEarly
        where any rank was asked to stop.

    Raises:
        StoppedEarly: the main process ended the block so.
        TrainingError: there was no sign of the main process for too long.
    """
    turn = _Turn(f"minimind_dpo/{task}", None if engine.world_size == 1 else _store(), stop)
    if not engine.is_main:
        turn.wait(patience)
        yield lambda: None
        return
    try:
        yield turn.go_on
    except StoppedEarly:
        turn.end(_STOPPED)
        raise
    turn.end(_DONE)


_DONE, _STOPPED = b"done", b"stopped"


class _Turn:
    """The main process's turn in a block, told through the store: `store` is None for a single process."""

    def __init__(self, key: str, store: Any, stop: Callable[[], bool]):
        self._end, self._sign, self._request = (f"{key}/{part}" for part in ("end", "sign", "stop"))
        self._store, self._stop = store, stop

    def go_on(self) -> None:
        """Give a sign; StoppedEarly where this or another process was asked to stop."""
        if self._store is not None:
            self._store.add(self._sign, 1)
        if self._stop() or (self._store is not None and self._store.check([self._request])):
            raise StoppedEarly("before the first step")

    def end(self, how: bytes) -> None:
        """Tell the others how it ended."""
        if self._store is not None:
            self._store.set(self._end, how)

    def wait(self, patience: float) -> None:
        """Until the main process has ended its turn."""
        sign, seen = 0, time.monotonic()
        silent = TrainingError(f"no sign of rank 0 for {patience:.0f} s (ddp_timeout); it hangs, or is stopped")
        try:
            while (now := _within(patience, self._look)) is not None:
                if now != sign:
                    sign, seen = now, time.monotonic()
                elif time.monotonic() - seen > patience:
                    raise silent
                time.sleep(0.1)
        except TimeoutError:  # rank 0 holds the store itself
            raise silent from None
        if self._store.get(self._end) == _STOPPED:
            raise StoppedEarly("before the first step")

    def _look(self) -> int | None:
        """How many signs the main process has given; None once its turn has ended."""
        if self._store.check([self._end]):  # raises once the process that holds the store has gone
            return None
        if self._stop():
            self._store.set(self._request, "")
        return self._store.add(self._sign, 0)


def end_with_launcher() -> None:
    """Be killed when torchrun's agent, which started this rank, is: it has put its ranks into sessions of their own.

    Without it they train on after `kill -9` of the launcher, beside the run that the user starts next. Linux only.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it went before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def leave_together(error: Exception) -> int:
    """End this rank after an error: the first rank to fail tells it, the others do not bury it under theirs.

    The other ranks leave since the sockets of this one close, or since the launcher ends them. Should this one's
    teardown wait for them meanwhile, it is cut short.

    Returns:
        The exit code.
    """
    try:
        first = int(_within(_ANSWERING_SECONDS, lambda: _store().add("minimind_dpo/failed", 1))) == 1
    except TimeoutError:  # the process that holds the store hangs, so it has told nothing
        first = True
    except (RuntimeError, ValueError):  # the store went with the process that held it
        first = False
    if first:
        report(_told_plainly(error))
    else:
        print(
            f"minimind-dpo: rank {os.environ.get('RANK')} leaves: another rank failed first",
            file=sys.stderr,
            flush=True,
        )
    timer = threading.Timer(_LEAVING_SECONDS, os._exit, [code_of(error)])
    timer.daemon = True
    timer.start()
    return code_of(error)


def _told_plainly(error: Exception) -> Exception:
    """What gloo's words for another rank that does not answer mean; any other error as it is."""
    words = str(error) if isinstance(error, RuntimeError) and "gloo" in str(error) else ""
    if found := re.search(r"Timed out waiting (\d+)ms", words):
        seconds = int(found[1]) / 1000
        return TrainingError(f"another rank gives no answer for {seconds:g} s (ddp_timeout); it hangs, or is stopped")
    if "Connection closed by peer" in words or "Connection reset by peer" in words:
        return TrainingError("another rank is gone; killed, if it says nothing itself: for want of memory, perhaps")
    return error


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What a call to the store gives. The store's own calls wait for ever where the process that holds it hangs.

    Raises:
        TimeoutError: it takes longer than `seconds`; the call is left to itself.
    """
    answer: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        try:
            answer.put((ask(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value


def _store() -> Any:
    """The key-value store through which the ranks found each other."""
    return torch.distributed.distributed_c10d._get_default_store()
