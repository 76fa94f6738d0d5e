"""Whether the host waits for the GPU anywhere in an optimizer step, as torch itself finds out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.shapes import WARM_UP, make_job
from benchmarks.peers import built
from minimind_dpo.training.batches import LoadedStep
from minimind_dpo.training.step import optimizer_step

# what the host has to read from a device before it can go on
_READ = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)


class Reads(TorchDispatchMode):
    """In a rehearsal, in place of torch's own look: raises where a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _READ:
            raise RuntimeError(f"{func} reads a number from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def unwaited() -> Iterator[None]:
    """torch raises where a call would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(notes: Notes, place: Place) -> None:
    """A step with each kind of reference, after some that may wait: allocators and libraries start then."""
    job, _ = make_job("tiny" if place.rehearses else "26m", place)
    for name in ("ours_live", "ours_cached"):
        training = built(name, job)
        training.scorer.train()
        loaded = []
        for plan in training.plans():
            rows = [training.train_data.dataset[int(pair)] for pair in plan.micro_batches[0].pairs]
            batch = training.reference.collating(training.layout)(rows)
            loaded.append(LoadedStep(plan, iter([batch.pin_memory() if place.device == "cuda" else batch])))
        for step in loaded[:WARM_UP]:
            optimizer_step(training, step, 0.0)
        watched: AbstractContextManager[Any] = unwaited() if place.device == "cuda" else Reads()
        where = None
        try:
            with watched:
                optimizer_step(training, loaded[WARM_UP], 0.0)
        except RuntimeError as error:
            traceback.print_exc()
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minimind_dpo" in frame.filename]
            where = f"{error}".splitlines()[0] + f" ({frames[-1].filename}:{frames[-1].lineno})"
        notes.check(f"{name}: a step waits for nothing", where is None, where)
