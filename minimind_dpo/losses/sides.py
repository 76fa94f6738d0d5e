"""Losses that hold each answer against the reference on its own, so that both can't sink together.

r_w = beta log(pi(y_w)/ref(y_w)) and r_l likewise are the implicit rewards of the two answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimind_dpo.losses.registry import log_sigmoid, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("nca_pair")
def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2: NCA (arXiv:2402.05369, table 1)."""
    chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
    return -log_sigmoid(chosen_rewards) - 0.5 * log_sigmoid(-chosen_rewards) - 0.5 * log_sigmoid(-rejected_rewards)


@register_loss("bco_pair")
def bco_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l): BCO (arXiv:2404.04656, equation 6), before rewards are shifted.

    `bco` has the shift.
    """
    return -log_sigmoid(beta * chosen_logratios) - log_sigmoid(-beta * rejected_logratios)


@register_loss("sppo_hard")
def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """(r_w / beta - 1 / (2 beta))^2 + (r_l / beta + 1 / (2 beta))^2: SPPO with hard labels.

    arXiv:2405.00675, equation 4.7 with a probability of 1 for the winner and 0 for the loser; beta is 1 / eta.
    """
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


@register_loss("apo_zero")
def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): APO-zero (arXiv:2408.06266, equation 7); chosen up, rejected down."""
    return 1 - (beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


@register_loss("apo_down")
def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): APO-down (arXiv:2408.06266, equation 8); both down, rejected further."""
    return (beta * chosen_logratios).sigmoid() + 1 - (beta * (chosen_logratios - rejected_logratios)).sigmoid()
