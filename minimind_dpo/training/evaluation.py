"""Metrics of the policy on held-out pairs: exact means over all pairs and ranks, no pair counted twice."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minimind_dpo.data.order import PairOrder, plan_steps
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.ranks import stop_together
from minimind_dpo.objective.step import BatchScores, ScoredPairs, score_batch, score_pairs
from minimind_dpo.objective.sums import PairTotals, empty_sums, loss_sums, read_totals
from minimind_dpo.objective.table import PairTable
from minimind_dpo.training.batches import load_steps
from minimind_dpo.training.run import Run
from minimind_dpo.training.spread import PairRewards

_ASKED_EVERY = 8  # global batches; asking waits for the device


def evaluate(run: Run, rewards: Mapping[str, PairRewards] | None = None) -> dict[str, float]:
    """Score every held-out pair once; the metrics of each set under `eval_NAME_`, of a single one `eval_`. Collective.

    `rewards` of each set, by its name, take in its pairs one by one.

    Raises:
        StoppedEarly: a signal to any rank asked for it.
    """
    values: dict[str, float] = {}
    for name, data in run.eval_sets.items():
        kept = None if rewards is None else rewards[name]
        values |= _evaluate_set(run, data, kept).means(f"eval_{name}_" if name else "eval_")
    return values


@torch.no_grad()
def _evaluate_set(run: Run, data: TokenizedData, rewards: PairRewards | None) -> PairTotals:
    """Score every pair of `data` once. Collective.

    Raises:
        StoppedEarly: a signal to any rank asked for it.
    """
    engine, size = run.engine, run.config.per_device_train_batch_size
    order = PairOrder(len(data), size * engine.world_size, seed=0, shuffle=False)
    plans = plan_steps(
        order,
        range(1, order.steps_per_epoch + 1),
        data.tokens,
        world_size=engine.world_size,
        rank=engine.rank,
        micro_batch_size=size,
        max_tokens=run.config.max_tokens_per_micro_batch,
    )
    was_training = run.scorer.training
    run.scorer.eval()
    preference, table = run.preference, PairTable(len(data) if run.preference.over_step else 0, engine.device)
    sums = empty_sums(engine.device, preference.parts)
    collate = run.reference.collating(run.layout)
    for plan, batches in load_steps(data.dataset, plans, collate, run.config.dataloader_num_workers, engine.device):
        if plan.step % _ASKED_EVERY == 0:
            stop_together(engine, run.stop.signalled, "in an evaluation")
        for micro_batch, host_batch in zip(plan.micro_batches, batches, strict=True):
            batch = host_batch.to(engine.device)
            ref_per_token_logps = run.reference.per_token_logps(batch)
            scored: BatchScores | ScoredPairs
            if not preference.over_step:
                scored = score_batch(run.scorer, batch, ref_per_token_logps, preference, run.end_token_ids)
            else:
                scored = score_pairs(run.scorer, batch, ref_per_token_logps, preference, run.end_token_ids)
                if micro_batch.counted:
                    table.put(micro_batch.pairs, scored.logps)
            sums += scored.sums * micro_batch.counted
            if micro_batch.counted and rewards is not None:
                rewards.put(micro_batch.pairs, batch, scored.per_token_logratios)
    if preference.over_step:  # the held-out pairs are one step then, whatever the number of ranks
        losses = table.derive(engine.sum, preference, run.state.running_logits)[0].own()
        sums += loss_sums(losses, torch.zeros_like(losses.total))
    run.scorer.train(was_training)
    return read_totals(engine.sum(sums), preference.parts)
