"""What a configuration leaves to the run, decided once and kept over every resume."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config import TrainConfig, identity, make_config
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.models.fast.products import TORCH, agree_on_library, half_precision_notice

logger = logging.getLogger(__name__)

_AUTO = "auto"
# What runs did before there was the setting.
_BEFORE = {"matmul": TORCH, "weight_rounding": "nearest", "dtype": "float32"}

# The defaults of the runs of before, MiniMind's; those of today are named in a checkpoint's identity.
_FORMER_DEFAULTS: dict[str, Any] = {
    "loss_type": ["sigmoid_norm"],
    "learning_rate": 4e-8,
    "lr_scheduler_type": "minimind",
    "warmup_ratio": 0.0,
    "completion_mask": "all_assistant",
}
DEFAULTS = {"defaults": "TRL's"}


def with_former_defaults(config: TrainConfig, checkpoint: Path | None) -> TrainConfig:
    """The configuration of a run that began under other defaults: a setting at today's default keeps what it was.

    What it was is told by the run's config.yaml, or it was the default of that time.
    """
    if checkpoint is None or DEFAULTS.items() <= read_state(checkpoint).identity.items():
        return config
    told = checkpoint.resolve().parents[1] / "config.yaml"
    before = _FORMER_DEFAULTS | (yaml.safe_load(told.read_text("utf-8")) if told.is_file() else {})
    if isinstance(before["loss_type"], str):
        before["loss_type"] = [before["loss_type"]]
    today = make_config({"model_name_or_path": "any", "train_data": "any"})
    kept = {
        name: before[name] for name in _FORMER_DEFAULTS if getattr(config, name) == getattr(today, name) != before[name]
    }
    if kept:
        named = ", ".join(f"{name}: {value[0] if isinstance(value, list) else value}" for name, value in kept.items())
        logger.info("the run began with other defaults, which stay: %s", named)
    return dataclasses.replace(config, **kept)


def identity_before() -> dict[str, Any]:
    """What the settings were of a run whose checkpoint does not name them."""
    return identity(TrainConfig()) | _BEFORE


def settle(config: TrainConfig, engine: Engine, checkpoint: Path | None = None) -> TrainConfig:
    """The configuration with nothing left open that a resume has to repeat. Collective.

    Args:
        config: as the user wrote it.
        engine: of the run.
        checkpoint: that the run goes on from; what was decided then stays.

    Raises:
        UserError: a library is asked for that is not there.
    """
    kept = {} if checkpoint is None else identity_before() | read_state(checkpoint).identity
    library, reason = agree_on_library(config.matmul, engine, kept.get("matmul"))
    logger.info("matmul: %s (%s)", library, reason)
    if checkpoint is None and engine.is_main and engine.device.type == "cpu" and engine.precision == "no":
        if notice := half_precision_notice(library):
            logger.info(notice)
    rounding = config.weight_rounding
    if rounding == _AUTO:
        rounding = kept.get("weight_rounding", "dithered" if engine.precision == "bf16" else "nearest")
    return dataclasses.replace(config, matmul=library, weight_rounding=rounding)
