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
    """

    sums: dict[str, float]
    pairs: float
    tokens: float

    def means(self, prefix: str = "") -> dict[str, float]:
        """Means over the pairs under their public names."""
        return {prefix + name: value / self.pairs for name, value in self.sums.items()}


def empty_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of PAIR_METRICS, the number of pairs and the number of tokens, float64."""
    return torch.zeros(len(PAIR_METRICS) + 2, dtype=torch.float64, device=device)


@torch.no_grad()
def pair_sums(
    batch: PairBatch,
    *,
    losses: Tensor,
    aux_losses: Tensor,
    policy_logps: tuple[Tensor, Tensor],
    ref_logps: tuple[Tensor, Tensor],
    beta: float,
) -> Tensor:
    """Sums over the pairs of one micro-batch, in `empty_sums`' layout.

    Args:
        batch: the B pairs.
        losses: [B] weighted preference losses; `aux_losses` [B] router losses.
        policy_logps: chosen and rejected [B] summed log-probabilities; `ref_logps` likewise.
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
    sums = empty_sums(losses.device)
    sums[:-2] = torch.stack([column.double() for column in columns]).sum(dim=1)
    sums[-2], sums[-1] = len(batch), batch.num_tokens
    return sums


def read_totals(sums: Tensor) -> PairTotals:
    """Sums in `empty_sums`' layout as named numbers; waits for the device."""
    *metrics, pairs, tokens = sums.tolist()
    return PairTotals(dict(zip(PAIR_METRICS, metrics, strict=True)), pairs, tokens)
