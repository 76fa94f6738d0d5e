"""Losses that need no reference: none is loaded, scored or cached for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimind_dpo.losses.bounds import NOT_NEGATIVE
from minimind_dpo.losses.registry import Setting, log_sigmoid, logistic_loss, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss(
    "simpo",
    simpo_gamma=Setting(0.5, "target margin of simpo (the paper: 0.3 to 1.6, with beta 2.0 to 2.5)", NOT_NEGATIVE),
)
def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    margins: Tensor,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float,
) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma), a log pi(y) a token: equation 6 of SimPO (arXiv:2405.14734).

    A pair's own margin comes on top of gamma; smoothed as `sigmoid`.
    """
    means = policy_chosen_logps / chosen_tokens - policy_rejected_logps / rejected_tokens
    return logistic_loss(beta * means - simpo_gamma - margins, label_smoothing)


@register_loss("cpo", cpo_alpha=Setting(1.0, "weight of the likelihood of chosen answers in cpo", NOT_NEGATIVE))
def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor,
    chosen_tokens: Tensor,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
) -> Tensor:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) + alpha n: CPO (arXiv:2401.08417, equation 5).

    n is -log pi(y_w) a token, as in the authors' program; the paper has the sum. The first term, its equation 3, is
    smoothed as `sigmoid`.
    """
    margin = beta * (policy_chosen_logps - policy_rejected_logps)
    return logistic_loss(margin, label_smoothing) + cpo_alpha * chosen_nll / chosen_tokens


@register_loss("orpo")
def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
) -> Tensor:
    """n - beta log sigmoid(log odds(y_w) - log odds(y_l)): ORPO (arXiv:2403.07691).

    n is -log pi(y_w) a token, odds(y) = p / (1 - p) of p = exp(log pi(y) a token); beta is the paper's lambda, and what
    it weighs equation 7.
    """
    # a certain answer has odds beyond all bounds; in fp32 log pi is 0 for less
    chosen = (policy_chosen_logps / chosen_tokens).clamp(max=-1e-6)
    rejected = (policy_rejected_logps / rejected_tokens).clamp(max=-1e-6)
    # log(1 - e^a) = log(-expm1(a)), which stays exact for an answer that is nearly certain
    log_odds = (chosen - rejected) - ((-chosen.expm1()).log() - (-rejected.expm1()).log())
    return chosen_nll / chosen_tokens - beta * log_sigmoid(log_odds)


@register_loss("slic", slic_delta=Setting(1.0, "target margin of slic, nats", NOT_NEGATIVE))
def slic_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_nll: Tensor, beta: float, slic_delta: float
) -> Tensor:
    """max(0, delta - log pi(y_w) + log pi(y_l)) - beta log pi(y_w): SLiC-HF (arXiv:2305.10425, section 2).

    beta is the paper's lambda, and the chosen answer its target of the regularisation.
    """
    return (slic_delta - policy_chosen_logps + policy_rejected_logps).relu() + beta * chosen_nll
