"""Learning rates as a pure function of the optimizer step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_NEEDS_MINIMUM = {"cosine_with_min_lr": {"min_lr_rate": 0.1}}


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens `every` so many steps (None or 0: never) happens after `step`."""
    return bool(every) and step % (every or 1) == 0


def learning_rate_schedule(
    lr_scheduler_type: str, learning_rate: float, total_steps: int, warmup_ratio: float
) -> Callable[[int], float]:
    """The learning rate used at optimizer step k = 1 .. `total_steps`.

    `minimind` is MiniMind's cosine to 10 %: lr (0.1 + 0.45 (1 + cos(pi k / N))), k counted from 1. The other names
    are transformers' schedules, of which step k uses the value after k - 1 scheduler steps, as its Trainer does.
    `cosine_with_min_lr` ends at 10 %.
    """
    if lr_scheduler_type == "minimind":
        return lambda step: learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps)))
    from transformers import get_scheduler  # late: it brings peft, half a second

    placeholder = torch.optim.SGD([torch.zeros(())], lr=1.0)
    scheduler = get_scheduler(
        lr_scheduler_type,
        placeholder,
        num_warmup_steps=math.ceil(total_steps * warmup_ratio),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=_NEEDS_MINIMUM.get(lr_scheduler_type, {}),
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: learning_rate * factor(step - 1)
