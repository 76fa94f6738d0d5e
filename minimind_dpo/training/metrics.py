"""metrics.jsonl, and the memory that a run has used."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash

from minimind_dpo.engine.protocol import Engine
from minimind_dpo.files import open_itself, sync, write_text, writing

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl of a run: appended a line at a time, cut back to a checkpoint's step on resume."""

    def __init__(self, path: Path, last_step: int | None):
        """Open for appending; keep the lines up to `last_step`, or none when there is nothing to resume.

        Raises:
            UserError: the file can't be written.
            TrainingError: the disk is full.
        """
        self.path = path
        kept = [] if last_step is None else [_dump(line) for line in self.lines() if line["step"] <= last_step]
        self._count, self._digest = len(kept), xxhash.xxh3_128("".join(kept).encode())
        with writing(path, "output_dir"):
            write_text(path, "".join(kept))

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line; those that are no lines of metrics are left out, as is said, and one cut short."""
        if not self.path.exists():
            return []
        complete = self.path.read_bytes().split(b"\n")[:-1]
        lines = [_parsed(line) for line in complete]
        if bad := [str(number) for number, line in enumerate(lines, 1) if line is None]:
            logger.warning("%s: left out, as no lines of metrics: %s", self.path, ", ".join(bad))
        return [line for line in lines if line is not None]

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system; a number that is not finite becomes null.

        Raises:
            UserError: the file can't be written.
            TrainingError: the disk is full.
        """
        text = _dump(_without_nan(line))
        with writing(self.path, "output_dir"), open(self.path, "a", encoding="utf-8", opener=open_itself) as file:
            file.write(text)
        self._count += 1
        self._digest.update(text.encode())

    def written(self) -> list[Any]:
        """How many lines there are, and their checksum."""
        return [self._count, self._digest.hexdigest()]

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        sync(self.path)


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """The same line with null for numbers that are not finite, which JSON does not have."""
    is_wrong = {name: isinstance(value, float) and not math.isfinite(value) for name, value in line.items()}
    return {name: None if is_wrong[name] else value for name, value in line.items()}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of metrics; None if it is something else."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


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
