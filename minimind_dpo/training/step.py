"""One optimizer step: forward and backward over its micro-batches, whatever the loss looks at."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.errors import TrainingError
from minimind_dpo.objective.layout import ran_out_of_memory
from minimind_dpo.objective.step import ScoredPairs, score_batch, score_pairs
from minimind_dpo.objective.sums import empty_sums, loss_sums
from minimind_dpo.objective.table import PairTable
from minimind_dpo.training.batches import LoadedStep
from minimind_dpo.training.numbers import StepResult
from minimind_dpo.training.run import Run


def optimizer_step(run: Run, loaded: LoadedStep, learning_rate: float) -> StepResult:
    """One optimizer step over all its micro-batches.

    The loss is the mean over the step's pairs on all ranks: each rank backpropagates its sum times the number of
    ranks (which average their gradients) over the number of pairs.
    """
    engine, plan = run.engine, loaded.plan
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    try:
        sums = (_go_back_together if run.preference.over_step else _go_back_apart)(run, loaded)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise TrainingError(_memory_advice(run, loaded)) from error
        raise
    stop_requests = torch.full((), float(bool(run.stop)), device=engine.device)
    grad_norm = engine.step(run.config.max_grad_norm)
    if run.following is not None:
        run.following.after_step(plan.step)
    return StepResult(plan.step, learning_rate, engine.sum(sums), engine.sum(stop_requests), grad_norm)


def _go_back_apart(run: Run, loaded: LoadedStep) -> Tensor:
    """The gradient of a loss that takes each pair on its own, micro-batch by micro-batch; the pairs' sums."""
    engine, plan = run.engine, loaded.plan
    sums = empty_sums(engine.device, run.preference.parts)
    for index, (micro_batch, host_batch) in enumerate(zip(plan.micro_batches, loaded.batches, strict=True)):
        _seed(run, plan.step, index)
        last = index == len(plan.micro_batches) - 1
        with engine.accumulate(last):
            batch = host_batch.to(engine.device)
            ref_per_token_logps = run.reference.per_token_logps(batch)
            scores = score_batch(run.scorer, batch, ref_per_token_logps, run.preference, run.end_token_ids)
            loss = (scores.losses + scores.aux_losses).sum().float() * (_scale(run, loaded) * micro_batch.counted)
            engine.backward(loss, last)
        sums += scores.sums * micro_batch.counted
    return sums


def _go_back_together(run: Run, loaded: LoadedStep) -> Tensor:
    """The gradient of a loss over all pairs of the step; the pairs' sums.

    Log-probabilities come first, then the slopes of the step's loss in them. A single micro-batch a rank keeps its
    graph for the way back; several are scored twice, so that no more than one graph is in memory.
    """
    engine, plan, preference = run.engine, loaded.plan, run.preference
    once = len(plan.micro_batches) == 1
    table, sums = PairTable(plan.num_pairs, engine.device), empty_sums(engine.device, preference.parts)
    batches = [host_batch.to(engine.device) for host_batch in loaded.batches]
    references = [run.reference.per_token_logps(batch) for batch in batches]
    for index, micro_batch in enumerate(plan.micro_batches):
        with engine.accumulate(True) if once else torch.no_grad():
            scored = _score(run, plan.step, index, batches[index], references[index])
        if micro_batch.counted:
            table.put(micro_batch.places, scored.logps)
    found, running = table.derive(engine.sum, preference, run.state.running_logits)
    for index, micro_batch in enumerate(plan.micro_batches):
        last = index == len(plan.micro_batches) - 1
        with nullcontext() if once else engine.accumulate(last):
            if not once:
                scored = _score(run, plan.step, index, batches[index], references[index])
            leaning = found.leaning(micro_batch.places, scored.logps) + scored.aux_losses.sum()
            engine.backward(leaning.float() * (_scale(run, loaded) * micro_batch.counted), last)
        losses = loss_sums(found.at(micro_batch.places), scored.aux_losses.detach())
        sums += (scored.sums + losses) * micro_batch.counted
    if preference.remembers and math.isfinite(mean := float(running)):  # waits, so it comes last
        run.state.running_logits = mean
    return sums


def _memory_advice(run: Run, loaded: LoadedStep) -> str:
    """What a step that ran out of memory needed, and what to set."""
    members = [run.train_data.tokens[micro_batch.pairs] for micro_batch in loaded.plan.micro_batches]
    largest = max(members, key=lambda tokens: int(tokens.sum()))
    advice = (
        f"set max_tokens_per_micro_batch to {largest.sum() // 2} or less" if len(largest) > 1 else "lower max_length"
    )
    return (
        f"out of memory in optimizer step {loaded.plan.step}, whose largest micro-batch here is {len(largest)} pair(s) "
        f"of {largest.sum()} tokens: {advice}, or gradient_checkpointing: true. The step's mean stays what it is; "
        "minimind-dpo plan says what fits"
    )


def _score(run: Run, step: int, index: int, batch: PairBatch, ref_per_token_logps: Tensor) -> ScoredPairs:
    _seed(run, step, index)
    return score_pairs(run.scorer, batch, ref_per_token_logps, run.preference, run.end_token_ids)


def _scale(run: Run, loaded: LoadedStep) -> float:
    return run.engine.world_size / loaded.plan.num_pairs


def _seed(run: Run, step: int, index: int) -> None:
    """Draw a micro-batch's dropout from (seed, step, its index, rank): a resumed run draws what it would have drawn."""
    torch.manual_seed(hash((run.config.seed, step, index, run.engine.rank)))
