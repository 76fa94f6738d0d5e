"""Checkpoints that are complete or absent: written aside, hashed, synced, then renamed into place.

    OUTPUT_DIR/checkpoints/step-000123/   each rank's share of the state, trainer_state.json, manifest.json

The only module that writes, validates and deletes checkpoints; what has another name is somebody else's and stays as it
is. State is saved at optimizer-step boundaries only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.files import FragmentReader, write_fragments
from minimind_dpo.checkpoints.state import STATE, TrainerState, read_state, write_state
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError
from minimind_dpo.files import discard, make_anew, put_in_place, share, sync, writing

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCALARS = "optimizer.json"
_NAME = re.compile(r"step-([0-9]+)")
_PARTIAL_NAME = re.compile(r"\.step-[0-9]+\.partial")
_TENSORS = "state-*.safetensors"


def save_checkpoint(
    engine: Engine, directory: Path, state: TrainerState, keep: int, describe_model: Callable[[Path], None]
) -> Path:
    """Write `directory`/step-N; every rank must call it, and sees the same file system.

    Older checkpoints are deleted only once the new one is in place, down to `keep` (0 keeps all), but for the best.

    Args:
        engine: whose state is saved.
        directory: of the run's checkpoints.
        state: of the run at this step.
        keep: how many checkpoints to keep.
        describe_model: writes what a model directory holds beside the weights (configuration, tokenizer).

    Raises:
        UserError: the directory can't be written to, or what the main process made is not there for another rank.
        TrainingError: the disk is full.
    """
    final = checkpoint_of(directory, state.step)
    partial = directory / f".step-{state.step:06d}.partial"
    try:
        with writing(partial, "output_dir"):
            _write(engine, partial, state, describe_model)
            if engine.is_main:
                put_in_place(
                    partial, final
                )  # which is there where an older checkpoint was resumed and comes to it again
                _prune(directory, keep, None if state.best is None else state.best["step"])
    except Exception:
        if engine.is_main and partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    engine.wait()
    return final


def _write(engine: Engine, partial: Path, state: TrainerState, describe_model: Callable[[Path], None]) -> None:
    """Write all files of a checkpoint to the disk. Collective."""
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
    share(partial)
    entries = engine.gather_objects(_entries(partial, own_files))
    if engine.is_main:
        files = {name: entry for part in entries for name, entry in part.items()}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), "utf-8")
        sync(partial / MANIFEST)
        sync(partial)


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
    if not (path / MANIFEST).is_file():
        return f"no {MANIFEST} there: not a complete checkpoint"
    try:
        files = _listed(path)
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, {entry['size']} were written"
            if _sha256(file) != entry["sha256"]:
                return f"{name} is damaged (its sha256 differs from {MANIFEST})"
    except OSError as error:
        return f"{error.filename or path} can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    strays = [file.name for file in path.glob(_TENSORS) if file.name not in files]
    return f"{strays[0]} is not in {MANIFEST}" if strays else None


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of its checkpoint's files; an error of some kind where that can't be all of it."""
    files = json.loads((path / MANIFEST).read_text("utf-8"))["files"]
    if not {STATE, SCALARS, "config.json"} <= files.keys() or not any(Path(name).match(_TENSORS) for name in files):
        raise ValueError
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or not all(type(e["size"]) is int and type(e["sha256"]) is str for e in files.values()):
        raise ValueError
    return files


def _entries(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of files, which are on the disk when this returns."""
    for path in files:
        sync(path)
    return {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(directory: Path, keep: int, best: int | None) -> None:
    """Remove what is half written, and all but `keep` checkpoints: the newest, and that of the `best` step."""
    for path in directory.iterdir():
        if _PARTIAL_NAME.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    if keep:
        newest_first = _newest_first(directory)
        if any(_step_of(path) == best for path in newest_first[keep:]):
            keep = max(keep - 1, 1)  # one of them is the best
        for path in newest_first[keep:]:
            if _step_of(path) != best:
                discard(path)


def _newest_first(directory: Path) -> list[Path]:
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(
        (directory / name for name in names if _NAME.fullmatch(name) and (directory / name).is_dir()),
        key=_step_of,
        reverse=True,
    )


def checkpoint_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
