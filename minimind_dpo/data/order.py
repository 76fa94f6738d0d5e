"""Which pairs, in which order, on which rank: pure functions of (seed, epoch, batch shape, world size).

Nothing here holds state, so a resumed run knows its place from the number of finished optimizer steps alone,
and the pairs of a step are the same for every factorisation of the global batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Positions of pairs in the dataset that one rank scores together.

    Attributes:
        pairs: dataset positions; never empty.
        places: of the same pairs in their optimizer step's order.
        counted: False for a filler, which a rank without pairs of its own in a partial step runs so that all
            ranks make the same number of collective calls; its loss has weight 0.
    """

    pairs: list[int]
    places: list[int]
    counted: bool = True


@dataclass(frozen=True, slots=True)
class PairOrder:
    """The pairs of every optimizer step of a run.

    Attributes:
        num_pairs: pairs in the dataset.
        global_batch: pairs an optimizer step (micro-batch x accumulation x ranks).
        seed: seed of the shuffling.
        shuffle: False keeps file order.
    """

    num_pairs: int
    global_batch: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last one may be partial."""
        return math.ceil(self.num_pairs / self.global_batch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that optimizer step `step` (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    def step_pairs(self, step: int) -> np.ndarray:
        """Dataset positions [n] of optimizer step `step` (from 1), n <= global_batch."""
        within = (step - 1) % self.steps_per_epoch
        order = _epoch_order(self.num_pairs, self.seed, self.epoch_of(step), self.shuffle)
        return order[within * self.global_batch : (within + 1) * self.global_batch]

    def pairs_seen(self, step: int) -> int:
        """Pairs trained on once optimizer step `step` is done (repeats in later epochs count again)."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.num_pairs + min(within * self.global_batch, self.num_pairs)


@lru_cache(maxsize=2)
def _epoch_order(num_pairs: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_pairs)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One rank's share of an optimizer step.

    Attributes:
        step: its number, from 1.
        num_pairs: pairs of the step on all ranks.
        micro_batches: this rank's, in order; every rank has as many.
    """

    step: int
    num_pairs: int
    micro_batches: list[MicroBatch]


def plan_steps(order: PairOrder, steps: range, tokens: np.ndarray, **division: Any) -> Iterator[StepPlan]:
    """A rank's share in each of `steps`; `tokens` [N] are the costs of all pairs, `division` is `split_step`'s."""
    for step in steps:
        pairs = order.step_pairs(step)
        yield StepPlan(step, len(pairs), split_step(pairs, tokens[pairs], **division))


def total_steps(num_pairs: int, global_batch: int, num_train_epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run; `max_steps` wins when positive."""
    if max_steps > 0:
        return max_steps
    return max(1, math.ceil(num_train_epochs * math.ceil(num_pairs / global_batch) - 1e-9))


def split_step(
    pairs: np.ndarray,
    tokens: np.ndarray,
    *,
    world_size: int,
    rank: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
) -> list[MicroBatch]:
    """Divide the pairs of one optimizer step among ranks; the micro-batches of `rank`, in order.

    The longest pair first, each goes to the micro-batch that has the fewest tokens so far and room for it (Graham 1969,
    "Bounds on multiprocessing timing anomalies"): no rank waits long for another, and no micro-batch needs much more
    memory than the rest. Every rank gets the same number of micro-batches; where a partial step leaves some of them
    empty they run the step's shortest pair as a filler.

    Args:
        pairs: [n] dataset positions.
        tokens: [n] their costs in tokens.
        world_size: number of ranks.
        rank: this one.
        micro_batch_size: most pairs a micro-batch.
        max_tokens: most tokens a micro-batch of several pairs; the step takes as many as that needs.
    """
    slots = math.ceil(len(pairs) / (micro_batch_size * world_size))
    members = _filled(tokens, slots * world_size, micro_batch_size)
    while max_tokens and any(len(own) > 1 and tokens[own].sum() > max_tokens for own in members):
        slots += 1
        members = _filled(tokens, slots * world_size, micro_batch_size)
    members.sort(key=lambda own: -int(tokens[own].sum()))  # a slot's micro-batches run at the same time
    batches = []
    for slot in range(slots):
        column = rank if slot % 2 == 0 else world_size - 1 - rank
        own = sorted(members[slot * world_size + column])
        counted, own = bool(own), own or [int(tokens.argmin())]
        batches.append(MicroBatch(pairs[own].tolist(), own, counted))
    return batches


def _filled(tokens: np.ndarray, count: int, size: int) -> list[list[int]]:
    """Indices of pairs in `count` micro-batches of at most `size`."""
    members: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for pair in np.argsort(-tokens, kind="stable").tolist():
        load, index = heapq.heappop(loads)
        members[index].append(pair)
        if len(members[index]) < size:
            heapq.heappush(loads, (load + int(tokens[pair]), index))
    return members
