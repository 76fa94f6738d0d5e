"""Where an optimizer step's time goes, as a table.

    python benchmarks/profile.py [--mix chat|long_prompt|long_answer] [--batch 8] [--micro_batch 8]
                                 [--reference cache|live] [--steps 8] [--model DIR]
                                 [--matmul auto|torch|onednn]

The product's own loop on the pairs and the 26M model of throughput.py; functions of it are timed from outside, each
without what it calls. On a GPU the device is waited for at every mark, which makes the step itself slower. Medians over
steps, the first left out. GFLOP/s are 6 x parameters x real tokens over a step's seconds without the reference's; the
peak they are a share of is that of the run's library for fp32, the best size's median, measured after every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the project's root instead of this directory, where this file hides the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.throughput import matrix_peak
from benchmarks.workloads import MAX_LENGTH, MIXES, minimind_shape, mix_lengths, save_model, word_tokenizer, write_pairs
from minimind_dpo.config import make_config
from minimind_dpo.config.settings import MATMULS
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.protocol import unwrap
from minimind_dpo.models.fast import patch
from minimind_dpo.models.fast.attention_cpu import CpuPairAttention
from minimind_dpo.models.fast.head import _TokenLogps
from minimind_dpo.training import loop
from minimind_dpo.training import step as stepping_module
from minimind_dpo.training.batches import LoadedStep
from minimind_dpo.training.run import Run
from minimind_dpo.training.run_log import RunLog
from minimind_dpo.training.setup import build_run

PHASES = (
    "data",
    "reference",
    "forward: layers",
    "forward: attention",
    "forward: head",
    "loss and metrics",
    "backward: layers",
    "backward: attention",
    "backward: head",
    "clipping and optimizer",
    "everything else",
)


class Stopwatch:
    """Exclusive wall time of named phases, a step at a time."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.steps: list[dict[str, float]] = []
        self.peaks: list[dict[int, float]] = []  # GFLOP/s of matrix products by size, after each step
        self._inner = [0.0]  # seconds spent in phases within the running one, for each that is open
        self._step: defaultdict[str, float] = defaultdict(float)

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as `phase`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = _now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = _now() - begin
                self._step[phase] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        return timed

    def end_step(self) -> None:
        """Begin the next step's account."""
        self.steps.append(dict(self._step))
        self._step.clear()
        self.peaks.append(matrix_peak(self.library))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(run: Run, clock: Stopwatch) -> None:
    """Put the stopwatch around the parts of a run's step."""
    decoder = unwrap(run.scorer).model.get_decoder()

    def load(*args: Any) -> Iterator[Any]:
        for plan, batches in loading(*args):
            pull = clock.around("data", partial(next, batches))
            yield LoadedStep(plan, (pull() for _ in plan.micro_batches))

    def step(*args: Any) -> Any:
        result = stepping(*args)
        clock.end_step()
        return result

    loading, stepping = loop.load_steps, clock.around("everything else", loop.optimizer_step)
    loop.load_steps, loop.optimizer_step = load, step
    stepping_module.score_batch = clock.around("loss and metrics", stepping_module.score_batch)
    run.engine.backward = clock.around("backward: layers", run.engine.backward)  # type: ignore[method-assign]
    run.engine.step = clock.around("clipping and optimizer", run.engine.step)  # type: ignore[method-assign]
    run.reference.per_token_logps = clock.around("reference", run.reference.per_token_logps)  # type: ignore[method-assign]
    decoder.forward = clock.around("forward: layers", decoder.forward)
    patch.token_logps = clock.around("forward: head", patch.token_logps)
    for node, phase in ((CpuPairAttention, "attention"), (_TokenLogps, "head")):
        node.backward = staticmethod(clock.around(f"backward: {phase}", node.backward))
    CpuPairAttention.forward = staticmethod(clock.around("forward: attention", CpuPairAttention.forward))


def main() -> None:
    """Profile a short run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument("--micro_batch", type=int, help="pairs a forward pass (default: the batch)")
    parser.add_argument("--reference", choices=("cache", "live"), default="cache")
    parser.add_argument("--matmul", choices=MATMULS, default="auto", help="library for products in fp32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", help="directory of a causal language model (default: MiniMind's 26M, random)")
    args = parser.parse_args()
    micro_batch = args.micro_batch or args.batch
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINIMIND_DPO_CACHE"] = str(Path(scratch, "cache"))
        model = args.model or save_model(minimind_shape(), Path(scratch, "model"))
        lengths = mix_lengths(args.mix, args.batch * (args.steps + 1))
        vocabulary = vocabulary_of(model)
        word_tokenizer(vocabulary).save_pretrained(Path(scratch, "tokenizer"))
        config = make_config(
            {
                "model_name_or_path": model,
                "tokenizer_name_or_path": str(Path(scratch, "tokenizer")),
                "train_data": [write_pairs(Path(scratch, "pairs.jsonl"), lengths, vocabulary)],
                "output_dir": str(Path(scratch, "run")),
                "max_length": MAX_LENGTH[args.mix],
                "max_steps": args.steps + 1,
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": args.batch // micro_batch,
                "reference": args.reference,
                "matmul": args.matmul,
                "shuffle": False,
                "save_steps": 0,
            }
        )
        with StopRequest() as stop:
            run = build_run(config, start_engine(config), None, stop)
            clock = Stopwatch(run.state.identity["matmul"])
            watch(run, clock)
            loop.train(run, RunLog(None))
    _print(clock, run, args.batch)


def vocabulary_of(model: str) -> int:
    """Token ids that a saved model knows."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).vocab_size


def _print(clock: Stopwatch, run: Run, batch: int) -> None:
    steps = clock.steps[1:]
    seconds = {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in PHASES}
    total = sum(seconds.values())
    print(f"\n| phase | seconds a step | share |\n|{'---|' * 3}")
    for phase, value in seconds.items():
        print(f"| {phase} | {value:.4f} | {value / total:.1%} |")
    print(f"| all | {total:.4f} | |\n")
    parameters = sum(weight.numel() for weight in unwrap(run.scorer).parameters())
    tokens = run.train_data.tokens.reshape(-1, batch).sum(axis=1)[1:]
    rate = statistics.median(
        6 * parameters * int(count) / (sum(step.values()) - step.get("reference", 0.0)) / 1e9
        for count, step in zip(tokens, steps, strict=True)
    )
    peak = max(statistics.median(rates[size] for rates in clock.peaks) for size in clock.peaks[0])
    print(
        f"{batch} pairs of {tokens.mean() / batch:.0f} tokens a step, {parameters / 1e6:.1f}M parameters: "
        f"{total / batch:.3f} s a pair, {rate:.0f} GFLOP/s (policy), {rate / peak:.0%} of {clock.library}'s {peak:.0f}"
    )


if __name__ == "__main__":
    main()
