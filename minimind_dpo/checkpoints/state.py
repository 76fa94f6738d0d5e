"""What a run has trained, as each rank holds it: parts of parameters with their optimizer states.

The same view of one process, DDP and every ZeRO stage, so that what is read through it under one engine and number of
ranks can be written back under another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from minimind_dpo.engine import sharding as zero

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


@dataclass
class TrainedState:
    """A run's trained parameters and its optimizer, seen from one rank.

    Attributes:
        optimizer: torch's AdamW, or DeepSpeed's optimizer around it.
        named_parameters: the trained parameters with the model's names for them.
        scaler: torch's fp16 loss scaler, None elsewhere.
        rank: of this process, out of `world_size`.
    """

    optimizer: Any
    named_parameters: list[tuple[str, Parameter]]
    scaler: Any
    rank: int
    world_size: int

    @property
    def _partitioned(self) -> bool:
        """Whether the optimizer keeps fp32 copies of its own, flattened and divided between the ranks."""
        return not isinstance(self.optimizer, Optimizer)

    @property
    def _adamw(self) -> Optimizer:
        return self.optimizer.optimizer if self._partitioned else self.optimizer

    def held(self) -> Iterator[Fragment]:
        """Every fragment that this rank holds."""
        for name, parameter in self.named_parameters:
            part: tuple[Tensor, int, int, int] | None = (parameter, 0, 0, parameter.numel())
            if self._partitioned:
                part = zero.held_part(self.optimizer, parameter)
            if part is None:
                continue
            flat, offset, start, length = part
            states = {"weight": flat.data} | _moments(self._adamw, flat)
            yield Fragment(
                name,
                zero.full_shape(parameter),
                start,
                {kind: state.view(-1).narrow(0, offset, length) for kind, state in states.items()},
            )

    def own(self) -> Iterator[Fragment]:
        """`held` without repetition between ranks: where all of them hold everything, they divide it evenly."""
        fragments = list(self.held())
        elements = sum(fragment.states["weight"].numel() for fragment in fragments)
        before = 0
        for fragment in fragments:
            if self._partitioned or before * self.world_size // elements == self.rank:
                yield fragment
            before += fragment.states["weight"].numel()

    def numbers(self) -> dict[str, Any]:
        """What is not of the parameters' size: AdamW's step count and fp16's loss scale."""
        steps = [float(state["step"]) for state in self._adamw.state.values()]
        scaler = (
            self.scaler.state_dict()
            if self.scaler is not None
            else {
                name: value
                for name, value in zero.loss_scaler(self.optimizer).items()
                if isinstance(value, (int, float))
            }
        )
        return {"optimizer_step": max(steps, default=0.0), "loss_scaler": scaler}

    def restore_numbers(self, numbers: dict[str, Any]) -> None:
        """Undo `numbers`, once every fragment has its values again. Collective."""
        for state in self._adamw.state.values():
            state["step"].fill_(numbers["optimizer_step"])
        if self.scaler is not None:
            self.scaler.load_state_dict(numbers["loss_scaler"])
        else:
            zero.loss_scaler(self.optimizer).update(numbers["loss_scaler"])
        if self._partitioned:
            zero.refresh_weights(self.optimizer)


def _moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's two moments of a parameter, made as AdamW makes them where it has taken no step yet."""
    state = optimizer.state[parameter]
    if MOMENTS[0] not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
    return {kind: state[kind] for kind in MOMENTS}
