"""What a run's device is told before it starts, and what it can hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either; it warns of the second, the older
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_MEMORY: Any = deterministic  # torch makes its switch as the module is imported


def grow_segments() -> None:
    """Have CUDA's allocator enlarge the segments it has, unless the user has set it up. For before CUDA starts.

    Packed rows have another length each step. Segments of fixed sizes would be left with holes that fit no later row,
    and a run that needs half of the memory ends in want of it. On Linux only, where the driver maps memory so.
    """
    if torch.version.cuda is not None and sys.platform == "linux" and not any(map(os.environ.get, _ALLOCATOR)):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


@contextmanager
def repeating(asked: bool) -> Iterator[None]:
    """Around a run, from before CUDA starts: with `asked`, operations in the form that gives the same bits every time.

    On a GPU some of them add with atomics otherwise, in whatever order threads come, and cuBLAS divides a product as
    its workspace allows. One that has no such form raises. Afterwards everything is as it was.
    """
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, workspace = _MEMORY.fill_uninitialized_memory, os.environ.get(_CUBLAS)
    try:
        os.environ.setdefault(_CUBLAS, ":4096:8")  # of the two values that torch takes the faster one
        torch.use_deterministic_algorithms(True)
        _MEMORY.fill_uninitialized_memory = False  # it finds memory read unwritten, which takes time
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _MEMORY.fill_uninitialized_memory = fills
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


@cache
def sum_dtype(device: torch.device | str) -> torch.dtype:
    """The type of sums on a device: float64, or float32 where there is none (Apple's GPUs, some of Intel's).

    A sum of some hundred nats has steps of 1e-5 in float32, and losses are made of differences of such sums.
    """
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):  # the first by MPS, the second by others
        return torch.float32


def summable(tensor: Tensor) -> Tensor:
    """The tensor in the type of sums on its device."""
    return tensor.to(sum_dtype(tensor.device))


def held_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type in which a device holds what has `dtype` on the host."""
    return sum_dtype(device) if dtype == torch.float64 else dtype
