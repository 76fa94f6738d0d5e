"""What a loss is here, and all that there are: `loss_type` names them.

A loss is a pure function of [B] tensors that returns one loss per pair, [B]. It says by the names of its parameters
what it wants to be fed: any of `INPUTS`, of the settings in `SHARED`, and settings of its own. All else follows from
the names: whether a reference is needed, whether `label_smoothing` or an f-divergence means something to it.

Nothing in this room imports torch, since a configuration is read with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from minimind_dpo.losses.bounds import Bounds

if TYPE_CHECKING:
    from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., "Tensor"])

# [B] tensors of B pairs, log-probabilities in nats; y_w is the chosen and y_l the rejected answer, pi the policy and
# ref the reference. `ld_alpha` discounts what is called a sum here.
INPUTS = {
    "policy_chosen_logps": "log pi(y_w), summed over completion tokens",
    "policy_rejected_logps": "log pi(y_l)",
    "ref_chosen_logps": "log ref(y_w)",
    "ref_rejected_logps": "log ref(y_l)",
    "chosen_logratios": "log pi(y_w) - log ref(y_w)",
    "rejected_logratios": "log pi(y_l) - log ref(y_l)",
    "logits": "chosen_logratios - rejected_logratios, or what an f-divergence makes of them",
    "normalised_logits": "the same, each side divided by its number of completion tokens",
    "chosen_nll": "-log pi(y_w), never discounted",
    "chosen_tokens": "completion tokens of y_w",
    "rejected_tokens": "completion tokens of y_l",
    "margins": "the pairs' own target margins, column `margin`; 0 where there is none",
    "earlier_logits": "a scalar: the running mean of the logits of earlier optimizer steps",
}
SHARED = ("beta", "label_smoothing")
_OF_SCORES = {"logits", "normalised_logits"}  # what an f-divergence is defined for
_OF_REFERENCE = {
    *("ref_chosen_logps", "ref_rejected_logps", "chosen_logratios", "rejected_logratios", "earlier_logits"),
    *_OF_SCORES,
}


class Setting(NamedTuple):
    """A number that belongs to one loss: a flag, a yaml key, a row of the docs and a part of a run's identity.

    Attributes:
        default: where a run says nothing.
        help: what it is, in a few words.
        bounds: what it may be.
    """

    default: float
    help: str
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and what it wants to be fed.

    Attributes:
        function: its inputs and settings by name -> losses [B].
        over_step: it looks at several pairs at once, so its B pairs are those of the optimizer step, all of them.
        weighs_pairs: a pair's weight can scale its loss; not so where pairs are taken apart.
        settings: of its own, by name.
        limits: what values a shared setting may have here, where they are fewer than elsewhere.
        names: of its parameters.
    """

    function: Callable[..., Tensor]
    over_step: bool = False
    weighs_pairs: bool = True
    settings: Mapping[str, Setting] = field(default_factory=dict)
    limits: Mapping[str, Bounds] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is read."""
        return not _OF_REFERENCE.isdisjoint(self.names)

    @property
    def takes_divergences(self) -> bool:
        """Whether the log-ratios it reads may be those of another f-divergence than the reverse KL's.

        They hold up to a constant a prompt, which cancels in the difference of the two sides only.
        """
        return not _OF_SCORES.isdisjoint(self.names) and not self.reads_more_than_scores

    @property
    def reads_more_than_scores(self) -> bool:
        """Whether it reads of the reference what another f-divergence has no meaning for."""
        return not (_OF_REFERENCE - _OF_SCORES).isdisjoint(self.names)


LOSSES: dict[str, Loss] = {}


def register_loss(
    name: str,
    *,
    over_step: bool = False,
    weighs_pairs: bool = True,
    limits: Mapping[str, Bounds] | None = None,
    **settings: Setting,
) -> Callable[[Function], Function]:
    """Make a function a choice of `loss_type`; it stays what it is.

    Args:
        name: that `loss_type` will give.
        over_step: see `Loss`.
        weighs_pairs: see `Loss`.
        limits: see `Loss`.
        settings: the loss's own; each is a parameter of the function.

    Raises:
        ValueError: there is a loss or a setting of that name, or a parameter is neither an input nor a setting.
    """
    taken = {key for loss in LOSSES.values() for key in loss.settings} | {*INPUTS, *SHARED}
    if name in LOSSES:
        raise ValueError(f"there is a loss called {name!r}")
    if doubled := taken.intersection(settings):
        raise ValueError(f"loss {name!r}: there is a setting called {', '.join(sorted(doubled))}")

    def register(function: Function) -> Function:
        names = tuple(inspect.signature(function).parameters)
        unknown = [wanted for wanted in names if wanted not in (*INPUTS, *SHARED, *settings)]
        unread = [setting for setting in settings if setting not in names]
        if unknown or unread:
            raise ValueError(
                f"loss {name!r}: {', '.join(unknown) or 'nothing'} is asked for that is no input ({', '.join(INPUTS)}) "
                f"and no setting; {', '.join(unread) or 'nothing'} is set that the function does not take"
            )
        if "earlier_logits" in names and not over_step:
            raise ValueError(f"loss {name!r}: earlier_logits are there for losses over_step only")
        LOSSES[name] = Loss(function, over_step, weighs_pairs, settings, limits or {}, names)
        return function

    return register


def own_settings() -> dict[str, Setting]:
    """The settings of all losses' own, by name."""
    return {name: setting for loss in LOSSES.values() for name, setting in loss.settings.items()}


def log_sigmoid(values: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), exact where the sigmoid itself is 0 or 1."""
    from torch.nn.functional import logsigmoid  # late: see above

    return logsigmoid(values)


def logistic_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x), smoothed where labels may be flipped: -(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    losses = -log_sigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_sigmoid(-margin)
    return losses
