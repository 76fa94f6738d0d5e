"""One forward pass of the DPO objective, the same for training and evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.objective.losses import LossSettings, dpo_losses
from minimind_dpo.objective.scoring import PairScores
from minimind_dpo.objective.sums import pair_sums, sum_per_side


class BatchScores(NamedTuple):
    """What one forward pass over B pairs gives.

    Attributes:
        losses: [B] preference losses times the pairs' weights.
        aux_losses: [B] router losses.
        sums: of the pairs' metrics, in the layout of `objective/sums.py`; no gradient.
    """

    losses: Tensor
    aux_losses: Tensor
    sums: Tensor


def score_batch(
    scorer: nn.Module, batch: PairBatch, ref_per_token_logps: Tensor, loss: LossSettings, end_token_ids: Tensor
) -> BatchScores:
    """Score a batch with the policy and compare it with the reference.

    Args:
        scorer: of the policy, as the engine prepared it.
        batch: B pairs with M counted tokens.
        ref_per_token_logps: [M] the reference's log-probabilities (nats) of the same tokens. It scores before the
            policy, so that its activations are gone by then.
        loss: of the run.
        end_token_ids: of the tokens that end an answer, on the batch's device.
    """
    ref_logps = sum_per_side(ref_per_token_logps, batch)
    scores: PairScores = scorer(batch)
    policy_logps = sum_per_side(scores.per_token_logps, batch)
    losses = batch.weights * dpo_losses(
        *policy_logps,
        *ref_logps,
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        **loss._asdict(),
    )
    sums = pair_sums(
        batch,
        losses=losses,
        aux_losses=scores.aux_losses,
        policy_logps=policy_logps,
        ref_logps=ref_logps,
        per_token_logratios=scores.per_token_logps.detach() - ref_per_token_logps,
        end_token_ids=end_token_ids,
        beta=loss.beta,
    )
    return BatchScores(losses, scores.aux_losses, sums)
