"""Filling the reference cache: every pair scored once, by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from minimind_dpo.data.batch import pair_key
from minimind_dpo.engine.console import Progress
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.ranks import on_main, stop_together
from minimind_dpo.errors import UserError
from minimind_dpo.objective.layout import PairLayout
from minimind_dpo.reference.cache import CHUNK_PAIRS, MERGED_CHUNKS, Needed, ReferenceCache

logger = logging.getLogger(__name__)

# Pairs are scored without gradients, so this takes less memory than one training pair of the default max_length, which
# has as many tokens; larger batches are no faster on a CPU (docs/training.md).
_BATCH_TOKENS = 2048


def open_complete(engine: Engine, cache: ReferenceCache, needed: Sequence[Needed]) -> bool:
    """Open the cache if it is known to hold all of `needed`, without a look at the pairs. Collective."""
    names = on_main(engine, lambda: cache.marked(needed))
    if names is None:
        return False
    cache.open(names)
    logger.info(
        "reference cache: all %d pairs are in %s", sum(len(pairs.positions) for pairs in needed), cache.directory
    )
    return True


def fill_cache(
    engine: Engine,
    cache: ReferenceCache,
    scorer: nn.Module,
    layout: PairLayout,
    needed: Sequence[Needed],
    stop: Callable[[], bool],
    reads: str = "per_token_logps",
) -> int:
    """Score what the cache lacks of `needed` and open it; the number of pairs scored. Collective.

    `reads` is the value [M] of `PairScores` that is kept.

    Raises:
        StoppedEarly: `stop` said so on any rank; the next call goes on there.
        UserError: somebody else deletes the cache's files meanwhile.
    """
    filler = CacheFiller(cache, scorer, layout, engine, reads)
    scored = 0
    for pairs in needed:
        if on_main(engine, partial(cache.marked, [pairs])) is None:
            scored += filler.fill(pairs, stop)
    if not open_complete(engine, cache, needed):
        raise UserError(
            f"reference cache: files of {cache.directory} went while it was filled; does another program "
            "clean up there?"
        )
    return scored


class CacheFiller:
    """Scores pairs into a cache, chunks dealt out to the ranks in turn.

    A chunk is a fixed group of pairs, scored as a whole or not at all and in batches that follow from it alone, so
    the numbers do not depend on where an earlier fill was interrupted, on the number of ranks or on the batch size
    of training.

    Args:
        cache: to fill.
        scorer: of the reference, ready for forward passes and in evaluation mode.
        layout: of its batches.
        engine: of the run.
        reads: the value [M] of `PairScores` that is kept.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        scorer: nn.Module,
        layout: PairLayout,
        engine: Engine,
        reads: str = "per_token_logps",
    ):
        self.cache, self.scorer, self.layout = cache, scorer, layout
        self.engine, self._reads = engine, reads

    @torch.no_grad()
    def fill(self, needed: Needed, stop: Callable[[], bool]) -> int:
        """Score what the cache lacks of `needed` and mark it as complete; every rank must call it.

        Args:
            needed: the pairs that will be looked up.
            stop: asked before each chunk whether to end early.

        Returns:
            Pairs that were scored, on all ranks.

        Raises:
            StoppedEarly: `stop` said so on any rank; finished chunks are kept.
        """
        self.cache.directory = on_main(self.engine, self.cache.claim)
        self.cache.open(on_main(self.engine, self.cache.mend))
        with Progress("reference log-probabilities", "pairs", len(needed.positions), self.engine.is_main) as progress:
            scored = self._fill(needed, stop, progress)
        self.engine.wait()
        on_main(self.engine, lambda: self.cache.finish(needed))
        return int(self.engine.sum(torch.tensor(scored, device=self.engine.device)))

    def _fill(self, needed: Needed, stop: Callable[[], bool], progress: Progress) -> int:
        """Score this rank's share of the chunks; how many pairs that were."""
        world_size, rank = self.engine.world_size, self.engine.rank
        scored = merged = 0
        for first in range(0, needed.chunks(), world_size):
            # also keeps the ranks in step, so that none waits longer than a chunk takes
            stop_together(self.engine, stop, "while computing reference log-probabilities")
            if first - merged >= MERGED_CHUNKS and self.engine.is_main:
                self.cache.merge()  # what is complete by now; the others go on to their next chunk
                merged = first
            rows = needed.rows(first + rank) if first + rank < needed.chunks() else []
            keys = [pair_key(row) for row in rows]
            batches = [] if self.cache.has(keys) else split_by_tokens(rows)
            passes = int(self.engine.largest(len(batches))) if self.engine.gathers_weights else len(batches)
            if passes:
                self._score(batches, passes, rows or needed.rows(first))
                scored += sum(map(len, batches))
            progress.update(min(CHUNK_PAIRS * world_size, len(needed.positions) - CHUNK_PAIRS * first))
        return scored

    def _score(self, batches: list[list[dict[str, Any]]], passes: int, spare: list[dict[str, Any]]) -> None:
        """Write a chunk's batches to the cache, in `passes` forward passes; those left over score a `spare` pair."""
        keys: list[bytes] = []
        logps: list[np.ndarray] = []
        for index in range(passes):
            batch = self.layout(batches[index] if index < len(batches) else spare[:1]).to(self.engine.device)
            with self.engine.autocast():
                values = getattr(self.scorer(batch), self._reads).float().cpu()
            if index < len(batches):
                sides = [part.numpy() for part in values.split(batch.side_sizes)]
                logps += [np.concatenate(pair) for pair in zip(sides[::2], sides[1::2], strict=True)]
                keys += batch.keys
        if keys:
            self.cache.write_chunk(keys, logps)


def split_by_tokens(rows: Sequence[dict[str, Any]], most: int = _BATCH_TOKENS) -> list[list[dict[str, Any]]]:
    """Cut a chunk into batches, in its order: at least one pair each, and at most `most` tokens of both sides."""
    batches: list[list[dict[str, Any]]] = []
    room = 0
    for row in rows:
        tokens = len(row["chosen_input_ids"]) + len(row["rejected_input_ids"])
        if not batches or tokens > room:
            batches.append([])
            room = most
        batches[-1].append(row)
        room -= tokens
    return batches
