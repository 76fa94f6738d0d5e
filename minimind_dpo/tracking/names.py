"""Under which names a tracker is told a line of metrics.jsonl: those that its dashboards of TRL's runs have."""

from __future__ import annotations

import math
from typing import Any

# transformers' callbacks, which TRL uses, rename for these (`rewrite_logs`), and give these the step as a number too
_RENAMED = ("wandb", "swanlab", "tensorboard", "trackio", "comet_ml")
_WITH_GLOBAL_STEP = ("wandb", "swanlab", "trackio")
_PLACES = ("epoch", "pairs_seen")


def told(tracker: str, line: dict[str, Any], has_places: bool) -> dict[str, float]:
    """A line of metrics.jsonl as `tracker` is told it at the line's step; numbers that are not finite are left out.

    Args:
        tracker: by its name.
        line: of a step or an evaluation.
        has_places: it was told another line of this step, and so where that is.
    """
    left_out = {"step", *(_PLACES if has_places else ())}
    values = {
        name: value
        for name, value in line.items()
        if name not in left_out and isinstance(value, (int, float)) and math.isfinite(value)
    }
    if tracker in _RENAMED:
        values = {_renamed(name): value for name, value in values.items()}
    if tracker in _WITH_GLOBAL_STEP and not has_places:
        values["train/global_step"] = line["step"]
    return values


def _renamed(name: str) -> str:
    return "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else "train/" + name
