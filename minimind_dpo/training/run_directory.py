"""The run directory: what is opened before training and what is left after it (checkpoints have their own module)."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minimind_dpo.checkpoints.directory import set_aside_later
from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import save_config
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.ranks import decide
from minimind_dpo.errors import UserError
from minimind_dpo.files import open_itself, replacing, sweep, write_text, writing
from minimind_dpo.models.adapters import has_adapters
from minimind_dpo.models.portable import make_portable
from minimind_dpo.models.probe import check_written, probe
from minimind_dpo.models.saving import save_adapter, save_model, seal_model
from minimind_dpo.report.page import write_report
from minimind_dpo.training.best import load_best
from minimind_dpo.training.metrics import MetricsFile, peak_memory_gib
from minimind_dpo.training.progress import tell_end
from minimind_dpo.training.run import Run
from minimind_dpo.training.schedule import is_due
from minimind_dpo.training.trackers import start_trackers

logger = logging.getLogger(__name__)

_DIRECTORIES = ("checkpoints", "model", "adapter")
_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html")


@contextmanager
def locked(directory: Path, patience: float = 30.0) -> Iterator[None]:
    """Keep other runs out of a run directory; the kernel gives it free when this process ends, however it ends.

    Args:
        directory: made if need be.
        patience: seconds to wait for a run that is about to end, as one that a signal has just stopped.

    Raises:
        UserError: another run holds it, or nothing can be written there.
    """
    with ExitStack() as stack:
        with writing(directory, "output_dir"):
            directory.mkdir(parents=True, exist_ok=True)
            _check_names(directory)
            lock = open(directory / ".lock", "a+b", buffering=0, opener=open_itself)
        file = stack.enter_context(lock)
        deadline = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"output_dir: {directory} is in use by another run ({file.read().decode() or 'unknown'}); wait "
                    "for it to end, stop it, or choose another directory"
                )
            time.sleep(0.2)
        with writing(directory, "output_dir"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _check_names(directory: Path) -> None:
    """Find at the start what a run would only come upon when it saves."""
    wrong = [name for name in _DIRECTORIES if (path := directory / name).exists() and not path.is_dir()]
    wrong += [name for name in _FILES if (directory / name).is_dir()]
    if wrong:
        kind = "a file" if wrong[0] in _DIRECTORIES else "a directory"
        raise UserError(f"output_dir: {directory / wrong[0]} is {kind}; move it away, or choose another output_dir")


def _lock(file: IO[bytes]) -> bool:
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
        samples: the policy's replies; None there too, and where it is asked for none.
    """

    metrics: MetricsFile | None
    samples: MetricsFile | None

    def record(self, run: Run, values: dict[str, float]) -> None:
        """Write the values of the run's present step, with its place."""
        step = run.state.step
        epoch, pairs_seen = step / run.order.steps_per_epoch, run.order.pairs_seen(step)
        if self.metrics is not None:
            self.metrics.append({"step": step, "epoch": epoch, "pairs_seen": pairs_seen} | values)
        run.engine.track(_numbers(values) | {"epoch": epoch, "pairs_seen": pairs_seen}, step)

    def record_replies(self, replies: list[dict[str, Any]]) -> None:
        """Write what the policy answered at the run's present step, as `training/replies.py` has it."""
        if self.samples is not None:
            for reply in replies:
                self.samples.append(reply)

    def lacks_evaluation(self, run: Run) -> bool:
        """Whether the run's present step has an evaluation, which is not recorded. Collective."""
        step = run.state.step
        has_one = run.eval_sets and (step in (0, run.state.total_steps) or is_due(run.config.eval_steps, step))
        if not has_one:
            return False
        lines = [] if self.metrics is None else self.metrics.lines()
        return not decide(any(line["step"] == step and _eval_metrics(line) for line in lines))

    def sync(self, state: TrainerState) -> None:
        """Make what is written survive a power cut, and note in `state` how much it is."""
        if self.metrics is not None:
            state.metrics = self.metrics.written()
            self.metrics.sync()


def open_run(run: Run, resumed: bool) -> RunLog:
    """Prepare the run directory for the steps to come, and start the trackers. Collective."""
    metrics = samples = None
    if run.engine.is_main:
        with writing(run.output_dir, "output_dir"):
            sweep(run.output_dir)
            if resumed:
                set_aside_later(run.output_dir / "checkpoints", run.state.step)
            save_config(run.config, run.output_dir / "config.yaml")
        last_step = run.state.step if resumed else None
        metrics = MetricsFile(run.output_dir / "metrics.jsonl", last_step)
        samples = MetricsFile(run.output_dir / "samples.jsonl", last_step) if run.prompts else None
        _compare(metrics, run.state)
    start_trackers(run.config, run.engine, run.state)
    run.engine.wait()
    return RunLog(metrics, samples)


def _compare(metrics: MetricsFile, state: TrainerState) -> None:
    """Say so if the lines of before a resume are not those that were written."""
    if state.metrics is not None and metrics.written() != state.metrics:
        logger.warning(
            "%s: the lines up to step %d are not those that were written: %d there, %d written; what is missing stays "
            "missing in the report",
            metrics.path,
            state.step,
            metrics.written()[0],
            state.metrics[0],
        )


def finish_run(run: Run, log: RunLog, begun: int) -> None:
    """Write model/ (with LoRA also adapter/), summary.json and report.html. Collective.

    `begun` is the step that this session began after.

    Raises:
        TrainingError: LoRA's matrices were not merged into model/ as the policy has them.
    """
    directory, state = run.output_dir, run.state
    peak, model_step = peak_memory_gib(run.engine), load_best(run)
    with writing(directory, "output_dir"):
        _write_model(run, directory)
        if log.metrics is not None:
            summary = _summary(run, log.metrics.lines(), peak)
            if state.best is not None:
                summary |= {"best": state.best, "model_step": model_step}
            write_text(directory / "summary.json", json.dumps(summary, indent=1))
            report = write_report(directory)
            tell_end(run, summary, begun, report)
    run.engine.wait()


def _write_model(run: Run, directory: Path) -> None:
    """Write model/, and with LoRA adapter/; what model/ computes is then compared with the policy."""
    expected = None
    if has_adapters(run.policy):
        with _replacing_on_main(run.engine, directory / "adapter") as adapter:
            save_adapter(run.policy, adapter)
            if adapter is not None:
                seal_model(adapter)
        with run.engine.autocast():
            expected = probe(run.policy)
    with _replacing_on_main(run.engine, directory / "model") as model:
        save_model(run.policy, model)
        if model is not None:
            run.tokenizer.save_pretrained(model)
            make_portable(model)
            seal_model(model)
            if expected is not None:
                check_written(model, expected, trust_remote_code=run.config.trust_remote_code)


def _summary(run: Run, lines: list[dict[str, Any]], peak_memory: float) -> dict[str, Any]:
    state, pairs = run.state, run.order.pairs_seen(run.state.step)
    digest = state.identity["reference_digest"]
    summary: dict[str, Any] = {
        "steps": state.step,
        "pairs_seen": pairs,
        "seconds": state.seconds,
        "pairs_per_second": pairs / max(state.seconds, 1e-9),
        "peak_memory_gib": peak_memory,
        "reference_digest": digest if run.config.needs_reference else None,
        "matmul": state.identity["matmul"],
        "skipped_steps": len(state.skipped_steps),
    }
    evaluations = [line for line in lines if _eval_metrics(line)]
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


def _numbers(values: dict[str, float]) -> dict[str, float]:
    """Those that are finite; trackers know no others."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _eval_metrics(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("eval_")}
