"""TRL's DPOTrainer on the pairs of the stage `speed`, its reference beside the policy as there."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu_check.demo import LN2
from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.shapes import SHAPES, WARM_UP, make_job
from benchmarks.gpu_check.timing import rounded, wait
from benchmarks.peers import trl
from benchmarks.workers import Gate


class _Enough(Exception):
    pass


class Clock(Gate):
    """Ends a contestant after so many steps, and knows when each of them ended."""

    def __init__(self, steps: int, device: str):
        self._steps, self._device = steps, device
        self.losses: list[float] = []
        self.ends: list[float] = []

    def step(self, loss: float) -> None:
        """One optimizer step is done."""
        wait(self._device)
        self.losses.append(loss)
        self.ends.append(time.perf_counter())
        if len(self.ends) == self._steps:
            raise _Enough


def run(notes: Notes, place: Place) -> None:
    """A row a shape, beside what `speed` found."""
    ours = place.found("speed")
    for shape in ["tiny"] if place.rehearses else SHAPES:
        job, _ = make_job(shape, place)
        clock = Clock(job.steps, place.device)
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            trl("trl_live", job, clock)
        except _Enough:
            pass
        except torch.OutOfMemoryError:
            notes.skip(shape, "out of memory")
            continue
        each = 1e3 * (clock.ends[-1] - clock.ends[WARM_UP - 1]) / (len(clock.ends) - WARM_UP) / job.batch
        figures = {"ms a pair": rounded(each)}
        if place.device == "cuda":
            figures["peak GiB"] = rounded(torch.cuda.max_memory_allocated() / 2**30)
        if (row := ours.get(f"{shape}, ours")) is not None:
            figures["ours is so many times as fast"] = rounded(each / row["ms a pair"])
        notes.figure(shape, figures)
        notes.close(f"{shape}: its loss", clock.losses[0], LN2, 0.05)
