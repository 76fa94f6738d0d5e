"""All pairs of an optimizer step in one table, for losses over several pairs, and the losses' slopes in it.

A loss over the step is a function of every pair's log-probabilities, which lie on several ranks and in several
micro-batches. They are gathered first, the loss is derived with respect to them, and each micro-batch goes backward
with its own pairs' slopes: the same gradient for any division of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minimind_dpo.engine.devices import sum_dtype, summable
from minimind_dpo.engine.transfer import send
from minimind_dpo.objective.preference import PairLogps, PairLosses, Preference, dpo_losses, next_running_logits


class PairTable:
    """What losses know of N pairs.

    Args:
        num_pairs: N, of all ranks.
        device: of the values.
    """

    def __init__(self, num_pairs: int, device: torch.device):
        self._values = torch.zeros(num_pairs, len(PairLogps._fields), dtype=sum_dtype(device), device=device)
        self._own = torch.zeros(num_pairs, dtype=torch.bool, device=device)

    def put(self, places: Sequence[int], logps: PairLogps) -> None:
        """Enter this rank's pairs at their places."""
        columns = torch.stack([summable(column.detach()) for column in logps], dim=1)
        rows = send(torch.tensor(places), columns.device)
        self._values.index_copy_(0, rows, columns)
        self._own.index_fill_(0, rows, True)

    def derive(
        self, total: Callable[[Tensor], Tensor], preference: Preference, earlier_logits: float
    ) -> tuple[StepLosses, float | Tensor]:
        """The losses of all pairs and their slopes, and the running mean of logits after the step. Collective.

        Args:
            total: adds up all ranks' values.
            preference: of the run.
            earlier_logits: the running mean before the step.
        """
        values = total(self._values)
        with torch.enable_grad():
            leaf = values.requires_grad_()
            pairs = PairLogps(*leaf.unbind(dim=1))
            losses = dpo_losses(pairs, preference, earlier_logits)
            (slopes,) = torch.autograd.grad(losses.total.sum(), leaf)
        found = PairLosses(losses.total.detach(), losses.parts)
        running: float | Tensor = earlier_logits
        if preference.remembers:
            running = next_running_logits(PairLogps(*values.detach().unbind(dim=1)), preference, earlier_logits)
        return StepLosses(found, slopes, self._own), running


class StepLosses:
    """The losses of a whole step, and where they lead.

    Args:
        losses: [N].
        slopes: [N, columns] of the losses' sum in every value of the table.
        own: [N] whether a pair is this rank's.
    """

    def __init__(self, losses: PairLosses, slopes: Tensor, own: Tensor):
        self._losses, self._slopes, self._own = losses, slopes, own

    def at(self, places: Sequence[int]) -> PairLosses:
        """The losses of some pairs, no gradient."""
        rows = send(torch.tensor(places), self._own.device)
        return PairLosses(self._losses.total[rows], tuple(part[rows] for part in self._losses.parts))

    def own(self) -> PairLosses:
        """The losses of this rank's pairs, no gradient."""
        return PairLosses(self._losses.total[self._own], tuple(part[self._own] for part in self._losses.parts))

    def leaning(self, places: Sequence[int], logps: PairLogps) -> Tensor:
        """A scalar whose gradient in `logps` is that of the sum of all losses."""
        slopes = self._slopes[send(torch.tensor(places), self._own.device)]
        columns = zip(logps, slopes.unbind(dim=1), strict=True)
        return torch.stack([(slope * column).sum() for column, slope in columns if column.requires_grad]).sum()
