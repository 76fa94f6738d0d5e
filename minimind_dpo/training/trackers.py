"""Trackers through accelerate: a name that accelerate knows is all that most of them take."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import TrainConfig, as_told
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError


def _wandb_settings(config: TrainConfig, state: TrainerState) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": config.run_name, "dir": config.output_dir}
    if state.tracker_run_id:
        settings |= {"id": state.tracker_run_id, "resume": "allow"}
    return settings


# What a tracker is told when it starts, by its name; one that is not here is told the project and the configuration.
STARTING_SETTINGS: dict[str, Callable[[TrainConfig, TrainerState], dict[str, Any]]] = {"wandb": _wandb_settings}


def start_trackers(config: TrainConfig, engine: Engine, state: TrainerState) -> None:
    """Start what `report_to` names, and note the run's id in `state` where a tracker gives it one.

    Raises:
        UserError: a tracker cannot start.
    """
    names = config.report_to
    if not names:
        return
    project = os.environ.get("WANDB_PROJECT", "minimind_dpo")
    starting = {name: STARTING_SETTINGS[name](config, state) for name in names if name in STARTING_SETTINGS}
    try:
        engine.start_trackers(project, as_told(config), starting)
    except Exception as error:  # each tracker has errors of its own
        raise UserError(
            f"report_to: {' or '.join(names)} cannot start: {error}\nFor wandb log in with `wandb login` or set "
            "WANDB_MODE=offline; or use report_to: none"
        ) from error
    if engine.is_main and "wandb" in names:
        state.tracker_run_id = engine.tracker("wandb").id
