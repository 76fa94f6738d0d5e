"""The files of a run directory, read for its page: what is missing is empty, what is damaged is said."""

from __future__ import annotations

import json
import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import yaml

from minimind_dpo.errors import UserError

logger = logging.getLogger(__name__)


class Curve(NamedTuple):
    """One metric over a run: optimizer steps, and as many finite values."""

    steps: array[float]
    values: array[float]

    def add(self, step: Any, value: Any) -> None:
        """Take in a point, if it is one."""
        if is_finite(step) and is_finite(value):
            self.steps.append(step)
            self.values.append(value)


@dataclass
class Metrics:
    """metrics.jsonl by columns: 16 bytes a value, however long the run was.

    Attributes:
        curves: of each metric; one that is not there is empty.
        last: the last line that logs a training step.
    """

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(lambda: Curve(array("d"), array("d"))))
    last: dict[str, Any] = field(default_factory=dict)

    def take(self, line: dict[str, Any]) -> None:
        """Take in a line."""
        for name, value in line.items():
            if name != "step" and not isinstance(value, bool):
                self.curves[name].add(line.get("step"), value)
        if "loss" in line:
            self.last = line

    def evaluations(self) -> dict[str, dict[str, float]]:
        """As summary.json tells them: the first and the last one, of a run that has made two at least."""
        evaluated = {name: curve for name, curve in self.curves.items() if name.startswith("eval_")}
        if not any(len(curve.steps) > 1 for curve in evaluated.values()):
            return {}
        return {
            key: {name: curve.values[place] for name, curve in evaluated.items() if len(curve.values)}
            for key, place in (("eval_before", 0), ("eval_after", -1))
        }


def read_metrics(run_dir: Path) -> Metrics:
    """The metrics of a run.

    Raises:
        UserError: `run_dir` has none, or they are damaged.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir}: no metrics.jsonl here; name the output_dir of a training run")
    metrics = Metrics()
    for line in read_lines(path):
        metrics.take(line)
    return metrics


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file (none if it is absent); a last line that is still being written is left out.

    Raises:
        UserError: another line is no object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                with suppress(UserError):
                    yield _object(json.loads, line, "", "")
            elif line.strip():
                yield _object(json.loads, line, f"{path}:{number}: not a JSON object", "mend or remove the line")


def read_extra(path: Path, part: str) -> list[dict[str, Any]]:
    """As `read_lines`, for what a page can do without: a damaged file costs it this part, and no run its end."""
    try:
        return list(read_lines(path))
    except UserError as error:
        logger.warning("%s; the report shows no %s", error, part)
        return []


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file, {} if it is absent or empty.

    Raises:
        UserError: it holds something else.
    """
    content = path.read_bytes() if path.is_file() else b""
    kind, parse = ("YAML", yaml.safe_load) if path.suffix == ".yaml" else ("JSON", json.loads)
    problem = f"{path}: not a {kind} object"
    return _object(parse, content, problem, "remove the file or run again") if content.strip() else {}


def _object(parse: Callable[[bytes], Any], content: bytes, problem: str, remedy: str) -> dict[str, Any]:
    try:
        value = parse(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{problem} ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{problem} ({type(value).__name__}); {remedy}")
    return value


def held_out_sets(names: Iterable[str]) -> dict[str, str]:
    """What the metrics of each set of held-out pairs begin with -> the set's name, which is empty for a single set.

    Args:
        names: of metrics, among them those of an evaluation.
    """
    found = sorted(name for name in names if name.startswith("eval_"))
    prefixes = [name.removesuffix("dpo_loss") for name in found if name.endswith("_dpo_loss")]
    if not prefixes and found:
        prefixes = ["eval_"]
    return {prefix: prefix.removeprefix("eval_").removesuffix("_") for prefix in prefixes}


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a logged value is a number that can be drawn."""
    return isinstance(value, (int, float)) and abs(value) < float("inf")
