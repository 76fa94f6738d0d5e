"""A model's log-probabilities of held-out pairs, the same bits for any number of ranks. Collective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from minimind_dpo.config import TrainConfig
from minimind_dpo.data.prompts import Prompt
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.engine.ranks import decide, stop_together
from minimind_dpo.evaluation.pairs import Stored
from minimind_dpo.models.generation import Manner, generate
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import Needed
from minimind_dpo.reference.choosing import make_cache, weight_rounding
from minimind_dpo.reference.digest import reference_digest
from minimind_dpo.reference.filling import fill_cache
from minimind_dpo.reference.sources import CachedReference
from minimind_dpo.training.fitting import end_token_ids
from minimind_dpo.training.replies import told_replies

logger = logging.getLogger(__name__)

_SQUARES = "log_squares"


class Judge(NamedTuple):
    """What models are scored with.

    Attributes:
        engine: of all of them.
        sets: held-out pairs, by name.
        prompts: that they answer.
        stop: whether this process was asked to stop.
    """

    engine: Engine
    sets: Mapping[str, TokenizedData]
    prompts: Sequence[Prompt]
    stop: Callable[[], bool]

    def ready(self, config: TrainConfig, model: PreTrainedModel) -> nn.Module:
        """The frozen scorer of a model, to be released again."""
        scorer = PairScorer(model, config.matmul)
        return self.engine.freeze(scorer, False, weight_rounding(config))

    def stored(self, config: TrainConfig, digest: str, scorer: nn.Module, squares: bool = False) -> dict[str, Stored]:
        """Score every pair of every set once, or find it scored; by the sets' names.

        A chunk of 64 pairs is scored by itself, whichever rank does it, and none is shared with another set, so the
        values follow from model and set alone.

        Args:
            config: of the model.
            digest: of the model's weights.
            scorer: as `ready` gives it.
            squares: `PairScores.log_squares` are needed too.

        Raises:
            StoppedEarly: a signal to any rank; what is scored is kept.
        """
        engine, inner = self.engine, unwrap(scorer)
        layout = choose_layout(inner, config.attn_implementation, engine.device, engine.autocast, decide)
        kinds = ("per_token_logps", _SQUARES) if squares else ("per_token_logps",)
        found: dict[str, list[CachedReference]] = {}
        for kind in kinds:
            inner.squares = kind == _SQUARES
            for name, data in self.sets.items():
                cache = make_cache(config, engine, digest, layout, apart=f"{data.digest} {kind}")
                fill_cache(engine, cache, scorer, layout, [Needed(data, range(len(data)))], self.stop, kind)
                found.setdefault(name, []).append(CachedReference(cache))
        return {name: Stored(*caches) for name, caches in found.items()}

    def replies(self, config: TrainConfig, scorer: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """A model's replies to the prompts, as `training/replies.py` tells them.

        Raises:
            StoppedEarly: a signal to any rank.
        """
        model = unwrap(scorer).model
        manner = Manner(
            end_token_ids(model, tokenizer).tolist(), config.max_new_tokens, config.temperature, config.seed
        )
        check = partial(stop_together, self.engine, self.stop, "while models answered prompts")
        replies = generate(self.engine, model, [prompt.ids for prompt in self.prompts], manner, check)
        return told_replies(self.prompts, replies, tokenizer, manner)


def compare_digest(engine: Engine, model: PreTrainedModel, noted: str | None) -> str:
    """The digest of a baseline, and a warning where a run was trained beside another reference.

    DeepSpeed in half precision rounds a reference before it is digested, which is taken for the same.
    """
    digest = reference_digest(model, engine.weights_dtype)
    if noted not in (None, digest):
        others = {torch.bfloat16, torch.float16, None} - {engine.weights_dtype}
        if noted not in [reference_digest(model, dtype) for dtype in sorted(others, key=str)]:
            logger.warning(
                "the baseline is not to the bit what the run was trained beside: other weights, or another precision; "
                "name what it is with --baseline"
            )
    return digest
