"""Contestants in processes of their own, each kept alive and asked for some optimizer steps at a time.

So that contestants can take turns in one run (a machine's speed drifts) and each one's peak memory is its own. Only one
computes at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Window:
    """Some optimizer steps in a row.

    Attributes:
        seconds: wall time of them all.
        losses: of each step, the mean over its pairs.
        peak_bytes: the process's peak so far, over what it held once its stack was imported.
    """

    seconds: float
    losses: list[float]
    peak_bytes: int


def status_bytes(name: str) -> int:
    """A memory figure of this process from Linux: `VmRSS` is resident now, `VmHWM` the most that ever was."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found, name
    return int(found[1]) * 1024


class Gate:
    """A worker's side: told of every finished step; holds the process between windows.

    Attributes:
        wanted: steps of the running window, at first those of the warm-up.
    """

    def __init__(self, pipe: Connection, warm_up: int):
        self._pipe = pipe
        self._imported = status_bytes("VmRSS")
        self._losses: list[float] = []
        self._began = time.perf_counter()
        self.wanted = warm_up

    def step(self, loss: float) -> None:
        """One optimizer step is done. Ends the process when no more are wanted."""
        self._losses.append(loss)
        if len(self._losses) < self.wanted:
            return
        seconds = time.perf_counter() - self._began
        self._pipe.send(Window(seconds, self._losses, status_bytes("VmHWM") - self._imported))
        wanted = self._pipe.recv()
        if wanted is None:
            sys.exit()  # from inside a training loop
        self.wanted, self._losses, self._began = wanted, [], time.perf_counter()


class Worker:
    """The side of the program that measures.

    Args:
        name: of the contestant.
        contestant: a function of a module (it is imported in the process) of `job` and a gate.
        prepare: likewise, without arguments: imports the contestant's stack.
        job: what `contestant` is told.
        log: file for what the process prints.
        warm_up: steps of its first window.
    """

    def __init__(
        self,
        name: str,
        contestant: Callable[..., None],
        prepare: Callable[[], None],
        job: Any,
        log: Path,
        warm_up: int = 1,
    ):
        self.name, self._log = name, log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, contestant, prepare, job, log, warm_up))
        self._process.start()
        theirs.close()
        self.warm_up = self._receive()

    def run(self, steps: int) -> Window:
        """Let it run so many optimizer steps."""
        self._pipe.send(steps)
        return self._receive()

    def close(self) -> None:
        """End the process, which may have ended itself."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=60)
        self._process.kill()

    def _receive(self) -> Window:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise WorkerFailed(self.name, self._log.read_text("utf-8", errors="replace")[-3000:]) from None


class WorkerFailed(Exception):
    """A contestant's process ended; its name and the last it printed."""


def _serve(
    pipe: Connection,
    name: str,
    contestant: Callable[..., None],
    prepare: Callable[[], None],
    job: Any,
    log: Path,
    warm_up: int,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    prepare()
    contestant(name, job, Gate(pipe, warm_up))
