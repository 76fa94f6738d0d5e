"""Shapes of models and runs to plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minimind_dpo.planning.allocation import Allocation
from minimind_dpo.planning.configurations import read_zero
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape

BILLION = ModelShape(
    parameters=(10**6,) * 1000,
    adapters=(),
    layers=10,
    hidden=1000,
    heads=10,
    query=1000,
    key_value=200,
    intermediate=4000,
    dense_blocks=1,
    routed=0,
    gated=True,
    normed_heads=False,
    fused=True,
    vocab=1000,
)


def planned(stage: int = 0, offload: str = "none", cpu: bool = False, **options: Any) -> RunShape:
    """A run under the settings of configs/deepspeed."""
    return RunShape(zero=read_zero(stage, offload, cpu), cpu=cpu, **options)


def total(allocations: Iterable[Allocation], on_host: bool | None = None) -> float:
    """Bytes of all of them, or of those on the host or on the device."""
    return sum(item.bytes for item in allocations if on_host in (None, item.on_host))
