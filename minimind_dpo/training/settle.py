"""What a configuration leaves to the run, decided once and kept over every resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config import TrainConfig, identity

_AUTO = "auto"
# What runs did before there was the setting.
_BEFORE = {"weight_rounding": "nearest", "dtype": "float32"}


def identity_before() -> dict[str, Any]:
    """What the settings were of a run whose checkpoint does not name them."""
    return identity(TrainConfig()) | _BEFORE


def settle(config: TrainConfig, precision: str, checkpoint: Path | None = None) -> TrainConfig:
    """The configuration with nothing left open that a resume has to repeat.

    Args:
        config: as the user wrote it.
        precision: of products: `no`, `bf16` or `fp16`.
        checkpoint: that the run goes on from; what was decided then stays.
    """
    saved = {} if checkpoint is None else identity_before() | read_state(checkpoint).identity
    rounding = config.weight_rounding
    if rounding == _AUTO:
        rounding = saved.get("weight_rounding", "dithered" if precision == "bf16" else "nearest")
    return dataclasses.replace(config, weight_rounding=rounding)
