"""Runs that something happens to, and the oracle that says whether they end as ones that were left alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers_run import REPOSITORY, Inputs

from minimind_dpo.checkpoints.files import FragmentReader

PROGRAM = REPOSITORY / "tests" / "programs" / "forked_runs.py"
STATES = ("weight", "exp_avg", "exp_avg_sq")
OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 1,
    "eval_steps": 2,
    "reference": "cache",
    "ddp_timeout": 60,
}
DEEPSPEED = {"ds_zero2_cpu": "zero2_cpu", "ds_zero3_cpu": "zero3_cpu"}


def group(engine: str | None) -> pytest.MarkDecorator:
    """Tests of one engine go side by side with those of another, and share a program that forks their runs."""
    return pytest.mark.xdist_group(f"faults of {engine or 'plain'}")


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


class Forks:
    """The program that forks runs; one process serves many."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        flags: list[str],
        directory: Path,
        engine: str | None = None,
        bomb: Bomb | None = None,
        forgets: str | None = None,
        **variables: str,
    ) -> list[int]:
        """Exit codes of a run's ranks: one, or two under `engine`. What they print goes to `directory`/log."""
        environment = {"MINIMIND_DPO_CACHE": str(directory / "cache")} | variables
        if engine is not None:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if engine in DEEPSPEED:
            file = REPOSITORY / "configs" / "deepspeed" / f"{DEEPSPEED[engine]}.json"
            environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
        job = {
            "flags": flags,
            "ranks": 1 if engine is None else 2,
            "environment": environment,
            "log": str(directory / "log"),
            "pairs": str(directory / "pairs"),
            "bomb": None if bomb is None else bomb.told(),
            "forgets": forgets,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Alone:
    """The oracle of a run that was left alone, for each engine; made when it is first asked for."""

    def __init__(self, forks: Forks, inputs: Inputs, directory: Path) -> None:
        self._forks, self._inputs, self._directory = forks, inputs, directory
        self._known: dict[str, str] = {}

    def __call__(self, engine: str | None) -> str:
        if (name := str(engine)) not in self._known:
            place = self._directory / name
            place.mkdir()
            self._known[name] = goes_on(self._forks, self._inputs, place, engine)
        return self._known[name]


def goes_on(forks: Forks, inputs: Inputs, directory: Path, engine: str | None) -> str:
    """The oracle of the run in `directory` once it is started, or started again, and ends."""
    codes = forks.run(flags_of(inputs, directory), directory, engine)
    assert set(codes) == {0}, (directory / "log").read_text("utf-8")
    return oracle(directory)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flags_of(inputs: Inputs, directory: Path, **options: Any) -> list[str]:
    """Of a run in `directory`/run: 12 optimizer steps of 4 pairs on one process, 6 of 8 on two."""
    return inputs.flags(directory / "run", eval_data=inputs.eval_data, **(OPTIONS | options))


def oracle(directory: Path) -> str:
    """sha256 over the final weights, weights and optimizer states of the last checkpoint, and every step's pairs."""
    digest = hashlib.sha256((directory / "run" / "model" / "model.safetensors").read_bytes())
    last = max((directory / "run" / "checkpoints").glob("step-*"))
    reader = FragmentReader(last)
    for name in sorted(reader.shapes):
        for kind in STATES:
            size = 1
            for length in reader.shapes[name]:
                size *= length
            digest.update(f"{last.name} {name} {kind}".encode() + reader.read(kind, name, 0, size).numpy().tobytes())
    for path in sorted(directory.glob("pairs-*")):
        steps = dict(json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("]"))
        digest.update(json.dumps([path.name, sorted(steps.items())]).encode())
    return digest.hexdigest()
