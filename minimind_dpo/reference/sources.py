"""Reference log-probabilities: scored live beside the policy, or once and read back from the cache on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minimind_dpo.data.batch import PairBatch, pair_key
from minimind_dpo.engine.launcher import whole
from minimind_dpo.engine.ranks import on_main
from minimind_dpo.errors import StoppedEarly, UserError
from minimind_dpo.objective.layout import Autocast, PairLayout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import SEGMENT_CHUNKS, Needed, ReferenceCache

logger = logging.getLogger(__name__)

# Pairs are scored without gradients, so this takes less memory than one training pair of the default max_length, which
# has as many tokens; larger batches are no faster on a CPU (docs/training.md).
_BATCH_TOKENS = 2048


class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """[M] log-probabilities (nats) of the counted tokens of `batch`, in its canonical order, no gradient."""
        ...


class LiveReference:
    """A frozen model that scores every batch beside the policy, made ready by `engine.freeze`."""

    def __init__(self, scorer: nn.Module, autocast: Autocast):
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


def reference_digest(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """sha256 of a model's configuration and weights (names, types, shapes, bytes), whatever path they came from.

    Args:
        model: whole or sharded; if sharded, every rank must call this.
        dtype: the type that the engine rounds all weights to before it computes with them, if it does.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with whole([tensor]):
            values = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CachedReference:
    """Reads every pair's log-probabilities from a filled cache."""

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
        return torch.from_numpy(logps).to(batch.input_ids.device)


class CacheFiller:
    """Scores pairs into a cache, chunks dealt out to the ranks in turn.

    A chunk is a fixed group of pairs, scored as a whole or not at all and in batches that follow from it alone, so
    the numbers do not depend on where an earlier fill was interrupted, on the number of ranks or on the batch size
    of training.

    Args:
        cache: to fill.
        scorer: of the reference, ready for forward passes and in evaluation mode.
        layout: of its batches.
        accelerator: of the run.
        together: a forward pass needs all ranks; those with nothing left to score then repeat a batch.
    """

    def __init__(
        self, cache: ReferenceCache, scorer: nn.Module, layout: PairLayout, accelerator: Accelerator, together: bool
    ):
        self.cache, self.scorer, self.layout = cache, scorer, layout
        self.accelerator, self.together = accelerator, together

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
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.cache.open(on_main(self.accelerator, self.cache.merge))
        scored = merged = 0
        rounds = tqdm(
            range(0, needed.chunks(), world_size),
            desc="reference log-probabilities",
            unit="chunk",
            unit_scale=world_size,
            disable=not self.accelerator.is_main_process,
        )
        for first in rounds:
            if self._most(stop()):  # also keeps the ranks in step, so that none waits longer than a chunk takes
                raise StoppedEarly("while computing reference log-probabilities")
            if first - merged >= SEGMENT_CHUNKS and self.accelerator.is_main_process:
                self.cache.merge()  # what is complete by now; the others go on to their next chunk
                merged = first
            rows = needed.rows(first + rank) if first + rank < needed.chunks() else []
            keys = [pair_key(row) for row in rows]
            batches = [] if self.cache.has(keys) else split_by_tokens(rows)
            passes = self._most(len(batches)) if self.together else len(batches)
            if passes:
                self._score(batches, passes, rows or needed.rows(first))
                scored += sum(map(len, batches))
        self.accelerator.wait_for_everyone()
        on_main(self.accelerator, lambda: self.cache.finish(needed))
        return int(self.accelerator.reduce(torch.tensor(scored, device=self.accelerator.device), "sum"))

    def _most(self, count: int) -> int:
        """The largest of all ranks' counts."""
        return int(self.accelerator.gather(torch.tensor([int(count)], device=self.accelerator.device)).max())

    def _score(self, batches: list[list[dict[str, Any]]], passes: int, spare: list[dict[str, Any]]) -> None:
        """Write a chunk's batches to the cache, in `passes` forward passes; those left over score a `spare` pair."""
        keys: list[bytes] = []
        logps: list[np.ndarray] = []
        for index in range(passes):
            batch = self.layout(batches[index] if index < len(batches) else spare[:1]).to(self.accelerator.device)
            with self.accelerator.autocast():
                per_token_logps = self.scorer(batch).per_token_logps.float().cpu()
            if index < len(batches):
                sides = [part.numpy() for part in per_token_logps.split(batch.side_sizes)]
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
