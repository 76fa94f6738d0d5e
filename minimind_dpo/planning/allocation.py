"""Memory that a rank holds for one purpose: the unit in which a plan is added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from minimind_dpo.engine.cpu import LARGE

PURPOSES = (
    "process",
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "activations",
    "softmax",
    "logits head",
    "communication",
    "allocator",
)


class Allocation(NamedTuple):
    """Bytes held for one purpose.

    Attributes:
        purpose: one of `PURPOSES`.
        heap: bytes in blocks below `LARGE`, which glibc takes from its heap.
        mapped: bytes in larger blocks, which glibc maps one by one and gives back when they are freed.
        on_host: whether they lie in the host's memory where that is not the device's.
    """

    purpose: str
    heap: float
    mapped: float = 0.0
    on_host: bool = False

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.heap + self.mapped

    def scaled(self, share: float) -> Allocation:
        """This share of it."""
        return self._replace(heap=self.heap * share, mapped=self.mapped * share)


def allocate(purpose: str, blocks: Iterable[float], times: float = 1.0, on_host: bool = False) -> Allocation:
    """`times` every block of the given sizes in bytes."""
    sizes = list(blocks)
    mapped = sum(size for size in sizes if size >= LARGE)
    return Allocation(purpose, (sum(sizes) - mapped) * times, mapped * times, on_host)
