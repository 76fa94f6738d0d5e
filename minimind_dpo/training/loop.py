"""The training loop: score, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from minimind_dpo.checkpoints.directory import TrainerState, save_checkpoint
from minimind_dpo.config import TrainConfig
from minimind_dpo.data.order import MicroBatch, PairOrder, split_step
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.launcher import accumulate, apply_gradients, backward, can_skip_steps, trained_state, unwrap
from minimind_dpo.errors import StoppedEarly, TrainingError
from minimind_dpo.models.saving import describe_adapter, describe_model
from minimind_dpo.objective.layout import PairLayout
from minimind_dpo.reference.sources import Reference
from minimind_dpo.training.batches import Batches, load_batches
from minimind_dpo.training.evaluation import evaluate, score_batch
from minimind_dpo.training.metrics import MetricsFile, empty_sums, metrics_of, peak_memory_gib, tokens_of
from minimind_dpo.training.schedule import learning_rate_schedule
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What a training run is made of.

    `scorer` and `optimizer` are prepared by the engine; `metrics` is None but on the main process.
    """

    config: TrainConfig
    accelerator: Accelerator
    scorer: torch.nn.Module
    optimizer: Optimizer
    reference: Reference
    layout: PairLayout
    train_data: TokenizedData
    eval_data: TokenizedData | None
    order: PairOrder
    metrics: MetricsFile | None
    state: TrainerState
    stop: StopRequest
    tokenizer: Any

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.output_dir / "checkpoints"

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of optimizer step `step`."""
        pairs = self.order.step_pairs(step)
        return split_step(
            pairs,
            self.train_data.tokens[pairs],
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            micro_batch_size=self.config.per_device_train_batch_size,
        )

    def plan(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches from the next step to the last."""
        for step in range(self.state.step + 1, self.state.total_steps + 1):
            yield from self.micro_batches(step)


def train(run: Run) -> None:
    """Train from `run.state.step` to the last step.

    Raises:
        StoppedEarly: a signal asked for it; a checkpoint is written.
        TrainingError: a loss or gradient is not finite; weights are as after the last good step.
    """
    config, state, accelerator = run.config, run.state, run.accelerator
    schedule = learning_rate_schedule(
        config.lr_scheduler_type, config.learning_rate, state.total_steps, config.warmup_ratio
    )
    batches = load_batches(
        run.train_data.dataset, run.plan(), run.layout, config.dataloader_num_workers, accelerator.device
    )
    run.scorer.train()
    progress = tqdm(
        total=state.total_steps,
        initial=state.step,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    clock = _Clock(state)
    unread: deque[_Outcome] = deque()
    lag = _steps_ahead(accelerator.device)
    stopped = False
    if state.step == 0:
        _evaluate(run)
        clock.restart()
    while state.step < state.total_steps:
        step = state.step + 1
        learning_rate = schedule(step)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        unread.append(_optimizer_step(run, step, batches))
        state.step = step
        last = step == state.total_steps
        logs, evaluates, saves = (
            last or _due(every, step) for every in (config.logging_steps, config.eval_steps, config.save_steps)
        )
        while unread and (len(unread) > lag or stopped or logs or evaluates or saves):
            sums, grad_norm, stops = _read(run, unread.popleft())
            stopped |= stops
            clock.count(sums)
            _show(progress, sums, clock)
        if logs:
            _log(run, sums, grad_norm, learning_rate, clock)
        if evaluates:
            _evaluate(run)
            clock.restart()
        if stopped or (saves and config.save_steps):
            clock.store(state)
            if run.metrics is not None:
                run.metrics.sync()
            save_checkpoint(
                accelerator,
                run.checkpoints,
                state,
                config.save_total_limit,
                trained_state(accelerator, run.scorer, run.optimizer),
                partial(_describe, run),
            )
            clock.restart()
        if stopped and not last:
            progress.close()
            raise StoppedEarly(f"after step {step} of {state.total_steps}")
    clock.store(state)
    progress.close()


def _describe(run: Run, directory: Path) -> None:
    """Write what tells of a checkpoint's model beside its tensors."""
    policy = unwrap(run.scorer).model
    describe_model(policy, directory)
    describe_adapter(policy, directory)
    run.tokenizer.save_pretrained(directory)


def _steps_ahead(device: torch.device) -> int:
    """Steps that are begun before the numbers of an earlier one are read: a GPU always has work while it is asked."""
    return 0 if device.type == "cpu" else 1


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step % (every or 1) == 0


class _Outcome(NamedTuple):
    """What an optimizer step leaves on the device: metric sums and stop requests of all ranks, the gradient norm."""

    step: int
    totals: Tensor
    grad_norm: Tensor


def _optimizer_step(run: Run, step: int, batches: Batches) -> _Outcome:
    """One optimizer step over all its micro-batches.

    The loss is the mean over the step's pairs on all ranks: each rank backpropagates its sum times the number of
    ranks (which average their gradients) over the number of pairs.
    """
    accelerator = run.accelerator
    micro_batches = len(run.micro_batches(step))
    scale = accelerator.num_processes / len(run.order.step_pairs(step))
    sums = empty_sums(accelerator.device)
    for index in range(micro_batches):
        batch, counted = next(batches)
        _seed(run, step, index)
        last = index == micro_batches - 1
        with accumulate(accelerator, run.scorer, last):
            losses, aux_losses, batch_sums = score_batch(
                run.scorer, run.reference, batch.to(accelerator.device), run.config
            )
            backward(accelerator, (losses + aux_losses).sum().float() * (scale * counted), last)
        sums += batch_sums * counted
    own = torch.cat([sums, torch.full_like(sums[:1], float(bool(run.stop)))])
    grad_norm = apply_gradients(accelerator, run.scorer, run.optimizer, run.config.max_grad_norm)
    return _Outcome(step, accelerator.reduce(own, "sum"), grad_norm)


def _read(run: Run, outcome: _Outcome) -> tuple[list[float], float, bool]:
    """The metric sums of a step, its gradient norm, and whether any rank was asked to stop; waits for the device.

    Raises:
        TrainingError: the loss or the gradient norm is not finite.
    """
    *totals, stops = outcome.totals.tolist()
    grad_norm = float(outcome.grad_norm)
    _check_finite(run, outcome.step, "loss", totals)
    if not can_skip_steps(run.accelerator):
        _check_finite(run, outcome.step, "gradient norm", [grad_norm])
    return totals, grad_norm, stops > 0


def _seed(run: Run, step: int, index: int) -> None:
    """Draw a micro-batch's dropout from (seed, step, its index, rank): a resumed run draws what it would have drawn."""
    torch.manual_seed(hash((run.config.seed, step, index, run.accelerator.process_index)))


def _check_finite(run: Run, step: int, what: str, values: list[float]) -> None:
    if all(math.isfinite(value) for value in values):
        return
    places = [run.train_data.dataset[int(pair)]["place"] for pair in run.order.step_pairs(step)[:8]]
    raise TrainingError(
        f"the {what} of optimizer step {step} is not finite; the run ends before that step. Pairs of the step: "
        f"{', '.join(places)}. Try a lower learning_rate, or bf16 instead of fp16."
    )


def _evaluate(run: Run) -> None:
    if run.eval_data is None:
        return
    metrics = evaluate(run.accelerator, run.scorer, run.reference, run.eval_data, run.layout, run.config)
    _record(run, metrics)


def _log(run: Run, sums: list[float], grad_norm: float, learning_rate: float, clock: _Clock) -> None:
    pairs_per_second, tokens_per_second = clock.rates()
    line = metrics_of(sums) | {
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "pairs_per_second": pairs_per_second,
        "tokens_per_second": tokens_per_second,
        "peak_memory_gib": peak_memory_gib(run.accelerator),
    }
    _record(run, line)
    clock.restart()


def _record(run: Run, values: dict[str, float]) -> None:
    step = run.state.step
    place = {"step": step, "epoch": step / run.order.steps_per_epoch, "pairs_seen": run.order.pairs_seen(step)}
    if run.metrics is not None:
        run.metrics.append(place | values)
    run.accelerator.log(values | {"epoch": place["epoch"], "pairs_seen": place["pairs_seen"]}, step=step)


def _show(progress: Any, sums: list[float], clock: _Clock) -> None:
    metrics = metrics_of(sums)
    progress.update()
    progress.set_postfix_str(
        f"loss {metrics['loss']:.4f} acc {metrics['rewards/accuracies']:.2f} "
        f"margin {metrics['rewards/margins']:.3f} {clock.rates()[0]:.1f} pairs/s",
        refresh=False,
    )


class _Clock:
    """Wall time of the run over all its sessions, and rates since the last `restart`."""

    def __init__(self, state: TrainerState):
        self._begin = time.perf_counter() - state.seconds
        self.restart()

    def restart(self) -> None:
        self._since, self._pairs, self._tokens = time.perf_counter(), 0.0, 0.0

    def count(self, sums: list[float]) -> None:
        self._pairs += sums[-2]
        self._tokens += tokens_of(sums)

    def rates(self) -> tuple[float, float]:
        """Pairs and tokens a second, over all ranks."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        return self._pairs / elapsed, self._tokens / elapsed

    def store(self, state: TrainerState) -> None:
        state.seconds = time.perf_counter() - self._begin
