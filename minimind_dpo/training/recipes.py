"""Which recipe of configs/dpo is made for a model."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from minimind_dpo.config import TrainConfig
from minimind_dpo.config.names import is_raw_weights

logger = logging.getLogger(__name__)

# model_type of raw weights -> their generation, and the recipes: of the original's settings, and one that learns
_RECIPES = {
    "llama": ("2", "minimind2_small", "minimind2_small_learns"),
    "minimind_moe": ("2", "minimind2_moe", "minimind2_small_learns"),
    "qwen3": ("3", "minimind3", "minimind2_small_learns"),
    "qwen3_moe": ("3", "minimind3", "minimind2_small_learns"),
}
_OF_A_RECIPE = ("loss_type", "beta", "learning_rate", "lr_scheduler_type", "completion_mask")


def generation(model: PreTrainedModel) -> str:
    """MiniMind's generation of a model made of raw weights."""
    return _RECIPES[model.config.model_type][0]


def name_recipe(config: TrainConfig, model: PreTrainedModel) -> None:
    """Say which recipe fits raw MiniMind weights that are trained with nothing but defaults."""
    defaults = TrainConfig()
    if any(getattr(config, name) != getattr(defaults, name) for name in _OF_A_RECIPE):
        return
    if is_raw_weights(Path(config.model_name_or_path).expanduser()) and model.config.model_type in _RECIPES:
        of, original, learns = _RECIPES[model.config.model_type]
        logger.info(
            "raw weights of MiniMind's generation %s, trained with the defaults for any model: --config %s has "
            "MiniMind's own settings, %s those with which such a model visibly learns",
            of,
            original,
            learns,
        )
