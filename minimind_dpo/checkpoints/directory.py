"""Checkpoints that are complete or absent: written aside, hashed, synced, then renamed into place.

    OUTPUT_DIR/checkpoints/step-000123/   each rank's share of the state, trainer_state.json, manifest.json

The only module that writes, validates and deletes checkpoints. State is saved at optimizer-step boundaries only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.files import FragmentReader, write_fragments
from minimind_dpo.checkpoints.state import TrainerState, read_state, write_state
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError
from minimind_dpo.files import discard, make_anew, put_in_place, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCALARS = "optimizer.json"


def save_checkpoint(
    engine: Engine, directory: Path, state: TrainerState, keep: int, describe_model: Callable[[Path], None]
) -> Path:
    """Write `directory`/step-N; every rank must call it, and sees the same file system.

    Older checkpoints are deleted only once the new one is in place, down to `keep` (0 keeps all).

    Args:
        engine: whose state is saved.
        directory: of the run's checkpoints.
        state: of the run at this step.
        keep: how many checkpoints to keep.
        describe_model: writes what a model directory holds beside the weights (configuration, tokenizer).

    Raises:
        UserError: the directory that the main process made is not there for another rank.
    """
    final = directory / f"step-{state.step:06d}"
    partial = directory / f".step-{state.step:06d}.partial"
    own_files: list[Path] = []
    if engine.is_main:
        make_anew(partial)
        describe_model(partial)
        write_state(state, partial)
        (partial / SCALARS).write_text(json.dumps(engine.scalars(), indent=1), "utf-8")
        own_files = sorted(path for path in partial.rglob("*") if path.is_file())
    engine.wait()
    if not partial.is_dir():
        raise UserError(
            f"rank {engine.rank} does not see {partial}, which rank 0 has just made: "
            "output_dir must lie on a file system that all nodes share"
        )
    own_files += write_fragments(partial, engine.rank, engine.shared_fragments())
    entries = engine.gather_objects(_entries(partial, own_files))
    if engine.is_main:
        files = {name: entry for part in entries for name, entry in part.items()}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), "utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        put_in_place(partial, final)  # `final` is there where an older checkpoint was resumed and this step comes again
        _prune(directory, keep)
    engine.wait()
    return final


def load_checkpoint(path: Path, engine: Engine) -> TrainerState:
    """Restore this rank's part of a validated checkpoint, whatever engine and number of ranks wrote it.

    Raises:
        UserError: it holds another model.
    """
    reader = FragmentReader(path)
    try:
        for fragment in engine.fragments():
            if reader.shapes[fragment.name] != fragment.shape:
                raise KeyError(f"{fragment.name} is {reader.shapes[fragment.name]} there, {fragment.shape} here")
            reader.fill(fragment)
    except KeyError as error:
        raise UserError(
            f"{path} does not fit the model: {error.args[0]}. Use the run's own model and LoRA "
            "settings, or another output_dir"
        ) from None
    engine.restore_scalars(json.loads((path / SCALARS).read_text("utf-8")))
    return read_state(path)


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
            put_in_place(path, aside)
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
        sync(path)
    return {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(directory: Path, keep: int) -> None:
    for path in directory.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    if keep:
        for path in _newest_first(directory)[keep:]:
            discard(path)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
