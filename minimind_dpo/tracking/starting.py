"""What each tracker is told when it starts, and how it names the run from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import TrainConfig, as_told

_TAKES_ANY_VALUE = ("wandb", "swanlab", "trackio")  # others take numbers and texts only
_KEEPS_FIRST_SETTINGS = ("tensorboard", "mlflow")  # a second writing is another run's, or refused

REMEDIES = {
    "wandb": "For wandb log in with `wandb login` or set WANDB_MODE=offline",
    "swanlab": "For swanlab log in with `swanlab login` or set SWANLAB_MODE=offline",
    "mlflow": "For mlflow see that MLFLOW_TRACKING_URI names a server or a file that answers",
    "trackio": "For trackio see that TRACKIO_DIR can be written to",
}


def project_of(config: TrainConfig) -> str:
    """The project, or what a tracker has in its place."""
    return config.project or os.environ.get("WANDB_PROJECT") or "minimind_dpo"


def starting_settings(config: TrainConfig, state: TrainerState) -> dict[str, dict[str, Any]]:
    """By tracker, the arguments beside the project; one that is not here gets none."""
    return {
        name: _ARGUMENTS[name](config, state, state.tracker_run_ids.get(name))
        for name in config.report_to
        if name in _ARGUMENTS
    }


def _wandb(config: TrainConfig, state: TrainerState, run_id: str | None) -> dict[str, Any]:
    settings = {"name": config.run_name, "group": config.run_group, "tags": config.tags or None}
    return settings | {"dir": config.output_dir} | ({"id": run_id, "resume": "allow"} if run_id else {})


def _swanlab(config: TrainConfig, state: TrainerState, run_id: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"log_dir": str(Path(config.output_dir) / "swanlog")}
    names = {"name": config.run_name, "group": config.run_group, "tags": config.tags or None}
    settings |= {name: value for name, value in names.items() if value is not None}
    return settings | ({"id": run_id, "resume": "allow"} if run_id else {})


def _trackio(config: TrainConfig, state: TrainerState, run_id: str | None) -> dict[str, Any]:
    names = {"name": run_id or config.run_name, "group": config.run_group}
    return names | {"resume": "allow" if run_id else "never", "embed": False}


def _tensorboard(config: TrainConfig, state: TrainerState, run_id: str | None) -> dict[str, Any]:
    """What lies in the directory from a later step on is void: of a session that was killed, or of another run."""
    return {"purge_step": state.step + 1 if run_id == project_of(config) else 0}


def _mlflow(config: TrainConfig, state: TrainerState, run_id: str | None) -> dict[str, Any]:
    import mlflow  # late: only where it is asked for

    if run_id is not None:
        try:
            mlflow.MlflowClient().get_run(run_id)
        except mlflow.MlflowException:  # another store: the run begins there again
            run_id = None
    tags = {"tags": ", ".join(config.tags), "group": config.run_group}
    return {
        "run_id": run_id,
        "run_name": config.run_name,
        "tags": {name: value for name, value in tags.items() if value},
    }


_ARGUMENTS: dict[str, Callable[[TrainConfig, TrainerState, str | None], dict[str, Any]]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}

_RUN_ID: dict[str, Callable[[Any], str]] = {
    "wandb": lambda own: own.tracker.id,
    "swanlab": lambda own: own.tracker.id,
    "trackio": lambda own: own.tracker.name,
    "tensorboard": lambda own: own.run_name,
    "mlflow": lambda own: own.tracker.info.run_id,
}


def run_id_of(name: str, own: Any) -> str:
    """What a started tracker calls the run; empty where it has no name for it."""
    return _RUN_ID[name](own) if name in _RUN_ID else ""


def store_settings(name: str, own: Any, config: TrainConfig, resumed: bool) -> None:
    """Tell a tracker the settings of the run."""
    if resumed and name in _KEEPS_FIRST_SETTINGS:
        return
    settings = as_told(config)
    if name not in _TAKES_ANY_VALUE:
        is_plain = {key: isinstance(value, (int, float, str)) for key, value in settings.items()}
        settings = {key: value if is_plain[key] else json.dumps(value) for key, value in settings.items()}
    own.store_init_configuration(settings)
    if name == "wandb":  # the axis of TRL's dashboards, as transformers sets it
        own.tracker.define_metric("train/global_step")
        own.tracker.define_metric("*", step_metric="train/global_step", step_sync=True)
