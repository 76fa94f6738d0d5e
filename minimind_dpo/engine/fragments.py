"""What a run trains, as a rank holds it: contiguous parts of parameters with their optimizer states.

The same view of one process, DDP and every ZeRO stage, so that what is read through it under one engine and number of
ranks can be written back under another.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from minimind_dpo.engine.optimizers import kept_states


class Fragment(NamedTuple):
    """The contiguous part of one parameter that a rank holds: the whole of it without ZeRO.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        start: first element of the part in the flattened parameter.
        states: "weight" [n] fp32 and what the optimizer keeps of it (`engine/optimizers.py`): flat views of
            what it works on. AdamW's "exp_avg" and "exp_avg_sq" are [n] fp32. What has another size than the parameter
            is whole, and so is then the parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    states: dict[str, Tensor]


class HeldPart(NamedTuple):
    """Where an optimizer keeps a rank's fp32 part of a parameter.

    Attributes:
        flat: the tensor that the optimizer steps.
        offset: of the part in `flat`, in elements.
        start: of the part in the flattened parameter.
        length: of the part.
    """

    flat: Tensor
    offset: int
    start: int
    length: int


def fragment(name: str, shape: tuple[int, ...], part: HeldPart, optimizer: Optimizer) -> Fragment:
    """A parameter's part with its states."""
    states = {"weight": part.flat.data} | kept_states(optimizer, part.flat)
    size = part.flat.numel()
    return Fragment(
        name,
        shape,
        part.start,
        {
            kind: state.view(-1).narrow(0, part.offset, part.length) if state.numel() == size else state.view(-1)
            for kind, state in states.items()
        },
    )
