"""Micro-batches read and laid out, ahead of the step where processes are to spare."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import tee
from typing import Any

import torch
from torch.utils.data import DataLoader

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.data.order import MicroBatch
from minimind_dpo.objective.layout import PairLayout

Batches = Iterator[tuple[PairBatch, bool]]


def load_batches(
    dataset: Any, plan: Iterator[MicroBatch], layout: PairLayout, workers: int | None, device: torch.device
) -> Batches:
    """The micro-batches of `plan`, laid out on the host, each with its `counted` flag.

    Args:
        dataset: tokenised pairs.
        plan: which of them, in order.
        layout: of a batch.
        workers: processes that work ahead; None takes none on a CPU, which has no core to spare, and 2 beside a GPU.
        device: that the batches will go to; for a GPU they lie in pinned memory.
    """
    on_gpu = device.type != "cpu"
    count = (2 if on_gpu else 0) if workers is None else workers
    ours, theirs = tee(plan)
    sampler: Any = (micro_batch.pairs for micro_batch in theirs)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=layout,
        num_workers=count,
        worker_init_fn=_start_worker if count else None,
        pin_memory=on_gpu,
    )
    for micro_batch, batch in zip(ours, loader, strict=True):
        yield batch, micro_batch.counted


def _start_worker(_: int) -> None:
    """A signal to all of a job's processes is for the ranks to answer: a worker ends when its rank does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
