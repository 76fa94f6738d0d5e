"""Losses of the margin between the two answers: what they share cancels, and with it the prompt's partition function.

`logits` is log(pi(y_w)/ref(y_w)) - log(pi(y_l)/ref(y_l)), the argument of beta in equation 7 of DPO
(Rafailov et al. 2023, arXiv:2305.18290).
"""

from __future__ import annotations

from math import log, log1p
from typing import TYPE_CHECKING

from minimind_dpo.losses.bounds import POSITIVE, Bounds
from minimind_dpo.losses.registry import Setting, log_sigmoid, logistic_loss, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("sigmoid")
def sigmoid_loss(logits: Tensor, margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta logits - m), equation 7 of DPO; m is 0, or the pair's own margin (ODPO, arXiv:2402.10571).

    With label smoothing e, when labels may be flipped (cDPO, Mitchell 2023):
    -(1 - e) log sigmoid(beta logits - m) - e log sigmoid(-(beta logits - m)).
    """
    return logistic_loss(beta * logits - margins, label_smoothing)


@register_loss("sigmoid_norm")
def sigmoid_norm_loss(normalised_logits: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta normalised_logits), MiniMind's: log-probabilities are means over completion tokens.

    Length-normalised DPO in Tülu 3 (arXiv:2411.15124, equation 6). Smoothed as `sigmoid`.
    """
    return logistic_loss(beta * normalised_logits, label_smoothing)


@register_loss("hinge")
def hinge_loss(logits: Tensor, margins: Tensor, beta: float) -> Tensor:
    """max(0, 1 + m - beta logits): SLiC's loss (arXiv:2305.10425) as in RSO (arXiv:2309.06657, equation 10).

    m is 0, or the pair's own margin.
    """
    return (1 + margins - beta * logits).relu()


@register_loss("ipo")
def ipo_loss(normalised_logits: Tensor, beta: float) -> Tensor:
    """(normalised_logits - 1 / (2 beta))^2, equation 17 of IPO (arXiv:2310.12036); beta is the paper's tau.

    The log-probabilities are means over completion tokens, the form TRL settled on with IPO's authors: with sums
    the target margin would depend on the answers' lengths.
    """
    return (normalised_logits - 1 / (2 * beta)) ** 2


@register_loss("robust")
def robust_loss(logits: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The unbiased loss under flipped labels: Robust DPO (arXiv:2403.00409).

    ((1 - e) * -log sigmoid(beta logits) + e * log sigmoid(-beta logits)) / (1 - 2 e).
    """
    kept = -(1 - label_smoothing) * log_sigmoid(beta * logits)
    flipped = -label_smoothing * log_sigmoid(-beta * logits)
    return (kept - flipped) / (1 - 2 * label_smoothing)


@register_loss(
    "exo_pair", limits={"label_smoothing": Bounds("above 0 (the paper: 0.001)", lambda number: 0 < number < 0.5)}
)
def exo_pair_loss(logits: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p) from the policy's preference q to the label's, equation 16 of EXO (arXiv:2402.00856).

    q = (s, 1 - s) with s = sigmoid(beta logits), p = (1 - e, e) with label smoothing e:
    s log(s / (1 - e)) + (1 - s) log((1 - s) / e).
    """
    wins, loses = log_sigmoid(beta * logits), log_sigmoid(-beta * logits)
    return wins.exp() * (wins - log1p(-label_smoothing)) + loses.exp() * (loses - log(label_smoothing))


@register_loss("discopop", discopop_tau=Setting(0.05, "temperature of the mixture of discopop", POSITIVE))
def discopop_loss(logits: Tensor, beta: float, discopop_tau: float) -> Tensor:
    """(1 - w) * -log sigmoid(beta logits) + w exp(-beta logits), equation 5 of DiscoPOP (arXiv:2406.08414).

    w = sigmoid(beta logits / tau): the log-ratio modulated loss that a search over programs found.
    """
    margin = beta * logits
    weighted = (log_sigmoid(margin / discopop_tau) - margin).exp()  # w exp(-x), where exp(-x) alone may overflow
    return -log_sigmoid(margin) * (-margin / discopop_tau).sigmoid() + weighted
