"""Short runs of the embedded demo, a trained model, by the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from minimind_dpo.demo.run import ASSETS

LN2 = 0.6931472
NOISE = {"no": 1e-4, "bf16": 0.02, "fp16": 0.02}  # of a loss in each precision


def settings(output_dir: Path, **options: Any) -> dict[str, Any]:
    """Settings of a run on pairs of the demo that visibly learns; `options` win."""
    return {
        "model_name_or_path": next(ASSETS.glob("*.pth")),
        "tokenizer_name_or_path": ASSETS / "tokenizer",
        "train_data": ASSETS / "train.jsonl",
        "output_dir": output_dir,
        "max_length": 128,
        "completion_mask": "all_assistant",
        "beta": 0.5,
        "learning_rate": 6e-5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "save_steps": 0,
    } | options


def command(output_dir: Path, *launcher: str, **options: Any) -> list[str]:
    """The command of such a run: plain, or behind the launcher's words."""
    flags = [word for name, value in settings(output_dir, **options).items() for word in (f"--{name}", str(value))]
    through = ["-m", "minimind_dpo.launch", *launcher] if launcher else []
    return [sys.executable, *through, "-m", "minimind_dpo.train", *flags]


def losses(output_dir: Path) -> list[float]:
    """Its loss at every step so far."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def end_of(result: subprocess.CompletedProcess[str]) -> str:
    """The last lines that a command printed, and all of it into the stage's own log."""
    print(result.stdout, result.stderr, sep="\n", flush=True)
    return " / ".join((result.stderr or result.stdout).strip().splitlines()[-2:])[-300:]
