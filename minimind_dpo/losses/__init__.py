"""Every preference loss: one function each, by what it looks at. A loss from outside registers in the same way."""

from minimind_dpo.losses import margins, reference_free, sides, steps  # noqa: F401  # they register
from minimind_dpo.losses.registry import (
    INPUTS,
    LOSSES,
    SHARED,
    Loss,
    Setting,
    log_sigmoid,
    logistic_loss,
    own_settings,
    register_loss,
)

__all__ = [
    "INPUTS",
    "LOSSES",
    "SHARED",
    "Loss",
    "Setting",
    "log_sigmoid",
    "logistic_loss",
    "own_settings",
    "register_loss",
]
