"""How fast pairs become tokens: the plain way and ours, side by side, alternating, on the same pairs.

    python -m benchmarks.tokenizing [--tokenizer DIR] [--pairs 4000] [--rounds 5] [--sizes 1000 10000 100000]

The plain way renders both sides of rows that are parsed already with `apply_chat_template`, and tokenizes the texts in
batches, on one core; it finds no masks. Ours starts from the lines of a file and ends with ids and masks of checked
pairs. The pairs' lengths are those of real ones (chat_pair_lengths.json); their words are drawn by frequency, so that
they look like natural text to a BPE tokenizer, in conversations of one to five turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import minimind_dpo.demo

LENGTHS = Path(__file__).parent / "chat_pair_lengths.json"
DEMO_TOKENIZER = Path(minimind_dpo.demo.__path__[0]) / "assets" / "tokenizer"
COMMON = """
the to you and a of i that is it in do what for are how they not be have can on with your don't people or if
me like about would my know get this so there some think was want as but just should more when make good at
has from who them one will he out could any because something really time need i'm it's their other way then
go no sure help an say we did tell find someone mean might why all very been had where right much things try
see she well use also work really
"""
SYLLABLES = "ba con der el fi gra hom in ja ker lo men nor op pre qui re sta ter un vi wor ex zen ment ly ing".split()
BATCH = 128
MAX_LENGTH = 1024


def vocabulary(rng: random.Random, size: int = 12_000) -> tuple[list[str], list[float]]:
    """Words, common ones first, and their cumulative frequencies (Zipf's law)."""
    made = ("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(size))
    words = list(dict.fromkeys([*COMMON.split(), *made]))
    return words, list(accumulate(1 / (rank + 2.7) for rank in range(len(words))))


def rows(count: int, tokenizer: Any, seed: int = 0, share: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows with the message lists of pairs whose token lengths follow the real mix, or are that `share` of them."""
    if not LENGTHS.exists():
        raise SystemExit(f"{LENGTHS}: not found; it holds the token lengths of real pairs")
    lengths = json.loads(LENGTHS.read_text("utf-8"))["pairs"]
    rng = random.Random(seed)
    words, frequencies = vocabulary(rng)
    sample = rng.choices(words, cum_weights=frequencies, k=5000)
    rate = len(sample) / len(tokenizer(" ".join(sample), add_special_tokens=False)["input_ids"])

    def text(tokens: float) -> str:
        said = rng.choices(words, cum_weights=frequencies, k=max(1, round(tokens * rate * share)))
        return " ".join(word + rng.choice(",.?!") if rng.random() < 0.1 else word for word in said).capitalize()

    for _ in range(count):
        prompt, chosen, rejected, _ = rng.choice(lengths)
        turns = rng.choice((1, 1, 3, 3, 5))
        messages = [
            {"role": "assistant" if turn % 2 else "user", "content": text((prompt - 14) / turns - 5)}
            for turn in range(turns)
        ]
        yield {
            side: [*messages, {"role": "assistant", "content": text(size - 2)}]
            for side, size in (("chosen", chosen), ("rejected", rejected))
        }


def plain_way(pairs: list[dict[str, Any]], tokenizer: Any) -> int:
    """Both sides rendered and tokenized as whole texts; the number of tokens."""
    tokens = 0
    for start in range(0, len(pairs), BATCH):
        texts = [
            tokenizer.apply_chat_template(pair[side], tokenize=False)
            for pair in pairs[start : start + BATCH]
            for side in ("chosen", "rejected")
        ]
        tokens += sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return tokens


def our_way(file: str, tokenizer: Any, processes: int | None) -> float:
    """The seconds that `tokenize_files` takes, with an empty cache."""
    from minimind_dpo.data.tokenized import tokenize_files

    with tempfile.TemporaryDirectory() as directory:
        os.environ["MINIMIND_DPO_CACHE"] = directory
        return seconds(
            lambda: tokenize_files(
                file, tokenizer, max_length=MAX_LENGTH, completion_mask="all_assistant", on_bad_row="auto",
                num_proc=processes,
            )
        )  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    """How long a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(file: str, tokenizer: Any, rounds: int) -> None:
    """Prints pairs a second of every way, medians over alternating rounds, and ratios."""
    pairs = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    tokens = plain_way(pairs, tokenizer)
    our_way(file, tokenizer, 1)
    print(f"{len(pairs)} pairs, {tokens / len(pairs):.0f} tokens a pair, {rounds} rounds")
    ways: dict[str, Callable[[], float]] = {
        "plain, one core": lambda: seconds(lambda: plain_way(pairs, tokenizer)),
        "ours, one core": lambda: our_way(file, tokenizer, 1),
        "ours, all cores": lambda: our_way(file, tokenizer, None),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            if name == "ours, one core" and hasattr(os, "sched_setaffinity"):
                cores = os.sched_getaffinity(0)
                os.sched_setaffinity(0, {min(cores)})
                taken[name].append(way())
                os.sched_setaffinity(0, cores)
            else:
                taken[name].append(way())
    base = statistics.median(taken["plain, one core"])
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:16} {len(pairs) / median:7.0f} pairs/s   {base / median:5.2f} times the plain way")


def measure_once(file: str, directory: str, tokenizer: str) -> None:
    """Prints seconds and peak memory of one run in this process: what `scaling` starts, with and without a cache."""
    from minimind_dpo.data.tokenized import load_tokenizer, tokenize_files

    os.environ["MINIMIND_DPO_CACHE"] = directory
    loaded = load_tokenizer(tokenizer)
    taken = seconds(
        lambda: tokenize_files(
            file, loaded, max_length=MAX_LENGTH, completion_mask="all_assistant", on_bad_row="auto"
        )
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": taken, "mib": peak}))


def scaling(sizes: list[int], tokenizer: Any, name: str, directory: Path) -> None:
    """Prints time and peak memory against the number of pairs, first without and then from the cache."""
    print("\n| pairs | tokenize, s | peak, MiB | from the cache, s | peak, MiB |\n|---|---|---|---|---|")
    for size in sizes:
        file = write(directory / f"{size}.jsonl", size, tokenizer)
        cells = []
        for _ in range(2):
            command = [sys.executable, "-m", "benchmarks.tokenizing", "--once", file, str(directory / f"cache{size}")]
            printed = subprocess.run([*command, "--tokenizer", name], capture_output=True, text=True, check=True).stdout
            measured = json.loads(printed.splitlines()[-1])
            cells += [f"{measured['seconds']:.2f}", f"{measured['mib']:.0f}"]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


def write(path: Path, count: int, tokenizer: Any) -> str:
    """Writes rows, one a line; the path."""
    with open(path, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows(count, tokenizer))
    return str(path)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(DEMO_TOKENIZER), help="directory; default: the demo's")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs to compare the ways on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 100_000], help="of the table")
    parser.add_argument("--once", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        measure_once(*options.once, options.tokenizer)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("minimind_dpo").setLevel(logging.ERROR)
    from minimind_dpo.data.tokenized import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        compare(write(Path(directory) / "pairs.jsonl", options.pairs, tokenizer), tokenizer, options.rounds)
        scaling(options.sizes, tokenizer, options.tokenizer, Path(directory))


if __name__ == "__main__":
    main()
