"""The run directory: what is opened before training and what is left after it (checkpoints have their own module)."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minimind_dpo.checkpoints.directory import set_aside_later
from minimind_dpo.config import save_config
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError
from minimind_dpo.files import replacing, sweep, write_text
from minimind_dpo.models.adapters import has_adapters
from minimind_dpo.models.portable import make_portable
from minimind_dpo.models.probe import check_written, probe
from minimind_dpo.models.saving import save_adapter, save_model
from minimind_dpo.report.page import write_report
from minimind_dpo.training.metrics import MetricsFile, peak_memory_gib
from minimind_dpo.training.run import Run
from minimind_dpo.training.trackers import start_trackers

logger = logging.getLogger(__name__)


@contextmanager
def locked(directory: Path, patience: float = 30.0) -> Iterator[None]:
    """Keep other runs out of a run directory; the kernel gives it free when this process ends, however it ends.

    Args:
        directory: made if need be.
        patience: seconds to wait for a run that is about to end, as one that a signal has just stopped.

    Raises:
        UserError: another run holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"output_dir: {directory} is in use by another run ({file.read() or 'unknown'}); wait "
                    "for it to end, stop it, or choose another directory"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Take the lock of an open file; False where another process has it."""
    try:
        import fcntl  # late: Windows has none

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: no locks can be taken here; take care that no other run uses the directory", file.name)
    return True


@dataclass(frozen=True)
class RunLog:
    """Where the numbers of a run go: metrics.jsonl on the main process, and the trackers.

    Attributes:
        metrics: None on all other processes.
    """

    metrics: MetricsFile | None

    def record(self, run: Run, values: dict[str, float]) -> None:
        """Write the values of the run's present step, with its place."""
        step = run.state.step
        epoch, pairs_seen = step / run.order.steps_per_epoch, run.order.pairs_seen(step)
        if self.metrics is not None:
            self.metrics.append({"step": step, "epoch": epoch, "pairs_seen": pairs_seen} | values)
        run.engine.track(values | {"epoch": epoch, "pairs_seen": pairs_seen}, step)

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        if self.metrics is not None:
            self.metrics.sync()


def open_run(run: Run, resumed: bool) -> RunLog:
    """Prepare the run directory for the steps to come, and start the trackers. Collective."""
    metrics = None
    if run.engine.is_main:
        sweep(run.output_dir)
        if resumed:
            set_aside_later(run.output_dir / "checkpoints", run.state.step)
        save_config(run.config, run.output_dir / "config.yaml")
        metrics = MetricsFile(run.output_dir / "metrics.jsonl", last_step=run.state.step if resumed else None)
    start_trackers(run.config, run.engine, run.state)
    run.engine.wait()
    return RunLog(metrics)


def finish_run(run: Run, log: RunLog) -> None:
    """Write model/ (with LoRA also adapter/), summary.json and report.html. Collective.

    Raises:
        TrainingError: LoRA's matrices were not merged into model/ as the policy has them.
    """
    directory, state = run.output_dir, run.state
    peak = peak_memory_gib(run.engine)
    expected = None
    if has_adapters(run.policy):
        with _replacing_on_main(run.engine, directory / "adapter") as adapter:
            save_adapter(run.policy, adapter)
        with run.engine.autocast():
            expected = probe(run.policy)
    with _replacing_on_main(run.engine, directory / "model") as model:
        save_model(run.policy, model)
        if model is not None:
            run.tokenizer.save_pretrained(model)
            make_portable(model)
            if expected is not None:
                check_written(model, expected, trust_remote_code=run.config.trust_remote_code)
    if log.metrics is not None:
        summary = _summary(run, log.metrics.lines(), peak)
        write_text(directory / "summary.json", json.dumps(summary, indent=1))
        report = write_report(directory)
        logger.info(
            "done: %d steps, %d pairs, %.1f s; model in %s, report in %s",
            state.step,
            summary["pairs_seen"],
            state.seconds,
            directory / "model",
            report,
        )
    run.engine.wait()


def _summary(run: Run, lines: list[dict[str, Any]], peak_memory: float) -> dict[str, Any]:
    state, pairs = run.state, run.order.pairs_seen(run.state.step)
    summary: dict[str, Any] = {
        "steps": state.step,
        "pairs_seen": pairs,
        "seconds": state.seconds,
        "pairs_per_second": pairs / max(state.seconds, 1e-9),
        "peak_memory_gib": peak_memory,
        "reference_digest": state.identity["reference_digest"],
        "matmul": state.identity["matmul"],
    }
    evaluations = [line for line in lines if "eval_loss" in line]
    if evaluations:
        summary |= {"eval_before": _eval_metrics(evaluations[0]), "eval_after": _eval_metrics(evaluations[-1])}
    return summary


@contextmanager
def _replacing_on_main(engine: Engine, final: Path) -> Iterator[Path | None]:
    """A directory that takes the place of `final` once it is written; None on every other process than the main one."""
    if not engine.is_main:
        yield None
        return
    with replacing(final) as new:
        new.mkdir()
        yield new


def _eval_metrics(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("eval_")}
