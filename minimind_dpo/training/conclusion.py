"""What a run says of itself at its end: what it has learned, where that is, and what can be done next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.training.held_out import before_and_after
from minimind_dpo.training.run import Run
from minimind_dpo.training.run_log import RunLog

logger = logging.getLogger(__name__)


def conclude(run: Run, log: RunLog, summary: dict[str, Any], begun: int) -> None:
    """Say what the run has learned, where it is, and what can be done next.

    Args:
        run: at its end.
        log: of the run.
        summary: what summary.json holds.
        begun: steps that were done before this start.
    """
    if log.metrics is None:
        return
    state, directory = run.state, run.output_dir
    if begun == state.step:
        logger.info("nothing was left to do: all %d steps were done before", state.step)
    else:
        steps = f"{state.step} steps" + (f", {state.step - begun} of them now" if begun else "")
        rate = summary["pairs_per_second"]
        logger.info("done: %s, %d pairs in %.1f s (%.1f pairs/s)", steps, summary["pairs_seen"], state.seconds, rate)
    for line in _learned([line for line in log.metrics.lines() if "loss" in line]):
        logger.info("  %s", line)
    for line in before_and_after(summary.get("eval_before", {}), summary.get("eval_after", {})):
        logger.info("  %s", line)
    if (best := state.best) is not None:
        of_it = ", which model/ is of" if summary["model_step"] == best["step"] else ""
        logger.info("  best by %s: %.4g at step %d%s", best["metric"], best["value"], best["step"], of_it)
    logger.info("  model   %s", directory / "model")
    logger.info("  report  %s", directory / "report.html")
    logger.info("  next    %s", _next(run))


def _learned(lines: list[dict[str, Any]]) -> list[str]:
    """First and last logged step, of the pairs that were trained on."""
    if len(lines) < 2:
        return []
    names = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    changes = [
        f"{title} {lines[0][name]:.3g} -> {lines[-1][name]:.3g}"
        for title, name in names.items()
        if lines[0][name] is not None and lines[-1][name] is not None
    ]
    return [f"steps {lines[0]['step']} -> {lines[-1]['step']}, training pairs: {', '.join(changes)}"]


def _next(run: Run) -> str:
    raw = is_raw_weights(Path(run.config.model_name_or_path).expanduser())
    if raw:
        return f"minimind-dpo export --model {run.output_dir} --format minimind --output out"
    return f"transformers chat {run.output_dir / 'model'}"
