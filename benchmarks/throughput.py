"""Seconds a pair of a DPO step, ours beside TRL, the naive step and MiniMind's script, taking turns in one run.

    python benchmarks/throughput.py [--mix chat|long_prompt|long_answer] [--batch 8] [--minimind DIR]

All contestants (`benchmarks/peers.py`) train on the same pairs from the same fp32 weights, each in a process of its own
with all cores, one at a time. In each of the `--rounds` rounds everyone makes the same `--steps` optimizer steps over
pairs of that round. The `--warm_up` steps before are not timed: a process that meets its longest batch so far gets
fresh memory, which a long run seldom does. Neither is building everything, TRL's precomputing or the filling of our
cache. Figures are medians over rounds, ratios medians of the rounds' ratios. `first epoch` is `ours_cached` plus
`ours_fill`.

Effective GFLOP/s: 6 x parameters x real tokens / seconds for a policy pass, plus 2 x for a reference pass. Parameters:
all of the model's, a tied embedding once. Real tokens: inputs of the packed layout, without padding, the prefix that
both sides share once; so padding and repeated prompts are work without effect. `exact` counts the head's parameters
only for positions whose next token counts, as nobody need run it elsewhere. The machine's peak is that of torch.mm in
fp32, the best size's median, measured in the same rounds. Memory is a process's peak resident memory (VmHWM), all it
did from its start on, over its resident memory once its libraries were imported (VmRSS).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoConfig

from benchmarks.peers import SLOW, contest, import_stack
from benchmarks.targets import check_targets, median_ratio
from benchmarks.workers import MIB, Window, Worker, WorkerFailed
from benchmarks.workloads import (
    MAX_LENGTH,
    MIXES,
    Job,
    PairLengths,
    minimind_shape,
    mix_lengths,
    parameter_counts,
    save_model,
    word_tokenizer,
    write_pairs,
)
from minimind_dpo.engine.cpu import available_cores
from minimind_dpo.models.fast.products import product

CONTESTANTS = (
    "ours_cached",
    "ours_fill",
    "ours_live",
    "trl",
    "trl_live",
    "trl_mb1",
    "trl_mb1_live",
    "trl_grouped",
    "trl_grouped_live",
    "naive",
)  # of the default; those in bf16 are asked for by name
FIRST_EPOCH = ("ours_cached", "ours_fill")
MATRIX_SIZES = (1024, 2048, 3072)
LOSS_TOLERANCE = 1e-5  # relative


def matrix_peak(library: str = "torch") -> dict[int, float]:
    """GFLOP/s of square fp32 matrix products of a library now, by size."""
    multiply = product if library == "onednn" else torch.mm
    rates = {}
    for size in MATRIX_SIZES:
        left, right = torch.randn(size, size), torch.randn(size, size)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            multiply(left, right)
            seconds.append(time.perf_counter() - began)
        rates[size] = 2 * size**3 / statistics.median(seconds) / 1e9
    return rates


def make_job(options: argparse.Namespace, scratch: Path) -> tuple[Job, list[PairLengths]]:
    """Write model, tokenizer and pairs."""
    windows = (options.warm_up, *[options.steps] * options.rounds)
    lengths = mix_lengths(options.mix, sum(windows) * options.batch, options.seed)
    model = options.model or save_model(minimind_shape(), scratch / "model")
    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    word_tokenizer(vocab_size).save_pretrained(scratch / "tokenizer")
    return Job(
        model=model,
        tokenizer=str(scratch / "tokenizer"),
        scratch=str(scratch),
        pairs=write_pairs(scratch / "pairs.jsonl", lengths, vocab_size, options.seed),
        batch=options.batch,
        micro_batch=options.micro_batch or min(options.batch, 4),
        max_length=MAX_LENGTH[options.mix],
        windows=windows,
        threads=options.threads,
        loss_type=options.loss_type or ("sigmoid_norm" if options.minimind else "sigmoid"),
        learning_rate=options.learning_rate,
        minimind=options.minimind,
    ), lengths


def measure(names: list[str], job: Job) -> tuple[dict[str, list[Window]], float]:
    """Windows of every contestant, the warm-up first, and the machine's peak in GFLOP/s."""
    workers: list[Worker] = []
    try:
        for name in names:
            began = time.perf_counter()
            log = Path(job.scratch) / f"{name}.log"
            workers.append(Worker(name, contest, partial(import_stack, name), job, log, job.windows[0]))
            print(f"{name}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return take_turns(workers, job)
    finally:
        for worker in workers:
            worker.close()


def take_turns(workers: list[Worker], job: Job) -> tuple[dict[str, list[Window]], float]:
    """All rounds; every other one in reverse, since what ran before leaves caches and heat."""
    results = {worker.name: [worker.warm_up] for worker in workers}
    peaks: dict[int, list[float]] = {size: [] for size in MATRIX_SIZES}
    for number, steps in enumerate(job.windows[1:]):
        for size, rate in matrix_peak().items():
            peaks[size].append(rate)
        for worker in workers if number % 2 == 0 else reversed(workers):
            results[worker.name].append(worker.run(1 if worker.name in SLOW else steps))
        print(f"round {number + 1} of {len(job.windows) - 1} done", file=sys.stderr, flush=True)
    return results, max(statistics.median(rates) for rates in peaks.values())


def seconds_a_pair(results: dict[str, list[Window]], batch: int) -> dict[str, list[float]]:
    """Of every contestant in each round, the first epoch with its filling pass among them."""
    seconds = {
        name: [window.seconds / len(window.losses) / batch for window in windows[1:]]
        for name, windows in results.items()
    }
    if seconds.keys() >= set(FIRST_EPOCH):
        seconds["first epoch"] = [sum(parts) for parts in zip(*map(seconds.__getitem__, FIRST_EPOCH), strict=True)]
    return seconds


def passes(name: str) -> int:
    """Multiples of parameters x tokens that a contestant's step is worth."""
    if name == "ours_fill":
        return 2
    return 8 if "live" in name or name in (*SLOW, "first epoch") else 6


def real_work(lengths: list[PairLengths], job: Job, parameters: int, head: int) -> tuple[list[float], list[float]]:
    """Parameters x real tokens a pair in each round; the same with the head's only where the next token counts."""
    plain, exact, start = [], [], job.windows[0] * job.batch
    for steps in job.windows[1:]:
        pairs = lengths[start : start + steps * job.batch]
        start += len(pairs)
        tokens, counted = (sum(getattr(pair, kind) for pair in pairs) / len(pairs) for kind in ("packed", "counted"))
        plain.append(parameters * tokens)
        exact.append((parameters - head) * tokens + head * counted)
    return plain, exact


def loss_differences(results: dict[str, list[Window]]) -> dict[str, float]:
    """Largest relative difference of each contestant's losses from ours, step by step.

    A grouped contestant steps through other pairs; only the means of its windows could be compared, and are not. One in
    bf16 differs by its rounding.
    """
    losses = {
        name: [loss for window in windows for loss in window.losses]
        for name, windows in results.items()
        if "grouped" not in name and "_bf16" not in name and name != "ours_fill"
    }
    first = losses.get("ours_cached") or next(iter(losses.values()))
    return {
        name: max(abs(own - other) / abs(own) for own, other in zip(first, values, strict=False))
        for name, values in losses.items()
    }


def summarise(results: dict[str, list[Window]], peak: float, lengths: list[PairLengths], job: Job) -> dict[str, Any]:
    """All figures, as they go into the JSON file."""
    seconds = seconds_a_pair(results, job.batch)
    parameters, head = parameter_counts(job.model)
    work, exact = real_work(lengths, job, parameters, head)
    timed = lengths[job.windows[0] * job.batch :]

    def rates(name: str, amounts: list[float]) -> float:
        mean = statistics.mean(amounts)  # of a slow contestant, which does not see all of a round's pairs
        return statistics.median(
            passes(name) * (mean if name in SLOW else amount) / spent / 1e9
            for amount, spent in zip(amounts, seconds[name], strict=True)
        )

    def peak_mib(name: str) -> float:
        parts = FIRST_EPOCH if name == "first epoch" else (name,)
        return max(results[part][-1].peak_bytes for part in parts) / MIB

    rows = {
        name: {
            "seconds_a_pair": statistics.median(seconds[name]),
            "gflops": rates(name, work),
            "exact_gflops": rates(name, exact),
            "peak_mib": peak_mib(name),
        }
        for name in seconds
    }
    return {
        "matrix_peak_gflops": peak,
        "parameters": parameters,
        "head_parameters": head,
        "real_tokens_a_pair": statistics.mean(pair.packed for pair in timed),
        "contestants": rows,
        "seconds_a_pair_by_round": seconds,
        "loss_differences": loss_differences(results),
        "losses": {
            name: [loss for window in windows for loss in window.losses]
            for name, windows in results.items()
            if name != "ours_fill"
        },
    }


def show(summary: dict[str, Any], options: argparse.Namespace, job: Job) -> None:
    """Print the tables."""
    print(
        f"\n{options.mix} mix, {job.batch} pairs an optimizer step, micro-batch {job.micro_batch}, "
        f"{summary['real_tokens_a_pair']:.0f} real tokens a pair, {summary['parameters']:,} parameters "
        f"({summary['head_parameters']:,} of the head), {job.threads} threads, "
        f"{options.rounds} rounds of {options.steps} steps"
    )
    peak = summary["matrix_peak_gflops"]
    print(f"torch.mm peak: {peak:.0f} GFLOP/s\n")
    print("| | seconds a pair | x ours_cached | effective GFLOP/s | of the peak | exact, of it | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    by_round = summary["seconds_a_pair_by_round"]
    for name, row in summary["contestants"].items():
        ratio = median_ratio(by_round, name, "ours_cached")
        print(
            f"| {name} | {row['seconds_a_pair']:.3f} | {ratio:.2f} | {row['gflops']:.0f} "
            f"| {row['gflops'] / peak:.0%} | {row['exact_gflops'] / peak:.0%} | {row['peak_mib']:.0f} |"
        )
    ours = summary["losses"].get("ours_cached", [math.nan])
    print(f"\nlosses, step by step, against ours (which moved by {max(abs(loss - ours[0]) for loss in ours):.1e}):")
    for name, difference in summary["loss_differences"].items():
        print(f"  {name}: {difference:.1e} {'agrees' if difference <= LOSS_TOLERANCE else 'DIFFERS'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--batch", type=int, default=4, help="pairs an optimizer step")
    parser.add_argument("--micro_batch", type=int, help="pairs a micro-batch (default: the batch, at most 4)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=4, help="optimizer steps before the first round")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="names, see benchmarks/peers.py")
    parser.add_argument(
        "--minimind",
        help="directory of a MiniMind checkout whose model has --model's weights (generation 2 for the default)",
    )
    parser.add_argument("--model", help="directory of another model (default: MiniMind's 26M shape, random weights)")
    parser.add_argument(
        "--loss_type",
        choices=("sigmoid", "sigmoid_norm"),
        help="default: sigmoid; beside MiniMind's script sigmoid_norm, its own",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print, and check what the project promises."""
    options = parse()
    names = list(dict.fromkeys([*options.contestants.split(","), *(["minimind"] if options.minimind else [])]))
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_HOME"] = directory
        job, lengths = make_job(options, Path(directory))
        try:
            results, peak = measure(names, job)
        except WorkerFailed as failed:
            sys.exit("{} failed:\n{}".format(*failed.args))
        summary = summarise(results, peak, lengths, job)
        show(summary, options, job)
    check_targets(summary, options.mix, options.batch, default_model=options.model is None)
    if options.json:
        Path(options.json).write_text(json.dumps(vars(options) | summary, indent=1), "utf-8")


if __name__ == "__main__":
    main()
