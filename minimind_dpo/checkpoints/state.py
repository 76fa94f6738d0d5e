"""What a run knows of itself beside weights and optimizer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind_dpo.errors import UserError

STATE = "trainer_state.json"


@dataclass
class TrainerState:
    """A run's place and identity.

    Attributes:
        step: finished optimizer steps.
        total_steps: optimizer steps of the whole run.
        seconds: wall time spent in training so far, over all sessions of the run.
        identity: what must be equal for a resume to continue the same run (`reference_digest`, data, settings).
        tracker_run_ids: by tracker, its name of the run, to append to it; empty where it has none.
        skipped_steps: optimizer steps that changed nothing, since their loss or gradient was not finite.
        running_logits: the running mean of the steps' mean logits, for losses that look back at it.
        metrics: how many lines of metrics.jsonl were written, and their checksum.
        best: the best evaluation so far: its `metric`, `value` and `step`.
    """

    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)
    tracker_run_ids: dict[str, str] = field(default_factory=dict)
    skipped_steps: list[int] = field(default_factory=list)
    running_logits: float = 0.0
    metrics: list[Any] | None = None  # checkpoints had none once
    best: dict[str, Any] | None = None  # nor this


def read_state(checkpoint: Path) -> TrainerState:
    """The trainer state of a checkpoint."""
    values = json.loads((checkpoint / STATE).read_text("utf-8"))
    if old := values.pop("tracker_run_id", None):  # checkpoints had one tracker's once
        values["tracker_run_ids"] = {"wandb": old}
    return TrainerState(**values)


def write_state(state: TrainerState, checkpoint: Path) -> None:
    """Write the trainer state of a checkpoint."""
    (checkpoint / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1), "utf-8")


def check_identity(
    saved: TrainerState, now: TrainerState, checkpoint: Path, defaults: dict[str, Any] | None = None
) -> None:
    """Refuse to continue another run's checkpoint.

    Args:
        saved: the state in the checkpoint.
        now: of the run that is to continue it.
        checkpoint: for the message.
        defaults: what a checkpoint had that was written before there was such a setting, by its name.

    Raises:
        UserError: naming each thing that differs, with its old and its new value.
    """
    then = (defaults or {}) | saved.identity
    changed = [
        f"{name}: was {then.get(name)}, is {value}" for name, value in now.identity.items() if then.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to another run:\n  "
            + "\n  ".join(changed)
            + "\nUse the run's own settings, model and data, or another output_dir"
        )
