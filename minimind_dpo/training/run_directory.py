"""The run directory: what is opened before training and what is left after it (checkpoints have their own module)."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError
from minimind_dpo.files import open_itself, replacing, write_text, writing
from minimind_dpo.models.adapters import has_adapters
from minimind_dpo.models.portable import make_portable
from minimind_dpo.models.probe import check_written, probe
from minimind_dpo.models.saving import save_adapter, save_model, seal_model
from minimind_dpo.report.page import write_report
from minimind_dpo.training.best import load_best
from minimind_dpo.training.metrics import peak_memory_gib
from minimind_dpo.training.run import Run
from minimind_dpo.training.run_log import RunLog, eval_metrics

logger = logging.getLogger(__name__)

_DIRECTORIES = ("checkpoints", "model", "adapter", "record")
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


def finish_run(run: Run, log: RunLog) -> dict[str, Any]:
    """Write model/ (with LoRA also adapter/), summary.json and report.html. Collective.

    Returns:
        What summary.json holds; nothing on all other processes.

    Raises:
        TrainingError: LoRA's matrices were not merged into model/ as the policy has them.
    """
    directory, state = run.output_dir, run.state
    peak, model_step = peak_memory_gib(run.engine), load_best(run)
    summary: dict[str, Any] = {}
    with writing(directory, "output_dir"):
        _write_model(run, directory)
        if log.metrics is not None:
            summary = _summary(run, log.metrics.lines(), peak)
            if state.best is not None:
                summary |= {"best": state.best, "model_step": model_step}
            write_text(directory / "summary.json", json.dumps(summary, indent=1))
            write_report(directory)
    run.engine.wait()
    return summary


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
    evaluations = [line for line in lines if eval_metrics(line)]
    if evaluations:
        summary |= {"eval_before": eval_metrics(evaluations[0]), "eval_after": eval_metrics(evaluations[-1])}
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
