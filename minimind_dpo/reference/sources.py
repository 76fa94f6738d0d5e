"""Where a run's reference log-probabilities come from: a frozen model, the policy's base model, or the cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine.transfer import send
from minimind_dpo.errors import UserError
from minimind_dpo.objective.layout import Autocast
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import ReferenceCache


class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """[M] log-probabilities (nats) of the counted tokens of `batch`, in its canonical order, no gradient."""
        ...


class LiveReference:
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


class AdapterReference:
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


class NoReference:
    """Of losses that read none; rewards are then beta times the policy's own log-probabilities."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Zeros."""
        return torch.zeros(sum(batch.side_sizes), device=batch.input_ids.device)


class CachedReference:
    """Every pair's log-probabilities, read from a filled cache."""

    def __init__(self, cache: ReferenceCache):
        self.cache = cache

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Look the batch's pairs up."""
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
