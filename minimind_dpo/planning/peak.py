"""The peak of a rank on the device and on the host: the largest phase, and on the CPU what glibc's heap adds to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minimind_dpo.planning.allocation import PURPOSES, Allocation
from minimind_dpo.planning.heap import heap_holes
from minimind_dpo.planning.phases import LOADING, phases
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape


@dataclass(frozen=True)
class Peak:
    """The predicted peak of one memory for one rank.

    Attributes:
        phase: when it is reached.
        bytes_by_purpose: by the names of `PURPOSES`.
    """

    phase: str
    bytes_by_purpose: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes for all purposes."""
        return sum(self.bytes_by_purpose.values())


def predict(shape: ModelShape, run: RunShape, process: float, device_process: float = 0.0) -> tuple[Peak, Peak]:
    """The peak of one rank on the device and on the host, bytes; on the CPU both are the host's.

    Args:
        shape: of the model.
        run: of the run.
        process: resident bytes of a Python process that has the stack at work on a tiny model.
        device_process: what the device's own runtime takes.
    """
    alive = phases(shape, run)
    if run.cpu:
        peak = _resident_peak(shape, run, alive, process)
        return peak, peak
    device = _allocated_peak(alive, on_host=False, process=device_process)
    return device, _allocated_peak(alive, on_host=True, process=process)


def _sums(allocations: Iterable[Allocation]) -> dict[str, float]:
    sums = dict.fromkeys(PURPOSES, 0.0)
    for item in allocations:
        sums[item.purpose] += item.bytes
    return sums


def _allocated_peak(alive: dict[str, list[Allocation]], on_host: bool, process: float) -> Peak:
    """The largest phase, counting what is alive: what torch's CUDA allocator reports as allocated."""
    own = {phase: [item for item in items if item.on_host == on_host] for phase, items in alive.items()}
    phase = max(own, key=lambda name: sum(item.bytes for item in own[name]))
    return Peak(phase, _sums(own[phase]) | {"process": process})


def _resident_peak(shape: ModelShape, run: RunShape, alive: dict[str, list[Allocation]], process: float) -> Peak:
    """The resident peak under glibc.

    Blocks below `LARGE` come from a heap that keeps its high-water mark, larger ones are given back when freed. So the
    largest heap of any phase and the largest mapped memory of any phase add up; the difference to the largest phase,
    and the heap's holes, are the allocator's.
    """
    running = {name: items for name, items in alive.items() if name != LOADING}
    heap = max(sum(item.heap for item in items) for items in running.values()) + heap_holes(shape, run)
    mapped = max(sum(item.mapped for item in items) for items in running.values())
    phase = max(running, key=lambda name: sum(item.bytes for item in running[name]))
    own = _sums(running[phase])
    own["allocator"] = heap + mapped - sum(own.values())
    own["process"] = process
    loading = Peak(LOADING, _sums(alive[LOADING]) | {"process": process})
    return max(Peak(phase, own), loading, key=lambda peak: peak.total)
