"""Checkpoints that are complete or absent: written aside, hashed, synced, then renamed into place.

    OUTPUT_DIR/checkpoints/step-000123/   accelerate's state of every rank, trainer_state.json, manifest.json

The only module that writes, validates and deletes checkpoints. State is saved at optimizer-step boundaries only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from minimind_dpo.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


@dataclass
class TrainerState:
    """What a run knows of itself beside weights and optimizer.

    Attributes:
        step: finished optimizer steps.
        total_steps: optimizer steps of the whole run.
        seconds: wall time spent in training so far, over all sessions of the run.
        identity: what must be equal for a resume to continue the same run (`reference_digest`, data, settings).
        tracker_run_id: the tracker's id of the run, to append to it.
    """

    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)
    tracker_run_id: str | None = None


def save_checkpoint(accelerator: Accelerator, directory: Path, state: TrainerState, keep: int) -> Path:
    """Write `directory`/step-N; every rank must call it.

    Older checkpoints are deleted only once the new one is in place, down to `keep` (0 keeps all).
    """
    final = directory / f"step-{state.step:06d}"
    partial = directory / f".step-{state.step:06d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1), "utf-8")
        _write_manifest(partial)
        if final.exists():  # this step again, after a resume from an older checkpoint
            _discard(final)
        os.replace(partial, final)
        _sync(directory)
        _prune(directory, keep)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, path: Path) -> TrainerState:
    """Restore every rank from a validated checkpoint and return its trainer state."""
    accelerator.load_state(str(path))
    return read_state(path)


def read_state(path: Path) -> TrainerState:
    """The trainer state of a checkpoint."""
    return TrainerState(**json.loads((path / STATE).read_text("utf-8")))


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (auto | never | PATH) asks for; None starts from scratch.

    `auto` takes the newest one that validates and says what is wrong with the ones it passes over.

    Raises:
        UserError: PATH is no valid checkpoint; a finished or unfinished run would be overwritten; or only damaged
            checkpoints are left.
    """
    if resume not in ("auto", "never"):
        if problem := checkpoint_problem(Path(resume)):
            raise UserError(f"--resume {resume}: {problem}")
        return Path(resume)
    existing = _newest_first(directory)
    finished = (directory.parent / "model").exists()
    if (existing and resume == "never") or (finished and not existing):
        raise UserError(f"{directory.parent} already holds a run ({existing[0].name if existing else 'model'}); "
                        "choose another output_dir" + (", or --resume auto to continue it" if existing else ""))
    for path in existing:
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    if existing:
        raise UserError(f"no checkpoint under {directory} is intact (see the warnings above); restore one, or move "
                        "the directory away to start from scratch")
    return None


def set_aside_later(directory: Path, step: int) -> None:
    """Rename checkpoints beyond `step`, which a run that resumes there abandons: they are kept, but not its own."""
    for path in _newest_first(directory):
        if _step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(path, aside)
            logger.warning("%s lies beyond the step resumed from: kept as %s", path.name, aside)


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint: missing, incomplete or damaged files; None when it is intact."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return f"no {MANIFEST} there: not a complete checkpoint"
    try:
        files = json.loads(manifest_path.read_text("utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, {entry['size']} were written"
        if _sha256(file) != entry["sha256"]:
            return f"{name} is damaged (its sha256 differs from {MANIFEST})"
    return None


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    entries = {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)}
               for path in files}
    (directory / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), "utf-8")
    for path in [*files, directory / MANIFEST]:
        _sync(path)
    _sync(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, keep: int) -> None:
    for path in directory.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    if keep:
        for path in _newest_first(directory)[keep:]:
            _discard(path)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _discard(path: Path) -> None:
    # renamed first, so that a crash half-way leaves no half checkpoint under a complete one's name
    doomed = path.with_name(f".{path.name}.discarded.partial")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
