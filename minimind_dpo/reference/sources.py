"""Where a run's reference log-probabilities come from: a frozen model, the policy's base model, or the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine.transfer import send
from minimind_dpo.errors import UserError
from minimind_dpo.objective.layout import Autocast, Collate
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import ReferenceCache


class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """[M] log-probabilities (nats) of the counted tokens of `batch`, in its canonical order, no gradient."""
        ...

    def collating(self, layout: Collate) -> Collate:
        """`layout`, with what is known of a batch beforehand: for the processes that lay batches out."""
        return layout


class LiveReference(Reference):
    """A frozen model that scores every batch beside the policy, made ready by `Engine.freeze`."""

    def __init__(self, scorer: nn.Module, autocast: Autocast):
        """`autocast` gives the precision of the run's forward passes."""
        self.scorer = scorer
        self.autocast = autocast

    @torch.no_grad()
    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Score the batch with the frozen model."""
        with self.autocast():
            return self.scorer(batch).per_token_logps


class AdapterReference(Reference):
    """The policy itself with its adapters switched off."""

    def __init__(self, scorer: PairScorer, autocast: Autocast):
        self.scorer = scorer
        self.autocast = autocast

    @torch.no_grad()
    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Score the batch with the policy's base model."""
        training = self.scorer.training
        self.scorer.eval()
        self.scorer.model.disable_adapters()
        try:
            with self.autocast():
                return self.scorer(batch).per_token_logps
        finally:
            self.scorer.model.enable_adapters()
            self.scorer.train(training)


class NoReference(Reference):
    """Of losses that read none; rewards are then beta times the policy's own log-probabilities."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Zeros."""
        return torch.zeros(sum(batch.side_sizes), device=batch.input_ids.device)


class CachedReference(Reference):
    """Every pair's log-probabilities, read from a filled cache."""

    def __init__(self, cache: ReferenceCache):
        self.cache = cache

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """What came with the batch; else its pairs are looked up."""
        if batch.ref_per_token_logps is not None:
            return batch.ref_per_token_logps
        try:
            logps = np.concatenate(self.cache.get(batch.keys))
        except KeyError as error:
            self.cache.unmark()
            raise UserError(
                f"reference cache: {self.cache.directory} lacks pair {error}, although it was filled. Start again: it "
                "will be computed. If that does not help: on several nodes MINIMIND_DPO_CACHE must name a directory "
                "that all of them share"
            ) from None
        return send(torch.from_numpy(logps), batch.input_ids.device)

    def collating(self, layout: Collate) -> Collate:
        """Batches that bring their log-probabilities along, so that none is looked up while a device waits."""
        return partial(_with_logps, self.cache, layout)


def _with_logps(cache: ReferenceCache, layout: Collate, rows: Sequence[dict[str, Any]]) -> PairBatch:
    batch = layout(rows)
    try:
        logps = np.concatenate(cache.get(batch.keys))
    except KeyError:
        return batch  # the run's own process will miss it too, and say so
    return replace(batch, ref_per_token_logps=torch.from_numpy(logps))
