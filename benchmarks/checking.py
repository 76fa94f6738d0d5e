"""What `minimind-dpo data check` costs, beside tokenizing the same rows, and whether it finds what was planted in them.

    python -m benchmarks.checking [--tokenizer DIR] [--sizes 10000 100000 1000000] [--share 1.0] [--planted 20]

Rows have the lengths of real pairs (`benchmarks/tokenizing.py`); from 10,000 on the same ones come again with a number
of their own. In each file some rows of each kind of fault are planted: what is found must be these and no others.
Both commands run in processes of their own, one after the other, with an empty cache. CPU seconds are those of all
processes; memory is what the main one holds at its peak beyond what it holds with a tokenizer loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.tokenizing import DEMO_TOKENIZER, rows, seconds

_BASES = 10_000
_MAX_LENGTH = 2048  # cuts none of the rows that are not meant to be cut
_REASONS = (
    "malformed_row",
    "identical_sides",
    "empty_answer",
    "prompt_differs",
    "double_bos",
    "no_completion_token",
    "identical_after_truncation",
    "duplicate_pair",
    "contradictory_pair",
    "leak_into_eval",
)
_MARK = "@NUMBER@"


def lines(count: int, tokenizer: Any, share: float) -> Iterator[str]:
    """Rows as JSON lines, no two alike, and no two sides: answers of a word or two would meet by chance."""
    bases = []
    wanted = min(count, _BASES)
    differing = (row for row in rows(2 * wanted, tokenizer, share=share) if row["chosen"] != row["rejected"])
    for row in islice(differing, wanted):
        for side in row.values():
            side[0] = side[0] | {"content": f"{side[0]['content']} {_MARK}"}
        bases.append(json.dumps(row))
    for number, line in enumerate(islice(cycle(bases), count)):
        yield line.replace(_MARK, str(number))


def plant(path: Path, held: Path, each: int, bos: str) -> dict[str, set[str]]:
    """Replaces lines of a file by faulty ones, and writes evaluation data to leak into; the places of each reason."""
    text = path.read_text("utf-8").splitlines()
    rng = random.Random(0)
    # the first half of the file stays as it is: what is copied comes before its copies
    at = iter(rng.sample(range(len(text) // 2, len(text)), each * len(_REASONS)))
    copied = iter(rng.sample(range(len(text) // 2), 2 * each))
    planted: dict[str, set[str]] = {reason: set() for reason in _REASONS}
    leaked = []
    for reason in _REASONS:
        for _ in range(each):
            number = next(at)
            row = json.loads(text[next(copied)] if reason in ("duplicate_pair", "contradictory_pair") else text[number])
            if reason == "leak_into_eval":
                leaked.append(text[number])
            text[number] = spoil(row, reason, bos)
            planted[reason].add(f"{path}:{number + 1}")
    path.write_text("\n".join(text) + "\n", "utf-8")
    held.write_text("\n".join(leaked) + "\n", "utf-8")
    return planted


def spoil(row: dict[str, Any], reason: str, bos: str) -> str:
    """A row with a fault, as a line."""
    chosen, rejected = row["chosen"], row["rejected"]
    long = {"role": "user", "content": "question " * _MAX_LENGTH}
    if reason == "malformed_row":
        return json.dumps(row)[:-1]
    if reason == "identical_sides":
        row["rejected"] = chosen
    elif reason == "empty_answer":
        chosen[-1]["content"] = " "
    elif reason == "prompt_differs":
        rejected[-2]["content"] += "!"
    elif reason == "double_bos":
        chosen[-1]["content"] = bos + chosen[-1]["content"]
    elif reason == "no_completion_token":
        row.update(chosen=[long, chosen[-1]], rejected=[long, rejected[-1]])
    elif reason == "identical_after_truncation":
        before = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}, long]
        row.update(chosen=[*before, chosen[-1]], rejected=[*before, rejected[-1]])
    elif reason == "contradictory_pair":
        row.update(chosen=rejected, rejected=chosen)
    return json.dumps(row)


def measure_once(way: str, file: str, scratch: str, name: str) -> None:
    """Prints seconds and memory of one way in this process."""
    from minimind_dpo.data.chat import load_tokenizer
    from minimind_dpo.data.check import run_check
    from minimind_dpo.data.tokenized import tokenize_files

    os.environ["MINIMIND_DPO_CACHE"] = scratch
    tokenizer = load_tokenizer(name)
    tokenizer(["warm"])
    before, spent = peak(), cpu_seconds()
    flags = ["--data", file, "--eval_data", f"{scratch}/held.jsonl", "--tokenizer", name, "--json"]
    flags += ["--completion_mask", "all_assistant"]
    ways = {
        "check": lambda: run_check([*flags, "--max_length", str(_MAX_LENGTH), "--ledger", f"{scratch}/ledger.jsonl"]),
        "tokenize": lambda: tokenize_files(
            file, tokenizer, max_length=_MAX_LENGTH, completion_mask="all_assistant", on_bad_row="drop"
        ),
    }
    taken = seconds(ways[way])
    print("\n" + json.dumps({"seconds": taken, "cpu": cpu_seconds() - spent, "mib": peak() - before}))


def cpu_seconds() -> float:
    """What this process has used, and those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak() -> float:
    """The most memory that this process has held, MiB.

    The kernel's own mark of it: getrusage counts in what the process held that started this one.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measured(way: str, file: Path, scratch: Path, name: str) -> dict[str, float]:
    """`measure_once` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.checking", "--once", way, str(file), str(scratch), "--tokenizer", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def verdict(ledger: Path, planted: dict[str, set[str]]) -> str:
    """Whether the findings, truncation aside, are those planted."""
    found: dict[str, set[str]] = {}
    for line in ledger.read_text("utf-8").splitlines():
        finding = json.loads(line)
        if finding["reason"] != "truncated":
            found.setdefault(finding["reason"], set()).add(finding["place"])
    missed = sum(len(planted[reason] - found.get(reason, set())) for reason in planted)
    wrong = sum(len(places - planted.get(reason, set())) for reason, places in found.items())
    return f"{sum(map(len, planted.values()))} planted, {missed} missed, {wrong} false"


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(DEMO_TOKENIZER), help="directory; default: the demo's")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="numbers of rows")
    parser.add_argument("--share", type=float, default=1.0, help="of the real lengths")
    parser.add_argument("--planted", type=int, default=20, help="rows of each kind of fault")
    parser.add_argument("--once", nargs=3, metavar=("WAY", "FILE", "SCRATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        measure_once(*options.once, options.tokenizer)
        return
    from minimind_dpo.data.chat import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    print("| rows | check: s | CPU s | MiB | tokenize: s | CPU s | MiB | ratio of s | of CPU s | findings |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as directory:
            scratch = Path(directory)
            file = scratch / "rows.jsonl"
            file.write_text("".join(f"{line}\n" for line in lines(size, tokenizer, options.share)), "utf-8")
            planted = plant(file, scratch / "held.jsonl", options.planted, tokenizer.bos_token)
            check, tokenize = (measured(way, file, scratch, options.tokenizer) for way in ("check", "tokenize"))
            cells = [f"{way[key]:.1f}" for way in (check, tokenize) for key in ("seconds", "cpu", "mib")]
            cells += [f"{check[key] / tokenize[key]:.2f}" for key in ("seconds", "cpu")]
            cells.append(verdict(scratch / "ledger.jsonl", planted))
            print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
