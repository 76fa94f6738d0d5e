"""The training loop: score, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minimind_dpo.checkpoints.directory import save_checkpoint
from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.errors import StoppedEarly, TrainingError
from minimind_dpo.models.saving import describe_adapter, describe_model
from minimind_dpo.objective.step import score_batch
from minimind_dpo.objective.sums import PairTotals, empty_sums, read_totals
from minimind_dpo.training.batches import LoadedStep, load_steps
from minimind_dpo.training.evaluation import evaluate
from minimind_dpo.training.metrics import peak_memory_gib
from minimind_dpo.training.run import Run
from minimind_dpo.training.run_directory import RunLog
from minimind_dpo.training.schedule import learning_rate_schedule
from minimind_dpo.training.visibility import UpdateWatch

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What an optimizer step leaves on the device.

    Attributes:
        step: its number.
        learning_rate: that it used.
        sums: of its pairs' metrics on all ranks, in the layout of `objective/sums.py`.
        stop_requests: ranks that were asked to stop, a scalar.
        grad_norm: before clipping, a scalar.
    """

    step: int
    learning_rate: float
    sums: Tensor
    stop_requests: Tensor
    grad_norm: Tensor


class StepNumbers(NamedTuple):
    """A step's result read back: totals of its pairs, its gradient norm, whether any rank was asked to stop."""

    totals: PairTotals
    grad_norm: float
    stops: bool


def train(run: Run, log: RunLog) -> None:
    """Train from `run.state.step` to the last step.

    Raises:
        StoppedEarly: a signal asked for it; a checkpoint is written.
        TrainingError: a loss or gradient is not finite; weights are as after the last good step.
    """
    config, state = run.config, run.state
    steps = load_steps(
        run.train_data.dataset, run.plans(), run.layout, config.dataloader_num_workers, run.engine.device
    )
    schedule = learning_rate_schedule(
        config.lr_scheduler_type, config.learning_rate, state.total_steps, config.warmup_ratio
    )
    run.scorer.train()
    clock, watch = _Clock(state), UpdateWatch(run)
    progress = _progress_bar(run)
    unread: deque[StepResult] = deque()
    stopped = False
    if state.step == 0:
        _evaluate(run, log, clock)
    for step in steps:
        unread.append(optimizer_step(run, step, schedule(step.plan.step)))
        state.step = step.plan.step
        last = state.step == state.total_steps
        logs, evaluates, saves = (
            last or _is_due(every, state.step) for every in (config.logging_steps, config.eval_steps, config.save_steps)
        )
        while unread and (len(unread) > _steps_ahead(run) or stopped or logs or evaluates or saves):
            result = unread.popleft()
            numbers = _read(run, result)
            stopped |= numbers.stops
            clock.count(numbers.totals)
            _show(progress, numbers.totals, clock)
        if logs:
            _log_step(run, log, numbers, result.learning_rate, clock)
            watch.look()
        if evaluates:
            _evaluate(run, log, clock)
        if stopped or (saves and config.save_steps):
            _save(run, log, clock)
        if stopped and not last:
            progress.close()
            raise StoppedEarly(f"after step {state.step} of {state.total_steps}")
    clock.store(state)
    progress.close()


def optimizer_step(run: Run, loaded: LoadedStep, learning_rate: float) -> StepResult:
    """One optimizer step over all its micro-batches.

    The loss is the mean over the step's pairs on all ranks: each rank backpropagates its sum times the number of
    ranks (which average their gradients) over the number of pairs.
    """
    engine, plan = run.engine, loaded.plan
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    scale = engine.world_size / plan.num_pairs
    sums = empty_sums(engine.device)
    for index, (micro_batch, host_batch) in enumerate(zip(plan.micro_batches, loaded.batches, strict=True)):
        _seed(run, plan.step, index)
        last = index == len(plan.micro_batches) - 1
        with engine.accumulate(last):
            batch = host_batch.to(engine.device)
            scores = score_batch(run.scorer, batch, run.reference.per_token_logps(batch), run.loss)
            loss = (scores.losses + scores.aux_losses).sum().float() * (scale * micro_batch.counted)
            engine.backward(loss, last)
        sums += scores.sums * micro_batch.counted
    stop_requests = torch.tensor(float(bool(run.stop)), device=engine.device)
    grad_norm = engine.step(run.config.max_grad_norm)
    return StepResult(plan.step, learning_rate, engine.sum(sums), engine.sum(stop_requests), grad_norm)


def _seed(run: Run, step: int, index: int) -> None:
    """Draw a micro-batch's dropout from (seed, step, its index, rank): a resumed run draws what it would have drawn."""
    torch.manual_seed(hash((run.config.seed, step, index, run.engine.rank)))


def _steps_ahead(run: Run) -> int:
    """Steps that are begun before the numbers of an earlier one are read: a GPU always has work while it is asked."""
    return 0 if run.engine.device.type == "cpu" else 1


def _is_due(every: int | None, step: int) -> bool:
    return bool(every) and step % (every or 1) == 0


def _read(run: Run, result: StepResult) -> StepNumbers:
    """Wait for the device and read a step's result.

    Raises:
        TrainingError: the loss or the gradient norm is not finite.
    """
    totals, grad_norm = read_totals(result.sums), float(result.grad_norm)
    _check_finite(run, result.step, "loss", list(totals.sums.values()))
    if not run.engine.skips_overflows:
        _check_finite(run, result.step, "gradient norm", [grad_norm])
    return StepNumbers(totals, grad_norm, stops=float(result.stop_requests) > 0)


def _check_finite(run: Run, step: int, what: str, values: list[float]) -> None:
    if all(math.isfinite(value) for value in values):
        return
    places = [run.train_data.dataset[int(pair)]["place"] for pair in run.order.step_pairs(step)[:8]]
    raise TrainingError(
        f"the {what} of optimizer step {step} is not finite; the run ends before that step. Pairs of the step: "
        f"{', '.join(places)}. Try a lower learning_rate, or bf16 instead of fp16."
    )


def _evaluate(run: Run, log: RunLog, clock: _Clock) -> None:
    if run.eval_data is not None:
        log.record(run, evaluate(run, run.eval_data))
    clock.restart()


def _log_step(run: Run, log: RunLog, numbers: StepNumbers, learning_rate: float, clock: _Clock) -> None:
    pairs_per_second, tokens_per_second = clock.rates()
    values = numbers.totals.means() | {
        "learning_rate": learning_rate,
        "grad_norm": numbers.grad_norm,
        "pairs_per_second": pairs_per_second,
        "tokens_per_second": tokens_per_second,
        "peak_memory_gib": peak_memory_gib(run.engine),
    }
    log.record(run, values)
    clock.restart()


def _save(run: Run, log: RunLog, clock: _Clock) -> None:
    clock.store(run.state)
    log.sync(run.state)
    save_checkpoint(
        run.engine, run.output_dir / "checkpoints", run.state, run.config.save_total_limit, partial(_describe, run)
    )
    clock.restart()


def _describe(run: Run, directory: Path) -> None:
    """Write what tells of a checkpoint's model beside its tensors."""
    describe_model(run.policy, directory)
    describe_adapter(run.policy, directory)
    run.tokenizer.save_pretrained(directory)


def _progress_bar(run: Run) -> Any:
    return tqdm(
        total=run.state.total_steps,
        initial=run.state.step,
        unit="step",
        dynamic_ncols=True,
        disable=not run.engine.is_main,
    )


def _show(progress: Any, totals: PairTotals, clock: _Clock) -> None:
    means = totals.means()
    progress.update()
    progress.set_postfix_str(
        f"loss {means['loss']:.4f} acc {means['rewards/accuracies']:.2f} "
        f"margin {means['rewards/margins']:.3f} {clock.rates()[0]:.1f} pairs/s",
        refresh=False,
    )


class _Clock:
    """Wall time of the run over all its sessions, and rates since the last `restart`."""

    def __init__(self, state: TrainerState):
        self._begin = time.perf_counter() - state.seconds
        self.restart()

    def restart(self) -> None:
        self._since, self._pairs, self._tokens = time.perf_counter(), 0.0, 0.0

    def count(self, totals: PairTotals) -> None:
        self._pairs += totals.pairs
        self._tokens += totals.tokens

    def rates(self) -> tuple[float, float]:
        """Pairs and tokens a second, over all ranks."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        return self._pairs / elapsed, self._tokens / elapsed

    def store(self, state: TrainerState) -> None:
        state.seconds = time.perf_counter() - self._begin
