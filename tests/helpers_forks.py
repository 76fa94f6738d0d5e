"""Runs in processes forked from one that has imported everything: a second or two, where the command takes ten.

What `accelerate launch` would put into their environment is taken from accelerate; the real command has its own tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from helpers_run import REPOSITORY, train_here

PROGRAM = REPOSITORY / "tests" / "programs" / "forked_runs.py"


@dataclass(frozen=True)
class Bomb:
    """A signal to one rank's process at the nth call of a function of the package, before or after it.

    Where it `fills` a disk, the signal is not sent: there is no room left on it instead.
    """

    module: str
    name: str
    nth: int = 1
    when: str = "before"
    rank: int = 0
    signal: int = int(signal.SIGKILL)
    fills: str | None = None

    def __str__(self) -> str:
        return f"{self.when} {self.module}.{self.name} {self.nth}"

    def told(self) -> dict[str, Any]:
        """As the program reads it."""
        return self.__dict__ | {"module": f"minimind_dpo.{self.module}"}


@dataclass(frozen=True)
class Started:
    """A run under way.

    Attributes:
        pids: of its ranks; each leads a process group.
    """

    pids: list[int]
    _answers: IO[str]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Return once the condition holds, or rank 0 has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and psutil.pid_exists(self.pids[0]) and time.monotonic() < deadline:
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """To all ranks; one that kills takes what they have started too."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)

    def wait(self) -> list[int]:
        """Exit codes of the ranks, once all have ended."""
        return json.loads(self._answers.readline())


class Forks:
    """The program that forks runs; one process serves many, one after another."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, flags: list[str], directory: Path, engine: str | None = None, bomb: Bomb | None = None, **options: Any
    ) -> list[int]:
        """Exit codes of a run's ranks; see `start`."""
        return self.start(flags, directory, engine, bomb, **options).wait()

    def start(
        self,
        flags: list[str],
        directory: Path,
        engine: str | None = None,
        bomb: Bomb | None = None,
        forgets: str | None = None,
        program: str = "minimind_dpo.train",
        **variables: str,
    ) -> Started:
        """A run in the background; what it prints goes to `directory`/log. It has to be waited for before the next.

        Args:
            flags: of the run.
            directory: existing; unless `variables` say otherwise the cache is in it.
            engine: one of the project's configurations, flags for the launcher may follow; None for one process.
            bomb: what happens amid the run.
            forgets: a value that the engine leaves out of checkpoints.
            program: a module with a `main`, or a file in tests/programs.
            **variables: of the ranks' environment.
        """
        ranks, environment = (1, {}) if engine is None else launched(engine)
        environment = {"MINIMIND_DPO_CACHE": str(directory / "cache")} | environment | variables
        if ranks > 1 or "ACCELERATE_USE_DEEPSPEED" in environment:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        job = {
            "program": program,
            "flags": flags,
            "ranks": ranks,
            "environment": environment,
            "log": str(directory / "log"),
            "pairs": str(directory / "pairs"),
            "bomb": None if bomb is None else bomb.told(),
            "forgets": forgets,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Started(json.loads(self._process.stdout.readline()), self._process.stdout)

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def train_on(engine: str | None, flags: list[str], forks: Forks, directory: Path) -> None:
    """Train to the end: in this process, or in forked ones under one of the project's configurations."""
    if engine is None:
        assert train_here(flags) == 0
    else:
        assert set(forks.run(flags, directory, engine)) == {0}, (directory / "log").read_text("utf-8")


@cache
def launched(engine: str) -> tuple[int, dict[str, str]]:
    """The number of ranks, and the variables that accelerate's launcher sets for them."""
    name, *flags = engine.split()
    file = REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), *flags, "program"])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(getattr(defaults, "deepspeed_config", {}))
    if args.use_deepspeed:
        surroundings = prepare_deepspeed_cmd_env(args)[1]
    else:
        surroundings = prepare_multi_gpu_env(args) if args.multi_gpu else prepare_simple_launcher_cmd_env(args)[1]
    own = {key: value for key, value in surroundings.items() if key.startswith("ACCELERATE_") or "VISIBLE" in key}
    return args.num_processes, own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
