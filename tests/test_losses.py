"""Losses on hand-computed numbers and identities."""

from __future__ import annotations

import math

import pytest
import torch

from minimind_dpo.objective.losses import LOSSES, dpo_losses, implicit_rewards

# two pairs: logits of the sums are (-10 + 14) - (-11 + 13) = 2 and (-6 + 4) - (-5 + 5) = -2
POLICY_CHOSEN, POLICY_REJECTED = torch.tensor([-10.0, -6.0]), torch.tensor([-14.0, -4.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-11.0, -5.0]), torch.tensor([-13.0, -5.0])
CHOSEN_TOKENS, REJECTED_TOKENS = torch.tensor([5, 2]), torch.tensor([2, 4])


def _losses(loss_type: str, beta: float = 0.5, label_smoothing: float = 0.0) -> list[float]:
    return dpo_losses(
        POLICY_CHOSEN,
        POLICY_REJECTED,
        REF_CHOSEN,
        REF_REJECTED,
        chosen_tokens=CHOSEN_TOKENS,
        rejected_tokens=REJECTED_TOKENS,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
    ).tolist()


def _log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


def test_sigmoid_by_hand() -> None:
    """-log sigmoid(0.5 * 2) = log(1 + e^-1) and -log sigmoid(0.5 * -2) = log(1 + e^1)."""
    assert _losses("sigmoid") == pytest.approx([_log1pexp(-1), _log1pexp(1)], rel=1e-6)


def test_smoothed_sigmoid_by_hand() -> None:
    """0.9 log(1 + e^-1) + 0.1 log(1 + e^1), and the reverse."""
    low, high = _log1pexp(-1), _log1pexp(1)
    assert _losses("sigmoid", label_smoothing=0.1) == pytest.approx([0.9 * low + 0.1 * high, 0.9 * high + 0.1 * low])


def test_sigmoid_norm_by_hand() -> None:
    """Pair 1: (-10/5 + 14/2) - (-11/5 + 13/2) = 0.7; pair 2: (-6/2 + 4/4) - (-5/2 + 5/4) = -0.75."""
    assert _losses("sigmoid_norm") == pytest.approx([_log1pexp(-0.35), _log1pexp(0.375)], rel=1e-6)


def test_robust_by_hand() -> None:
    """(0.9 log(1 + e^-1) - 0.1 log(1 + e^1)) / 0.8, and the reverse."""
    low, high = _log1pexp(-1), _log1pexp(1)
    assert _losses("robust", label_smoothing=0.1) == pytest.approx(
        [(0.9 * low - 0.1 * high) / 0.8, (0.9 * high - 0.1 * low) / 0.8]
    )


def test_hinge_by_hand() -> None:
    """max(0, 1 - 1) = 0 and max(0, 1 + 1) = 2."""
    assert _losses("hinge") == [0.0, 2.0]


def test_ipo_by_hand() -> None:
    """Length-normalised logits 0.7 and -0.75, target 1 / (2 * 0.5) = 1: 0.3^2 and 1.75^2."""
    assert _losses("ipo") == pytest.approx([0.09, 3.0625], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "robust"])
def test_policy_equal_to_reference_gives_ln2(loss_type: str) -> None:
    logps, tokens = torch.tensor([-3.0, -40.0]), torch.tensor([3, 9])
    losses = dpo_losses(
        logps, logps - 1, logps, logps - 1, chosen_tokens=tokens, rejected_tokens=tokens, loss_type=loss_type, beta=0.1
    )
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_pulls_chosen_up_and_rejected_down(loss_type: str) -> None:
    chosen, rejected = POLICY_CHOSEN.clone().requires_grad_(), POLICY_REJECTED.clone().requires_grad_()
    dpo_losses(
        chosen,
        rejected,
        REF_CHOSEN,
        REF_REJECTED,
        chosen_tokens=CHOSEN_TOKENS,
        rejected_tokens=REJECTED_TOKENS,
        loss_type=loss_type,
        beta=0.1,
    ).sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_rewards_by_hand() -> None:
    assert implicit_rewards(POLICY_CHOSEN, REF_CHOSEN, beta=0.5).tolist() == [0.5, -0.5]
