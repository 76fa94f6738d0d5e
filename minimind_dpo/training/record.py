"""What the page of a run shows beside its metrics, kept in `record/` of the run directory, and the page as it grows.

`data.json` and `environment.json` are written at the start, `rewards.jsonl` and `warnings.jsonl` grow a line at a time
and are cut back on a resume as metrics.jsonl is, `pairs.jsonl` comes with the last evaluation. None of it is read again
by training.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.errors import TrainingError, UserError
from minimind_dpo.files import sweep, write_text, writing
from minimind_dpo.report.page import write_report
from minimind_dpo.report.spread import describe_rewards, histogram
from minimind_dpo.training.metrics import MetricsFile
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)

_PACKAGES = ("minimind-dpo", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers")
_SAMPLE = 10_000  # pairs whose lengths are looked at
_SHARE = 0.01  # of a run's time that its page may take


class Record(logging.Handler):
    """On the main process: keeps what the page needs, as a handler also every warning, and writes the page.

    Args:
        run: about to start.
        resumed: what was kept up to the run's present step stays.

    Raises:
        UserError: nothing can be written to the run directory.
        TrainingError: the disk is full.
    """

    def __init__(self, run: Run, resumed: bool):
        super().__init__(logging.WARNING)
        self._run, self._directory = run, run.output_dir / "record"
        with writing(self._directory, "output_dir"):
            self._directory.mkdir(exist_ok=True)
            sweep(self._directory)
            if not resumed:
                (self._directory / "pairs.jsonl").unlink(missing_ok=True)
            write_text(self._directory / "data.json", json.dumps(_describe_data(run), indent=1))
            write_text(self._directory / "environment.json", json.dumps(_describe_environment(run), indent=1))
        last_step = run.state.step if resumed else None
        self._rewards = MetricsFile(self._directory / "rewards.jsonl", last_step)
        self._warnings = MetricsFile(self._directory / "warnings.jsonl", last_step)
        self._page = PageWriter(run.output_dir)

    def __enter__(self) -> Record:
        logging.getLogger("minimind_dpo").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("minimind_dpo").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning; one that cannot be kept has been said all the same."""
        with suppress(UserError, TrainingError):
            self._warnings.append({"step": self._run.state.step, "text": record.getMessage()})

    def add_rewards(self, name: str, values: np.ndarray) -> None:
        """A line of rewards.jsonl, of the pairs of a set in an evaluation as `PairRewards.gather` gives them."""
        self._rewards.append({"step": self._run.state.step, "set": name} | describe_rewards(*values.T))

    def write_pairs(self, rows: list[dict[str, Any]]) -> None:
        """The worst and the best held-out pairs of the run."""
        path = self._directory / "pairs.jsonl"
        with writing(path, "output_dir"):
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def refresh_page(self) -> None:
        """Write the page anew, if the run can spare the time."""
        self._page.refresh()


class PageWriter:
    """Writes a run's page amid it, for at most a hundredth of the time.

    After a page that took t seconds, none is written for 99 t; the first is taken to take 0.1 s.
    """

    def __init__(self, directory: Path):
        self._directory, self._ended, self._took = directory, time.monotonic(), 0.1

    def refresh(self) -> None:
        """Write `report.html`, or leave it as it is for now; a page that cannot be written stops no run."""
        begun = time.monotonic()
        if begun - self._ended < self._took * (1 / _SHARE - 1):
            return
        try:
            write_report(self._directory)
        except (UserError, TrainingError, OSError) as error:
            logger.info("report.html stays as it is for now: %s", error)
        self._ended = time.monotonic()
        self._took = self._ended - begun


def _describe_environment(run: Run) -> dict[str, Any]:
    """On what the run goes: versions and machine; no name, no path, no variable of the user's."""
    engine = run.engine
    on_gpu = engine.device.type == "cuda"
    return {
        "processes": engine.world_size,
        "engine": type(engine).__name__,
        "precision": engine.precision,
        "device": torch.cuda.get_device_name(engine.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    } | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _describe_data(run: Run) -> dict[str, Any]:
    held_out = {f"eval {name}".strip(): data for name, data in run.eval_sets.items()}
    return {name: _describe(data) for name, data in ({"train": run.train_data} | held_out).items()}


def _describe(data: TokenizedData) -> dict[str, Any]:
    """What is known of some pairs; lengths are those of at most 10,000, evenly spaced."""
    rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), _SAMPLE)).astype(np.int64))
    table = data.dataset.with_format("arrow")[rows.tolist()]
    chosen, rejected = (_counted(table[f"{side}_completion_mask"]) for side in ("chosen", "rejected"))
    longer = chosen - rejected
    return {
        "pairs": len(data),
        "rows": data.report.rows,
        "dropped": data.report.dropped,
        "examples": data.report.examples,
        "looked_at": len(rows),
        "tokens": {"chosen": _quartiles(chosen), "rejected": _quartiles(rejected), "input": _quartiles(data.tokens)},
        "longer": {"chosen": float((longer > 0).mean()), "rejected": float((longer < 0).mean())},
        "difference": histogram(longer.astype(float), finest=0),
    }


def _counted(masks: Any) -> np.ndarray:
    """[rows] counted tokens of each mask of an Arrow column; none is empty."""
    column = masks.combine_chunks()
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    return np.add.reduceat(column.flatten().to_numpy(zero_copy_only=False).astype(np.int64), [0, *ends[:-1]])


def _quartiles(values: np.ndarray) -> dict[str, float]:
    median, most, longest = np.percentile(values, (50, 95, 100))
    return {"median": float(median), "95 %": float(most), "longest": float(longest)}
