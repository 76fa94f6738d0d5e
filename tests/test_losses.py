"""Every loss on hand-computed numbers; what follows from the names of its parameters; how it is registered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minimind_dpo.losses import INPUTS, LOSSES, Setting, own_settings, register_loss
from minimind_dpo.losses.bounds import POSITIVE
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses, implicit_rewards, next_running_logits

# Two pairs. Log-ratios of the sums: chosen 1 and -1, rejected -1 and 1, so the logits are 2 and -2.
POLICY_CHOSEN, POLICY_REJECTED = [-10.0, -6.0], [-14.0, -4.0]
REF_CHOSEN, REF_REJECTED = [-11.0, -5.0], [-13.0, -5.0]
CHOSEN_TOKENS, REJECTED_TOKENS = [5, 2], [2, 4]
MARGINS = [0.5, 0.0]
SMOOTHED = [name for name, loss in LOSSES.items() if "label_smoothing" in loss.names]


def pairs(**changed: list[float]) -> PairLogps:
    """The two pairs, with other columns where told."""
    columns = {
        "policy_chosen_logps": POLICY_CHOSEN,
        "policy_rejected_logps": POLICY_REJECTED,
        "ref_chosen_logps": REF_CHOSEN,
        "ref_rejected_logps": REF_REJECTED,
        "chosen_nll": [-value for value in changed.get("policy_chosen_logps", POLICY_CHOSEN)],
        "chosen_tokens": CHOSEN_TOKENS,
        "rejected_tokens": REJECTED_TOKENS,
        "margins": [0.0, 0.0],
        "weights": [1.0, 1.0],
    } | changed
    return PairLogps(**{name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()})


def losses_of(name: str, beta: float = 0.5, label_smoothing: float = 0.0, **changed: list[float]) -> list[float]:
    settings = {setting: LOSSES[name].settings[setting].default for setting in LOSSES[name].settings}
    preference = Preference({name: 1.0}, beta=beta, label_smoothing=label_smoothing, settings=settings)
    return dpo_losses(pairs(**changed), preference).total.tolist()


def soft(x: float) -> float:
    """-log sigmoid(-x) = log(1 + e^x)."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# name -> the two losses at beta 0.5 without smoothing, written out
BY_HAND = {
    "sigmoid": [soft(-1), soft(1)],
    # means a token: -2 + 7 - (-2.2 + 6.5) = 0.7 and -3 + 1 - (-2.5 + 1.25) = -0.75
    "sigmoid_norm": [soft(-0.35), soft(0.375)],
    "hinge": [0.0, 2.0],
    "ipo": [0.3**2, 1.75**2],  # target 1 / (2 * 0.5) = 1
    "robust": [soft(-1), soft(1)],
    # s = sigmoid(1): weight s of the exponential e^-1 with tau 0.05 is sigmoid(20), that of e^1 is sigmoid(-20)
    "discopop": [
        soft(-1) * (1 - sigmoid(20)) + math.exp(-1) * sigmoid(20),
        soft(1) * (1 - sigmoid(-20)) + math.exp(1) * sigmoid(-20),
    ],
    # means a token -2 against -7 and -3 against -1, gamma 0.5
    "simpo": [soft(0.5 - 0.5 * 5), soft(0.5 + 0.5 * 2)],
    # sums -10 against -14 and -6 against -4, and the likelihood a token, 2 and 3
    "cpo": [soft(-2) + 2, soft(1) + 3],
    "orpo": [
        2 + 0.5 * soft(-(-2 + 7 - (math.log(1 - math.exp(-2)) - math.log(1 - math.exp(-7))))),
        3 + 0.5 * soft(-(-3 + 1 - (math.log(1 - math.exp(-3)) - math.log(1 - math.exp(-1))))),
    ],
    "slic": [0 + 0.5 * 10, 1 + 6 - 4 + 0.5 * 6],
    "nca_pair": [soft(-0.5) + (soft(0.5) + soft(-0.5)) / 2, soft(0.5) + (soft(-0.5) + soft(0.5)) / 2],
    "bco_pair": [2 * soft(-0.5), 2 * soft(0.5)],
    "sppo_hard": [0.0, 8.0],  # (1 - 1)^2 + (-1 + 1)^2 and (-1 - 1)^2 + (1 + 1)^2
    "apo_zero": [2 * sigmoid(-0.5), 2 * sigmoid(0.5)],
    "apo_down": [sigmoid(0.5) + sigmoid(-1), sigmoid(-0.5) + sigmoid(1)],
    # sorted, the policy's ratios are -2 and 4, the reference's 0 and 2
    "aot": [soft(1), soft(-1)],
    "aot_unpaired": [soft(0), soft(0)],  # both sides sorted are -1 and 1
    "bco": [2 * soft(-0.5), 2 * soft(0.5)],  # the mean reward is 0
    "sft": [10 * 2 / 7, 6 * 2 / 7],
    "beta_dpo": [soft(-1), soft(1)],  # the mean of the logits is 0, as was that of the steps before
    # log-ratios a token 0.2 + 0.5 = 0.7 and -0.5 - 0.25 = -0.75: by their deviation 1 and -1
    "alpha_dpo": [soft(0.5 - 0.5 * (5 - 0.05)), soft(0.5 - 0.5 * (-2 + 0.05))],
}


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"exo_pair"}))
def test_by_hand(name: str) -> None:
    assert losses_of(name) == pytest.approx(BY_HAND[name], rel=1e-9, abs=1e-12)


def test_exo_by_hand() -> None:
    """q = sigmoid(+-1) against (0.9, 0.1)."""

    def divergence(q: float) -> float:
        return q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)

    expected = [divergence(sigmoid(1)), divergence(sigmoid(-1))]
    assert losses_of("exo_pair", label_smoothing=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted({*SMOOTHED} - {"exo_pair", "robust", "cpo"}))
def test_smoothing_mixes_a_loss_with_that_of_the_flipped_pair(name: str) -> None:
    """0.9 of -log sigmoid(x) and 0.1 of -log sigmoid(-x) = x - log sigmoid(x)."""
    margins = [-math.log(math.expm1(loss)) for loss in BY_HAND[name]]
    expected = [0.9 * loss + 0.1 * (loss + margin) for loss, margin in zip(BY_HAND[name], margins, strict=True)]
    assert losses_of(name, label_smoothing=0.1) == pytest.approx(expected)


def test_smoothed_robust_and_cpo_by_hand() -> None:
    low, high = soft(-1), soft(1)
    assert losses_of("robust", label_smoothing=0.1) == pytest.approx(
        [(0.9 * low - 0.1 * high) / 0.8, (0.9 * high - 0.1 * low) / 0.8]
    )
    assert losses_of("cpo", label_smoothing=0.1) == pytest.approx(
        [0.9 * soft(-2) + 0.1 * soft(2) + 2, 0.9 * soft(1) + 0.1 * soft(-1) + 3]
    )


def test_target_margins_by_hand() -> None:
    """The first pair is to be 0.5 apart."""
    assert losses_of("sigmoid", margins=MARGINS) == pytest.approx([soft(-0.5), soft(1)])
    assert losses_of("hinge", margins=MARGINS) == pytest.approx([0.5, 2.0])
    assert losses_of("simpo", margins=MARGINS) == pytest.approx([soft(1 - 2.5), soft(1.5)])
    assert losses_of("sigmoid_norm", margins=MARGINS) == losses_of("sigmoid_norm")


def test_weights_scale_a_pairs_loss() -> None:
    assert losses_of("ipo", weights=[2.0, 0.5]) == pytest.approx([2 * 0.09, 0.5 * 3.0625])
    assert losses_of("aot", weights=[2.0, 0.5]) == losses_of("aot")  # whose it is can't be said; a run refuses them


def test_statistics_of_the_step_by_hand() -> None:
    """The chosen answers of both pairs get 2 nats more: rewards 1.5, 0.5 and -0.5, 0.5; their mean is 0.5."""
    up = [value + 2 for value in POLICY_CHOSEN]
    assert losses_of("bco", policy_chosen_logps=up) == pytest.approx([soft(-1) + soft(-1), soft(0) + soft(0)])
    # logits 4 and 0, mean 2; the running mean goes from 0 to 0.2, so beta is 0.5 (1 + 0.6 * 1.8) = 1.04
    assert losses_of("beta_dpo", policy_chosen_logps=up) == pytest.approx([soft(-1.04 * 4), soft(0)])
    # alpha_dpo: 0.7 + 0.4 = 1.1 and -0.75 + 1 = 0.25; still 1 and -1 by their deviation
    assert losses_of("alpha_dpo", policy_chosen_logps=up) == pytest.approx(
        [soft(0.5 - 0.5 * (5.4 - 0.05)), soft(0.5 - 0.5 * (-1 + 0.05))]
    )


def test_a_running_mean_by_hand() -> None:
    """0.9 of what was, 0.1 of the step's: logits 2 and -2, then 4 and 0."""
    preference = Preference({"beta_dpo": 1.0}, beta=0.5, settings={"beta_dpo_alpha": 0.6})
    assert float(next_running_logits(pairs(), preference, 3.0)) == pytest.approx(2.7)
    up = pairs(policy_chosen_logps=[value + 2 for value in POLICY_CHOSEN])
    assert float(next_running_logits(up, preference, 3.0)) == pytest.approx(2.9)
    # with a running mean of 2.9 after it the step's 2 lie below: beta is 0.5 (1 - 0.6 * 0.9) = 0.23
    assert dpo_losses(up, preference, 3.0).total.tolist() == pytest.approx([soft(-0.23 * 4), soft(0)])
    assert dpo_losses(up, preference, 60.0).total.tolist() == pytest.approx([soft(-0.001 * 4), soft(0)])  # at least


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "beta_dpo"])
def test_policy_equal_to_reference_gives_ln2(name: str) -> None:
    same = {"ref_chosen_logps": POLICY_CHOSEN, "ref_rejected_logps": POLICY_REJECTED}
    assert losses_of(name, beta=0.1, **same) == pytest.approx([math.log(2)] * 2, abs=1e-7)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"apo_down", "sft", "sppo_hard", "slic"}))
def test_gradient_pulls_chosen_up_and_rejected_down(name: str) -> None:
    """But for apo_down, which lowers both; sft, which looks at one; sppo_hard and slic, which are at their target."""
    settings = {setting: LOSSES[name].settings[setting].default for setting in LOSSES[name].settings}
    chosen = torch.tensor(POLICY_CHOSEN, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(POLICY_REJECTED, dtype=torch.float64, requires_grad=True)
    given = pairs()._replace(policy_chosen_logps=chosen, policy_rejected_logps=rejected, chosen_nll=-chosen)
    smoothing = 0.01 if name == "exo_pair" else 0.0
    preference = Preference({name: 1.0}, beta=0.1, label_smoothing=smoothing, settings=settings)
    dpo_losses(given, preference).total.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_far_from_the_reference_nothing_overflows(name: str) -> None:
    """Some thousand nats, the length of a long answer."""
    settings = {setting: LOSSES[name].settings[setting].default for setting in LOSSES[name].settings}
    chosen = torch.tensor([-10.0, -4000.0], dtype=torch.float64, requires_grad=True)
    given = pairs()._replace(policy_chosen_logps=chosen, chosen_nll=-chosen)
    preference = Preference({name: 1.0}, beta=0.1, label_smoothing=0.01, settings=settings)
    total = dpo_losses(given, preference).total.sum()
    total.backward()
    assert chosen.grad is not None and total.isfinite() and chosen.grad.isfinite().all()


def test_a_certain_answer_and_a_lost_one_leave_numbers() -> None:
    """A log-probability of 0, which fp32 has for a likely short answer; and margins of -3000 nats."""
    for certain in ("policy_chosen_logps", "policy_rejected_logps"):
        values = torch.tensor([0.0, -4.0], dtype=torch.float64, requires_grad=True)
        total = dpo_losses(pairs()._replace(**{certain: values}), Preference({"orpo": 1.0}, beta=0.1)).total.sum()
        total.backward()
        assert values.grad is not None and total.isfinite() and values.grad.isfinite().all()
    lost = pairs()._replace(policy_chosen_logps=torch.tensor([-3000.0, -6.0], dtype=torch.float64))
    discopop = Preference({"discopop": 1.0}, beta=0.5, settings={"discopop_tau": 0.05})
    assert dpo_losses(lost, discopop).total[0].item() == pytest.approx(0.5 * (3000 - 11 - 1), rel=1e-3)
    forward = dpo_losses(lost, Preference({"sigmoid": 1.0}, beta=0.1, divergence="forward_kl")).total.float()
    assert forward.isfinite().all()


def test_a_weighted_sum_by_hand() -> None:
    preference = Preference({"ipo": 0.5, "bco_pair": -2.0}, beta=0.5)
    found = dpo_losses(pairs(), preference)
    parts = [BY_HAND["ipo"], BY_HAND["bco_pair"]]
    assert [part.tolist() for part in found.parts] == [pytest.approx(part) for part in parts]
    assert found.total.tolist() == pytest.approx([0.5 * a - 2 * b for a, b in zip(*parts, strict=True)])
    assert dpo_losses(pairs(), Preference({"ipo": 0.5}, beta=0.5)).total.tolist() == pytest.approx([0.045, 1.53125])


@pytest.mark.parametrize(
    ("divergence", "alpha", "logits"),
    [
        ("forward_kl", 0.5, math.e - math.exp(-1)),  # (1 - e^-1) - (1 - e^1)
        ("js_divergence", 0.5, math.log(sigmoid(1) / sigmoid(-1))),
        ("alpha_divergence", 0.5, (math.exp(-0.5) - math.exp(0.5)) / -0.5),
        ("alpha_divergence", 3.0, (math.exp(2) - math.exp(-2)) / 2),
        ("alpha_divergence", 1.0, 2.0),
        ("reverse_kl", 0.5, 2.0),
    ],
)
def test_divergences_by_hand(divergence: str, alpha: float, logits: float) -> None:
    """Log-ratios of 1 and -1 in the first pair, and the other way round in the second."""
    preference = Preference({"sigmoid": 1.0}, beta=0.5, divergence=divergence, divergence_alpha=alpha)
    expected = [soft(-0.5 * logits), soft(0.5 * logits)]
    assert dpo_losses(pairs(), preference).total.tolist() == pytest.approx(expected)


def test_rewards_by_hand() -> None:
    assert implicit_rewards(pairs().policy_chosen_logps, pairs().ref_chosen_logps, beta=0.5).tolist() == [0.5, -0.5]


def test_what_follows_from_names() -> None:
    free = {name for name, loss in LOSSES.items() if not loss.needs_reference}
    assert free == {"simpo", "cpo", "orpo", "slic", "sft"}
    able = {name for name, loss in LOSSES.items() if loss.takes_divergences}
    assert able == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"}
    assert {name for name, loss in LOSSES.items() if loss.over_step} == {
        *("aot", "aot_unpaired", "bco", "sft", "beta_dpo", "alpha_dpo")
    }
    assert {name for loss in LOSSES.values() for name in loss.names} <= {
        *INPUTS,
        "beta",
        "label_smoothing",
        *own_settings(),
    }


@pytest.fixture
def cleared() -> Iterator[None]:
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def test_a_registration_that_can_not_be(cleared: None) -> None:
    def wants(logits: Tensor, colour: Tensor) -> Tensor:
        return logits * colour

    with pytest.raises(ValueError, match="there is a loss called 'ipo'"):
        register_loss("ipo")
    with pytest.raises(ValueError, match="there is a setting called simpo_gamma"):
        register_loss("mine", simpo_gamma=Setting(1.0, "", POSITIVE))
    with pytest.raises(ValueError, match="there is a setting called beta"):
        register_loss("mine", beta=Setting(1.0, "", POSITIVE))
    with pytest.raises(ValueError, match="colour is asked for that is no input"):
        register_loss("mine")(wants)
    with pytest.raises(ValueError, match="slope is set that the function does not take"):
        register_loss("mine", colour=Setting(1.0, "", POSITIVE), slope=Setting(1.0, "", POSITIVE))(wants)
    with pytest.raises(ValueError, match="earlier_logits are there for losses over_step only"):
        register_loss("mine")(lambda logits, earlier_logits: logits - earlier_logits)
    assert "mine" not in LOSSES


def test_a_loss_gives_one_number_a_pair(cleared: None) -> None:
    """A mean over what happens to be one batch would depend on how a step is divided."""
    register_loss("mine")(lambda logits: logits.mean())
    with pytest.raises(ValueError, match=r"loss 'mine' gives \[\], not one loss for each of 2 pairs"):
        dpo_losses(pairs(), Preference({"mine": 1.0}))
