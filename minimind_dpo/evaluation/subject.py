"""What `--model` names: a model, or a run with the settings and the reference that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.checkpoints.directory import find_checkpoint
from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config import TrainConfig, make_config
from minimind_dpo.errors import UserError
from minimind_dpo.losses import own_settings
from minimind_dpo.models.places import is_checkpoint

_OF_THE_START = ("tokenizer_name_or_path", "num_attention_heads")  # model/ has its own
_PATHS = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")
_DATA = ("train_data", "eval_data", "eval_split")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        path: that it is loaded from.
        run: the configuration of the run that it comes from, if it comes from one.
        reference_digest: of that run's reference, where it is known.
        running_logits: of that run, as far as it has come.
    """

    path: str
    run: TrainConfig | None = None
    reference_digest: str | None = None
    running_logits: float = 0.0
    _told: dict[str, Any] = field(default_factory=dict)

    def defaults(self, settings: Iterable[str]) -> dict[str, Any]:
        """Raw values of some settings for an evaluation that is told nothing else, and the run's data."""
        kept = {*settings, *own_settings(), *_DATA} - {*_OF_THE_START}
        # a library that is chosen by how fast it is would make other digits for other numbers of ranks
        return {"matmul": "torch"} | {name: value for name, value in self._told.items() if name in kept}


def find_subject(model: str) -> Subject:
    """What a path or a hub id names: a run, its `model/` or one of its checkpoints, or a model without a run.

    Raises:
        UserError: a run that has neither a model nor a checkpoint yet, or whose config.yaml can't be read.
    """
    location = Path(model).expanduser()
    run = _run_of(location)
    if run is None:
        return Subject(model)
    path = location
    if location == run and not (run / "model").is_dir():
        found = find_checkpoint(run / "checkpoints", "auto")
        if found is None:
            raise UserError(f"--model {model}: this run has neither model/ nor a checkpoint yet")
        path = found
    try:
        told = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        config = make_config(told | _found_from(run, told))
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"{run / 'config.yaml'}: can't be read: {error}") from None
    digest, running_logits = _noted(run, path)
    return Subject(str(path), config, digest, running_logits, told)


def _run_of(location: Path) -> Path | None:
    """The run directory that a path is, or lies in."""
    candidates = [location]
    if location.name == "model":
        candidates.append(location.parent)
    if location.is_dir() and is_checkpoint(location):
        candidates.append(location.resolve().parents[1])
    for run in candidates:
        if (run / "config.yaml").is_file() and ((run / "model").is_dir() or (run / "checkpoints").is_dir()):
            return run
    return None


def _found_from(run: Path, told: dict[str, Any]) -> dict[str, str]:
    """Paths of models that are not there from here, but from the run's directory or one above it."""
    found = {}
    for name in _PATHS:
        told_path = told.get(name)
        if told_path and not Path(told_path).expanduser().exists():
            places = (folder / told_path for folder in run.resolve().parents)
            if (place := next((place for place in places if place.exists()), None)) is not None:
                found[name] = str(place)
    return found


def _noted(run: Path, path: Path) -> tuple[str | None, float]:
    """The digest of a run's reference, and its running mean of logits."""
    if not is_checkpoint(path):
        summary = run / "summary.json"
        digest = json.loads(summary.read_text("utf-8")).get("reference_digest") if summary.is_file() else None
        checkpoints = sorted((run / "checkpoints").glob("step-*"), key=lambda place: place.name)
        states = [read_state(place) for place in checkpoints[-1:] if is_checkpoint(place)]
        return digest, states[0].running_logits if states else 0.0
    state = read_state(path)
    digest = state.identity.get("reference_digest")
    return (None if digest == "none" else digest), state.running_logits
