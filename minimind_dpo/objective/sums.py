"""From per-token log-probabilities to sums: over a side's tokens, and over pairs for metrics.

Metrics are sums over pairs first and means once, over all micro-batches and ranks; means of means would weigh the pairs
of a smaller micro-batch more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.objective.losses import implicit_rewards

PAIR_METRICS = (
    "loss",
    "dpo_loss",
    "aux_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)

# What tells of a run's health beside its metrics, summed over pairs too: moments of the length difference d (counted
# tokens of the chosen side less those of the rejected one) and of the margin m, the distance from the reference in
# nats a token, and the log-ratio of the tokens that end an answer, on the chosen side.
HEALTH_SUMS = ("d", "d d", "m m", "d m", "distance", "end logratio", "end tokens")


def sum_per_side(per_token_logps: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Sum [M] per-token log-probabilities over each side's completion tokens: chosen [B] and rejected [B], nats.

    In float64: a sum of some hundred nats has steps of 1e-5 in float32, and losses are made of differences of them.
    """
    sums = torch.stack([side.sum(dtype=torch.float64) for side in per_token_logps.split(batch.side_sizes)]).view(-1, 2)
    return sums[:, 0], sums[:, 1]


class PairTotals(NamedTuple):
    """What pairs add up to, read back from a device.

    Attributes:
        sums: over the pairs, of each of `PAIR_METRICS`.
        pairs: how many they are.
        tokens: real input tokens of theirs.
        health: sums of each of `HEALTH_SUMS`.
    """

    sums: dict[str, float]
    pairs: float
    tokens: float
    health: dict[str, float]

    def means(self, prefix: str = "") -> dict[str, float]:
        """Means over the pairs under their public names."""
        return {prefix + name: value / self.pairs for name, value in self.sums.items()}


def empty_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of PAIR_METRICS, then pairs, tokens and HEALTH_SUMS, float64."""
    return torch.zeros(len(PAIR_METRICS) + 2 + len(HEALTH_SUMS), dtype=torch.float64, device=device)


@torch.no_grad()
def pair_sums(
    batch: PairBatch,
    *,
    losses: Tensor,
    aux_losses: Tensor,
    policy_logps: tuple[Tensor, Tensor],
    ref_logps: tuple[Tensor, Tensor],
    per_token_logratios: Tensor,
    end_token_ids: Tensor,
    beta: float,
) -> Tensor:
    """Sums over the pairs of one micro-batch, in `empty_sums`' layout.

    Args:
        batch: the B pairs.
        losses: [B] weighted preference losses; `aux_losses` [B] router losses.
        policy_logps: chosen and rejected [B] summed log-probabilities; `ref_logps` likewise.
        per_token_logratios: [M] the policy's log-probabilities less the reference's.
        end_token_ids: of the tokens that end an answer.
        beta: scale of the rewards.

    Rewards are beta times the summed log-ratio, logps are sums over completion tokens. A tie is no accuracy.
    `logps/accuracies` compares the policy's own mean log-probability a token of the two answers.
    """
    (chosen_logps, rejected_logps), (ref_chosen_logps, ref_rejected_logps) = policy_logps, ref_logps
    chosen_rewards = implicit_rewards(chosen_logps, ref_chosen_logps, beta=beta)
    rejected_rewards = implicit_rewards(rejected_logps, ref_rejected_logps, beta=beta)
    likelier = chosen_logps / batch.chosen_tokens > rejected_logps / batch.rejected_tokens
    columns = [
        losses + aux_losses,
        losses,
        aux_losses,
        chosen_rewards,
        rejected_rewards,
        chosen_rewards - rejected_rewards,
        chosen_rewards > rejected_rewards,
        chosen_rewards == rejected_rewards,
        chosen_logps,
        rejected_logps,
        likelier,
    ]
    sums, metrics = empty_sums(losses.device), len(PAIR_METRICS)
    sums[:metrics] = torch.stack([column.double() for column in columns]).sum(dim=1)
    sums[metrics], sums[metrics + 1] = len(batch), batch.num_tokens
    sums[metrics + 2 :] = _health_sums(batch, chosen_rewards - rejected_rewards, per_token_logratios, end_token_ids)
    return sums


def _health_sums(batch: PairBatch, margins: Tensor, per_token_logratios: Tensor, end_token_ids: Tensor) -> Tensor:
    longer = (batch.chosen_tokens - batch.rejected_tokens).double()
    distances = sum_per_side(per_token_logratios.abs(), batch)
    tokens = batch.chosen_tokens + batch.rejected_tokens
    ends = torch.isin(batch.target_ids[batch.token_index], end_token_ids)
    columns = [
        longer,
        longer.square(),
        margins.double().square(),
        longer * margins.double(),
        (distances[0] + distances[1]) / tokens,
        sum_per_side(per_token_logratios * ends, batch)[0],
        sum_per_side(ends, batch)[0],
    ]
    return torch.stack(columns).sum(dim=1)


def read_totals(sums: Tensor) -> PairTotals:
    """Sums in `empty_sums`' layout as named numbers; waits for the device."""
    values = sums.tolist()
    metrics, (pairs, tokens), health = (
        values[: len(PAIR_METRICS)],
        values[len(PAIR_METRICS) : -len(HEALTH_SUMS)],
        values[-len(HEALTH_SUMS) :],
    )
    return PairTotals(
        dict(zip(PAIR_METRICS, metrics, strict=True)), pairs, tokens, dict(zip(HEALTH_SUMS, health, strict=True))
    )
