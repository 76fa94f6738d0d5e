"""A run that is killed and started again ends with the bits of one that was left alone, under `deterministic: true`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu_check.demo import command, end_of
from benchmarks.gpu_check.notes import Notes, Place


def run(notes: Notes, place: Place) -> None:
    """Three runs: one left alone, one killed at its first checkpoint, and that one again."""
    whole, broken = place.scratch / "whole", place.scratch / "broken"
    options = {"deterministic": "true", "reference": "live", "max_steps": 12, "save_steps": 3}
    surroundings = os.environ | ({} if place.rehearses else {"ACCELERATE_MIXED_PRECISION": "bf16"})
    result = subprocess.run(command(whole, **options), capture_output=True, text=True, env=surroundings)
    notes.check("a deterministic run", result.returncode == 0, end_of(result) if result.returncode else None)
    if result.returncode:
        return
    with open(place.scratch / "killed.log", "w", encoding="utf-8") as log:
        killed = subprocess.Popen(command(broken, **options), stdout=log, stderr=log, env=surroundings)
        while killed.poll() is None and not list((broken / "checkpoints").glob("step-*")):
            time.sleep(0.01)
        killed.kill()
    notes.check("was killed at its first checkpoint", killed.wait() == -signal.SIGKILL, f"ended with {killed.wait()}")
    result = subprocess.run(command(broken, **options), capture_output=True, text=True, env=surroundings)
    notes.check("started again it ends", result.returncode == 0, end_of(result) if result.returncode else None)
    if not result.returncode:
        first, second = (_weights(directory) for directory in (whole, broken))
        other = [name for name in first if not torch.equal(first[name], second[name])]
        notes.check("with the same bits", not other, f"{len(other)} of {len(first)} tensors differ {other[:3]}")


def _weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model" / "model.safetensors")
