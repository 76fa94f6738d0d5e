"""DPO's losses and rewards: pure functions on [B] tensors of log-probabilities, in nats.

Notation of Rafailov et al. 2023 (arXiv:2305.18290): pi is the policy, ref the frozen reference, y_w the chosen
and y_l the rejected answer. Every loss takes the four log-probabilities and returns one loss per pair, [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_dpo.config.settings import LOSS_TYPES, SMOOTHED_LOSS_TYPES


def preference_logits(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    """log(pi(y_w)/pi(y_l)) - log(ref(y_w)/ref(y_l)), [B]: the argument of beta in equation 7 of the paper."""
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = ref_chosen_logps - ref_rejected_logps
    return pi_logratios - ref_logratios


def sigmoid_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta logits), equation 7 of DPO; smoothed as in cDPO (Mitchell 2023) when labels may be flipped.

    With label smoothing e: -(1 - e) log sigmoid(beta logits) - e log sigmoid(-beta logits).
    """
    logits = preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = -F.logsigmoid(beta * logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-beta * logits)
    return losses


def robust_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The unbiased loss under flipped labels, equation 14 of Robust DPO (arXiv:2403.00409).

    ((1 - e) * -log sigmoid(beta logits) + e * log sigmoid(-beta logits)) / (1 - 2 e).
    """
    logits = preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    kept = -(1 - label_smoothing) * F.logsigmoid(beta * logits)
    flipped = -label_smoothing * F.logsigmoid(-beta * logits)
    return (kept - flipped) / (1 - 2 * label_smoothing)


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """max(0, 1 - beta logits): SLiC's ranking loss (arXiv:2305.10425) as in RSO (arXiv:2309.06657, equation 11)."""
    logits = preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return torch.relu(1 - beta * logits)


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(logits - 1 / (2 beta))^2, equation 17 of IPO (arXiv:2310.12036); beta is the paper's tau.

    The log-probabilities are means over completion tokens, the form TRL settled on with IPO's authors: with sums
    the target margin would depend on the answers' lengths.
    """
    logits = preference_logits(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (logits - 1 / (2 * beta)) ** 2


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and what it wants to be fed.

    Attributes:
        function: four log-probabilities [B] each, beta, label_smoothing -> losses [B].
        length_normalised: log-probabilities are divided by each side's number of completion tokens first.
    """

    function: Callable[..., Tensor]
    length_normalised: bool = False


LOSSES = {
    "sigmoid": Loss(sigmoid_loss),
    "sigmoid_norm": Loss(sigmoid_loss, length_normalised=True),  # MiniMind's
    "robust": Loss(robust_loss),
    "hinge": Loss(hinge_loss),
    "ipo": Loss(ipo_loss, length_normalised=True),
}


def register_loss(name: str, loss: Loss, smoothed: bool = False) -> None:
    """Make a loss from outside of the package a choice of `loss_type`, before a configuration is read.

    Args:
        name: that `loss_type` will give.
        loss: its function, and what it wants to be fed.
        smoothed: `label_smoothing` means something to it.

    Raises:
        ValueError: there is a loss of that name.
    """
    if name in LOSSES:
        raise ValueError(f"there is a loss called {name!r}")
    LOSSES[name] = loss
    LOSS_TYPES.append(name)
    if smoothed:
        SMOOTHED_LOSS_TYPES.append(name)


class LossSettings(NamedTuple):
    """A run's loss; the fields are the keyword arguments of `dpo_losses`.

    Attributes:
        loss_type: a key of `LOSSES`.
        beta: strength of the pull towards the reference.
        label_smoothing: assumed share of flipped preferences.
    """

    loss_type: str
    beta: float
    label_smoothing: float = 0.0


def dpo_losses(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, [B].

    Args:
        policy_chosen_logps: [B] log-probabilities summed over completion tokens; the other three likewise.
        chosen_tokens: [B] completion tokens of the chosen side; `rejected_tokens` likewise.
        loss_type: a key of `LOSSES`.
    """
    loss = LOSSES[loss_type]
    if loss.length_normalised:
        policy_chosen_logps, ref_chosen_logps = policy_chosen_logps / chosen_tokens, ref_chosen_logps / chosen_tokens
        policy_rejected_logps = policy_rejected_logps / rejected_tokens
        ref_rejected_logps = ref_rejected_logps / rejected_tokens
    return loss.function(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def implicit_rewards(policy_logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """beta log(pi(y)/ref(y)), [B], of summed log-probabilities: section 5 of the DPO paper, whatever the loss."""
    return beta * (policy_logps - ref_logps).detach()
