"""The reference of a run: which mode, which model, and made ready beside the prepared policy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.launcher import (
    divides_states,
    freeze,
    is_sharded,
    loading_reference,
    release,
    scoring_dtype,
    unwrap,
)
from minimind_dpo.engine.ranks import decide, on_main
from minimind_dpo.errors import UserError
from minimind_dpo.objective.layout import PairLayout, adopt_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import Needed, ReferenceCache, cache_directory
from minimind_dpo.reference.sources import (
    AdapterReference,
    CachedReference,
    CacheFiller,
    LiveReference,
    Reference,
    reference_digest,
)

logger = logging.getLogger(__name__)


@dataclass
class LoadedReference:
    """A reference before the engine is there.

    Attributes:
        mode: live, offload, cache or adapter.
        model: None where the policy's start, itself, is the reference.
        digest: of its weights.
        chosen: by `auto`; a live reference then gives way to a cache that is complete.
    """

    mode: str
    model: PreTrainedModel | None
    digest: str
    chosen: bool = False


def switches_adapters_off(config: TrainConfig) -> bool:
    """Whether `auto` needs no reference of its own."""
    return config.reference == "auto" and config.lora_r is not None and config.ref_model_name_or_path is None


def choose_mode(config: TrainConfig, accelerator: Accelerator, once: bool) -> tuple[str, str]:
    """The reference mode that `config` asks for or `auto` chooses, and why.

    Args:
        config: of the run.
        accelerator: of the run.
        once: no pair will be scored a second time.
    """
    if config.reference != "auto":
        return config.reference, "as configured"
    if switches_adapters_off(config):
        return "adapter", "the policy without its LoRA matrices is the reference; nothing more to hold or to compute"
    if once and not divides_states(accelerator):
        return "live", "every pair is scored once, so filling a cache would only delay the first step"
    return "cache", "log-probabilities are computed once; no second model stays in memory"


def load_reference(
    config: TrainConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel,
    load: Callable[[TrainConfig, str], PreTrainedModel],
    once: bool,
) -> LoadedReference:
    """Load or copy the reference model, as long as `policy` is still as loaded; `once` as above. Collective."""
    mode, reason = choose_mode(config, accelerator, once)
    logger.info("reference: %s (%s)", mode, reason)
    model, path = None, config.ref_model_name_or_path
    if path is None and mode in ("live", "offload"):
        if is_sharded(accelerator):  # sharded weights belong to their engine: they are loaded again, not copied
            path = config.model_name_or_path
        else:
            model = copy.deepcopy(policy)
    if path is not None:
        with loading_reference(accelerator, offload=mode == "offload"):
            model = load(config, path)
    digest = reference_digest(policy if model is None else model, scoring_dtype(accelerator))
    return LoadedReference(mode, model, digest, chosen=config.reference == "auto")


def make_reference(
    config: TrainConfig,
    accelerator: Accelerator,
    loaded: LoadedReference,
    policy: PairScorer,
    layout: PairLayout,
    needed: list[Needed],
    stop: Callable[[], bool],
) -> Reference:
    """The reference in its mode, for batches of `layout`; a cache is filled for the `needed` pairs first."""
    if loaded.mode == "adapter":
        return AdapterReference(policy, accelerator.autocast)
    reads_cache = loaded.mode == "cache" or loaded.chosen
    cache = make_cache(config, accelerator, loaded.digest, layout) if reads_cache else None
    if cache is not None and open_complete(accelerator, cache, needed):
        loaded.model = None
        return CachedReference(cache)
    scorer: Any = policy
    if loaded.model is not None:
        scorer = freeze(accelerator, PairScorer(loaded.model), offload=loaded.mode == "offload")
        loaded.model = None
        adopt_layout(
            unwrap(scorer),
            policy,
            layout,
            accelerator.device,
            accelerator.autocast,
            decide,
            named=config.ref_model_name_or_path is not None,
        )
    if cache is None or loaded.mode != "cache":
        return LiveReference(scorer, accelerator.autocast)
    training = scorer.training
    fill_cache(accelerator, cache, scorer.eval(), layout, needed, stop)
    scorer.train(training)
    if scorer is not policy:
        release(scorer)
    return CachedReference(cache)


def make_cache(config: TrainConfig, accelerator: Accelerator, digest: str, layout: PairLayout) -> ReferenceCache:
    """The cache of one reference under the numeric settings of the run, nothing opened yet."""
    return ReferenceCache(
        cache_directory(
            digest,
            {
                "precision": accelerator.mixed_precision,
                "weights": str(scoring_dtype(accelerator)),
                "attention": config.attn_implementation,
                "layout": layout.id,
                "device": accelerator.device.type,
            },
        )
    )


def open_complete(accelerator: Accelerator, cache: ReferenceCache, needed: Sequence[Needed]) -> bool:
    """Open the cache if it is known to hold all of `needed`, without a look at the pairs. Collective."""
    segments = on_main(accelerator, lambda: cache.marked(needed))
    if segments is None:
        return False
    cache.open(segments)
    logger.info("reference cache: all %d pairs are in %s", sum(len(part.positions) for part in needed), cache.directory)
    return True


def fill_cache(
    accelerator: Accelerator,
    cache: ReferenceCache,
    scorer: nn.Module,
    layout: PairLayout,
    needed: Sequence[Needed],
    stop: Callable[[], bool],
) -> int:
    """Score what the cache lacks of `needed` and open it; the number of pairs scored. Collective.

    Raises:
        StoppedEarly: `stop` said so on any rank; the next call goes on there.
    """
    filler = CacheFiller(cache, scorer, layout, accelerator, together=is_sharded(accelerator))
    scored = 0
    for part in needed:
        if on_main(accelerator, partial(cache.marked, [part])) is None:
            scored += filler.fill(part, stop)
    if not open_complete(accelerator, cache, needed):
        raise UserError(
            f"reference cache: files of {cache.directory} went while it was filled; does another program "
            "clean up there?"
        )
    return scored
