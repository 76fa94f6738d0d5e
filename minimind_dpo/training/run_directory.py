"""The run directory: what is opened before training and what is left after it (checkpoints have their own module)."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from minimind_dpo.checkpoints.directory import TrainerState
from minimind_dpo.config import TrainConfig, save_config
from minimind_dpo.engine.launcher import unwrap
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import has_adapters
from minimind_dpo.models.saving import save_adapter, save_model
from minimind_dpo.report.page import write_report
from minimind_dpo.training.loop import Run
from minimind_dpo.training.metrics import MetricsFile, peak_memory_gib

logger = logging.getLogger(__name__)


@contextmanager
def held(directory: Path, patience: float = 30.0) -> Iterator[None]:
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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: this file system knows no locks; take care that no other run uses the directory", file.name)
    return True


def open_run(config: TrainConfig, accelerator: Accelerator, state: TrainerState, resumed: bool) -> MetricsFile | None:
    """Prepare the run directory and the tracker; the metrics file on the main process."""
    directory = Path(config.output_dir)
    metrics = None
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
        metrics = MetricsFile(directory / "metrics.jsonl", last_step=state.step if resumed else None)
    if config.report_to == "wandb":
        _start_wandb(config, accelerator, state)
    return metrics


def _start_wandb(config: TrainConfig, accelerator: Accelerator, state: TrainerState) -> None:
    import wandb

    settings = {"name": config.run_name, "dir": config.output_dir}
    if state.tracker_run_id:
        settings |= {"id": state.tracker_run_id, "resume": "allow"}
    try:
        accelerator.init_trackers(
            os.environ.get("WANDB_PROJECT", "minimind_dpo"),
            config=dataclasses.asdict(config),
            init_kwargs={"wandb": settings},
        )
    except wandb.Error as error:
        accelerator.trackers.clear()  # one that never started cannot be ended
        raise UserError(
            f"report_to: W&B cannot start: {error}\nLog in with `wandb login`, set WANDB_MODE=offline, "
            "or use report_to: none"
        ) from None
    if accelerator.is_main_process:
        state.tracker_run_id = accelerator.get_tracker("wandb", unwrap=True).id


def finish_run(run: Run) -> None:
    """Write model/ (with LoRA also adapter/), summary.json and report.html."""
    accelerator, directory, state = run.accelerator, run.output_dir, run.state
    policy = unwrap(run.scorer).model
    peak = peak_memory_gib(accelerator)
    if has_adapters(policy):
        with _replacing(accelerator, directory / "adapter") as adapter:
            save_adapter(policy, adapter)
    with _replacing(accelerator, directory / "model") as model:
        save_model(policy, model)
        if model is not None:
            run.tokenizer.save_pretrained(model)
    if accelerator.is_main_process:
        assert run.metrics is not None
        pairs = run.order.pairs_seen(state.step)
        summary = {
            "steps": state.step,
            "pairs_seen": pairs,
            "seconds": state.seconds,
            "pairs_per_second": pairs / max(state.seconds, 1e-9),
            "peak_memory_gib": peak,
            "reference_digest": state.identity["reference_digest"],
        }
        evaluations = [line for line in run.metrics.lines() if "eval_loss" in line]
        if evaluations:
            summary |= {"eval_before": _eval_metrics(evaluations[0]), "eval_after": _eval_metrics(evaluations[-1])}
        _write(directory / "summary.json", json.dumps(summary, indent=1))
        report = write_report(directory)
        logger.info(
            "done: %d steps, %d pairs, %.1f s; model in %s, report in %s",
            state.step,
            pairs,
            state.seconds,
            directory / "model",
            report,
        )
    accelerator.wait_for_everyone()


@contextmanager
def _replacing(accelerator: Accelerator, final: Path) -> Iterator[Path | None]:
    """A directory that takes the place of `final` once it is written; None on all but the main process."""
    if not accelerator.is_main_process:
        yield None
        return
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _eval_metrics(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("eval_")}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
