"""Optimizer steps with their micro-batches read and laid out, ahead of the step where processes are to spare."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from itertools import islice, tee
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.data.order import StepPlan
from minimind_dpo.ending import STOP_SIGNALS
from minimind_dpo.objective.layout import Collate


class LoadedStep(NamedTuple):
    """An optimizer step, and its micro-batches on the host, laid out as they are asked for."""

    plan: StepPlan
    batches: Iterator[PairBatch]


def load_steps(
    dataset: Any, plans: Iterable[StepPlan], collate: Collate, workers: int | None, device: torch.device
) -> Iterator[LoadedStep]:
    """The steps of `plans` in order; each must be used up before the next is asked for.

    Args:
        dataset: tokenised pairs.
        plans: which of them, in which micro-batches.
        collate: makes a batch of rows.
        workers: processes that work ahead; None takes none on a CPU, which has no core to spare, and 2 beside a GPU.
        device: that the batches will go to; for a CUDA device they lie in pinned memory.
    """
    on_gpu = device.type != "cpu"
    count = (2 if on_gpu else 0) if workers is None else workers
    ours, theirs = tee(plans)
    sampler: Any = (micro_batch.pairs for plan in theirs for micro_batch in plan.micro_batches)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=count,
        worker_init_fn=_start_worker if count else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    for plan in ours:
        yield LoadedStep(plan, islice(batches, len(plan.micro_batches)))


def _start_worker(_: int) -> None:
    """A signal to all of a job's processes is for the ranks to answer: a worker ends when its rank does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
