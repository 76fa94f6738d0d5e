"""What every engine has from accelerate: its place among the ranks, precision, collectives and trackers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minimind_dpo.engine.trackers import Guarded

_RELEASING_SECONDS = 0.1

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's name of a precision


class Launched:
    """The part of `Engine` that does not depend on how the policy is trained; only this room sees the Accelerator."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.precision: str = accelerator.mixed_precision
        self.skips_overflows = self.precision == "fp16"

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""
        return self._accelerator.autocast()

    def wait(self) -> None:
        """Until every rank has come here."""
        self._accelerator.wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values."""
        return self._accelerator.reduce(values, "sum")  # type: ignore[return-value]

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        own = torch.tensor([float(value)], device=self.device)
        return float(self._accelerator.gather(own).max())  # type: ignore[union-attr]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        return gather_object([value])

    def start_trackers(self, project: str, starting: dict[str, dict[str, Any]]) -> list[Guarded]:
        """Start what `report_to` names; on the main process only."""
        try:
            self._accelerator.init_trackers(project, init_kwargs=starting)
        except Exception:
            self._accelerator.trackers.clear()  # one that never started cannot be ended
            raise
        started = [Guarded(tracker) for tracker in self._accelerator.trackers]
        self._accelerator.trackers = started  # which ends them
        return started

    def end(self) -> None:
        """End trackers and the group of processes."""
        if self.world_size > 1:
            # Gloo's threads need Python's lock to release the tensors of the last exchange. Taken down meanwhile the
            # group would wait for them, and DDP's part of it holds that lock.
            time.sleep(_RELEASING_SECONDS)
        self._accelerator.end_training()


def evenly_divided(sizes: Iterable[int], rank: int, world_size: int) -> list[bool]:
    """Which of consecutive items rank `rank` takes, so that every rank takes about as many elements."""
    counts = list(sizes)
    total, before, taken = sum(counts), 0, []
    for count in counts:
        taken.append(before * world_size // total == rank)
        before += count
    return taken
