"""What losses cost beside each other: seconds a step, and the memory of runs with and without a reference.

    python -m benchmarks.losses [--losses sigmoid aot sft simpo] [--batch 8] [--micro_batch 4] [--rounds 8]
                                [--model DIR]

The product's own steps on the pairs and the 26M model of throughput.py. Runs of all losses go on in one process and
take turns, a step each a round, the order reversed every other round; the first round is left out. A loss over the step
takes one forward pass where a step is one micro-batch (`--micro_batch` equal to `--batch`), else two. Memory is the
peak of a process of its own each, two steps with a live reference where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.profile import vocabulary_of
from benchmarks.workloads import MAX_LENGTH, minimind_shape, mix_lengths, save_model, word_tokenizer, write_pairs
from minimind_dpo.config import make_config
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.losses import LOSSES
from minimind_dpo.training.batches import LoadedStep, load_steps
from minimind_dpo.training.run import Run
from minimind_dpo.training.setup import build_run
from minimind_dpo.training.step import optimizer_step


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["sigmoid", "aot", "sft", "simpo"])
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument("--micro_batch", type=int, default=4, help="pairs a forward pass")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", help="directory of a causal language model (default: MiniMind's 26M, random)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINIMIND_DPO_CACHE"] = str(Path(scratch, "cache"))
        settings = _settings(args, Path(scratch))
        peaks = {name: _peak(settings | {"output_dir": f"{scratch}/peak-{name}"}, name) for name in args.losses}
        with StopRequest() as stop:
            runs = {name: _run(settings, name, stop) for name in args.losses}
            seconds = _take_turns(runs, args.rounds)
    _print(seconds, peaks)


def _settings(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What all runs are told."""
    model = args.model or save_model(minimind_shape(), scratch / "model")
    vocabulary = vocabulary_of(model)
    word_tokenizer(vocabulary).save_pretrained(scratch / "tokenizer")
    lengths = mix_lengths("chat", args.batch * (args.rounds + 1))
    return {
        "model_name_or_path": model,
        "tokenizer_name_or_path": str(scratch / "tokenizer"),
        "train_data": str(write_pairs(scratch / "pairs.jsonl", lengths, vocabulary)),
        "output_dir": str(scratch / "run"),
        "max_length": MAX_LENGTH["chat"],
        "max_steps": args.rounds + 1,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.batch // args.micro_batch,
        "shuffle": False,
        "save_steps": 0,
    }


def _run(settings: dict[str, Any], name: str, stop: StopRequest) -> tuple[Run, Any]:
    """A run of one loss, and its steps; with a reference its log-probabilities are cached."""
    reference = "cache" if LOSSES[name].needs_reference else "auto"
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].limits else 0.0
    config = make_config(settings | {"loss_type": name, "reference": reference, "label_smoothing": smoothing})
    run = build_run(config, start_engine(config), None, stop)
    run.scorer.train()
    collate = run.reference.collating(run.layout)
    return run, load_steps(run.train_data.dataset, run.plans(), collate, 0, run.engine.device)


def _take_turns(runs: dict[str, tuple[Run, Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run's steps but the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            run, steps = runs[name]
            loaded = next(steps)
            loaded = LoadedStep(loaded.plan, iter(list(loaded.batches)))
            start = time.perf_counter()
            float(optimizer_step(run, loaded, run.config.learning_rate).grad_norm)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _peak(settings: dict[str, Any], name: str) -> float:
    """GiB at the peak of a process that takes two steps."""
    reference = "live" if LOSSES[name].needs_reference else "auto"
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].limits else 0.0
    told = settings | {"loss_type": name, "reference": reference, "label_smoothing": smoothing, "max_steps": 2}
    words = [str(word) for key, value in told.items() for word in (f"--{key}", value)]
    subprocess.run([sys.executable, "-m", "minimind_dpo.train", *words], check=True, capture_output=True)
    return float(json.loads((Path(told["output_dir"]) / "summary.json").read_text("utf-8"))["peak_memory_gib"])


def _print(seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
    first = next(iter(seconds))
    print(f"{'loss':<14}{'s a step':>10}{'ratio to ' + first:>22}{'peak, GiB':>12}")
    for name, values in seconds.items():
        ratios = sorted(value / base for value, base in zip(values, seconds[first], strict=True))
        middle, spread = statistics.median(ratios), f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:<14}{statistics.median(values):>10.3f}{middle:>9.2f} {spread}{peaks[name]:>11.3f}")


if __name__ == "__main__":
    main()
