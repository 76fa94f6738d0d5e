"""Which evaluation of a run is the best, and its checkpoint in place of the last one."""

from __future__ import annotations

import logging
import math
from functools import partial

from minimind_dpo.checkpoints.directory import checkpoint_of, checkpoint_problem, load_checkpoint
from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.ranks import on_main
from minimind_dpo.errors import UserError
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)


def take_best(run: Run, values: dict[str, float]) -> bool:
    """Note an evaluation of the run's present step in its state if it is the best one; whether it is.

    The start is none: it has no checkpoint.

    Raises:
        UserError: evaluations have no such metric.
    """
    config, state = run.config, run.state
    if config.metric_for_best_model is None:
        return False
    metric = "eval_" + config.metric_for_best_model.removeprefix("eval_")
    if metric not in values:
        raise UserError(f"metric_for_best_model: {metric} is none of {', '.join(values)}")
    before = None if state.best is None or state.best["metric"] != metric else state.best["value"]
    if state.step == 0 or not math.isfinite(values[metric]):
        return False
    if before is not None and not (
        values[metric] > before if _more_is_better(config, metric) else values[metric] < before
    ):
        return False
    state.best = {"metric": metric, "value": values[metric], "step": state.step}
    return True


def load_best(run: Run) -> int:
    """Give a finished run its best checkpoint's weights, if that is asked for; the step they are of. Collective."""
    best, last = run.state.best, run.state.step
    if not run.config.load_best_model_at_end or best is None or best["step"] == last:
        return last
    path = checkpoint_of(run.output_dir / "checkpoints", best["step"])
    if problem := on_main(run.engine, partial(checkpoint_problem, path)):
        logger.warning(
            "load_best_model_at_end: model/ is of the last step, since of the best one %s: %s", path, problem
        )
        return last
    load_checkpoint(path, run.engine)
    return int(best["step"])


def _more_is_better(config: TrainConfig, metric: str) -> bool:
    """As told, or by Hugging Face's rule."""
    return not metric.endswith("loss") if config.greater_is_better is None else config.greater_is_better
