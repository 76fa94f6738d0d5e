"""What lies at the path that a user gives for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimind_dpo.config.names import looks_local
from minimind_dpo.errors import UserError

CHECKPOINT_STATE = "trainer_state.json"  # what a checkpoint has and no other model directory
ADAPTER_CONFIG = "adapter_config.json"  # peft's name


def locate_model(path: str) -> Path | None:
    """Find the file or the directory with `config.json`, for a run directory its `model/`.

    Returns:
        None for what can only be a hub id.

    Raises:
        UserError: a local path with no model behind it.
    """
    location = Path(path).expanduser()
    if location.is_file():
        return location
    if location.is_dir():
        for folder in (location, location / "model"):
            if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
                return folder
        raise UserError(
            f"{path}: no model in this directory: neither config.json (a saved model) nor model/config.json "
            "(a finished run) is there."
        )
    if looks_local(path):
        raise UserError(f"{path}: no such model file or directory.")
    return None


def absolute_source(path: str) -> str:
    """The name of a model as it can be opened from any working directory; a hub id stays what it is."""
    location = Path(path).expanduser()
    return str(location.resolve()) if location.exists() else path


def is_checkpoint(location: Path) -> bool:
    """Whether a directory is a checkpoint of a run."""
    return (location / CHECKPOINT_STATE).is_file()


def is_adapter(location: Path) -> bool:
    """Whether a directory holds LoRA matrices alone, without their base."""
    return (location / ADAPTER_CONFIG).is_file() and not is_checkpoint(location)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON: {error}; write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object; write it again")
    return value


def adapter_base(location: Path) -> str:
    """The name of the base that the matrices in a directory belong to; a relative path is looked for from there too.

    Raises:
        UserError: none is named.
    """
    name = read_object(location / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{location}: {ADAPTER_CONFIG} names no base model; write its path there (base_model_name_or_path)"
        )
    for folder in (Path(), *location.resolve().parents):
        path = folder / Path(name).expanduser()
        if path.exists():
            return str(path)
    return name
