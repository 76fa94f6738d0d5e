"""Peak memory of one optimizer step on one pair, by sequence length and vocabulary, ours beside TRL.

    python benchmarks/memory.py [--lengths 1024 2048 4096 8192] [--vocab_sizes 6400 151936] [--prompt_share 0.5]

Each cell is a process of its own that trains one step in fp32 on one pair, both of whose sides have the given number of
tokens. Its peak is Linux's VmHWM over VmRSS once the libraries were imported, so it counts everything: the model read,
weights, gradients, Adam's moments, activations, logits. The body is small (2 layers, hidden size 256), so that the head
dominates. `beyond states` is that peak less the model's states, 16 bytes a parameter (20 with a live reference): what
activations, logits and buffers took, and nearly all of what a large vocabulary adds to it is the head's.

`ours_cached` reads reference log-probabilities that a process before it computed; that one's peak is `ours_fill`'s.
`trl` precomputes them in the same process, as it has to. A process that asks for more than `--limit_gib` of address
space fails and is shown so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.peers import contest, import_stack
from benchmarks.workers import MIB, Worker, WorkerFailed
from benchmarks.workloads import Job, PairLengths, parameter_counts, save_model, tiny_shape, word_tokenizer, write_pairs
from minimind_dpo.engine.cpu import available_cores

CONTESTANTS = ("ours_fill", "ours_cached", "trl")


def prepare(name: str, limit_bytes: int) -> None:
    """Import a contestant's stack in a process that cannot take the whole machine."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    import_stack(name)


def make_job(directory: Path, vocab_size: int, length: int, options: argparse.Namespace) -> Job:
    """The files of one cell; those of a vocabulary are written once."""
    model, tokenizer = directory / f"model{vocab_size}", directory / f"tokenizer{vocab_size}"
    if not model.exists():
        save_model(tiny_shape(vocab_size), model)
        word_tokenizer(vocab_size).save_pretrained(tokenizer)
    prompt = round(length * options.prompt_share)
    pair = PairLengths(prompt, length - prompt, length - prompt, shared=prompt)
    return Job(
        model=str(model),
        tokenizer=str(tokenizer),
        scratch=str(directory),
        batch=1,
        micro_batch=1,
        pairs=write_pairs(directory / f"pairs{vocab_size}_{length}.jsonl", [pair], vocab_size),
        max_length=length,
        windows=(1,),
        threads=options.threads,
    )


def measure(name: str, job: Job, limit_bytes: int) -> float | None:
    """Peak MiB of one cell; None if it asked for more than the limit."""
    kind = "ours_cached" if name == "ours_fill" else name  # the first of ours fills the cache for the second
    try:
        worker = Worker(
            name,
            partial(_contest_as, kind),
            partial(prepare, kind, limit_bytes),
            job,
            Path(job.scratch) / f"{name}.log",
        )
    except WorkerFailed as failed:
        if "allocate" not in failed.args[1] and "MemoryError" not in failed.args[1]:
            sys.exit("{} failed:\n{}".format(*failed.args))
        return None
    worker.close()
    return worker.warm_up.peak_bytes / MIB


def _contest_as(kind: str, name: str, job: Job, gate: object) -> None:
    contest(kind, job, gate)  # type: ignore[arg-type]


def show(
    peaks: dict[tuple[int, int, str], float | None], states: dict[int, float], options: argparse.Namespace
) -> None:
    """Print a table a vocabulary."""
    for vocab_size in options.vocab_sizes:
        print(f"\nvocabulary {vocab_size:,}, model states {states[vocab_size]:.0f} MiB: peak MiB (beyond states)")
        print("| tokens a side | " + " | ".join(options.contestants) + " |")
        print("|---|" + "---|" * len(options.contestants))
        for length in options.lengths:
            cells = []
            for name in options.contestants:
                peak = peaks[vocab_size, length, name]
                own = states[vocab_size] * (20 / 16 if name.endswith("_live") else 1)
                cells.append(f"over {options.limit_gib:.0f} GiB" if peak is None else f"{peak:.0f} ({peak - own:.0f})")
            print(f"| {length:,} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure every cell in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[6400, 151_936])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), help="also ours_live, trl_live, naive")
    parser.add_argument("--prompt_share", type=float, default=0.5, help="share of a side that both have in common")
    parser.add_argument("--limit_gib", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", metavar="FILE", help="write all figures there, in MiB")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    peaks: dict[tuple[int, int, str], float | None] = {}
    states = {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_HOME"] = directory
        for vocab_size in options.vocab_sizes:
            for length in options.lengths:
                job = make_job(Path(directory), vocab_size, length, options)
                for name in options.contestants:
                    peaks[vocab_size, length, name] = measure(name, job, int(options.limit_gib * 2**30))
                    print(vocab_size, length, name, peaks[vocab_size, length, name], file=sys.stderr, flush=True)
            states[vocab_size] = 16 * parameter_counts(job.model)[0] / MIB
    show(peaks, states, options)
    if options.json:
        cells = [
            {"vocab_size": vocab, "length": length, "contestant": name, "peak_mib": peak}
            for (vocab, length, name), peak in peaks.items()
        ]
        Path(options.json).write_text(json.dumps({"states_mib": states, "cells": cells}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
