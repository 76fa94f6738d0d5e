"""metrics.jsonl, and the memory that a run has used."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from minimind_dpo.engine.protocol import Engine
from minimind_dpo.files import sync, write_text


class MetricsFile:
    """metrics.jsonl of a run: appended a line at a time, cut back to a checkpoint's step on resume."""

    def __init__(self, path: Path, last_step: int | None):
        """Open for appending; keep the lines up to `last_step`, or none when there is nothing to resume."""
        self.path = path
        kept = [] if last_step is None else [line for line in self.lines() if line["step"] <= last_step]
        write_text(path, "".join(_dump(line) for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line; a last one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        complete = self.path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in complete if line.endswith("\n")]

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system; a number that is not finite becomes null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_dump(_without_nan(line)))

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        sync(self.path)


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """The same line with null for numbers that are not finite, which JSON does not have."""
    is_wrong = {name: isinstance(value, float) and not math.isfinite(value) for name, value in line.items()}
    return {name: None if is_wrong[name] else value for name, value in line.items()}


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def peak_memory_gib(engine: Engine) -> float:
    """The largest memory that any rank used so far, GiB: allocated on its device, or resident on the host.

    Collective.
    """
    if engine.device.type == "cuda":
        return engine.largest(torch.cuda.max_memory_allocated(engine.device) / 2**30)
    return engine.largest(_peak_resident_kib() / 2**20)


def _peak_resident_kib() -> int:
    """The process's peak resident memory, KiB.

    Linux's own figure of the running program: `getrusage` counts in what the process was before it became this
    program, which is as large as whatever started it.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))):
        return int(found[1])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset // 1024
    import resource  # late: Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak  # macOS counts bytes
