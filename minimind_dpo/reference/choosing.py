"""The reference of a run: which mode, which model, and made ready beside the prepared policy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.engine.ranks import decide, on_main
from minimind_dpo.models.fast.products import TORCH
from minimind_dpo.objective.layout import PairLayout, adopt_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import Needed, ReferenceCache, cache_directory
from minimind_dpo.reference.digest import reference_digest
from minimind_dpo.reference.filling import fill_cache, open_complete
from minimind_dpo.reference.following import FollowingReference, Place, parameter_places
from minimind_dpo.reference.sources import AdapterReference, CachedReference, LiveReference, NoReference, Reference

logger = logging.getLogger(__name__)


@dataclass
class LoadedReference:
    """A reference before the engine has taken the policy over.

    Attributes:
        mode: live, offload, cache or adapter; none where no loss reads a reference.
        model: None where the policy's start, itself, is the reference.
        digest: of its weights; `none` without it.
        by_auto: `auto` decided on the mode; a live reference then gives way to a cache that is complete.
        places: of its parameters, where it is to follow the policy.
    """

    mode: str
    model: PreTrainedModel | None
    digest: str
    by_auto: bool = False
    places: dict[str, list[Place]] = field(default_factory=dict)


def weight_rounding(config: TrainConfig) -> str:
    """How a reference's weights are rounded: as the policy's start, of which with LoRA nothing is trained."""
    return "nearest" if config.lora_r is not None else config.weight_rounding


def choose_mode(config: TrainConfig, engine: Engine, single_pass: bool) -> tuple[str, str]:
    """The reference mode that `config` asks for or `auto` decides on, and why.

    Args:
        config: of the run.
        engine: of the run.
        single_pass: no pair will be scored a second time.
    """
    if not config.needs_reference:
        return "none", f"{' and '.join(config.loss_type)} reads none"
    if config.sync_ref_model:
        return "live", "it follows the policy"
    if config.reference != "auto":
        return config.reference, "as configured"
    if config.switches_adapters_off:
        return "adapter", "the policy without its LoRA matrices is the reference; nothing more to hold or to compute"
    if single_pass and not engine.divides_states:
        return "live", "every pair is scored once, so filling a cache would only delay the first step"
    return "cache", "log-probabilities are computed once; no second model stays in memory"


def load_reference(
    config: TrainConfig,
    engine: Engine,
    policy: PreTrainedModel,
    load: Callable[[TrainConfig, str, str], PreTrainedModel],
    single_pass: bool,
) -> LoadedReference:
    """Load or copy the reference model, as long as `policy` is still as loaded. Collective.

    Args:
        config: of the run.
        engine: of the run.
        policy: on the CPU, or divided between the ranks.
        load: how a model is loaded as `config` asks for it, from a path and in a type.
        single_pass: no pair will be scored a second time.
    """
    mode, reason = choose_mode(config, engine, single_pass)
    logger.info("reference: %s (%s)", mode, reason)
    if mode == "none":
        return LoadedReference(mode, None, digest="none")
    model, path, dtype = None, config.ref_model_name_or_path, config.ref_dtype
    own_type = dtype != "auto"
    if path is None and (own_type or mode in ("live", "offload")):
        if own_type or engine.gathers_weights:  # divided weights belong to their engine: they can't be copied
            path = config.model_name_or_path
        else:
            model = copy.deepcopy(policy)
    if path is not None:
        with engine.loading_reference(offload=mode == "offload"):
            model = load(config, path, dtype if own_type else "float32")
    digest = reference_digest(policy if model is None else model, engine.weights_dtype)
    places = {} if model is None or not config.sync_ref_model else parameter_places(model)
    by_auto = config.reference == "auto" and not config.sync_ref_model
    return LoadedReference(mode, model, digest, by_auto, places)


def make_reference(
    config: TrainConfig,
    engine: Engine,
    loaded: LoadedReference,
    policy: PairScorer,
    layout: PairLayout,
    needed: list[Needed],
    stop: Callable[[], bool],
) -> Reference:
    """The reference in its mode, for batches of `layout`; a cache is filled for the `needed` pairs first. Collective.

    Raises:
        StoppedEarly: `stop` said so while a cache was filled.
        UserError: a named reference cannot score the policy's batches.
    """
    if loaded.mode == "none":
        return NoReference()
    if loaded.mode == "adapter":
        return AdapterReference(policy, engine.autocast)
    cache = None
    if loaded.mode == "cache" or loaded.by_auto:
        cache = make_cache(config, engine, loaded.digest, layout)
        if open_complete(engine, cache, needed):
            loaded.model = None
            if loaded.mode != "cache":
                logger.info("reference: cache after all (it is complete)")
            return CachedReference(cache)
        if loaded.by_auto and on_main(engine, lambda: cache.was_complete(needed)):
            loaded.mode = "cache"  # it was damaged since: mended, it gives the same bits again
    scorer: Any = policy
    if loaded.model is not None:
        scorer = PairScorer(loaded.model, policy.library)
        scorer = engine.freeze(scorer, loaded.mode == "offload", weight_rounding(config))
        loaded.model = None
        named = config.ref_model_name_or_path is not None
        adopt_layout(unwrap(scorer), policy, layout, engine.device, engine.autocast, decide, named=named)
    if cache is None or loaded.mode != "cache":
        return LiveReference(scorer, engine.autocast)
    training = scorer.training
    scorer.eval()
    fill_cache(engine, cache, scorer, layout, needed, stop)
    scorer.train(training)
    if scorer is not policy:
        engine.release(scorer)
    return CachedReference(cache)


def make_following(
    config: TrainConfig, engine: Engine, loaded: LoadedReference, scorer: nn.Module
) -> FollowingReference | None:
    """What moves the reference after the policy, if it does; `scorer` is the policy's, as the engine prepared it."""
    if not config.sync_ref_model:
        return None
    share, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
    return FollowingReference(
        engine, scorer, loaded.places, share=share, every=every, weight_rounding=config.weight_rounding
    )


def make_cache(
    config: TrainConfig, engine: Engine, digest: str, layout: PairLayout, apart: str | None = None
) -> ReferenceCache:
    """The cache of one model under the numeric settings of the run, nothing opened yet.

    Values of a shared cache may differ in their last bits with what it was filled for first, since they depend on the
    pairs that are scored together; one that is kept `apart` by a name is shared by what gives the same name only.
    """
    numerics = {
        "precision": engine.precision,
        "weights": str(engine.weights_dtype),
        "attention": config.attn_implementation,
        "layout": layout.id,
        "device": engine.device.type,
    }
    if engine.precision != "no" and weight_rounding(config) != "nearest":
        numerics["weight_rounding"] = weight_rounding(config)
    if config.matmul != TORCH:  # the caches there were before there was another stay valid
        numerics["matmul"] = config.matmul
    if apart is not None:
        numerics["apart"] = apart
    return ReferenceCache(cache_directory(digest, numerics))
