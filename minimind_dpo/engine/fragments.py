"""What a run trains, as a rank holds it: contiguous parts of parameters with their optimizer states.

The same view of one process, DDP and every ZeRO stage, so that what is read through it under one engine and number of
ranks can be written back under another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """The contiguous part of one parameter that a rank holds: the whole of it without ZeRO.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        start: first element of the part in the flattened parameter.
        states: "weight", "exp_avg" and "exp_avg_sq", each [n] fp32: views of what the optimizer works on.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    states: dict[str, Tensor]


class HeldPart(NamedTuple):
    """Where an optimizer keeps a rank's fp32 part of a parameter.

    Attributes:
        flat: the tensor that AdamW steps.
        offset: of the part in `flat`, in elements.
        start: of the part in the flattened parameter.
        length: of the part.
    """

    flat: Tensor
    offset: int
    start: int
    length: int


def fragment(name: str, shape: tuple[int, ...], part: HeldPart, adamw: Optimizer) -> Fragment:
    """A parameter's part with its states."""
    states = {"weight": part.flat.data} | _moments(adamw, part.flat)
    return Fragment(
        name,
        shape,
        part.start,
        {kind: state.view(-1).narrow(0, part.offset, part.length) for kind, state in states.items()},
    )


def optimizer_step_count(adamw: Optimizer) -> float:
    """Steps that AdamW has taken, the same for every parameter."""
    return max((float(state["step"]) for state in adamw.state.values()), default=0.0)


def set_optimizer_step_count(adamw: Optimizer, steps: float) -> None:
    """Undo `optimizer_step_count`, once every parameter has its moments again."""
    for state in adamw.state.values():
        state["step"].fill_(steps)


def _moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's two moments of a parameter, made as AdamW makes them where it has taken no step yet."""
    state = optimizer.state[parameter]
    if MOMENTS[0] not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
    return {kind: state[kind] for kind in MOMENTS}
