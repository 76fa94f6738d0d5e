"""Contestants for the tests of benchmarks/workers.py; in a file of their own since a new process imports it."""

from __future__ import annotations

from typing import Any


def prepare() -> None:
    pass


def contest(name: str, job: str, gate: Any) -> None:
    """Step 1, 2, 3, ... with the losses 1, 2, 3, ...; or fail at once."""
    number = 0
    while True:
        if job == "fail":
            raise RuntimeError("no such luck")
        number += 1
        gate.step(float(number))
