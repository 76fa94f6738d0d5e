"""One forward pass of the DPO objective, the same for training and evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine.devices import summable
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses
from minimind_dpo.objective.scoring import PairScores
from minimind_dpo.objective.sums import discounts, loss_sums, pair_sums, sum_per_side


class ScoredPairs(NamedTuple):
    """What one forward pass over B pairs gives, before a loss is made of it.

    Attributes:
        logps: what losses know of the pairs.
        aux_losses: [B] router losses.
        sums: of the pairs' metrics but losses, in the layout of `objective/sums.py`; no gradient.
        per_token_logratios: [M] the policy's log-probabilities less the reference's; no gradient.
    """

    logps: PairLogps
    aux_losses: Tensor
    sums: Tensor
    per_token_logratios: Tensor


class BatchScores(NamedTuple):
    """What one forward pass over B pairs gives where each pair has a loss of its own.

    Attributes:
        losses: [B] preference losses times the pairs' weights.
        aux_losses: [B] router losses.
        sums: of the pairs' metrics, in the layout of `objective/sums.py`; no gradient.
        per_token_logratios: [M] the policy's log-probabilities less the reference's; no gradient.
    """

    losses: Tensor
    aux_losses: Tensor
    sums: Tensor
    per_token_logratios: Tensor


def score_pairs(
    scorer: nn.Module, batch: PairBatch, ref_per_token_logps: Tensor, preference: Preference, end_token_ids: Tensor
) -> ScoredPairs:
    """Score a batch with the policy beside the reference.

    Args:
        scorer: of the policy, as the engine prepared it.
        batch: B pairs with M counted tokens.
        ref_per_token_logps: [M] the reference's log-probabilities (nats) of the same tokens. It scores before the
            policy, so that its activations are gone by then.
        preference: of the run.
        end_token_ids: of the tokens that end an answer, on the batch's device.
    """
    ref_logps = sum_per_side(ref_per_token_logps, batch)
    scores: PairScores = scorer(batch)
    policy_logps = sum_per_side(scores.per_token_logps, batch)
    per_token_logratios = scores.per_token_logps.detach() - ref_per_token_logps
    sums = pair_sums(
        batch,
        policy_logps=policy_logps,
        ref_logps=ref_logps,
        per_token_logratios=per_token_logratios,
        end_token_ids=end_token_ids,
        beta=preference.beta,
        parts=preference.parts,
    )
    chosen_nll = -policy_logps[0]
    if preference.ld_alpha != 1.0:
        by_length = discounts(batch, preference.ld_alpha)
        policy_logps = sum_per_side(scores.per_token_logps * by_length, batch)
        ref_logps = sum_per_side(ref_per_token_logps * by_length, batch)
    weights = summable(batch.weights)
    if preference.weighs_by_policy:
        weights = weights * _policy_weights(scores, batch)
    tokens = batch.chosen_tokens, batch.rejected_tokens
    logps = PairLogps(*policy_logps, *ref_logps, chosen_nll, *tokens, batch.margins, weights)
    return ScoredPairs(logps, scores.aux_losses, sums, per_token_logratios)


def score_batch(
    scorer: nn.Module, batch: PairBatch, ref_per_token_logps: Tensor, preference: Preference, end_token_ids: Tensor
) -> BatchScores:
    """As `score_pairs`, with the losses of a preference that takes each pair on its own."""
    scored = score_pairs(scorer, batch, ref_per_token_logps, preference, end_token_ids)
    losses = dpo_losses(scored.logps, preference)
    sums = scored.sums + loss_sums(losses, scored.aux_losses)
    return BatchScores(losses.total, scored.aux_losses, sums, scored.per_token_logratios)


def _policy_weights(scores: PairScores, batch: PairBatch) -> Tensor:
    """[B] w(y_w) w(y_l), w(y) = exp of the mean over tokens of log p(y_t) - log sum_v p(v)^2, without gradient.

    How likely the policy itself would say the pair: WPO (Zhou et al. 2024, arXiv:2406.11827, equation 2).
    """
    chosen, rejected = sum_per_side(scores.per_token_logps.detach() - scores.log_squares, batch)
    return (chosen / batch.chosen_tokens + rejected / batch.rejected_tokens).exp()
