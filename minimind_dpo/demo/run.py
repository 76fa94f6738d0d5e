"""`minimind-dpo demo`: replies before, DPO through the ordinary training entry, replies after, a report."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.config import TrainConfig, make_config
from minimind_dpo.demo.task import judge
from minimind_dpo.evaluation.text import beside
from minimind_dpo.files import write_text
from minimind_dpo.report.page import write_report
from minimind_dpo.train import run

ASSETS = Path(__file__).parent / "assets"
DEMO_NAME = "minimind-dpo demo"
SHOWN = 10  # replies printed in the terminal; the report has all of them


def run_demo(argv: list[str]) -> int:
    """Train the embedded model on the embedded pairs and show what changed; the exit code of the training run.

    Leaves an ordinary run directory, and in it `replies.jsonl`: the greedy replies to all held-out prompts before
    and after, judged by the task's rule.
    """
    parser = argparse.ArgumentParser(prog="minimind-dpo demo", description="Train the embedded demo on the CPU.")
    parser.add_argument("--output_dir", default="runs/demo", help="the run directory (default: runs/demo)")
    parser.add_argument("--max_steps", type=int, help="optimizer steps (default: all of the demo)")
    options = parser.parse_args(argv)
    import torch  # late: it takes seconds, which --help need not wait for

    # late for the same reason
    from minimind_dpo.demo.replies import speak
    from minimind_dpo.engine.console import quiet_libraries

    started = time.monotonic()
    quiet_libraries()
    if "OMP_NUM_THREADS" not in os.environ:  # so small a model loses by sharing its work, most of all on a busy machine
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    output_dir = Path(options.output_dir)
    config = demo_config(output_dir, options.max_steps)
    prompts = heldout_prompts()
    _clear_former_demo(output_dir)
    print(f"A tiny MiniMind that stays a butler even when it is asked for a pirate.\nIts replies to {len(prompts)} "
          "prompts that no training sees, before ...", flush=True)  # fmt: skip
    before = speak(config.model_name_or_path, str(config.tokenizer_name_or_path), prompts)
    code = run(config)
    if code != 0:
        return code
    after = speak(str(output_dir), str(config.tokenizer_name_or_path), prompts)
    replies = [
        {"prompt": prompt, "before": old, "after": new, "before_ok": judge(prompt, old), "after_ok": judge(prompt, new)}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    write_text(output_dir / "replies.jsonl", "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies))
    report = write_report(output_dir)
    print(side_by_side(replies[:SHOWN], shutil.get_terminal_size((110, 40)).columns))
    print(summary_lines(replies, json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))))
    print(f"everything took {time.monotonic() - started:.0f} s\nreport: {report}")
    return code


def _clear_former_demo(output_dir: Path) -> None:
    """Remove what an earlier demo left; another run's directory is left alone (training then refuses it)."""
    former = output_dir / "config.yaml"
    if former.is_file() and yaml.safe_load(former.read_text("utf-8")).get("run_name") == DEMO_NAME:
        shutil.rmtree(output_dir)


def demo_config(output_dir: Path, max_steps: int | None = None) -> TrainConfig:
    """The training configuration of the demo: `assets/demo.yaml` and the paths of the assets."""
    settings = yaml.safe_load((ASSETS / "demo.yaml").read_text(encoding="utf-8"))
    (weights,) = ASSETS.glob("*.pth")
    settings |= {
        "model_name_or_path": str(weights),
        "tokenizer_name_or_path": str(ASSETS / "tokenizer"),
        "train_data": [str(ASSETS / "train.jsonl")],
        "eval_data": [str(ASSETS / "heldout.jsonl")],
        "output_dir": str(output_dir),
        "run_name": DEMO_NAME,
    }
    return make_config(settings | ({} if max_steps is None else {"max_steps": max_steps}))


def heldout_prompts() -> list[str]:
    """The prompts of the held-out pairs, none of which any training has seen."""
    lines = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["chosen"][0]["content"] for line in lines]


def side_by_side(replies: Iterable[dict[str, Any]], width: int) -> str:
    """Prompts with both replies next to each other, each in a column of half the terminal's width."""
    lines = []
    for reply in replies:
        lines += ["", *textwrap.wrap(reply["prompt"], max(width, 60))]
        told = [f"{'✓' if reply[f'{when}_ok'] else '✗'} {when}: {reply[when]}" for when in ("before", "after")]
        lines += beside(told, width)
    return "\n".join(lines)


def summary_lines(replies: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The demo's two figures: replies that keep the rule, pairs that the model itself puts in the right order."""
    right = [sum(reply[key] for reply in replies) / len(replies) for key in ("before_ok", "after_ok")]
    before, after = (summary[key]["eval_logps/accuracies"] for key in ("eval_before", "eval_after"))
    return (
        f"\non {len(replies)} prompts it never trained on         before    after\n"
        f"  replies right in content and manner    {right[0]:6.1%}   {right[1]:6.1%}\n"
        f"  pairs whose chosen reply is likelier   {before:6.1%}   {after:6.1%}"
    )
