"""What guarding a run costs: the share of a start and of a step that goes into checks of files, data and numbers.

    python -m benchmarks.guards [--pairs 2000] [--steps 40]

The demo's model on pairs of real lengths, in one process. A first run fills the caches; a second one, with all of them
to be verified, is watched: every function that only guards has a clock around it. The start ends with the first step.
Shares are of one run, so other programs on the machine slow both parts alike.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tokenizing import DEMO_TOKENIZER, rows
from minimind_dpo.config import make_config
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.demo.run import ASSETS

_AT_START = (
    "data.cache:checksum",  # of the token cache
    "reference.stored:is_whole",  # of the reference's
    "training.setup:check_fits",
    "training.setup:check_loss",
    "training.setup:check_identity",
)
_AT_STEPS = (
    "objective.sums:_health_sums",
    "training.health:HealthWatch.take",
    "training.visibility:UpdateWatch.look",
    "reference.stored:LogpsFile.is_intact",  # of a pair that is read
    "training.numbers:_answer",
)


def main() -> None:
    """Run twice and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINIMIND_DPO_CACHE"] = str(Path(scratch, "cache"))
        data = Path(scratch, "pairs.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(args.pairs, tokenizer)), "utf-8")
        settings = {
            "model_name_or_path": str(next(ASSETS.glob("*.pth"))),
            "tokenizer_name_or_path": str(DEMO_TOKENIZER),
            "train_data": str(data),
            "reference": "cache",
            "max_steps": args.steps,
            "save_steps": 0,
        }
        _train(settings | {"output_dir": f"{scratch}/first"})
        spent, start, steps = _watched(settings | {"output_dir": f"{scratch}/second"})
    for title, names, total in (("start", _AT_START, start), ("steps", _AT_STEPS, steps)):
        print(f"{title}: {total:.3f} s, guards {100 * sum(spent[name] for name in names) / total:.2f} %")
        for name in names:
            print(f"    {name:<40}{1000 * spent[name]:>9.2f} ms")


def _train(settings: dict[str, Any]) -> None:
    from minimind_dpo.train import run  # late: a child of the watched run

    assert run(make_config(settings)) == 0


def _watched(settings: dict[str, Any]) -> tuple[Counter[str], float, float]:
    """Seconds in each guard, of the start, and of all steps."""
    spent: Counter[str] = Counter()
    for name in (*_AT_START, *_AT_STEPS):
        _watch(name, spent)
    loop: Any = importlib.import_module("minimind_dpo.training.loop")
    honest, marks = loop.optimizer_step, []

    def marked(*values: Any) -> Any:
        marks.append(time.perf_counter())
        return honest(*values)

    loop.optimizer_step = marked
    begin = time.perf_counter()
    _train(settings)
    return spent, marks[0] - begin, (marks[-1] - marks[0]) * len(marks) / (len(marks) - 1)


def _watch(name: str, spent: Counter[str]) -> None:
    """Put a clock around a function, or a method, where it is called."""
    module, _, attribute = name.partition(":")
    owner: Any = importlib.import_module(f"minimind_dpo.{module}")
    *outer, attribute = attribute.split(".")
    for part in outer:
        owner = getattr(owner, part)
    honest: Callable[..., Any] = getattr(owner, attribute)

    def timed(*values: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        try:
            return honest(*values, **more)
        finally:
            spent[name] += time.perf_counter() - begin

    setattr(owner, attribute, timed)


if __name__ == "__main__":
    sys.exit(main())
