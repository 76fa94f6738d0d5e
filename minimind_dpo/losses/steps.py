"""Losses over several pairs at once: their B pairs are those of the optimizer step, over all micro-batches and ranks.

What a loss looks at is then no matter of how a step is divided. A step that is more than one micro-batch a rank costs a
second forward pass: the loss's slope in every log-probability is known only when all of them are (docs/losses.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimind_dpo.losses.bounds import FINITE, NOT_NEGATIVE
from minimind_dpo.losses.registry import Setting, log_sigmoid, logistic_loss, register_loss

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 0.9  # of a running mean, each step


@register_loss("aot", over_step=True, weighs_pairs=False)
def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """-log sigmoid(beta (pi_(i) - ref_(i))), paired AOT (arXiv:2406.05882).

    pi_(i) is the i-th smallest log pi(y_w)/pi(y_l) of the step, ref_(i) that of the reference; smoothed as `sigmoid`.
    """
    pi_logratios, ref_logratios = policy_chosen_logps - policy_rejected_logps, ref_chosen_logps - ref_rejected_logps
    return logistic_loss(beta * (_ascending(pi_logratios) - _ascending(ref_logratios)), label_smoothing)


@register_loss("aot_unpaired", over_step=True, weighs_pairs=False)
def aot_unpaired_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """-log sigmoid(beta (w_(i) - l_(i))), unpaired AOT (arXiv:2406.05882).

    w_(i) is the i-th smallest log pi(y_w)/ref(y_w) of the step, l_(i) that of the rejected answers; smoothed as
    `sigmoid`.
    """
    return logistic_loss(beta * (_ascending(chosen_logratios) - _ascending(rejected_logratios)), label_smoothing)


@register_loss("bco", over_step=True)
def bco_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """-log sigmoid(r_w - d) - log sigmoid(-(r_l - d)): BCO (arXiv:2404.04656, equation 8).

    d, the mean reward of all answers of the step, is the paper's reward shift (equation 7) without its running mean; no
    gradient goes through it.
    """
    chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
    shift = (chosen_rewards.mean() + rejected_rewards.mean()).detach() / 2
    return -log_sigmoid(chosen_rewards - shift) - log_sigmoid(shift - rejected_rewards)


@register_loss("sft", over_step=True)
def sft_loss(chosen_nll: Tensor, chosen_tokens: Tensor) -> Tensor:
    """-log pi(y_w) B / T of a step with B pairs and T completion tokens of chosen answers: its mean is that of tokens.

    For weighted sums, as in Iterative RPO (arXiv:2404.19733).
    """
    return chosen_nll * (len(chosen_nll) / chosen_tokens.sum())


@register_loss(
    "beta_dpo", over_step=True, beta_dpo_alpha=Setting(0.6, "how far beta_dpo's beta follows a step's margins", FINITE)
)
def beta_dpo_loss(logits: Tensor, earlier_logits: Tensor, beta: float, beta_dpo_alpha: float) -> Tensor:
    """-log sigmoid(beta' logits), beta' = beta (1 + alpha (mean(logits) - M)): beta-DPO (arXiv:2407.08639).

    M is the running mean of the steps' mean logits, this one included (`KEPT` of it a step). beta' is at least 0.001,
    and no gradient goes through it. The paper's filter, which drops pairs at random, is left out.
    """
    mean = logits.mean().detach()
    scale = 1 + beta_dpo_alpha * (mean - running_mean(earlier_logits, mean))
    return -log_sigmoid((beta * scale).clamp(min=1e-3) * logits)


@register_loss(
    "alpha_dpo",
    over_step=True,
    alpha_dpo_alpha=Setting(0.05, "weight of a pair's own margin in alpha_dpo", NOT_NEGATIVE),
    alpha_dpo_gamma=Setting(0.5, "target margin of alpha_dpo", NOT_NEGATIVE),
)
def alpha_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
    label_smoothing: float,
    alpha_dpo_alpha: float,
    alpha_dpo_gamma: float,
) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma - beta alpha z): alpha-DPO (arXiv:2410.10148).

    a is log pi(y) a token, z the log-ratios a token, chosen less rejected, less their mean over the step, by their
    standard deviation (0.01 at least: at the start, where policy and reference agree, there is nothing but rounding to
    scale up). No gradient goes through z. The authors' program takes running means of both.
    """
    own = (chosen_logratios / chosen_tokens - rejected_logratios / rejected_tokens).detach()
    spread = (own - own.mean()) / own.std(correction=0).clamp(min=0.01)
    means = policy_chosen_logps / chosen_tokens - policy_rejected_logps / rejected_tokens
    return logistic_loss(beta * (means - alpha_dpo_alpha * spread) - alpha_dpo_gamma, label_smoothing)


def running_mean(earlier: Tensor, value: Tensor) -> Tensor:
    """The running mean after another step's value."""
    return KEPT * earlier + (1 - KEPT) * value


def _ascending(values: Tensor) -> Tensor:
    return values.sort(stable=True).values
