"""The trained demo in each precision, with each kind of reference: it starts at ln 2, and all learn the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.demo import LN2, NOISE, end_of, losses, settings
from benchmarks.gpu_check.notes import Notes, Place

MODES = ("live", "cache", "offload", "adapter")
LORA_R = 8


def run(notes: Notes, place: Place) -> None:
    """A process a precision trains with every reference in turn."""
    precisions, steps = (("bf16",), 2) if place.rehearses else (tuple(NOISE), 12)
    for precision in precisions:
        words = [sys.executable, "-m", "benchmarks.gpu_check.precisions", str(place.scratch / precision), str(steps)]
        surroundings = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
        result = subprocess.run(words, capture_output=True, text=True, env=surroundings)
        if result.returncode:
            notes.check(precision, False, end_of(result))
            continue
        found = {mode: losses(place.scratch / precision / mode) for mode in MODES}
        for mode, values in found.items():
            notes.close(f"{precision}, {mode}: loss at step 1", values[0], LN2, NOISE[precision])
            least = LN2 - (1e-4 if place.rehearses else 0.01)
            notes.check(f"{precision}, {mode}: learns", values[-1] < least, f"{values[-1]:.4f} at step {len(values)}")
        for mode in ("cache", "offload"):
            within = max(2e-3, 2 * NOISE[precision])
            notes.close(f"{precision}: {mode} ends as live", found[mode][-1], found["live"][-1], within)
        notes.figure(precision, {mode: [round(value, 5) for value in values] for mode, values in found.items()})


def train(directory: Path, steps: int) -> None:
    """All references in this process, in the precision that the launcher's variable says."""
    from minimind_dpo import train_dpo  # late: for the processes that train
    from minimind_dpo.config import make_config

    for mode in MODES:
        own = {"lora_r": LORA_R, "learning_rate": 2e-3} if mode == "adapter" else {}
        told = settings(directory / mode, reference=mode, max_steps=steps, **own)
        train_dpo(make_config({name: str(value) for name, value in told.items()}))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
