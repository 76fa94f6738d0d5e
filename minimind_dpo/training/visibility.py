"""Whether half-precision weights follow their fp32 masters, which rounding to the nearest may keep them from."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from minimind_dpo.engine.devices import summable
from minimind_dpo.engine.launched import HALF_TYPES
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)

_SAMPLE = 4096  # elements of each parameter part
_LEAST_STEPS = 5
_LEAST_SHARE = 0.5


class UpdateWatch:
    """Warns once of a run under `weight_rounding: nearest` most of whose updates no forward pass sees.

    Begins with the weights as they are now. Under the other roundings, and in fp32, it does nothing.
    """

    def __init__(self, run: Run):
        self._run, self._first_step = run, run.state.step
        self._dtype = HALF_TYPES.get(run.engine.precision)
        self._done = self._dtype is None or run.config.weight_rounding != "nearest"
        self._start = [] if self._done else self._sample()

    def look(self) -> None:
        """Compare with the start. Collective."""
        steps = self._run.state.step - self._first_step
        if self._done or steps < _LEAST_STEPS:
            return
        self._done = True
        share = self._visible_share()
        if share < _LEAST_SHARE:
            logger.warning(
                "weight_rounding: nearest hides what this run learns: in %d steps the %s weights of products moved by "
                "%.0f %% of what their fp32 masters did; set weight_rounding: dithered",
                steps,
                self._run.engine.precision,
                100 * share,
            )

    def _visible_share(self) -> float:
        """The part of the masters' movement that their rounded values show: its projection on it."""
        seen = torch.zeros(2, dtype=torch.float64)
        for before, now in zip(self._start, self._sample(), strict=True):
            moved = summable(now - before)
            shown = (summable(now.to(self._dtype)) - summable(before.to(self._dtype))) * moved
            seen += torch.stack([shown.sum(), moved.square().sum()]).cpu()
        shown_sum, moved_sum = self._run.engine.sum(seen.float().to(self._run.engine.device)).tolist()
        return shown_sum / moved_sum if moved_sum else 1.0

    def _sample(self) -> list[Tensor]:
        """Evenly spaced elements of every matrix that this rank steps, fp32."""
        weights = [part.states["weight"] for part in self._run.engine.shared_fragments() if len(part.shape) > 1]
        return [weight[:: max(1, len(weight) // _SAMPLE)].clone() for weight in weights]
