"""Sums over many short runs of rows at once, as a GPU likes them."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_segments(values: Tensor, ends: Tensor) -> Tensor:
    """Sums [S, ...] over consecutive rows of values [N, ...].

    Args:
        values: on a CPU or GPU.
        ends: [S + 1] where each segment begins, and N.
    """
    return torch.segment_reduce(values, "sum", offsets=ends, axis=0, unsafe=True)  # a safe one waits for the device
