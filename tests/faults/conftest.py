"""Writes the table of docs/reliability.md where `FAULTS_TABLE` names that file, as `make faults` does."""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.runs import Alone
from helpers_forks import Forks
from helpers_run import Inputs

BEGIN, END = "<!-- written by make faults -->\n", "<!-- until here -->\n"


@pytest.fixture(scope="module")
def alone(forks: Forks, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(forks, inputs, tmp_path_factory.mktemp("alone"))


@pytest.fixture(autouse=True)
def scenario(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Each try counts for its scenario, the first sentence of its test, and for the engine that it ran on."""
    function = getattr(request, "function", None)
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    first = re.split(r"(?<=\.)\s", (getattr(function, "__doc__", None) or request.node.originalname).strip())[0]
    kind = f" ({params['kind']})" if "kind" in params else ""
    record_property("scenario", " ".join(first.split()).rstrip(".") + kind)
    record_property("engine", params.get("engine") or "plain")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the reports of all workers and write the table."""
    target = os.environ.get("FAULTS_TABLE")
    if not target or "PYTEST_XDIST_WORKER" in os.environ:  # which knows of its own tests only
        return
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(report.user_properties)
            if "scenario" in told and report.when == "call":
                counts[told["scenario"], told["engine"]][0] += 1
                counts[told["scenario"], told["engine"]][1] += outcome == "passed"
    rows = [f"| {name} | {engine} | {tries} | {right} |" for (name, engine), (tries, right) in sorted(counts.items())]
    table = ["| scenario | engine | tries | as it should be |", "|---|---|---|---|", *rows, ""]
    machine = f"\nOn {platform.machine()}, {platform.system()}, Python {platform.python_version()}.\n"
    path = Path(target)
    text = path.read_text("utf-8")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(head + "\n" + "\n".join(table) + machine + "\n" + tail, "utf-8")
