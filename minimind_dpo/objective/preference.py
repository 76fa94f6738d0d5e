"""The preference loss of a run: a weighted sum of losses, fed with what pairs' log-probabilities give.

Notation of Rafailov et al. 2023 (arXiv:2305.18290): pi is the policy, ref the frozen reference, y_w the chosen and y_l
the rejected answer. All log-probabilities are in nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_dpo.engine.devices import sum_dtype
from minimind_dpo.losses import LOSSES
from minimind_dpo.losses.steps import running_mean

_LARGEST = 80.0  # exponent; beyond it nothing finite would be left of a step's gradient in fp32


class PairLogps(NamedTuple):
    """What a loss can know of B pairs, [B] each: sums over completion tokens, discounted where `ld_alpha` says so.

    Attributes:
        policy_chosen_logps: log pi(y_w); the next three likewise.
        chosen_nll: -log pi(y_w), never discounted.
        chosen_tokens, rejected_tokens: completion tokens.
        margins: the pairs' own target margins, or 0.
        weights: by which their losses are multiplied.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_nll: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    margins: Tensor
    weights: Tensor


class Preference(NamedTuple):
    """How a run's preference loss is made.

    Attributes:
        weights: of each part, by its key in `LOSSES`.
        beta: strength of the pull towards the reference.
        label_smoothing: assumed share of flipped preferences.
        divergence: which f-divergence holds the policy to the reference; `divergence_alpha` is that of the
            alpha-divergence.
        ld_alpha: weight of the tokens by which an answer is longer than its rival.
        weighs_by_policy: WPO's weights.
        settings: of the losses' own, by name.
    """

    weights: dict[str, float]
    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    ld_alpha: float = 1.0
    weighs_by_policy: bool = False
    settings: dict[str, float] = {}  # noqa: RUF012  # read only

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads a reference."""
        return any(LOSSES[name].needs_reference for name in self.weights)

    @property
    def over_step(self) -> bool:
        """Whether a loss looks at all pairs of an optimizer step at once."""
        return any(LOSSES[name].over_step for name in self.weights)

    @property
    def remembers(self) -> bool:
        """Whether a loss looks back at earlier steps."""
        return any("earlier_logits" in LOSSES[name].names for name in self.weights)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the losses, where they are several and each is told apart."""
        return tuple(self.weights) if len(self.weights) > 1 else ()


class PairLosses(NamedTuple):
    """The losses of B pairs, times the pairs' weights.

    Attributes:
        total: [B] the weighted sum of the parts.
        parts: [B] each, in the order of `Preference.parts`; without gradient.
    """

    total: Tensor
    parts: tuple[Tensor, ...]


def dpo_losses(pairs: PairLogps, preference: Preference, earlier_logits: float = 0.0) -> PairLosses:
    """The loss of each pair.

    Args:
        pairs: B of them; where a loss looks over the step, all of the step.
        preference: of the run.
        earlier_logits: the running mean of `logits` over earlier steps.
    """
    inputs: dict[str, Tensor | float] = {**_inputs(pairs, preference)}
    if preference.remembers:
        inputs["earlier_logits"] = _scalar(earlier_logits, pairs)
    inputs |= {"beta": preference.beta, "label_smoothing": preference.label_smoothing} | preference.settings
    parts = {}
    for name in preference.weights:
        loss = LOSSES[name]
        values = loss.function(**{wanted: inputs[wanted] for wanted in loss.names})
        if values.shape != pairs.weights.shape:
            raise ValueError(
                f"loss {name!r} gives {list(values.shape)}, not one loss for each of {len(pairs.weights)} pairs"
            )
        parts[name] = pairs.weights * values if loss.weighs_pairs else values
    if not preference.parts:
        ((name, weight),) = preference.weights.items()
        return PairLosses(parts[name] if weight == 1.0 else weight * parts[name], ())
    total = torch.stack([weight * parts[name] for name, weight in preference.weights.items()]).sum(dim=0)
    return PairLosses(total, tuple(part.detach() for part in parts.values()))


def next_running_logits(pairs: PairLogps, preference: Preference, earlier: float) -> Tensor:
    """The running mean of `logits` after a step of `pairs`."""
    return running_mean(_scalar(earlier, pairs), _inputs(pairs, preference)["logits"].mean().detach())


def _scalar(number: float, pairs: PairLogps) -> Tensor:
    """A number beside the pairs, filled in there: one copied from the host would be waited for."""
    device = pairs.weights.device
    return torch.full((), number, dtype=sum_dtype(device), device=device)


def _inputs(pairs: PairLogps, preference: Preference) -> dict[str, Tensor]:
    """What of `losses.INPUTS` is made of B pairs, by name."""
    pi_logratios = pairs.policy_chosen_logps - pairs.policy_rejected_logps
    ref_logratios = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    chosen, rejected = pairs.chosen_tokens, pairs.rejected_tokens
    chosen_logratios = pairs.policy_chosen_logps - pairs.ref_chosen_logps
    rejected_logratios = pairs.policy_rejected_logps - pairs.ref_rejected_logps
    inputs = pairs._asdict() | {"chosen_logratios": chosen_logratios, "rejected_logratios": rejected_logratios}
    if preference.divergence == "reverse_kl":
        inputs["logits"] = pi_logratios - ref_logratios
        inputs["normalised_logits"] = (pairs.policy_chosen_logps / chosen - pairs.policy_rejected_logps / rejected) - (
            pairs.ref_chosen_logps / chosen - pairs.ref_rejected_logps / rejected
        )
    else:
        scores = (divergence_scores(ratios, preference) for ratios in (chosen_logratios, rejected_logratios))
        chosen_scores, rejected_scores = scores
        inputs["logits"] = chosen_scores - rejected_scores
        inputs["normalised_logits"] = chosen_scores / chosen - rejected_scores / rejected
    return inputs


def divergence_scores(logratios: Tensor, preference: Preference) -> Tensor:
    """f'(u) of u = pi(y)/ref(y), [B], up to a constant: f-DPO (Wang et al. 2023, arXiv:2309.16240, table 1).

    reverse_kl: log u; forward_kl: 1 - 1 / u; js_divergence: log(2 u / (1 + u)); alpha_divergence:
    (u^(alpha - 1) - 1) / (alpha - 1), and log u where alpha is 1; the paper's alpha is one less this one, as in TRL.
    """
    alpha = preference.divergence_alpha
    if preference.divergence == "forward_kl":
        return 1 - (-logratios).clamp(max=_LARGEST).exp()
    if preference.divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if preference.divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return ((alpha - 1) * logratios).clamp(max=_LARGEST).expm1() / (alpha - 1)
    return logratios


def implicit_rewards(policy_logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """beta log(pi(y)/ref(y)), [B], of summed log-probabilities: section 5 of the DPO paper, whatever the loss."""
    return beta * (policy_logps - ref_logps).detach()
