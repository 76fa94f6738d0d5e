"""Metrics of the policy on held-out pairs: exact means over all pairs and ranks, no pair counted twice."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minimind_dpo.config import TrainConfig
from minimind_dpo.data.batch import PairBatch
from minimind_dpo.data.order import PairOrder, split_step
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.objective.layout import PairLayout
from minimind_dpo.objective.losses import dpo_losses
from minimind_dpo.objective.scoring import sum_per_side
from minimind_dpo.reference.sources import Reference
from minimind_dpo.training.metrics import empty_sums, metrics_of, pair_sums


def score_batch(
    scorer: nn.Module, reference: Reference, batch: PairBatch, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass of the DPO objective, the same for training and evaluation.

    Returns:
        losses [B] weighted preference losses, aux_losses [B] router losses, and the sums of
        `training/metrics.py`.
    """
    ref_logps = sum_per_side(reference.per_token_logps(batch), batch)  # first: its activations are gone by then
    scores = scorer(batch)
    policy_logps = sum_per_side(scores.per_token_logps, batch)
    losses = batch.weights * dpo_losses(
        *policy_logps,
        *ref_logps,
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        loss_type=config.loss_type,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    sums = pair_sums(
        batch,
        losses=losses,
        aux_losses=scores.aux_losses,
        policy_logps=policy_logps,
        ref_logps=ref_logps,
        beta=config.beta,
    )
    return losses, scores.aux_losses, sums


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    scorer: nn.Module,
    reference: Reference,
    data: TokenizedData,
    layout: PairLayout,
    config: TrainConfig,
) -> dict[str, float]:
    """Score every pair of `data` once and return its metrics under `eval_` names; every rank must call it."""
    was_training = scorer.training
    scorer.eval()
    world_size, rank = accelerator.num_processes, accelerator.process_index
    size = config.per_device_train_batch_size
    order = PairOrder(len(data), size * world_size, seed=0, shuffle=False)
    sums = empty_sums(accelerator.device)
    for step in range(1, order.steps_per_epoch + 1):
        pairs = order.step_pairs(step)
        for micro_batch in split_step(
            pairs, data.tokens[pairs], world_size=world_size, rank=rank, micro_batch_size=size
        ):
            batch = layout([data.dataset[pair] for pair in micro_batch.pairs]).to(accelerator.device)
            *_, batch_sums = score_batch(scorer, reference, batch, config)
            sums += batch_sums * micro_batch.counted
    scorer.train(was_training)
    return metrics_of(accelerator.reduce(sums, "sum").tolist(), prefix="eval_")
