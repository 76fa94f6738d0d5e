"""What a configuration leaves to the run, decided once and kept over every resume."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config import TrainConfig, identity
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.models.fast.products import TORCH, agree_on_library, half_precision_notice

logger = logging.getLogger(__name__)

_AUTO = "auto"
# What runs did before there was the setting.
_BEFORE = {"matmul": TORCH, "weight_rounding": "nearest", "dtype": "float32"}


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
