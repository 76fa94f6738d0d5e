"""What a stage finds, on disk after each finding, so that one that dies or runs out of time has told what it knew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RIGHT, WRONG, FAILED, SKIPPED = "right", "wrong", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage works.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        rehearses: the same work on tiny shapes, to see that it runs.
        scratch: a directory of the stage's own.
        results: the directory with what earlier stages found.
    """

    device: str
    rehearses: bool
    scratch: Path
    results: Path

    def found(self, stage: str) -> dict[str, Any]:
        """The figures of an earlier stage, or none."""
        path = self.results / f"{stage}.json"
        return json.loads(path.read_text("utf-8"))["figures"] if path.is_file() else {}


class Notes:
    """The findings of one stage, written to a file as they come.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, Any] = {"checks": [], "figures": {}, "skipped": []}
        self._write()

    def check(self, what: str, right: bool, said: Any = None) -> None:
        """Note whether something is as it must be, and in `said` by which figure."""
        self._found["checks"].append({"what": what, "right": bool(right), "said": said})
        self._write()

    def close(self, what: str, value: float, expected: float, within: float) -> None:
        """Check that two numbers differ by no more than `within`."""
        self.check(what, abs(value - expected) <= within, f"{value:.6g}, expected {expected:.6g} within {within:g}")

    def figure(self, name: str, value: Any) -> None:
        """Note a figure that nothing is asked of."""
        self._found["figures"][name] = value
        self._write()

    def skip(self, what: str, why: str) -> None:
        """Note what could not be tried here."""
        self._found["skipped"].append({"what": what, "why": why})
        self._write()

    def _write(self) -> None:
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self._found, indent=1), "utf-8")
        aside.replace(self._path)


def verdict(found: dict[str, Any], ended_well: bool) -> str:
    """What to make of a stage: wrong where a check says so, failed where it did not come to its end."""
    if any(not check["right"] for check in found["checks"]):
        return WRONG
    return RIGHT if ended_well else FAILED
