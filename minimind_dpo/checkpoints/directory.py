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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from minimind_dpo.checkpoints.files import FragmentReader, write_fragments
from minimind_dpo.checkpoints.state import TrainedState
from minimind_dpo.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
NUMBERS = "optimizer.json"


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


def save_checkpoint(
    accelerator: Accelerator,
    directory: Path,
    state: TrainerState,
    keep: int,
    trained: TrainedState,
    describe_model: Callable[[Path], None],
) -> Path:
    """Write `directory`/step-N; every rank must call it, and sees the same file system.

    Older checkpoints are deleted only once the new one is in place, down to `keep` (0 keeps all).

    Args:
        accelerator: of the run.
        directory: of the run's checkpoints.
        state: of the run at this step.
        keep: how many checkpoints to keep.
        trained: weights and optimizer.
        describe_model: writes what a model directory holds beside the weights (configuration, tokenizer).

    Raises:
        UserError: the directory that the main process made is not there for another rank.
    """
    final = directory / f"step-{state.step:06d}"
    partial = directory / f".step-{state.step:06d}.partial"
    own_files: list[Path] = []
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        describe_model(partial)
        (partial / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1), "utf-8")
        (partial / NUMBERS).write_text(json.dumps(trained.numbers(), indent=1), "utf-8")
        own_files = sorted(path for path in partial.rglob("*") if path.is_file())
    accelerator.wait_for_everyone()
    if not partial.is_dir():
        raise UserError(
            f"rank {accelerator.process_index} does not see {partial}, which rank 0 has just made: "
            "output_dir must lie on a file system that all nodes share"
        )
    own_files += write_fragments(partial, accelerator.process_index, trained.own())
    entries = gather_object([_entries(partial, own_files)])
    if accelerator.is_main_process:
        files = {name: entry for part in entries for name, entry in part.items()}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), "utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        if final.exists():  # this step again, after a resume from an older checkpoint
            _discard(final)
        os.replace(partial, final)
        _sync(directory)
        _prune(directory, keep)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(path: Path, trained: TrainedState) -> TrainerState:
    """Restore this rank's part of a validated checkpoint, whatever engine and number of ranks wrote it.

    Raises:
        UserError: it holds another model.
    """
    reader = FragmentReader(path)
    try:
        for fragment in trained.held():
            if reader.shapes[fragment.name] != fragment.shape:
                raise KeyError(f"{fragment.name} is {reader.shapes[fragment.name]} there, {fragment.shape} here")
            reader.fill(fragment)
    except KeyError as error:
        raise UserError(
            f"{path} does not fit the model: {error.args[0]}. Use the run's own model and LoRA "
            "settings, or another output_dir"
        ) from None
    trained.restore_numbers(json.loads((path / NUMBERS).read_text("utf-8")))
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
        raise UserError(
            f"{directory.parent} already holds a run ({existing[0].name if existing else 'model'}); "
            "choose another output_dir" + (", or --resume auto to continue it" if existing else "")
        )
    for path in existing:
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    if existing:
        raise UserError(
            f"no checkpoint under {directory} is intact (see the warnings above); restore one, or move "
            "the directory away to start from scratch"
        )
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


def _entries(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of files, which are on the disk when this returns."""
    for path in files:
        _sync(path)
    return {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


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
