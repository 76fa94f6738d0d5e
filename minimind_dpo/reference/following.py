"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656, equations 4 and 5).

Every so many optimizer steps it moves by a share of its way to the policy, `ref <- (1 - a) ref + a pi`; with a share of
1 it becomes the policy. Its fp32 values are one more state of every parameter, beside the optimizer's: divided between
ranks as those are, and kept in checkpoints. The model that scores has them rounded as the policy's are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minimind_dpo.engine.protocol import Engine, trained_parameters
from minimind_dpo.engine.rounding import rounded
from minimind_dpo.engine.sharding import full_shape, gathered

Place = tuple[nn.Module, str]


def parameter_places(model: nn.Module) -> dict[str, list[Place]]:
    """Where each parameter of a model is read, by its name: a tied one in several places."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places: dict[str, list[Place]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(names[parameter], []).append((module, attribute))
    return places


class FollowingReference:
    """Moves the reference, and the model that scores for it.

    Args:
        engine: of the run.
        scorer: of the policy, as the engine prepared it.
        places: of the reference model's parameters, as they were before the engine made it ready.
        share: of its way to the policy, each time.
        every: so many optimizer steps.
        weight_rounding: of half-precision weights.
    """

    def __init__(
        self,
        engine: Engine,
        scorer: nn.Module,
        places: dict[str, list[Place]],
        *,
        share: float,
        every: int,
        weight_rounding: str,
    ):
        self._engine, self._places, self._share, self._every = engine, places, share, every
        self._rounding = weight_rounding
        self._shapes = {name: full_shape(parameter) for name, parameter in trained_parameters(scorer)}
        engine.keep_reference()

    def after_step(self, step: int) -> None:
        """Move if it is time to. Collective."""
        if step % self._every == 0:
            self._engine.move_reference(self._share)
            self.bring_up(step)

    @torch.no_grad()
    def bring_up(self, step: int) -> None:
        """Give the model that scores the values of now: after a move, and after a checkpoint was loaded. Collective.

        Half-precision ones are rounded as the policy's are after `step`, or after the newest move before it.
        """
        moved = step - step % self._every
        held: dict[str, list[Any]] = {}
        for fragment in self._engine.fragments():
            held.setdefault(fragment.name, []).append(fragment)
        for name, shape in self._shapes.items():
            values = torch.zeros(torch.Size(shape).numel(), device=self._engine.device)
            for fragment in held.get(name, []):
                part = fragment.states["reference"]
                values[fragment.start : fragment.start + len(part)] = part.to(values.device)
            whole = self._engine.sum(values) if self._engine.divides_states else values
            self._write(name, whole.view(shape), moved)

    def _write(self, name: str, whole: Tensor, step: int) -> None:
        parameters = {id(parameter): parameter for parameter in (getattr(*place) for place in self._places[name])}
        for parameter in parameters.values():
            with gathered([parameter], modify=True):
                half = parameter.dtype != torch.float32
                parameter.copy_(rounded(whole, parameter.dtype, self._rounding, name, step=step) if half else whole)
