"""The training loop: score, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from pathlib import Path

from minimind_dpo.checkpoints.directory import save_checkpoint
from minimind_dpo.errors import StoppedEarly
from minimind_dpo.models.saving import describe_adapter, describe_model
from minimind_dpo.training.batches import load_steps
from minimind_dpo.training.best import take_best
from minimind_dpo.training.callbacks import tell_saved
from minimind_dpo.training.evaluation import evaluate
from minimind_dpo.training.health import HealthWatch
from minimind_dpo.training.held_out import tell_evaluation
from minimind_dpo.training.metrics import peak_memory_gib
from minimind_dpo.training.numbers import StepNumbers, StepResult, read_step
from minimind_dpo.training.progress import Clock
from minimind_dpo.training.replies import live_replies, reply_metrics
from minimind_dpo.training.run import Run
from minimind_dpo.training.run_log import RunLog
from minimind_dpo.training.schedule import is_due, learning_rate_schedule
from minimind_dpo.training.spread import empty_rewards
from minimind_dpo.training.step import optimizer_step
from minimind_dpo.training.visibility import UpdateWatch

logger = logging.getLogger(__name__)


def train(run: Run, log: RunLog) -> None:
    """Train from `run.state.step` to the last step.

    Raises:
        StoppedEarly: a signal asked for it, or `max_hours` are over; a checkpoint is written.
        TrainingError: a loss or gradient is not finite; weights are as after the last good step.
    """
    config, state = run.config, run.state
    collate = run.reference.collating(run.layout)
    steps = load_steps(run.train_data.dataset, run.plans(), collate, config.dataloader_num_workers, run.engine.device)
    schedule = learning_rate_schedule(
        config.lr_scheduler_type, config.learning_rate, state.total_steps, config.warmup_ratio or 0.0
    )
    run.scorer.train()
    clock, watch, health = Clock(state), UpdateWatch(run), HealthWatch(run, schedule)
    unread: deque[StepResult] = deque()
    stopped = False
    if log.lacks_evaluation(run) and _evaluate(run, log, clock):
        _save(run, log, clock)
    for step in steps:
        unread.append(optimizer_step(run, step, schedule(step.plan.step)))
        state.step = step.plan.step
        last = state.step == state.total_steps
        logs, evaluates, saves = (
            last or is_due(every, state.step) for every in (config.logging_steps, config.eval_steps, config.save_steps)
        )
        while unread and (len(unread) > _steps_ahead(run) or stopped or logs or evaluates or saves):
            result = unread.popleft()
            numbers = read_step(run, result)
            stopped |= numbers.stops
            clock.count(numbers.totals)
            log.show(numbers.totals, clock)
            if not numbers.skipped:
                health.take(result.step, numbers.totals, numbers.grad_norm)
        if logs:
            _log_step(run, log, numbers, result.learning_rate, clock)
            watch.look()
        stops = stopped and not last
        best = evaluates and not stops and _evaluate(run, log, clock)
        if stopped or best or (saves and config.save_steps):
            _save(run, log, clock)
        if stops:
            raise StoppedEarly(f"after step {state.step} of {state.total_steps}")
    clock.store(state)


def _steps_ahead(run: Run) -> int:
    """Steps that are begun before the numbers of an earlier one are read: a GPU always has work while it is asked."""
    return 0 if run.engine.device.type == "cpu" else 1


def _evaluate(run: Run, log: RunLog, clock: Clock) -> bool:
    """Record an evaluation; whether it is the best so far. One that is stopped is made again when the run goes on.

    Raises:
        StoppedEarly: it was stopped; a checkpoint of the step is written.
    """
    if not run.eval_sets:
        return False
    rewards = empty_rewards(run)
    try:
        values = evaluate(run, rewards)
        replies = live_replies(run) if run.prompts else []
    except StoppedEarly:
        if run.state.step > 0:
            _save(run, log, clock)
        raise
    values |= reply_metrics(replies)
    log.record(run, values)
    log.record_replies(replies)
    log.record_rewards(run, rewards)
    tell_evaluation(run, values)
    clock.restart()
    return take_best(run, values)


def _log_step(run: Run, log: RunLog, numbers: StepNumbers, learning_rate: float, clock: Clock) -> None:
    pairs_per_second, tokens_per_second = clock.rates()
    values = numbers.totals.means() | {
        "learning_rate": learning_rate,
        "grad_norm": numbers.grad_norm,
        "pairs_per_second": pairs_per_second,
        "tokens_per_second": tokens_per_second,
        "peak_memory_gib": peak_memory_gib(run.engine),
    }
    if run.state.skipped_steps:
        values["skipped_steps"] = len(run.state.skipped_steps)
    log.record(run, values)
    clock.restart()


def _save(run: Run, log: RunLog, clock: Clock) -> None:
    clock.store(run.state)
    log.sync(run.state)
    path = save_checkpoint(
        run.engine, run.output_dir / "checkpoints", run.state, run.config.save_total_limit, partial(_describe, run)
    )
    tell_saved(log.callbacks, run.state.step, path)
    log.refresh_page()
    clock.restart()


def _describe(run: Run, directory: Path) -> None:
    """Write what tells of a checkpoint's model beside its tensors."""
    describe_model(run.policy, directory)
    describe_adapter(run.policy, directory)
    run.tokenizer.save_pretrained(directory)
