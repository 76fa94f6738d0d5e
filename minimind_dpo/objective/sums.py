"""From per-token log-probabilities to sums: over a side's tokens, and over pairs for metrics.

Metrics are sums over pairs first and means once, over all micro-batches and ranks; means of means would weigh the pairs
of a smaller micro-batch more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine import transfer
from minimind_dpo.engine.devices import sum_dtype, summable
from minimind_dpo.models.fast.segments import sum_segments
from minimind_dpo.objective.preference import PairLosses, implicit_rewards

# What is known of each pair beside its loss, and then with it.
PAIR_COLUMNS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)
PAIR_METRICS = ("loss", "dpo_loss", "aux_loss", *PAIR_COLUMNS)

# What tells of a run's health beside its metrics, summed over pairs too: moments of the length difference d (counted
# tokens of the chosen side less those of the rejected one) and of the margin m, the distance from the reference in
# nats a token, and the log-ratio of the tokens that end an answer, on the chosen side.
HEALTH_SUMS = ("d", "d d", "m m", "d m", "distance", "end logratio", "end tokens")


def sum_per_side(per_token_logps: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Sum [M] per-token log-probabilities over each side's completion tokens: chosen [B] and rejected [B], nats.

    In the type of sums (`engine/devices.py`), as all that is made of them. A GPU adds up all sides at once; on a CPU
    that would be another order, and other bits, than a side at a time.
    """
    if transfer.on_gpu(per_token_logps):
        sums = sum_segments(summable(per_token_logps), batch.side_numbers[0])
    else:
        dtype = sum_dtype(per_token_logps.device)
        sums = torch.stack([side.sum(dtype=dtype) for side in per_token_logps.split(batch.side_sizes)])
    return sums[::2], sums[1::2]


def discounts(batch: PairBatch, ld_alpha: float) -> Tensor:
    """[M] weights of completion tokens: 1 up to the length of the pair's shorter answer, `ld_alpha` beyond it.

    LD-DPO (Liu et al. 2024, arXiv:2409.06411, equation 11), as what it multiplies log-probabilities by.
    """
    sides = zip(batch.side_sizes[::2], batch.side_sizes[1::2], strict=True)
    parts = [
        torch.full((count,), weight, dtype=sum_dtype(batch.weights.device))
        for chosen, rejected in sides
        for size, rival in ((chosen, rejected), (rejected, chosen))
        for count, weight in ((min(size, rival), 1.0), (max(size - rival, 0), ld_alpha))
    ]
    return transfer.send(torch.cat(parts), batch.weights.device)


class PairTotals(NamedTuple):
    """What pairs add up to, read back from a device.

    Attributes:
        sums: over the pairs, of each of `PAIR_METRICS`, and of each part of the loss, `losses/NAME`.
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


def empty_sums(device: torch.device, parts: Sequence[Any] = ()) -> Tensor:
    """Zeros for the sums over pairs of PAIR_METRICS, pairs, tokens, HEALTH_SUMS and the parts of the loss."""
    return torch.zeros(len(PAIR_METRICS) + 2 + len(HEALTH_SUMS) + len(parts), dtype=sum_dtype(device), device=device)


@torch.no_grad()
def loss_sums(losses: PairLosses, aux_losses: Tensor) -> Tensor:
    """Sums of the losses of some pairs in `empty_sums`' layout, and zeros for all else; `aux_losses` [B]."""
    sums = empty_sums(aux_losses.device, losses.parts)
    totals = [losses.total + aux_losses, losses.total, aux_losses]
    sums[: len(totals)] = torch.stack([summable(column) for column in totals]).sum(dim=1)
    for place, part in enumerate(losses.parts, start=len(sums) - len(losses.parts)):
        sums[place] = summable(part).sum()
    return sums


@torch.no_grad()
def pair_columns(
    batch: PairBatch, *, policy_logps: tuple[Tensor, Tensor], ref_logps: tuple[Tensor, Tensor], beta: float
) -> Tensor:
    """[columns, B] each pair's `PAIR_COLUMNS`, in the type of sums.

    Args:
        batch: the B pairs.
        policy_logps: chosen and rejected [B] summed log-probabilities; `ref_logps` likewise.
        beta: scale of the rewards.

    Rewards are beta times the summed log-ratio, logps are sums over completion tokens. A tie is no accuracy.
    `logps/accuracies` compares the policy's own mean log-probability a token of the two answers.
    """
    (chosen_logps, rejected_logps), (ref_chosen_logps, ref_rejected_logps) = policy_logps, ref_logps
    chosen_rewards = implicit_rewards(chosen_logps, ref_chosen_logps, beta=beta)
    rejected_rewards = implicit_rewards(rejected_logps, ref_rejected_logps, beta=beta)
    columns = [
        chosen_rewards,
        rejected_rewards,
        chosen_rewards - rejected_rewards,
        chosen_rewards > rejected_rewards,
        chosen_rewards == rejected_rewards,
        chosen_logps,
        rejected_logps,
        chosen_logps / batch.chosen_tokens > rejected_logps / batch.rejected_tokens,
    ]
    return torch.stack([summable(column) for column in columns])


@torch.no_grad()
def pair_sums(
    batch: PairBatch,
    *,
    policy_logps: tuple[Tensor, Tensor],
    ref_logps: tuple[Tensor, Tensor],
    per_token_logratios: Tensor,
    end_token_ids: Tensor,
    beta: float,
    parts: Sequence[str] = (),
) -> Tensor:
    """Sums over the pairs of one micro-batch, in `empty_sums`' layout, with zeros for losses.

    Args:
        batch: the B pairs.
        policy_logps: chosen and rejected [B] summed log-probabilities; `ref_logps` likewise.
        per_token_logratios: [M] the policy's log-probabilities less the reference's.
        end_token_ids: of the tokens that end an answer.
        beta: scale of the rewards.
        parts: of the loss.
    """
    columns = pair_columns(batch, policy_logps=policy_logps, ref_logps=ref_logps, beta=beta)
    sums, metrics = empty_sums(batch.weights.device, parts), len(PAIR_METRICS)
    sums[metrics - len(columns) : metrics] = columns.sum(dim=1)
    for place, number in ((metrics, len(batch)), (metrics + 1, batch.num_tokens)):
        sums[place].fill_(number)  # an assignment would copy the number to the device, and wait
    margins = columns[PAIR_COLUMNS.index("rewards/margins")]
    health = _health_sums(batch, margins, per_token_logratios, end_token_ids)
    sums[metrics + 2 : metrics + 2 + len(health)] = health
    return sums


def _health_sums(batch: PairBatch, margins: Tensor, per_token_logratios: Tensor, end_token_ids: Tensor) -> Tensor:
    longer, margins = summable(batch.chosen_tokens - batch.rejected_tokens), summable(margins)
    distances = sum_per_side(per_token_logratios.abs(), batch)
    tokens = batch.chosen_tokens + batch.rejected_tokens
    ends = torch.isin(batch.target_ids[batch.token_index], end_token_ids)
    columns = [
        longer,
        longer.square(),
        margins.square(),
        longer * margins,
        (distances[0] + distances[1]) / tokens,
        sum_per_side(per_token_logratios * ends, batch)[0],
        sum_per_side(ends, batch)[0],
    ]
    return torch.stack(columns).sum(dim=1)


def read_totals(sums: Tensor, parts: Sequence[str] = ()) -> PairTotals:
    """Sums in `empty_sums`' layout as named numbers; waits for the device."""
    values = iter(sums.tolist())
    metrics = dict(zip(PAIR_METRICS, values, strict=False))
    pairs, tokens = next(values), next(values)
    health = dict(zip(HEALTH_SUMS, values, strict=False))
    return PairTotals(
        metrics | {f"losses/{part}": value for part, value in zip(parts, values, strict=True)}, pairs, tokens, health
    )
