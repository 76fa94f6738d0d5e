"""Seconds on a device, which works on after a call has come back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: str) -> None:
    """Until the device has done all that it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def rounded(number: float) -> float:
    """To four digits."""
    return float(f"{number:.4g}")


def median_seconds(function: Callable[[], Any], device: str, rounds: int = 7, calls: int = 3) -> float:
    """Median over rounds of the seconds that a call takes, several of them in a row, after one to warm up."""
    function()
    seconds = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        seconds.append((time.perf_counter() - began) / calls)
    return statistics.median(seconds)
