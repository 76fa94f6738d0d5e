"""Runs that something happens to, and the oracle that says whether they end as ones that were left alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers_forks import Forks
from helpers_run import Inputs

from minimind_dpo.checkpoints.files import FragmentReader

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


def group(engine: str | None) -> pytest.MarkDecorator:
    """Tests of one engine go side by side with those of another, and share a program that forks their runs."""
    return pytest.mark.xdist_group(f"faults of {engine or 'plain'}")


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
